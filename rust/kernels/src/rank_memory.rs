//! Sums, dealt rows and gathered words among the ranks of one host, through memory that their processes share.
//! Each rank copies its part in, says so in a word of its own, waits for the others' words and reads what is meant for it
//! in the order of ranks, so that every rank computes the same bits. Two halves take turns: a rank that writes the next
//! one has seen everybody arrive at this one, so it overwrites only what all have read. One copy per element that
//! another rank reads, and one read for each that does.
//! A rank that does not come within the time limit is named. Knows nothing of models, steps or why a rank is late.
#![expect(unsafe_code, reason = "memory that other processes write")]

use crate::element::Element;
use crate::mapping::{LINE_BYTES, Mapping};
use crate::rank_parts::{add_parts, place_columns};
use crate::rank_wait::{wait_until, wake_all};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use crate::rank_wait::RankError;

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
            self.write_part(0, values);
            self.meet()?;
            let parts: Vec<&[T]> = (0..self.ranks).map(|rank| self.part(rank, 0, values.len())).collect();
            add_parts(&parts, values);
        }
        Ok(())
    }

    /// Deals rows: rank r holds `[rows, widths[r]]`, and gets all columns, `[own, sum of widths]`, of the rows that are its
    /// own, `bounds[r]..bounds[r + 1]`. What a rank holds of a row goes to that row's rank and to no other.
    ///
    /// # Errors
    /// Lengths that do not fit widths and bounds, less room than there are ranks, or a rank that does not come.
    pub fn deal_rows<T: Element>(
        &mut self,
        own: &[T],
        widths: &[usize],
        bounds: &[usize],
        output: &mut [T],
    ) -> Result<(), RankError> {
        let (rows, rank) = (self.rows_of(bounds)?, self.rank);
        require("the number of widths", widths.len(), self.ranks)?;
        let (width, total) = (widths[rank], widths.iter().sum::<usize>());
        require("the length of what this rank holds", own.len(), rows * width)?;
        let dealt = |rank: usize| bounds[rank + 1] - bounds[rank];
        require("the length of the output", output.len(), dealt(rank) * total)?;
        let others = |rank: usize| (0..widths.len()).filter(move |&other| other != rank);
        // A message is what one rank holds of another's rows; a piece of every message goes at once.
        let piece = self.room_bytes / size_of::<T>() / (self.ranks - 1).max(1);
        if piece == 0 {
            return Err(RankError::Shape { what: "the number of ranks", given: self.ranks, limit: self.room_bytes });
        }
        let longest = (0..self.ranks).flat_map(|to| others(to).map(move |from| dealt(to) * widths[from]));
        let longest = longest.max().unwrap_or(0);
        for start in (0..longest).step_by(piece) {
            for to in others(rank) {
                let message = &own[bounds[to] * width..bounds[to + 1] * width];
                self.write_part(place_of(rank, to) * piece, clamped(message, start, piece));
            }
            self.meet()?;
            for from in others(rank) {
                let elements = (dealt(rank) * widths[from]).saturating_sub(start).min(piece);
                let part = self.part::<T>(from, place_of(from, rank) * piece, elements);
                let column = widths[..from].iter().sum();
                place_columns(part, start, widths[from], output, total, column);
            }
        }
        let column = widths[..rank].iter().sum();
        place_columns(&own[bounds[rank] * width..bounds[rank + 1] * width], 0, width, output, total, column);
        Ok(())
    }

    /// Every rank gets all words: rank r has filled `bounds[r]..bounds[r + 1]`, the others fill the rest.
    ///
    /// # Errors
    /// A length that does not fit the bounds, or a rank that does not come.
    pub fn gather_words(&mut self, words: &mut [u32], bounds: &[usize]) -> Result<(), RankError> {
        let total = self.rows_of(bounds)?;
        require("the number of words", words.len(), total)?;
        let piece = self.room_bytes / size_of::<u32>();
        let longest = bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        for start in (0..longest).step_by(piece) {
            self.write_part(0, clamped(&words[bounds[self.rank]..bounds[self.rank + 1]], start, piece));
            self.meet()?;
            for from in (0..self.ranks).filter(|&from| from != self.rank) {
                let theirs = &mut words[bounds[from]..bounds[from + 1]];
                let start = start.min(theirs.len());
                let theirs = &mut theirs[start..];
                let elements = theirs.len().min(piece);
                theirs[..elements].copy_from_slice(self.part::<u32>(from, 0, elements));
            }
        }
        Ok(())
    }

    /// What bounds divide among the ranks.
    fn rows_of(&self, bounds: &[usize]) -> Result<usize, RankError> {
        require("the number of bounds", bounds.len(), self.ranks + 1)?;
        require("the first bound", bounds[0], 0)?;
        if let Some(pair) = bounds.windows(2).find(|pair| pair[0] > pair[1]) {
            return Err(RankError::Shape { what: "a bound", given: pair[0], limit: pair[1] });
        }
        Ok(bounds[self.ranks])
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

    /// Writes from the `at`-th element of this rank's room on.
    fn write_part<T: Copy>(&mut self, at: usize, values: &[T]) {
        assert!((at + values.len()) * size_of::<T>() <= self.room_bytes, "a part is larger than its room");
        let room = self.room(self.rank).cast::<T>();
        // SAFETY: the room holds `room_bytes`, see above; nobody reads this half until this rank has said that it is
        // written, and everybody has read what was in it, see the head of this file.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), room.add(at), values.len()) };
    }

    /// What a rank wrote from its `at`-th element on, for the exchange that has just been met. `T` has no invalid bits.
    fn part<T: Copy>(&self, rank: usize, at: usize, elements: usize) -> &[T] {
        // After `meet` the number is one ahead.
        let half = self.exchange.wrapping_sub(1) & 1;
        assert!((at + elements) * size_of::<T>() <= self.room_bytes, "a part is larger than its room");
        let start = self.room_of(rank, half as usize).cast::<T>();
        // SAFETY: written and published by its rank, and not written again before this rank has met the next exchange,
        // which takes `&mut self`. Callers read elements and words, which have no invalid bits; rooms are aligned to 128
        // bytes.
        unsafe { std::slice::from_raw_parts(start.add(at), elements) }
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

/// Which of a rank's messages goes to another: it sends itself none.
fn place_of(from: usize, to: usize) -> usize {
    to - usize::from(to > from)
}

/// At most `length` values from `start` on, fewer or none where they end.
fn clamped<T>(values: &[T], start: usize, length: usize) -> &[T] {
    let start = start.min(values.len());
    &values[start..values.len().min(start + length)]
}

fn require(what: &'static str, given: usize, limit: usize) -> Result<(), RankError> {
    if given == limit { Ok(()) } else { Err(RankError::Shape { what, given, limit }) }
}

#[cfg(test)]
mod tests;
