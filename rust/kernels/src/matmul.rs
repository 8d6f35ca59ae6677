//! Products of rows with packed weights: `output = input weights^T + bias`, for one row or thousands, from one layout.
//! Each output is one chain of multiply-adds in the order of its inputs (accumulated in f32, rounded once), so its bits
//! depend neither on the rows beside it nor on threads. Panels of weights are claimed in chunks; blocks of rows share a
//! panel while it is in the cache. `2 rows x outputs x inputs` operations, weights read once per 192 rows.
#![expect(unsafe_code, reason = "disjoint parts of the output and micro-kernels")]

mod micro;
mod packed;

pub use packed::{PackError, PackedWeights};

use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::simd::Simd;
use micro::PanelProduct;
use packed::PANEL;

/// Rows that share a panel before the next panel is read: their inputs stay in the second-level cache.
const ROW_BLOCK: usize = 192;
/// Weights of a chunk: claiming takes 50 ns, reading these 5 us.
const CHUNK_BYTES: usize = 128 << 10;

/// `output = input weights^T + bias` for rows of `weights.padded_inputs()` elements, of which those past `inputs` are
/// zero. `output` has rows of `weights.outputs()` elements, `bias` one such row.
///
/// # Errors
/// A length that is no whole number of rows.
pub fn multiply<T: Element>(
    pool: &Pool,
    level: Level,
    input: &[T],
    weights: &PackedWeights<T>,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<(), KernelError> {
    let (outputs, stride) = (weights.outputs(), weights.padded_inputs());
    let rows = input.len() / stride;
    require_length("input", rows * stride, input.len())?;
    require_length("output", rows * outputs, output.len())?;
    if let Some(bias) = bias {
        require_length("bias", outputs, bias.len())?;
    }
    let units = stride / PackedWeights::<T>::UNIT;
    let panels_per_chunk = (CHUNK_BYTES / (units * PANEL * 4)).max(1);
    let (row_blocks, panel_chunks) = (rows.div_ceil(ROW_BLOCK), weights.panels().div_ceil(panels_per_chunk));
    let target = Target(output.as_mut_ptr());
    pool.parallel_for(row_blocks * panel_chunks, |chunk| {
        let first_row = chunk / panel_chunks * ROW_BLOCK;
        let first_panel = chunk % panel_chunks * panels_per_chunk;
        for panel in first_panel..(first_panel + panels_per_chunk).min(weights.panels()) {
            let column = panel * PANEL;
            let product = PanelProduct {
                input: input[first_row * stride..].as_ptr(),
                input_stride: stride,
                rows: (rows - first_row).min(ROW_BLOCK),
                panel: weights.panel(panel).as_ptr().cast(),
                units,
                bias: bias.map_or(core::ptr::null(), |bias| bias[column..].as_ptr()),
                output: target.at(first_row * outputs + column),
                output_stride: outputs,
                outputs: (outputs - column).min(PANEL),
            };
            level.run(RunPanel(product));
        }
    })
}

/// The output's address, which the threads of a pool share.
#[derive(Clone, Copy)]
struct Target<T>(*mut T);

// SAFETY: every chunk writes rows and columns of its own.
unsafe impl<T: Send> Sync for Target<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Target<T> {}

impl<T> Target<T> {
    fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

struct RunPanel<T>(PanelProduct<T>);

impl<T: Element> Kernel for RunPanel<T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: lengths were checked in `multiply`, which gives every panel rows and columns of its own.
        unsafe { self.0.run(simd) }
    }
}
