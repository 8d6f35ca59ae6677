//! A persistent pool of threads that split one loop at a time.
//! Chunks are claimed one by one from an atomic counter, never dealt out in equal halves, so that a core stolen by
//! another process costs its share of the work and not the whole loop. Idle workers spin for about 30 us, which bridges
//! the gap between two kernels of a step, and then park; waking them costs the caller one system call.
//! Claiming is O(1) per chunk. The pool knows nothing of tensors, steps or cores.
#![expect(unsafe_code, reason = "a borrowed closure is shared with threads that outlive the borrow")]

mod affinity;
#[cfg(test)]
mod tests;

use crate::error::KernelError;
use core::any::Any;
use core::cell::{Cell, UnsafeCell};
use core::fmt;
use core::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread polls before it parks. Parking and waking costs 5 to 50 us, so polling shorter than that loses.
const SPIN: Duration = Duration::from_micros(30);

thread_local! {
    /// Whether this thread is inside a chunk of some pool.
    static IN_CHUNK: Cell<bool> = const { Cell::new(false) };
}

/// The loop being run. Valid from its publication until its last chunk is finished.
#[derive(Clone, Copy)]
struct Job {
    /// The body, its lifetime erased: see the safety argument in [`Pool::parallel_for`].
    body: *const (dyn Fn(usize) + Sync),
    chunks: usize,
}

struct Shared {
    job: UnsafeCell<Job>,
    /// Chunks of the current job that nobody has claimed. A thread that lowers it by one owns chunk `chunks - old`.
    unclaimed: AtomicUsize,
    /// Chunks of the current job that are finished.
    finished: AtomicUsize,
    /// Workers that are parked or about to park.
    parked: AtomicUsize,
    caller_parked: AtomicBool,
    stop: AtomicBool,
    /// Set by a panicking chunk: the remaining chunks of the job are claimed but not run.
    cancelled: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    park: Mutex<()>,
    work_arrived: Condvar,
    job_finished: Condvar,
}

// SAFETY: `job` is written only by the caller that holds `Pool::caller` while no chunk is claimable or running, and read
// only by the owner of a claimed chunk. The claim (an acquiring compare-exchange on `unclaimed`) reads a value from the
// release sequence headed by the store that published the job, so the write happens before the read; the job's last
// `finished` increment (release) is read (acquire) by the caller before the next write. Everything else is Sync.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only dereferenced under the protocol above, from any thread.
unsafe impl Send for Shared {}

/// Persistent threads that run one parallel loop at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the thread whose loop is running; further callers wait here.
    caller: Mutex<()>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads` threads including the caller of each loop, so `threads - 1` are started.
    ///
    /// # Errors
    /// The operating system's, if a thread cannot be started.
    pub fn new(threads: NonZeroUsize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(Job { body: &|_: usize| (), chunks: 0 }),
            unclaimed: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            parked: AtomicUsize::new(0),
            caller_parked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            panic: Mutex::new(None),
            park: Mutex::new(()),
            work_arrived: Condvar::new(),
            job_finished: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::with_capacity(threads.get() - 1), caller: Mutex::new(()) };
        for index in 1..threads.get() {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("llmscale-cpu-{index}"))
                .spawn(move || shared.work_until_stopped())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// A pool as wide as this process may run (`std::thread::available_parallelism`, which respects cgroup limits).
    ///
    /// # Errors
    /// The operating system's, if the width is unknown or a thread cannot be started.
    pub fn with_available_parallelism() -> std::io::Result<Self> {
        Self::new(std::thread::available_parallelism()?)
    }

    /// As [`Self::new`], with every thread on a CPU of its own: the calling thread on the first that this process may use
    /// (loops should then be run by it), workers on the next ones.
    ///
    /// On a machine that other processes also load, the system may otherwise wake a worker on the caller's CPU and leave
    /// it there: two threads were then measured to be no faster than one for minutes.
    ///
    /// # Errors
    /// `InvalidInput` where there are fewer CPUs than threads, `Unsupported` on systems without thread affinity, or the
    /// operating system's.
    pub fn pinned(threads: NonZeroUsize) -> std::io::Result<Self> {
        let cpus = affinity::allowed_cpus()?;
        if cpus.len() < threads.get() {
            let message = format!(
                "{threads} threads cannot each have one of {} CPUs. Ask for fewer threads or an unpinned pool.",
                cpus.len()
            );
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message));
        }
        let pool = Self::new(threads)?;
        for (worker, &cpu) in pool.workers.iter().zip(&cpus[1..]) {
            affinity::pin_worker(worker, cpu)?;
        }
        affinity::pin_current_thread(cpus[0])?;
        Ok(pool)
    }

    /// Threads that share a loop, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(0)` to `body(chunks - 1)`, each once, in any order and on any thread, and returns when all are done.
    /// The caller takes part. A panic in a chunk cancels the chunks not yet begun and continues in the caller.
    ///
    /// # Errors
    /// [`KernelError::NestedParallelism`] when called from inside a chunk, before anything is run.
    pub fn parallel_for(&self, chunks: usize, body: impl Fn(usize) + Sync) -> Result<(), KernelError> {
        if IN_CHUNK.get() {
            return Err(KernelError::NestedParallelism);
        }
        if self.workers.is_empty() || chunks <= 1 {
            let _inside = InsideChunk::enter();
            (0..chunks).for_each(body);
            return Ok(());
        }
        let caller = lock(&self.caller);
        let shared = &*self.shared;
        let body: &(dyn Fn(usize) + Sync) = &body;
        // SAFETY: only the lifetime changes. The body is called only by owners of claimed chunks, and this function
        // returns only after every chunk of the job is finished, so no call outlives the borrow.
        let body: &'static (dyn Fn(usize) + Sync) = unsafe { core::mem::transmute(body) };
        // SAFETY: `caller` is held and the previous job is finished, so nobody reads `job` (see `Shared`).
        unsafe { *shared.job.get() = Job { body, chunks } };
        shared.finished.store(0, Ordering::Relaxed);
        // Sequentially consistent with `parked` below and in `wait_for_work`: either this thread sees a parked worker,
        // or the worker sees the chunks before it sleeps.
        shared.unclaimed.store(chunks, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            // Taking the lock waits for a worker between its last look and its sleep.
            drop(lock(&shared.park));
            shared.work_arrived.notify_all();
        }
        while shared.run_one_chunk() {}
        shared.wait_until_finished(chunks);
        let panic = if shared.cancelled.swap(false, Ordering::Relaxed) { lock(&shared.panic).take() } else { None };
        drop(caller);
        match panic {
            Some(payload) => resume_unwind(payload),
            None => Ok(()),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.park));
        self.shared.work_arrived.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its chunks, so this cannot fail.
            worker.join().expect("a pool worker panicked outside of a chunk");
        }
    }
}

impl Shared {
    fn work_until_stopped(&self) {
        while !self.stop.load(Ordering::Acquire) {
            if !self.run_one_chunk() {
                self.wait_for_work();
            }
        }
    }

    /// Claims and runs one chunk of the current job; false where none is left.
    fn run_one_chunk(&self) -> bool {
        let claim = self.unclaimed.fetch_update(Ordering::Acquire, Ordering::Relaxed, |left| left.checked_sub(1));
        let Ok(left) = claim else {
            return false;
        };
        // SAFETY: this thread owns a chunk of the current job, which is therefore published and unfinished.
        let job = unsafe { *self.job.get() };
        if !self.cancelled.load(Ordering::Relaxed) {
            let inside = InsideChunk::enter();
            // SAFETY: the caller keeps the body alive until this chunk is counted as finished.
            let body = unsafe { &*job.body };
            let outcome = catch_unwind(AssertUnwindSafe(|| body(job.chunks - left)));
            drop(inside);
            if let Err(payload) = outcome {
                lock(&self.panic).get_or_insert(payload);
                self.cancelled.store(true, Ordering::Relaxed);
            }
        }
        // Past this increment the job may be gone. SeqCst pairs with `caller_parked`.
        if self.finished.fetch_add(1, Ordering::SeqCst) + 1 == job.chunks && self.caller_parked.load(Ordering::SeqCst) {
            drop(lock(&self.park));
            self.job_finished.notify_all();
        }
        true
    }

    fn wait_for_work(&self) {
        if spin_until(|| self.unclaimed.load(Ordering::Relaxed) > 0 || self.stop.load(Ordering::Relaxed)) {
            return;
        }
        let mut guard = lock(&self.park);
        self.parked.fetch_add(1, Ordering::SeqCst);
        while self.unclaimed.load(Ordering::SeqCst) == 0 && !self.stop.load(Ordering::SeqCst) {
            guard = self.work_arrived.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }

    fn wait_until_finished(&self, chunks: usize) {
        if spin_until(|| self.finished.load(Ordering::Acquire) == chunks) {
            return;
        }
        let mut guard = lock(&self.park);
        self.caller_parked.store(true, Ordering::SeqCst);
        while self.finished.load(Ordering::SeqCst) < chunks {
            guard = self.job_finished.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }
}

/// Marks the current thread as running a chunk until dropped, also by a panic.
struct InsideChunk;

impl InsideChunk {
    fn enter() -> Self {
        IN_CHUNK.set(true);
        Self
    }
}

impl Drop for InsideChunk {
    fn drop(&mut self) {
        IN_CHUNK.set(false);
    }
}

/// Polls for at most [`SPIN`]; true once the condition holds.
fn spin_until(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            if condition() {
                return true;
            }
            core::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

/// Locks, also after a panic elsewhere: the data under these locks is valid at every instant.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
