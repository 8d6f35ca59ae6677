//! Sums and gathers among the ranks of one host, through memory that their processes share.
//! Each rank copies its part in, says so in a word of its own, waits for the others' words and reads all parts in the
//! order of ranks, so that every rank computes the same bits. Two halves take turns: a rank that writes the next one has
//! seen everybody arrive at this one, so it overwrites only what all have read. One copy and `ranks` reads per element.
//! A rank that does not come within the time limit is named. Knows nothing of models, steps or why a rank is late.
#![expect(unsafe_code, reason = "memory that other processes write, and futexes")]

use crate::element::Element;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Most ranks of one host.
pub const MAX_RANKS: usize = 64;
/// A rank's words have lines of their own: one that all write would travel between cores with every poll.
const LINE_BYTES: usize = 128;
/// Polls before a rank sleeps: about 30 us, longer than ranks in step with each other ever wait for a part.
const SPINS: u32 = 1_000;
/// Longest sleep before the clock is looked at.
const NAP: Duration = Duration::from_millis(50);

/// Why an exchange was not finished. The memory is of no use afterwards.
#[derive(Debug)]
pub enum RankError {
    /// The memory cannot be had.
    Memory(std::io::Error),
    /// It has another size than this group needs.
    Size {
        /// Bytes that it has.
        given: u64,
        /// Bytes that it should have.
        needed: usize,
    },
    /// Numbers that make no sense.
    Shape {
        /// Which.
        what: &'static str,
        /// The value.
        given: usize,
        /// The limit.
        limit: usize,
    },
    /// A rank did not come.
    Absent {
        /// Which.
        rank: usize,
        /// How long it was waited for.
        waited: Duration,
    },
}

impl std::fmt::Display for RankError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory(error) => write!(out, "the memory that ranks share cannot be mapped: {error}"),
            Self::Size { given, needed } => {
                write!(out, "the memory that ranks share has {given} bytes, this group needs {needed}")
            }
            Self::Shape { what, given, limit } => write!(out, "{what} is {given}, the limit is {limit}"),
            Self::Absent { rank, waited } => {
                write!(out, "rank {rank} did not come to the exchange within {:.1} s", waited.as_secs_f64())
            }
        }
    }
}

impl std::error::Error for RankError {}

/// One rank's end of the shared memory.
#[derive(Debug)]
pub struct RankMemory {
    start: *mut u8,
    bytes: usize,
    rank: usize,
    ranks: usize,
    room_bytes: usize,
    /// Number of this exchange; wraps.
    exchange: u32,
    max_wait: Duration,
}

// SAFETY: the mapping belongs to this value and is unmapped by it alone; methods that write take `&mut self`.
unsafe impl Send for RankMemory {}

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
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(RankError::Memory)?;
        let needed = Self::bytes_for(ranks, room_bytes);
        let given = file.metadata().map_err(RankError::Memory)?.len();
        if given != needed as u64 {
            return Err(RankError::Size { given, needed });
        }
        // SAFETY: a new mapping of a file that is long enough; the address is chosen by the kernel.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                needed,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(RankError::Memory(std::io::Error::last_os_error()));
        }
        Ok(Self { start: start.cast(), bytes: needed, rank, ranks, room_bytes, exchange: 0, max_wait })
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
        let word = self.word(rank);
        let arrived = |seen: u32| seen.wrapping_sub(number).cast_signed() > 0;
        for _ in 0..SPINS {
            if arrived(word.load(Ordering::Acquire)) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let began = Instant::now();
        let sleeping = self.sleeps(self.rank);
        sleeping.store(1, Ordering::SeqCst);
        let outcome = loop {
            // Looked at after the flag was set: whoever stores later sees the flag, and the futex compares again.
            let seen = word.load(Ordering::SeqCst);
            if arrived(seen) {
                break Ok(());
            }
            if began.elapsed() >= self.max_wait {
                break Err(RankError::Absent { rank, waited: began.elapsed() });
            }
            sleep_while(word, seen);
        };
        sleeping.store(0, Ordering::SeqCst);
        outcome
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
        assert!(offset + self.room_bytes <= self.bytes, "a room lies inside the mapping");
        // SAFETY: inside the mapping, by the line above.
        unsafe { self.start.add(offset) }
    }

    /// How many exchanges a rank has come to.
    fn word(&self, rank: usize) -> &AtomicU32 {
        self.line(2 * rank)
    }

    /// Whether a rank sleeps, or is about to.
    fn sleeps(&self, rank: usize) -> &AtomicU32 {
        self.line(2 * rank + 1)
    }

    fn line(&self, index: usize) -> &AtomicU32 {
        assert!(index < 2 * self.ranks, "a line lies inside the head");
        // SAFETY: inside the mapping, by the line above.
        let line = unsafe { self.start.add(index * LINE_BYTES) };
        #[expect(clippy::cast_ptr_alignment, reason = "mappings are aligned to pages and lines to 128 bytes")]
        let word = line.cast::<AtomicU32>();
        // SAFETY: valid and aligned, and only ever used as an atomic.
        unsafe { &*word }
    }
}

impl Drop for RankMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `open`, which nothing refers to any more.
        let outcome = unsafe { libc::munmap(self.start.cast(), self.bytes) };
        assert!(outcome == 0 || std::thread::panicking(), "the mapping was ours");
    }
}

/// Until the word changes, somebody wakes it, or a nap is over.
fn sleep_while(word: &AtomicU32, seen: u32) {
    let nap = libc::timespec { tv_sec: 0, tv_nsec: libc::c_long::from(NAP.subsec_nanos()) };
    // SAFETY: the word outlives the call; every outcome, errors too, means that the caller looks again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const nap) };
}

fn wake_all(word: &AtomicU32) {
    // SAFETY: the word outlives the call, which touches nothing else.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

#[cfg(test)]
mod tests;
