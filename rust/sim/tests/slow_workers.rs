//! Goal: what a front does about slow nodes helps its clients. Method: the same worlds of three nodes, whose workers compute
//! twenty times slower now and then, with and without; the figures of ADR 0011 are those of sixty of them (`--nocapture`).

#![allow(clippy::print_stdout, reason = "figures are to be read")]

use llmscale_sim::{Care, Coverage, Simulation};

/// First tokens of some worlds in microseconds, shortest first, and what was reached.
fn run(seeds: u64, care: Care) -> (Vec<u64>, Coverage) {
    let (mut waits_us, mut coverage) = (Vec::new(), Coverage::default());
    for seed in 0..seeds {
        let report = Simulation::run_with_slow_workers(seed, care);
        waits_us.extend(report.first_tokens.iter().map(|wait| wait.0));
        coverage.merge(&report.coverage);
    }
    assert_eq!(coverage.count("worker_hung"), 0, "no single step took longer than the limit");
    waits_us.sort_unstable();
    let at = |permille: usize| waits_us[waits_us.len() * permille / 1_000];
    let mean_us = waits_us.iter().sum::<u64>() / waits_us.len() as u64;
    println!("{care:?}: {} first tokens, mean {mean_us} us", waits_us.len());
    println!("  p50 {} p95 {} p99 {} p99.9 {} us", at(500), at(950), at(990), at(999));
    let reached = ["front_hedges", "front_hedge_wins", "front_ejections"].map(|what| (what, coverage.count(what)));
    println!("  {reached:?}");
    (waits_us, coverage)
}

const NONE: Care = Care { ejects: false, hedges: false };
const BOTH: Care = Care { ejects: true, hedges: true };

#[test]
fn the_slowest_twentieth_of_first_tokens_comes_earlier_with_second_attempts() {
    let (without, _) = run(12, NONE);
    let (with, reached) = run(12, BOTH);
    let slow = |waits_us: &[u64]| waits_us[waits_us.len() * 19 / 20];
    assert!(slow(&with) * 5 < slow(&without) * 4, "{} of {} us", slow(&with), slow(&without));
    assert!(reached.count("front_hedge_wins") * 2 > reached.count("front_hedges"), "most lose");
    assert!(reached.count("front_ejections") > 0, "nobody is left alone");
}

#[test]
#[ignore = "prints figures; takes a quarter of a minute"]
fn figures_of_sixty_worlds() {
    for care in [NONE, Care { ejects: true, ..NONE }, Care { hedges: true, ..NONE }, BOTH] {
        run(60, care);
    }
}
