//! What a simulation has reached: a count per fault and per path of recovery. A path that no seed reaches is a hole in
//! the test that looks like a pass, so tests demand every count of `EXPECTED`. O(log n) per count.

use std::collections::BTreeMap;

/// Faults and paths of recovery that five hundred seeds must reach at least once.
pub const EXPECTED: &[&str] = &[
    "caches_asked_again",
    "caches_changed",
    "caches_lost",
    "caches_told_at_once",
    "client_attached",
    "client_cancelled",
    "client_cut_at_token",
    "client_detached",
    "client_gone",
    "client_next_turn",
    "client_refused_live",
    "client_refused_queue",
    "client_refused_tokens",
    "client_refused_unavailable",
    "client_slow_reader",
    "connection_lost",
    "disk_bit_flipped",
    "disk_full",
    "disk_lost",
    "disk_recalled",
    "disk_records_lost",
    "disk_torn",
    "drain_cut_short",
    "drain_left_blocks",
    "drain_saved_blocks",
    "end_aborted",
    "end_deadline",
    "end_length",
    "end_poisoned",
    "end_stop",
    "end_unavailable",
    "frame_late_to_front",
    "frame_late_to_node",
    "front_ejections",
    "front_expired",
    "front_failed_probes",
    "front_gaps",
    "front_given_back",
    "front_hedge_wins",
    "front_hedges",
    "front_late",
    "front_lost_attempts",
    "front_moved",
    "front_numerics_changes",
    "front_paused",
    "front_recalls",
    "front_repeated_retries",
    "front_retries",
    "front_retries_delayed",
    "front_silences",
    "front_silent_for_node",
    "front_slow_readers",
    "front_gave_up_workers",
    "front_spared",
    "front_stale_frames",
    "front_stale_rows",
    "front_stopped",
    "front_stopped_with_goodbye",
    "front_welcomed_again",
    "host_bit_flipped",
    "host_memory_lost",
    "node_crashed",
    "node_drained",
    "node_erred",
    "node_lost_a_row",
    "node_not_greeted",
    "node_paused",
    "node_refused_wrongly",
    "node_restarted",
    "node_silent_for_front",
    "prompt_named",
    "replica_bad_disk_blocks",
    "replica_bad_host_blocks",
    "replica_discarded_rows",
    "replica_disk_read",
    "replica_disk_written",
    "replica_failed_disk_writes",
    "replica_late_fetches",
    "replica_offloaded",
    "replica_poisoned",
    "replica_paced_steps",
    "replica_preemptions",
    "replica_prefix_hits",
    "replica_queue_full",
    "replica_restored",
    "replica_stale_results",
    "replica_steps_lost",
    "replica_unknown_orders",
    "stream_kept_numerics",
    "stream_survived_restart",
    "stream_survived_two_restarts",
    "suspect_given_back",
    "upgrade_done",
    "version_next_agreed",
    "version_of_today_agreed_by_a_newer_build",
    "worker_condemned",
    "worker_crashed",
    "worker_deadly_token",
    "worker_deadly_token_raised",
    "worker_dropped_delta",
    "worker_found_bad_host_blocks",
    "worker_hung",
    "worker_lingered",
    "worker_lost_mirror",
    "worker_needs_snapshot",
    "worker_raised",
    "worker_slow",
];

/// See the file's header.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Coverage {
    counts: BTreeMap<&'static str, u64>,
}

impl Coverage {
    /// Something was reached.
    pub fn reach(&mut self, what: &'static str) {
        self.add(what, 1);
    }

    /// Something was reached this many times.
    pub fn add(&mut self, what: &'static str, times: u64) {
        *self.counts.entry(what).or_default() += times;
    }

    /// Takes the counts of another simulation.
    pub fn merge(&mut self, other: &Self) {
        for (&what, &times) in &other.counts {
            self.add(what, times);
        }
    }

    /// How often something was reached.
    pub fn count(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    /// What was expected and never reached.
    pub fn missing(&self) -> Vec<&'static str> {
        EXPECTED.iter().copied().filter(|what| self.count(what) == 0).collect()
    }

    /// All counts by name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counts.iter().map(|(&what, &times)| (what, times))
    }
}
