//! Goal: it does not matter when a process dies. Method: one small world in which nothing else fails, and in which a worker
//! or a node dies after so many events, for every number of events that there are.

use llmscale_sim::{Fault, Simulation};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Worlds with one step in flight and with several, with a pipeline and without, as their seeds drew them.
const WORLDS: [u64; 4] = [0, 1, 2, 3];

fn strike_everywhere(fault: Fault) {
    for seed in WORLDS {
        let undisturbed = Simulation::run_with_strike(seed, fault, 0, u64::MAX);
        assert!(undisturbed.tokens > 50, "{undisturbed:?}");
        for position in 0..undisturbed.events {
            let strike = AssertUnwindSafe(|| Simulation::run_with_strike(seed, fault, 0, position));
            let outcome = catch_unwind(strike);
            assert!(outcome.is_ok(), "seed {seed}: {fault:?} after {position} events");
        }
    }
}

#[test]
fn a_worker_may_die_at_any_position() {
    strike_everywhere(Fault::WorkerCrash);
}

#[test]
fn a_node_may_die_at_any_position() {
    strike_everywhere(Fault::NodeCrash);
}
