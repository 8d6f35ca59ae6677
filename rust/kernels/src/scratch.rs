//! Cache-line aligned scratch memory that a thread keeps between kernels.
//! Unaligned scratch would make every 64-byte vector load touch two cache lines. Growing is O(size), reuse is O(1);
//! the contents are whatever the last user left, so kernels write before they read.
#![expect(unsafe_code, reason = "one buffer is lent as arrays of two types")]

use crate::element::Element;
use core::cell::RefCell;

/// One cache line; the alignment of the whole buffer follows from it.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; Line::WORDS]);

impl Line {
    const WORDS: usize = 16;
}

/// A growing buffer of 32-bit words that starts at a cache line.
#[derive(Default)]
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    pub(crate) const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    /// The buffer, made at least `words` long. New words are zero, others are left from earlier use.
    pub(crate) fn words(&mut self, words: usize) -> *mut u32 {
        let lines = words.div_ceil(Line::WORDS);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; Line::WORDS]));
        }
        self.lines.as_mut_ptr().cast()
    }
}

impl Scratch {
    /// A line of words and a row of elements, side by side, with whatever earlier use left in them.
    pub(crate) fn line_and_row<T: Element>(&mut self, words: usize, elements: usize) -> (&mut [u32], &mut [T]) {
        let row = line_rounded(words);
        let start = self.words(row + (elements * size_of::<T>()).div_ceil(4));
        // SAFETY: both lie in the buffer, which is borrowed as long as they are, and do not overlap; every bit pattern is an
        // element, and a cache line is aligned for it.
        unsafe {
            (
                core::slice::from_raw_parts_mut(start, words),
                core::slice::from_raw_parts_mut(start.add(row).cast(), elements),
            )
        }
    }
}

/// Words that keep the next part of a scratch buffer on a cache line.
pub(crate) const fn line_rounded(words: usize) -> usize {
    words.next_multiple_of(Line::WORDS)
}

thread_local! {
    static THREAD_SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// Lends this thread's scratch buffer to `user`.
///
/// Call it outside of a kernel: a closure is compiled for the baseline, however it is inlined.
pub(crate) fn with_thread_scratch<R>(user: impl FnOnce(&mut Scratch) -> R) -> R {
    THREAD_SCRATCH.with_borrow_mut(user)
}

#[cfg(test)]
mod tests {
    use super::Scratch;

    #[test]
    fn scratch_starts_at_a_cache_line_and_keeps_its_contents_while_it_is_long_enough() {
        let mut scratch = Scratch::new();
        for words in [1, 100, 5000, 7] {
            assert_eq!(scratch.words(words) as usize % 64, 0);
        }
        assert_eq!(scratch.words(5000), scratch.words(1));
    }
}
