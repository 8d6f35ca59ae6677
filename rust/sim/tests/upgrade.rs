//! Goal: a fleet is replaced by the next build, which speaks one version more, without a request that notices. Method:
//! simulated worlds in which nothing else happens; nodes drain one after the other, the front comes last.

use llmscale_sim::{Coverage, Simulation};

const WORLDS: u64 = 60;

#[test]
fn a_fleet_that_is_upgraded_process_by_process_loses_no_request() {
    let mut all = Coverage::default();
    for seed in 0..WORLDS {
        let report = Simulation::run_with_upgrade(seed);
        let coverage = &report.coverage;
        assert_eq!(coverage.count("upgrade_done"), 1, "world {seed}");
        // The next build spoke to one of today, and in the end to its own.
        assert!(coverage.count("version_next_agreed") >= 2, "world {seed}");
        assert_eq!(coverage.count("version_refused"), 0, "world {seed}");
        for end in ["end_unavailable", "end_aborted", "end_poisoned", "front_gap"] {
            assert_eq!(coverage.count(end), 0, "world {seed}: {end}");
        }
        all.merge(coverage);
    }
    let streams = all.count("front_moved");
    assert!(streams > 0, "no stream moved from a node that was replaced");
}
