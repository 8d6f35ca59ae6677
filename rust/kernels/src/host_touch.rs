//! Has the pages of a host tier's memory made before copies need them: zeroing a fresh page takes ten times as long as
//! copying into one that is there. A thread of the lowest priority, which rests most of the time, stays a bounded number of
//! bytes ahead of the furthest block that was ever written, so an idle tier takes no more than that. O(1) per call. Knows nothing of what is copied.
#![expect(unsafe_code, reason = "the priority of a thread is the system's to set")]

use crate::host_region::HostRegion;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How far ahead: two conversations of 2,000 tokens of a small model, a third of a second of zeroing.
const AHEAD_BYTES: usize = 128 << 20;
/// For each moment of work it rests so many: pages are zeroed with the bandwidth that the steps beside it want, whatever the
/// priority of who does it.
const RESTS: u32 = 7;
/// Of a small tier, no more than this part at once.
const MOST_OF_TIER: u32 = 4;

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
    /// Starts with the first blocks.
    pub fn start(region: &HostRegion) -> std::io::Result<Self> {
        let blocks = region.blocks();
        let ahead = (AHEAD_BYTES / region.block_bytes()) as u32;
        let ahead = ahead.clamp(1, (blocks / MOST_OF_TIER).max(1));
        let state = State { wanted: ahead.min(blocks), closing: false };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let (own, pages) = (Arc::clone(&shared), region.pages());
        let touch = move || {
            yield_to_all();
            let (state, changed) = &*own;
            for block in 0..blocks {
                let waiting = state.lock().unwrap_or_else(PoisonError::into_inner);
                let idle = |state: &mut State| state.wanted <= block && !state.closing;
                let state = changed.wait_while(waiting, idle).unwrap_or_else(PoisonError::into_inner);
                let closing = state.closing;
                drop(state);
                let began = Instant::now();
                // A system that cannot do this makes pages when they are written, as it did before.
                if closing || !pages.touch(block) {
                    return;
                }
                rest(&own, RESTS * began.elapsed());
            }
        };
        let thread = std::thread::Builder::new().name("llmscale-touch".into()).spawn(touch)?;
        Ok(Self { shared, ahead, blocks, thread: Some(thread) })
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
    // SAFETY: no pointers; zero is the calling thread, whose priority may always be lowered.
    let outcome = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
    assert!(outcome == 0, "a thread may lower its own priority");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    const BLOCKS: u32 = 64;
    const BLOCK_BYTES: usize = 4 << 20;

    #[test]
    fn an_idle_tier_takes_a_bounded_part_of_its_memory_and_a_written_one_what_comes_next() {
        let path = std::env::temp_dir().join(format!("llmscale-touch-{}", std::process::id()));
        let file = File::create_new(&path).unwrap();
        file.set_len(HostRegion::bytes_for(BLOCKS, BLOCK_BYTES).unwrap() as u64).unwrap();
        let region = HostRegion::open(&path, BLOCKS, BLOCK_BYTES, 1, 1).unwrap();
        let touch = TouchAhead::start(&region).unwrap();
        let blocks_there = || file.metadata().unwrap().blocks() as usize * 512 / BLOCK_BYTES;
        let wait_for = |blocks: usize| {
            let deadline = Instant::now() + Duration::from_mins(1);
            while blocks_there() < blocks && Instant::now() < deadline {
                std::thread::yield_now();
            }
        };
        wait_for(16);
        assert_eq!(blocks_there(), 16, "a quarter");
        touch.reached(3);
        wait_for(20);
        assert_eq!(blocks_there(), 20);
        drop(touch);
        std::fs::remove_file(&path).unwrap();
    }
}
