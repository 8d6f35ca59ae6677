//! What an attention task does with finished splits: merge them in order, store them for another task, write the output.
//! O(vectors x head size) per split. Merging here or in a later task gives the same bits, because both see the same splits
//! in the same order.
#![expect(unsafe_code, reason = "kernels on scratch memory and disjoint parts of the output")]

use super::layout::PartialLayout;
use super::softmax::{SplitResult, merge_split};
use super::tile::Work;
use crate::element::Element;
use crate::kv_format::Stored;
use crate::simd::{Simd, store_element, store_element_partial};

impl<S: Simd, T: Element, K: Stored> Work<'_, S, T, K> {
    /// The finished state of the current split, its denominators summed into the first lane.
    ///
    /// # Safety
    /// As [`Self::execute`], once per split.
    #[inline(always)]
    unsafe fn current(&self, vector: usize) -> SplitResult {
        // SAFETY: the layout places every array.
        unsafe {
            let denominators = self.at(self.layout.denominators + vector * S::LANES).cast::<f32>();
            *denominators = self.simd.reduce_add(self.simd.load(denominators));
            SplitResult {
                maximum: self.at(self.layout.maxima + vector).cast(),
                denominator: denominators,
                sums: self.at(self.layout.sums + vector * self.layout.padded_dim).cast(),
            }
        }
    }

    /// # Safety
    /// As [`Self::execute`], once per split.
    #[inline(always)]
    pub(super) unsafe fn merge_current(&self) {
        let layout = PartialLayout::new(self.input.plan.shape().region.head_dim);
        for vector in 0..self.vectors() {
            // SAFETY: totals and state are different arrays of the layout.
            unsafe {
                let total = layout.result(self.at(self.layout.totals), vector);
                merge_split(self.simd, total, self.current(vector), self.layout.padded_dim, self.scale);
            }
        }
    }

    /// # Safety
    /// As [`Self::execute`]; `partials` holds `first + vectors` results.
    #[inline(always)]
    pub(super) unsafe fn merge(&self, partials: *mut u32, first: usize) {
        let layout = PartialLayout::new(self.input.plan.shape().region.head_dim);
        for vector in 0..self.vectors() {
            // SAFETY: the caller's promise.
            unsafe {
                let total = layout.result(self.at(self.layout.totals), vector);
                let next = layout.result(partials, first + vector);
                merge_split(self.simd, total, next, self.layout.padded_dim, self.scale);
            }
        }
    }

    /// # Safety
    /// As [`Self::execute`], once per split; `partials` holds `first + vectors` results.
    #[inline(always)]
    pub(super) unsafe fn store_split(&self, partials: *mut u32, first: usize) {
        let layout = PartialLayout::new(self.input.plan.shape().region.head_dim);
        for vector in 0..self.vectors() {
            // SAFETY: the caller's promise.
            unsafe {
                let (target, source) = (layout.result(partials, first + vector), self.current(vector));
                *target.maximum = *source.maximum;
                *target.denominator = *source.denominator;
                core::ptr::copy_nonoverlapping(source.sums, target.sums, self.layout.padded_dim);
            }
        }
    }

    /// Divides the totals by their denominators and writes them as elements.
    ///
    /// # Safety
    /// As [`Self::execute`].
    #[inline(always)]
    pub(super) unsafe fn write_output(&self) {
        let head_dim = self.input.plan.shape().region.head_dim;
        let layout = PartialLayout::new(head_dim);
        for vector in 0..self.vectors() {
            // SAFETY: each (row, head) belongs to one writing task; totals hold `padded_dim` sums.
            unsafe {
                let total = layout.result(self.at(self.layout.totals), vector);
                let output = self.input.output.part(self.query_offset(vector), head_dim).as_mut_ptr();
                let inverse = self.simd.splat(1.0 / *total.denominator);
                for dim in (0..head_dim).step_by(S::LANES) {
                    let value = self.simd.mul(self.simd.load(total.sums.add(dim)), inverse);
                    if dim + S::LANES <= head_dim {
                        store_element(self.simd, output.add(dim), value);
                    } else {
                        store_element_partial(self.simd, output.add(dim), value, head_dim - dim);
                    }
                }
            }
        }
    }
}
