//! Sums and gathers among the ranks of one host, through memory that their processes share.
//! Each rank copies its part in, says so in a word of its own, waits for the others' words and reads all parts in the
//! order of ranks, so that every rank computes the same bits. Two halves take turns: a rank that writes the next one has
//! seen everybody arrive at this one, so it overwrites only what all have read. One copy and `ranks` reads per element.
//! A rank that does not come within the time limit is named. Knows nothing of models, steps or why a rank is late.
#![expect(unsafe_code, reason = "memory that other processes write")]

use crate::element::Element;
use crate::rank_mapping::{LINE_BYTES, Mapping, wait_until, wake_all};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use crate::rank_mapping::RankError;

/// Most ranks of one host.
pub const MAX_RANKS: usize = 64;
/// One rank's end of the shared memory.
#[derive(Debug)]
pub struct RankMemory {
    memory: Mapping,
    rank: usize,
    ranks: usize,
    room_bytes: usize,
    /// Number of this exchange; wraps.
    exchange: u32,
    max_wait: Duration,
}

impl RankMemory {
    /// Size of the memory for `ranks` ranks with room for parts of `room_bytes`.
    pub const fn bytes_for(ranks: usize, room_bytes: usize) -> usize {
        ranks * LINE_BYTES * 2 + 2 * ranks * room_bytes
    }

    /// Maps a file of zeros of [`Self::bytes_for`] bytes that every rank opens.
    ///
    /// # Errors
    /// Impossible numbers, a file of another size, or one that cannot be mapped.
    pub fn open(
        path: &Path,
        rank: usize,
        ranks: usize,
        room_bytes: usize,
        max_wait: Duration,
    ) -> Result<Self, RankError> {
        if ranks == 0 || ranks > MAX_RANKS {
            return Err(RankError::Shape { what: "the number of ranks", given: ranks, limit: MAX_RANKS });
        }
        if rank >= ranks {
            return Err(RankError::Shape { what: "the rank", given: rank, limit: ranks - 1 });
        }
        if room_bytes == 0 || !room_bytes.is_multiple_of(LINE_BYTES) {
            return Err(RankError::Shape {
                what: "the room, in units of 128 bytes,",
                given: room_bytes,
                limit: 1 << 30,
            });
        }
        let memory = Mapping::open(path, Self::bytes_for(ranks, room_bytes))?;
        Ok(Self { memory, rank, ranks, room_bytes, exchange: 0, max_wait })
    }

    /// Replaces `values` by the sum over all ranks, added in the order of ranks in f32 and rounded once.
    ///
    /// # Errors
    /// A rank that does not come.
    pub fn sum<T: Element>(&mut self, values: &mut [T]) -> Result<(), RankError> {
        for values in values.chunks_mut(self.room_bytes / size_of::<T>()) {
            self.write_part(values);
            self.meet()?;
            let first = self.part::<T>(0, values.len());
            if let [second] = self.others::<T>(values.len()).as_slice() {
                for ((value, &a), &b) in values.iter_mut().zip(first).zip(*second) {
                    *value = T::from_f32(a.to_f32() + b.to_f32());
                }
                continue;
            }
            let others = self.others::<T>(values.len());
            for (index, value) in values.iter_mut().enumerate() {
                let sum = others.iter().fold(first[index].to_f32(), |sum, part| sum + part[index].to_f32());
                *value = T::from_f32(sum);
            }
        }
        Ok(())
    }

    /// Gathers columns: rank r holds `[rows, widths[r]]`, and every rank gets `[rows, sum of widths]`.
    ///
    /// # Errors
    /// Lengths that do not fit the widths, rows wider than the room, or a rank that does not come.
    pub fn gather_columns<T: Element>(
        &mut self,
        own: &[T],
        widths: &[usize],
        output: &mut [T],
    ) -> Result<(), RankError> {
        let shape = |what, given, limit| RankError::Shape { what, given, limit };
        if widths.len() != self.ranks {
            return Err(shape("the number of widths", widths.len(), self.ranks));
        }
        let (width, total) = (widths[self.rank], widths.iter().sum::<usize>());
        let widest = widths.iter().copied().max().unwrap_or(0);
        let rows = own.len().checked_div(width).unwrap_or(0);
        if rows * width != own.len() || rows * total != output.len() {
            return Err(shape("the length of the output", output.len(), rows * total));
        }
        let rows_at_once = (self.room_bytes / size_of::<T>()).checked_div(widest).unwrap_or(0);
        if rows_at_once == 0 {
            return Err(shape("the width of a part", widest, self.room_bytes / size_of::<T>()));
        }
        for (own, output) in own.chunks(rows_at_once * width).zip(output.chunks_mut(rows_at_once * total)) {
            self.write_part(own);
            self.meet()?;
            let mut column = 0;
            for (rank, &width) in widths.iter().enumerate() {
                let part = self.part::<T>(rank, output.len() / total * width);
                for (to, from) in output.chunks_mut(total).zip(part.chunks(width)) {
                    to[column..column + width].copy_from_slice(from);
                }
                column += width;
            }
        }
        Ok(())
    }

    /// Returns when every rank has come as far.
    ///
    /// # Errors
    /// A rank that does not come.
    pub fn meet(&mut self) -> Result<(), RankError> {
        let number = self.exchange;
        let mine = self.word(self.rank);
        mine.store(number.wrapping_add(1), Ordering::SeqCst);
        if (0..self.ranks).any(|rank| self.sleeps(rank).load(Ordering::SeqCst) != 0) {
            wake_all(mine);
        }
        for rank in 0..self.ranks {
            self.wait_for(rank, number)?;
        }
        self.exchange = number.wrapping_add(1);
        Ok(())
    }

    fn wait_for(&self, rank: usize, number: u32) -> Result<(), RankError> {
        let arrived = |seen: u32| seen.wrapping_sub(number).cast_signed() > 0;
        wait_until(self.word(rank), self.sleeps(self.rank), arrived, self.max_wait)
            .map_err(|waited| RankError::Absent { rank, waited })
    }

    fn write_part<T: Element>(&mut self, values: &[T]) {
        let room = self.room(self.rank).cast::<T>();
        // SAFETY: the room holds `room_bytes` and callers cut to that; nobody reads this half until this rank has said
        // that it is written, and everybody has read what was in it, see the head of this file.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), room, values.len()) };
    }

    fn others<T: Element>(&self, elements: usize) -> Vec<&[T]> {
        (1..self.ranks).map(|rank| self.part(rank, elements)).collect()
    }

    /// What a rank wrote for the exchange that has just been met.
    fn part<T: Element>(&self, rank: usize, elements: usize) -> &[T] {
        // After `meet` the number is one ahead.
        let half = self.exchange.wrapping_sub(1) & 1;
        assert!(elements * size_of::<T>() <= self.room_bytes, "a part is larger than its room");
        let start = self.room_of(rank, half as usize).cast::<T>();
        // SAFETY: written and published by its rank, and not written again before this rank has met the next exchange,
        // which takes `&mut self`. Elements have no invalid bits; rooms are aligned to 128 bytes.
        unsafe { std::slice::from_raw_parts(start, elements) }
    }

    fn room(&self, rank: usize) -> *mut u8 {
        self.room_of(rank, (self.exchange & 1) as usize)
    }

    fn room_of(&self, rank: usize, half: usize) -> *mut u8 {
        let offset = self.ranks * LINE_BYTES * 2 + (half * self.ranks + rank) * self.room_bytes;
        self.memory.room(offset, self.room_bytes)
    }

    /// How many exchanges a rank has come to.
    fn word(&self, rank: usize) -> &AtomicU32 {
        self.memory.line(2 * rank)
    }

    /// Whether a rank sleeps, or is about to.
    fn sleeps(&self, rank: usize) -> &AtomicU32 {
        self.memory.line(2 * rank + 1)
    }
}

#[cfg(test)]
mod tests;
