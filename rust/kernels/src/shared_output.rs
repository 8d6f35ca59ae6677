//! An output array that several threads fill at once, each its own part.
//! Rust cannot express "disjoint by construction" over a shared loop; this is the one place that says it.
//! Every access names its range and is checked against the length, so a wrong partition can race but never leaves the array.
#![expect(unsafe_code, reason = "disjoint mutable parts of one array on several threads")]

use core::marker::PhantomData;

/// A mutable slice that may be shared with the threads of a pool.
pub(crate) struct SharedOutput<'a, T> {
    start: *mut T,
    length: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `part`, whose callers promise disjoint ranges; T itself may move between threads.
unsafe impl<T: Send> Sync for SharedOutput<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedOutput<'_, T> {}

impl<'a, T> SharedOutput<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), borrow: PhantomData }
    }

    /// The elements `from..from + length`.
    ///
    /// # Safety
    /// No other part alive at the same time may overlap this one.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the disjointness is the caller's promise")]
    pub(crate) unsafe fn part(&self, from: usize, length: usize) -> &mut [T] {
        assert!(from <= self.length && length <= self.length - from, "part {from}+{length} of {}", self.length);
        // SAFETY: in bounds by the assertion, disjoint by the caller's promise, alive by the borrow.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(from), length) }
    }

    /// Writes elements `stride` apart, the first to `from`.
    ///
    /// # Safety
    /// Nobody else uses these elements at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write_strided(&self, from: usize, stride: usize, values: &[T])
    where
        T: Copy,
    {
        let Some(last) = values.len().checked_sub(1) else { return };
        assert!(from + last * stride < self.length, "{from} and {last} steps of {stride} in {}", self.length);
        for (index, &value) in values.iter().enumerate() {
            // SAFETY: in bounds by the assertion, the caller's alone.
            unsafe { self.start.add(from + index * stride).write(value) };
        }
    }
}
