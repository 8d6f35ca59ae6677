//! Has pages of a region of blocks made before they are written: zeroing a fresh page takes ten times as long as writing to
//! one that is there. A thread of the lowest priority, which rests most of the time, stays a bounded number of bytes ahead
//! of the furthest block that was ever written, so a region that is not used takes next to no memory, and one that is used
//! takes what it needs. O(1) per call. Knows nothing of what blocks hold.
#![expect(unsafe_code, reason = "the priority of a thread is the system's to set")]

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// For each moment of work it rests so many: pages are zeroed with the bandwidth that the steps beside it want, whatever the
/// priority of who does it.
const RESTS: u32 = 7;
/// Of a small region, no more than this part at once.
const MOST_OF_REGION: u32 = 4;

/// How far ahead, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// Before anything was written.
    pub unused_bytes: usize,
    /// Behind the furthest block that was.
    pub used_bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Blocks whose pages are wanted, from the first on.
    wanted: u32,
    closing: bool,
}

/// See the file's header.
#[derive(Debug)]
pub struct TouchAhead {
    shared: Arc<(Mutex<State>, Condvar)>,
    ahead: u32,
    blocks: u32,
    thread: Option<JoinHandle<()>>,
}

impl TouchAhead {
    /// Starts with the first blocks. `touch(block)` has the pages of one made, or is false where the system cannot.
    ///
    /// # Errors
    /// The operating system's, where it starts no thread.
    pub fn start(
        blocks: u32,
        block_bytes: usize,
        ahead: Ahead,
        touch: impl Fn(u32) -> bool + Send + 'static,
    ) -> std::io::Result<Self> {
        let within = |bytes: usize| ((bytes / block_bytes) as u32).clamp(1, (blocks / MOST_OF_REGION).max(1));
        let state = State { wanted: within(ahead.unused_bytes).min(blocks), closing: false };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let own = Arc::clone(&shared);
        let work = move || {
            yield_to_all();
            let (state, changed) = &*own;
            for block in 0..blocks {
                let waiting = state.lock().unwrap_or_else(PoisonError::into_inner);
                let idle = |state: &mut State| state.wanted <= block && !state.closing;
                let state = changed.wait_while(waiting, idle).unwrap_or_else(PoisonError::into_inner);
                let closing = state.closing;
                drop(state);
                let began = Instant::now();
                // A system that cannot do this makes pages when they are written, as it would without this thread.
                if closing || !touch(block) {
                    return;
                }
                rest(&own, RESTS * began.elapsed());
            }
        };
        let thread = std::thread::Builder::new().name("llmscale-touch".into()).spawn(work)?;
        Ok(Self { shared, ahead: within(ahead.used_bytes), blocks, thread: Some(thread) })
    }

    /// A block was written: those behind it may be next.
    pub fn reached(&self, block: u32) {
        let (state, changed) = &*self.shared;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = block.saturating_add(1).saturating_add(self.ahead).min(self.blocks);
        if wanted > state.wanted {
            state.wanted = wanted;
            changed.notify_one();
        }
    }
}

impl Drop for TouchAhead {
    fn drop(&mut self) {
        let (state, changed) = &*self.shared;
        state.lock().unwrap_or_else(PoisonError::into_inner).closing = true;
        changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            assert!(outcome.is_ok() || std::thread::panicking(), "the touching thread panicked");
        }
    }
}

/// For so long, or until the end.
fn rest(shared: &(Mutex<State>, Condvar), span: Duration) {
    let (state, changed) = shared;
    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
    drop(changed.wait_timeout_while(state, span, |state| !state.closing));
}

/// Whoever else wants the core gets it. On Linux a priority is a thread's.
fn yield_to_all() {
    // Where a sandbox forbids even this, the thread's rests are all that it leaves to others.
    // SAFETY: no pointers; zero is the calling thread, whose priority may always be lowered.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    const BLOCK_BYTES: usize = 1 << 20;
    const AHEAD: Ahead = Ahead { unused_bytes: 5 << 20, used_bytes: 9 << 20 };

    #[test]
    fn pages_are_made_up_to_a_bound_behind_the_furthest_block_and_no_further() {
        let (made, seen) = channel();
        let touch = TouchAhead::start(64, BLOCK_BYTES, AHEAD, move |block| made.send(block).is_ok()).unwrap();
        let next = |count: u32| -> Vec<u32> { (0..count).map(|_| seen.recv().unwrap()).collect() };
        assert_eq!(next(5), (0..5).collect::<Vec<_>>());
        touch.reached(3);
        assert_eq!(next(8), (5..13).collect::<Vec<_>>());
        touch.reached(2);
        touch.reached(40);
        assert_eq!(next(37), (13..50).collect::<Vec<_>>());
        drop(touch);
        assert_eq!(seen.iter().count(), 0, "what is further behind is left alone");
    }

    #[test]
    fn of_a_small_region_a_quarter_is_made_at_once() {
        let (made, seen) = channel();
        let touch = TouchAhead::start(8, BLOCK_BYTES, AHEAD, move |block| made.send(block).is_ok()).unwrap();
        assert_eq!([seen.recv(), seen.recv()], [Ok(0), Ok(1)]);
        drop(touch);
        assert_eq!(seen.iter().count(), 0);
    }

    #[test]
    fn a_system_that_cannot_make_pages_is_left_alone() {
        let (made, seen) = channel();
        let touch = TouchAhead::start(8, BLOCK_BYTES, AHEAD, move |block| made.send(block).is_err()).unwrap();
        touch.reached(7);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [0]);
        drop(touch);
    }
}
