//! The gated activation of Llama-style MLPs: `silu(gate) * up` on the fused output of the gate and up projections.
//! Computed in f32 and rounded once at the end. For gates in [-87, inf) the f32 result is within 4 units in the last
//! place of the exact product (2 of the exponential, 2 of division and products); below -87, where |silu| < 2e-36, it is
//! off by at most 1e-35 absolutely. The bits are the same at every level. O(rows x ffn), each element read once.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers, and a source of rows")]

use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::row_source::RowSource;
use crate::rows::RowChunks;
use crate::shared_output::SharedOutput;
use crate::simd::{Simd, exact, load_element, load_element_partial, store_element, store_element_partial};

/// `output[r][i] = silu(gate_up[r][i]) * gate_up[r][ffn + i]` with `silu(x) = x / (1 + e^-x)`.
///
/// `gate_up` is `rows x 2 ffn`, `output` is `rows x ffn`.
///
/// # Errors
/// A length that is no whole number of rows.
pub fn silu_and_multiply<T: Element>(
    pool: &Pool,
    level: Level,
    gate_up: &[T],
    ffn: usize,
    output: &mut [T],
) -> Result<(), KernelError> {
    if ffn == 0 {
        return Err(KernelError::Unsupported { argument: "ffn", given: 0, rule: "at least 1" });
    }
    let rows = output.len() / ffn;
    require_length("output", rows * ffn, output.len())?;
    require_length("gate_up", rows * 2 * ffn, gate_up.len())?;
    let output = SharedOutput::new(output);
    let chunks = RowChunks::new(rows, 3 * ffn * size_of::<T>());
    pool.parallel_for(chunks.count(), |chunk| {
        for row in chunks.rows(chunk) {
            let (gate, up) = gate_up[row * 2 * ffn..][..2 * ffn].split_at(ffn);
            // SAFETY: every row belongs to one chunk and is written once.
            let output = unsafe { output.part(row * ffn, ffn) };
            level.run(SiluRow { gate, up, output });
        }
    })
}

/// Rows `silu(gate) * up` for a product, as [`silu_and_multiply`] gives them.
pub struct GatedRows<'a, T> {
    gate_up: &'a [T],
    ffn: usize,
}

impl<'a, T: Element> GatedRows<'a, T> {
    /// Of rows `gate, up`, `rows x 2 ffn`.
    ///
    /// # Errors
    /// A length that is no whole number of rows.
    pub fn new(gate_up: &'a [T], ffn: usize) -> Result<Self, KernelError> {
        if ffn == 0 {
            return Err(KernelError::Unsupported { argument: "ffn", given: 0, rule: "at least 1" });
        }
        require_length("gate_up", gate_up.len() / (2 * ffn) * 2 * ffn, gate_up.len())?;
        Ok(Self { gate_up, ffn })
    }
}

impl<T: Element> RowSource<T> for GatedRows<'_, T> {
    fn elements(&self) -> usize {
        self.gate_up.len() / 2
    }

    unsafe fn row<'a>(&'a self, level: Level, row: usize, room: &'a mut [T]) -> &'a [T] {
        let (gate, up) = self.gate_up[row * 2 * self.ffn..][..2 * self.ffn].split_at(self.ffn);
        level.run(SiluRow { gate, up, output: room });
        room
    }
}

struct SiluRow<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    output: &'a mut [T],
}

impl<T: Element> Kernel for SiluRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ffn = self.output.len();
        assert!(self.gate.len() == ffn && self.up.len() == ffn);
        let (gate, up, output) = (self.gate.as_ptr(), self.up.as_ptr(), self.output.as_mut_ptr());
        let whole = ffn - ffn % S::LANES;
        let rest = ffn - whole;
        // SAFETY: the three rows hold `ffn` elements; the loop covers `whole` of them, the partial access the rest.
        unsafe {
            let mut at = 0;
            while at < whole {
                let value = gated(simd, load_element(simd, gate.add(at)), load_element(simd, up.add(at)));
                store_element(simd, output.add(at), value);
                at += S::LANES;
            }
            if rest > 0 {
                let gate = load_element_partial(simd, gate.add(whole), rest);
                let value = gated(simd, gate, load_element_partial(simd, up.add(whole), rest));
                store_element_partial(simd, output.add(whole), value, rest);
            }
        }
    }
}

#[inline(always)]
fn gated<S: Simd>(simd: S, gate: S::F32, up: S::F32) -> S::F32 {
    let negated = simd.sub(simd.splat(0.0), gate);
    let denominator = simd.add(exact::exp(simd, negated), simd.splat(1.0));
    simd.mul(simd.div(gate, denominator), up)
}
