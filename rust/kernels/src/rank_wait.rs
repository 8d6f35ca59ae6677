//! How a rank waits for a word of shared memory that another one writes, and how an exchange fails. A wait polls for as
//! long as ranks in step with each other ever need, then sleeps on the word; who writes it wakes the sleeper, whose flag
//! tells that there is one. Waits are bounded. Knows nothing of what the words mean.
#![expect(unsafe_code, reason = "futexes")]

use crate::mapping::MappingError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Polls before a rank sleeps: about 30 us, longer than ranks in step with each other ever wait for a part.
const SPINS: u32 = 1_000;
/// Longest sleep before the clock is looked at.
const NAP: Duration = Duration::from_millis(50);

/// Why an exchange was not finished. The memory is of no use afterwards.
#[derive(Debug)]
pub enum RankError {
    /// The memory cannot be had.
    Memory(MappingError),
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
            Self::Memory(error) => error.fmt(out),
            Self::Shape { what, given, limit } => write!(out, "{what} is {given}, the limit is {limit}"),
            Self::Absent { rank, waited } => {
                write!(out, "rank {rank} did not come to the exchange within {:.1} s", waited.as_secs_f64())
            }
        }
    }
}

impl std::error::Error for RankError {}

impl From<MappingError> for RankError {
    fn from(error: MappingError) -> Self {
        Self::Memory(error)
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
