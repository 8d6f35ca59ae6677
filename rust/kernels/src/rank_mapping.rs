//! Memory that the processes of ranks share, and how a rank waits for a word of it that another one writes.
//! A wait polls for as long as ranks in step with each other ever need, then sleeps on the word; who writes it wakes the
//! sleeper, whose flag tells that there is one. Waits are bounded. Knows nothing of what the words mean.
#![expect(unsafe_code, reason = "memory that other processes write, and futexes")]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A rank's words have lines of their own: one that all write would travel between cores with every poll.
pub(crate) const LINE_BYTES: usize = 128;
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

/// A file that is mapped as long as this value lives.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value and is unmapped by it alone; whoever writes through it holds it mutably.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps a file of exactly `needed` bytes.
    pub(crate) fn open(path: &Path, needed: usize) -> Result<Self, RankError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(RankError::Memory)?;
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
        Ok(Self { start: start.cast(), bytes: needed })
    }

    /// The word at the beginning of a line, which is only ever used as an atomic.
    pub(crate) fn line(&self, index: usize) -> &AtomicU32 {
        assert!((index + 1) * LINE_BYTES <= self.bytes, "a line lies inside the mapping");
        // SAFETY: inside the mapping, by the line above.
        let line = unsafe { self.start.add(index * LINE_BYTES) };
        #[expect(clippy::cast_ptr_alignment, reason = "mappings are aligned to pages and lines to 128 bytes")]
        let word = line.cast::<AtomicU32>();
        // SAFETY: valid and aligned, and only ever used as an atomic.
        unsafe { &*word }
    }

    /// A word of 64 bits, counted from the beginning, which is only ever used as an atomic.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= self.bytes, "a word lies inside the mapping");
        // SAFETY: inside the mapping, by the line above.
        let word = unsafe { self.start.add(index * 8) };
        #[expect(clippy::cast_ptr_alignment, reason = "mappings are aligned to pages and words to their size")]
        let word = word.cast::<AtomicU64>();
        // SAFETY: valid and aligned, and only ever used as an atomic.
        unsafe { &*word }
    }

    /// The address of `bytes` bytes at an offset, aligned to lines.
    pub(crate) fn room(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(offset.is_multiple_of(LINE_BYTES), "a room begins with a line");
        assert!(offset + bytes <= self.bytes, "a room lies inside the mapping");
        // SAFETY: inside the mapping, by the line above.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping of `open`, which nothing refers to any more.
        let outcome = unsafe { libc::munmap(self.start.cast(), self.bytes) };
        assert!(outcome == 0 || std::thread::panicking(), "the mapping was ours");
    }
}

/// Returns when the word satisfies `arrived`; else how long it was waited for. `sleeping` is set while the caller sleeps,
/// for whoever writes the word and has to wake it.
pub(crate) fn wait_until(
    word: &AtomicU32,
    sleeping: &AtomicU32,
    arrived: impl Fn(u32) -> bool,
    max_wait: Duration,
) -> Result<(), Duration> {
    for _ in 0..SPINS {
        if arrived(word.load(Ordering::Acquire)) {
            return Ok(());
        }
        std::hint::spin_loop();
    }
    let began = Instant::now();
    sleeping.store(1, Ordering::SeqCst);
    let outcome = loop {
        // Looked at after the flag was set: whoever stores later sees the flag, and the futex compares again.
        let seen = word.load(Ordering::SeqCst);
        if arrived(seen) {
            break Ok(());
        }
        if began.elapsed() >= max_wait {
            break Err(began.elapsed());
        }
        sleep_while(word, seen);
    };
    sleeping.store(0, Ordering::SeqCst);
    outcome
}

/// Until the word changes, somebody wakes it, or a nap is over.
fn sleep_while(word: &AtomicU32, seen: u32) {
    let nap = libc::timespec { tv_sec: 0, tv_nsec: libc::c_long::from(NAP.subsec_nanos()) };
    // SAFETY: the word outlives the call; every outcome, errors too, means that the caller looks again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const nap) };
}

pub(crate) fn wake_all(word: &AtomicU32) {
    // SAFETY: the word outlives the call, which touches nothing else.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
