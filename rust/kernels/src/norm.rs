//! Root mean square normalisation of rows, with an optional residual addition before it (Zhang and Sennrich 2019).
//! Sums are in f32; for bf16 the roundings are those of Hugging Face's Llama: the residual sum is rounded, the row is
//! normalised in f32 and rounded, then multiplied by the weight and rounded again. O(rows x hidden), each row read once
//! from memory. A row's bits depend on that row alone. Knows nothing of layers.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers, and a source of rows")]

use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::row_source::RowSource;
use crate::rows::RowChunks;
use crate::shared_output::SharedOutput;
use crate::simd::{Simd, load_element, load_element_partial, round_to_element, store_element, store_element_partial};

/// `output = input / rms(input) * weight` for rows of `weight.len()` elements.
///
/// `input` and `output` are `rows x hidden`; `rms` is the root of the mean square plus `epsilon`.
///
/// # Errors
/// A length that is no multiple of the weight's or not the input's.
pub fn rms_norm<T: Element>(
    pool: &Pool,
    level: Level,
    input: &[T],
    weight: &[T],
    epsilon: f32,
    output: &mut [T],
) -> Result<(), KernelError> {
    let (hidden, rows) = row_shape("input", input.len(), weight.len())?;
    require_length("output", input.len(), output.len())?;
    let output = SharedOutput::new(output);
    let chunks = RowChunks::new(rows, 2 * hidden * size_of::<T>());
    pool.parallel_for(chunks.count(), |chunk| {
        for row in chunks.rows(chunk) {
            // SAFETY: every row belongs to one chunk and is written once.
            let output = unsafe { output.part(row * hidden, hidden) };
            let input = &input[row * hidden..][..hidden];
            level.run(NormRow { input, weight, epsilon, output });
        }
    })
}

/// `residual += input; output = residual / rms(residual) * weight`, all `rows x hidden`.
///
/// # Errors
/// As [`rms_norm`].
pub fn add_rms_norm<T: Element>(
    pool: &Pool,
    level: Level,
    input: &[T],
    residual: &mut [T],
    weight: &[T],
    epsilon: f32,
    output: &mut [T],
) -> Result<(), KernelError> {
    let (hidden, rows) = row_shape("input", input.len(), weight.len())?;
    require_length("residual", input.len(), residual.len())?;
    require_length("output", input.len(), output.len())?;
    let output = SharedOutput::new(output);
    let residual = SharedOutput::new(residual);
    let chunks = RowChunks::new(rows, 3 * hidden * size_of::<T>());
    pool.parallel_for(chunks.count(), |chunk| {
        for row in chunks.rows(chunk) {
            // SAFETY: every row belongs to one chunk and is written once, in both arrays.
            let (residual, output) =
                unsafe { (residual.part(row * hidden, hidden), output.part(row * hidden, hidden)) };
            level.run(AddRow { input: &input[row * hidden..][..hidden], residual });
            level.run(NormRow { input: residual, weight, epsilon, output });
        }
    })
}

/// The rows of a residual stream after their norm, for a product: `normed(residual + delta)`, as [`add_rms_norm`] and
/// [`rms_norm`] give them. Asking for a row adds to the stream.
pub struct NormedRows<'a, T> {
    delta: Option<&'a [T]>,
    residual: SharedOutput<'a, T>,
    rows: usize,
    weight: &'a [T],
    epsilon: f32,
}

impl<'a, T: Element> NormedRows<'a, T> {
    /// Of a stream `rows x hidden`, to which `delta` is added first where there is one.
    ///
    /// # Errors
    /// A length that is no multiple of the weight's or not the stream's.
    pub fn new(
        delta: Option<&'a [T]>,
        residual: &'a mut [T],
        weight: &'a [T],
        epsilon: f32,
    ) -> Result<Self, KernelError> {
        let (_, rows) = row_shape("residual", residual.len(), weight.len())?;
        if let Some(delta) = delta {
            require_length("delta", residual.len(), delta.len())?;
        }
        Ok(Self { delta, residual: SharedOutput::new(residual), rows, weight, epsilon })
    }
}

impl<T: Element> RowSource<T> for NormedRows<'_, T> {
    fn elements(&self) -> usize {
        self.rows * self.weight.len()
    }

    unsafe fn row<'a>(&'a self, level: Level, row: usize, room: &'a mut [T]) -> &'a [T] {
        let hidden = self.weight.len();
        // SAFETY: the caller asks for each row once.
        let residual = unsafe { self.residual.part(row * hidden, hidden) };
        if let Some(delta) = self.delta {
            level.run(AddRow { input: &delta[row * hidden..][..hidden], residual });
        }
        level.run(NormRow { input: residual, weight: self.weight, epsilon: self.epsilon, output: room });
        room
    }
}

fn row_shape(argument: &'static str, elements: usize, hidden: usize) -> Result<(usize, usize), KernelError> {
    if hidden == 0 {
        return Err(KernelError::Unsupported { argument: "weight", given: 0, rule: "at least one element" });
    }
    let rows = elements / hidden;
    require_length(argument, rows * hidden, elements)?;
    Ok((hidden, rows))
}

struct AddRow<'a, T> {
    input: &'a [T],
    residual: &'a mut [T],
}

impl<T: Element> Kernel for AddRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let hidden = self.input.len();
        let (input, residual) = (self.input.as_ptr(), self.residual.as_mut_ptr());
        let whole = hidden - hidden % S::LANES;
        let rest = hidden - whole;
        // SAFETY: both rows hold `hidden` elements; the loop covers `whole` of them, the partial access the rest.
        unsafe {
            let mut at = 0;
            while at < whole {
                let sum = simd.add(load_element(simd, residual.add(at)), load_element(simd, input.add(at)));
                store_element(simd, residual.add(at), sum);
                at += S::LANES;
            }
            if rest > 0 {
                let sum = simd.add(
                    load_element_partial(simd, residual.add(whole), rest),
                    load_element_partial(simd, input.add(whole), rest),
                );
                store_element_partial(simd, residual.add(whole), sum, rest);
            }
        }
    }
}

/// Normalises one row.
pub(crate) struct NormRow<'a, T> {
    pub(crate) input: &'a [T],
    pub(crate) weight: &'a [T],
    pub(crate) epsilon: f32,
    pub(crate) output: &'a mut [T],
}

impl<T: Element> Kernel for NormRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.weight.len() == self.input.len() && self.output.len() == self.input.len());
        // SAFETY: the three rows have the same length.
        unsafe {
            norm_row(
                simd,
                self.input.as_ptr(),
                self.weight.as_ptr(),
                self.epsilon,
                self.output.as_mut_ptr(),
                self.input.len(),
            );
        }
    }
}

/// Normalises `length` elements; `output` may be `input`.
///
/// # Safety
/// The three pointers must be valid for `length` elements.
#[inline(always)]
pub(crate) unsafe fn norm_row<S: Simd, T: Element>(
    simd: S,
    input: *const T,
    weight: *const T,
    epsilon: f32,
    output: *mut T,
    length: usize,
) {
    let whole = length - length % S::LANES;
    let rest = length - whole;
    // SAFETY: accesses cover `whole` elements in vectors and `rest` more in a partial one.
    unsafe {
        let sum = sum_of_squares(simd, input, length);
        let scale = simd.splat(1.0 / (sum / length as f32 + epsilon).sqrt());
        let mut at = 0;
        while at < whole {
            let normal = round_to_element::<S, T>(simd, simd.mul(load_element(simd, input.add(at)), scale));
            store_element(simd, output.add(at), simd.mul(normal, load_element(simd, weight.add(at))));
            at += S::LANES;
        }
        if rest > 0 {
            let value = load_element_partial(simd, input.add(whole), rest);
            let normal = round_to_element::<S, T>(simd, simd.mul(value, scale));
            let product = simd.mul(normal, load_element_partial(simd, weight.add(whole), rest));
            store_element_partial(simd, output.add(whole), product, rest);
        }
    }
}

/// # Safety
/// `input` must be valid for `length` elements.
#[inline(always)]
unsafe fn sum_of_squares<S: Simd, T: Element>(simd: S, input: *const T, length: usize) -> f32 {
    // Four independent sums hide the latency of the addition.
    let mut sums = [simd.splat(0.0); 4];
    let step = 4 * S::LANES;
    let mut at = 0;
    // SAFETY: `at` plus the access never passes `length`.
    unsafe {
        while at + step <= length {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let x = load_element(simd, input.add(at + lane * S::LANES));
                *sum = simd.mul_add(x, x, *sum);
            }
            at += step;
        }
        while at < length {
            let count = (length - at).min(S::LANES);
            let x = load_element_partial(simd, input.add(at), count);
            sums[0] = simd.mul_add(x, x, sums[0]);
            at += count;
        }
    }
    simd.reduce_add(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
}
