//! Where a product takes its rows from: memory, or the step before it, which then makes each row in the cache of the
//! thread that packs it. So norms and activations are part of the product behind them: no pass over memory, no barrier
//! between threads, and the same bits, for a row is rounded as if it had been stored. It does not know formats or weights.
#![expect(unsafe_code, reason = "sources may write, and say what they need in return")]

use crate::dispatch::Level;
use crate::element::Element;

/// Rows of one width, each of which is asked for once.
pub trait RowSource<T: Element>: Sync {
    /// Rows times their width.
    fn elements(&self) -> usize;

    /// One row, made in `room` (of `room.len()` elements, the width) where it does not lie in memory.
    ///
    /// # Safety
    /// No row is asked for twice, by whichever threads.
    unsafe fn row<'a>(&'a self, level: Level, row: usize, room: &'a mut [T]) -> &'a [T];
}

/// Rows as they lie in memory.
impl<T: Element> RowSource<T> for [T] {
    fn elements(&self) -> usize {
        self.len()
    }

    unsafe fn row<'a>(&'a self, _: Level, row: usize, room: &'a mut [T]) -> &'a [T] {
        &self[row * room.len()..][..room.len()]
    }
}
