//! A wake-up that any thread may send to the one that waits in a poller: one Linux eventfd behind a flag.
//! Waking is one atomic swap when a wake-up is pending already and one 8-byte write otherwise; many wake-ups between
//! two waits are one. It knows nothing of what the woken thread will find.
#![expect(unsafe_code, reason = "eventfd has no safe binding in the standard library")]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
struct Shared {
    /// Set from the first wake-up until the waiting thread has taken it.
    pending: AtomicBool,
    descriptor: File,
}

/// The sending side; cheap to clone, and every thread may hold one.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

impl Waker {
    /// A new wake-up, not pending.
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes no pointer; its result is checked before use.
        let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created, is open, and nobody else owns it.
        let descriptor = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
        Ok(Self(Arc::new(Shared { pending: AtomicBool::new(false), descriptor })))
    }

    /// Wakes the waiting thread, or lets its next wait return at once.
    pub fn wake(&self) {
        if !self.0.pending.swap(true, Ordering::AcqRel) {
            let written = (&self.0.descriptor).write(&1_u64.to_ne_bytes());
            // The flag allows one write per read, so the counter never overflows, the only way a write can fail.
            assert!(matches!(written, Ok(8)), "a wake-up was not written: {written:?}");
        }
    }

    /// The descriptor that is readable while a wake-up is pending.
    pub fn descriptor(&self) -> RawFd {
        self.0.descriptor.as_raw_fd()
    }

    /// Takes a pending wake-up; what was done before it is visible to the caller afterwards.
    pub fn take(&self) -> bool {
        // The flag is set before the descriptor is written, so a clear one saves the system call.
        if !self.0.pending.load(Ordering::Acquire) {
            return false;
        }
        let mut count = [0; 8];
        if (&self.0.descriptor).read(&mut count).is_err() {
            // Nothing was written, or its write is still on the way and will make the descriptor readable.
            return false;
        }
        // Cleared after the read: the other order would consume the write of a wake-up that came in between
        // and leave the flag set, so that no later one is ever written.
        self.0.pending.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn many_wake_ups_between_two_waits_are_one() {
        let waker = Waker::new().expect("a descriptor");
        assert!(!waker.take());
        waker.wake();
        waker.clone().wake();
        assert!(waker.take());
        assert!(!waker.take());
        waker.wake();
        assert!(waker.take());
    }

    /// Each thread publishes before it wakes; a lost wake-up would leave the waiter in poll until the deadline.
    #[test]
    fn no_wake_up_is_lost_between_threads() {
        const ROUNDS: u64 = 20_000;
        let waker = Waker::new().expect("a descriptor");
        let published = [AtomicU64::new(0), AtomicU64::new(0)];
        std::thread::scope(|scope| {
            for counter in &published {
                let waker = waker.clone();
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        counter.store(round, Ordering::Relaxed);
                        waker.wake();
                    }
                });
            }
            let done = || published.iter().all(|counter| counter.load(Ordering::Relaxed) == ROUNDS);
            while !done() {
                let mut item = [zmq::PollItem::from_fd(waker.descriptor(), zmq::POLLIN)];
                let ready = zmq::poll(&mut item, 10_000).expect("poll");
                if ready == 0 {
                    assert!(done(), "a wake-up was lost");
                }
                waker.take();
            }
        });
    }
}
