//! What Python sees of a front: its queue, its counts and its replicas, copied out of the core at one moment, O(replicas).
//! Frozen; absent numbers are 0, as metrics want them. Decides nothing.

use llmscale_front::{FrontStatus, ReplicaStatus};
use llmscale_types::Time;
use pyo3::prelude::*;

/// The front's queue, its counts since the start, and its replicas.
#[pyclass(frozen, get_all, name = "FrontStatus", module = "llmscale._core")]
pub(crate) struct PyFrontStatus {
    queued_requests: u64,
    queued_tokens: u64,
    live_requests: u64,
    /// Times that a stream went on under another numerics id, because no replica of its own could begin it.
    numerics_changes: u64,
    /// Attempts lost with their replica, by a gap, by silence or by a refusal that counts.
    lost_attempts: u64,
    /// Attempts moved away from a draining replica in the middle of their stream.
    moved_attempts: u64,
    /// Frames of an incarnation or a conversation that is over, dropped.
    stale_frames: u64,
    /// Rows of an attempt that is over, dropped.
    stale_rows: u64,
    /// Prefixes that some replica is known to hold.
    known_prefixes: u64,
    /// Memory of what is known of the replicas' prefix caches, in bytes.
    prefix_bytes: u64,
    /// Changes of caches that were missed and asked for again.
    prefix_gaps: u64,
    /// Times that a replica was left alone.
    ejections: u64,
    /// Of these, times that it was because its probe failed.
    failed_probes: u64,
    /// Times that a replica was not left alone because half of its pool was already.
    spared_replicas: u64,
    /// Attempts made again after a replica answered badly.
    retries: u64,
    /// Of these, attempts of requests that had failed before: what the retry budget bounds.
    repeated_retries: u64,
    /// Times that one of those had to wait for the budget.
    retries_delayed: u64,
    /// Second attempts beside a first one whose first token was late.
    hedges: u64,
    /// Of these, those that were first after all.
    hedge_wins: u64,
    /// Context tokens of second attempts.
    hedged_tokens: u64,
    /// Context tokens of first attempts; 0 without second attempts.
    first_attempt_tokens: u64,
    replicas: Vec<PyReplicaStatus>,
}

/// One replica as the front sees it.
#[pyclass(frozen, get_all, name = "ReplicaStatus", module = "llmscale._core")]
#[derive(Clone)]
pub(crate) struct PyReplicaStatus {
    node: String,
    state: &'static str,
    /// "trusted", "ejected" while it gets nothing, "probing" while one request decides.
    trust: &'static str,
    /// How often this front has left it alone.
    ejections: u64,
    /// First tokens of the last 5 to 10 s, of these late ones, and attempts that it failed.
    recent_answers: u32,
    recent_late: u32,
    recent_failures: u32,
    running: u32,
    waiting: u32,
    free_blocks: u32,
    total_blocks: u32,
    steps: u64,
    worker_restarts: u32,
    prefix_queries: u64,
    prefix_hits: u64,
    offloaded_blocks: u64,
    restored_blocks: u64,
    bad_host_blocks: u64,
    disk_written_blocks: u64,
    disk_read_blocks: u64,
    bad_disk_blocks: u64,
    failed_disk_writes: u64,
    disk_waits: u64,
    lost_disk_records: u64,
    predicted_step_ns: u64,
    step_error_ns: u64,
    paced_steps: u64,
    preemptions: u64,
    model: String,
    weights_digest: String,
    tokenizer_digest: String,
    numerics: String,
    max_sequence_tokens: u32,
    vocabulary: u32,
    worker_pid: u32,
    step_ns: u64,
    stage_wait_ns: u64,
}

impl PyFrontStatus {
    /// A copy of what a front was at `now`.
    pub(crate) fn new(status: &FrontStatus, now: Time) -> Self {
        let (counters, health) = (status.counters, status.health);
        Self {
            queued_requests: status.queued_requests,
            queued_tokens: status.queued_tokens,
            live_requests: status.live_requests,
            numerics_changes: counters.numerics_changes,
            lost_attempts: counters.lost_attempts,
            moved_attempts: counters.moved,
            stale_frames: counters.stale_frames,
            stale_rows: counters.stale_rows,
            known_prefixes: status.known_prefixes,
            prefix_bytes: status.prefix_bytes,
            prefix_gaps: status.prefixes.gaps,
            ejections: health.ejections,
            failed_probes: health.failed_probes,
            spared_replicas: health.spared,
            retries: counters.retries,
            repeated_retries: counters.repeated_retries,
            retries_delayed: counters.retries_delayed,
            hedges: counters.hedges,
            hedge_wins: counters.hedge_wins,
            hedged_tokens: counters.hedged_tokens,
            first_attempt_tokens: counters.first_attempt_tokens,
            replicas: status.replicas.iter().map(|replica| PyReplicaStatus::new(replica, now)).collect(),
        }
    }
}

impl PyReplicaStatus {
    fn new(replica: &ReplicaStatus, now: Time) -> Self {
        let (report, tally) = (replica.report, replica.tally);
        Self {
            node: format!("{:016x}", replica.node.0),
            state: replica.state.map_or("down", llmscale_front::ReplicaState::label),
            trust: replica.trust.label(now),
            ejections: replica.ejections,
            recent_answers: tally.answers,
            recent_late: tally.late,
            recent_failures: tally.failures,
            running: report.map_or(0, |report| report.running),
            waiting: report.map_or(0, |report| report.waiting),
            free_blocks: report.map_or(0, |report| report.free_blocks),
            total_blocks: replica.limits.total_blocks,
            steps: report.map_or(0, |report| report.steps),
            worker_restarts: report.map_or(0, |report| report.worker_restarts),
            prefix_queries: report.map_or(0, |report| report.prefix_queries),
            prefix_hits: report.map_or(0, |report| report.prefix_hits),
            offloaded_blocks: report.map_or(0, |report| report.offloaded_blocks),
            restored_blocks: report.map_or(0, |report| report.restored_blocks),
            bad_host_blocks: report.map_or(0, |report| report.bad_host_blocks),
            disk_written_blocks: report.map_or(0, |report| report.disk_written_blocks),
            disk_read_blocks: report.map_or(0, |report| report.disk_read_blocks),
            bad_disk_blocks: report.map_or(0, |report| report.bad_disk_blocks),
            failed_disk_writes: report.map_or(0, |report| report.failed_disk_writes),
            disk_waits: report.map_or(0, |report| report.disk_waits),
            lost_disk_records: report.map_or(0, |report| report.lost_disk_records),
            predicted_step_ns: report.map_or(0, |report| report.predicted_step_ns),
            step_error_ns: report.map_or(0, |report| report.step_error_ns),
            paced_steps: report.map_or(0, |report| report.paced_steps),
            preemptions: report.map_or(0, |report| report.preemptions),
            model: replica.model.served_name().to_owned(),
            weights_digest: hexadecimal(&replica.model.weights_digest),
            tokenizer_digest: hexadecimal(&replica.model.tokenizer_digest),
            numerics: replica.numerics.clone(),
            max_sequence_tokens: replica.limits.max_sequence_tokens,
            vocabulary: replica.limits.vocabulary,
            worker_pid: report.and_then(|report| report.worker_pid).unwrap_or(0),
            step_ns: report.map_or(0, |report| report.step_ns),
            stage_wait_ns: report.map_or(0, |report| report.stage_wait_ns),
        }
    }
}

fn hexadecimal(digest: &[u8]) -> String {
    let digit = |half: u8| char::from(b"0123456789abcdef"[usize::from(half)]);
    digest.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
