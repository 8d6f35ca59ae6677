//! The pool's promises: every chunk once, every write seen, every panic forwarded, no nesting, one CPU a thread.

use super::{Pool, affinity};
use crate::error::KernelError;
use core::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

fn pool(threads: usize) -> Pool {
    Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap()
}

#[test]
fn every_chunk_runs_exactly_once_for_every_pool_size_and_chunk_count() {
    for threads in [1, 2, 3, 4, 7] {
        let pool = pool(threads);
        assert_eq!(pool.threads(), threads);
        for chunks in [0, 1, 2, 3, 5, 8, 64, 1000] {
            let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
            pool.parallel_for(chunks, |chunk| {
                counts[chunk].fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} {chunks}");
        }
    }
}

#[test]
fn writes_of_a_chunk_are_seen_by_the_caller_over_many_short_jobs() {
    let pool = pool(3);
    let cells: Vec<AtomicUsize> = (0..6).map(|_| AtomicUsize::new(0)).collect();
    for round in 1..=20_000 {
        pool.parallel_for(cells.len(), |chunk| cells[chunk].store(round, Ordering::Relaxed)).unwrap();
        assert!(cells.iter().all(|cell| cell.load(Ordering::Relaxed) == round));
    }
}

#[test]
fn parked_workers_wake_for_the_next_job() {
    let pool = pool(4);
    for _ in 0..3 {
        while pool.shared.parked.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        // The chunks wait for each other, so they finish only if four threads take part.
        let arrived = AtomicUsize::new(0);
        pool.parallel_for(4, |_| {
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < 4 {
                std::thread::yield_now();
            }
        })
        .unwrap();
    }
}

#[test]
fn a_caller_that_finished_early_parks_until_the_last_chunk_is_done() {
    let pool = pool(2);
    let order = Mutex::new(Vec::new());
    let caller = std::thread::current().id();
    let begun = AtomicUsize::new(0);
    pool.parallel_for(2, |_| {
        begun.fetch_add(1, Ordering::SeqCst);
        while begun.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        let on_caller = std::thread::current().id() == caller;
        while !on_caller && !pool.shared.caller_parked.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        order.lock().unwrap().push(on_caller);
    })
    .unwrap();
    assert_eq!(*order.lock().unwrap(), [true, false]);
}

#[test]
fn a_panic_in_a_chunk_reaches_the_caller_and_the_pool_stays_usable() {
    for threads in [1, 4] {
        let pool = pool(threads);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.parallel_for(100, |chunk| assert!(chunk != 57, "chunk {chunk} failed"))
        }));
        let payload = outcome.unwrap_err();
        assert_eq!(payload.downcast_ref::<String>().unwrap(), "chunk 57 failed");
        let sum = AtomicUsize::new(0);
        pool.parallel_for(10, |chunk| {
            sum.fetch_add(chunk, Ordering::Relaxed);
        })
        .unwrap();
        assert_eq!(sum.into_inner(), 45);
    }
}

#[test]
fn nested_use_is_refused_and_the_outer_loop_completes() {
    for threads in [1, 3] {
        let pool = pool(threads);
        let refusals = AtomicUsize::new(0);
        pool.parallel_for(8, |_| {
            let error = pool.parallel_for(2, |_| ()).unwrap_err();
            assert_eq!(error, KernelError::NestedParallelism);
            refusals.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        assert_eq!(refusals.into_inner(), 8);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_pinned_pool_uses_one_cpu_per_thread_and_refuses_more_threads_than_cpus() {
    // Pinning narrows the CPUs of the calling thread, so it gets a thread of its own.
    std::thread::spawn(|| {
        let cpus = affinity::allowed_cpus().unwrap();
        let error = Pool::pinned(NonZeroUsize::new(cpus.len() + 1).unwrap()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        let pool = Pool::pinned(NonZeroUsize::new(cpus.len()).unwrap()).unwrap();
        let seen = Mutex::new(Vec::new());
        let arrived = AtomicUsize::new(0);
        // The chunks wait for each other, so every thread takes one.
        pool.parallel_for(cpus.len(), |_| {
            seen.lock().unwrap().extend(affinity::allowed_cpus().unwrap());
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < cpus.len() {
                std::thread::yield_now();
            }
        })
        .unwrap();
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, cpus);
    })
    .join()
    .unwrap();
}

#[test]
fn several_callers_take_turns() {
    let pool = pool(2);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    pool.parallel_for(7, |_| {
                        total.fetch_add(1, Ordering::Relaxed);
                    })
                    .unwrap();
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 4 * 500 * 7);
}
