//! Between the wire's words and the front's: field by field, nothing decided.

use llmscale_front::{ModelKey, Offer, ReplicaFrame, ReplicaLimits, ReplicaState, Report, ToReplica};
use llmscale_types::Time;
use llmscale_wire::{Abort, GiveBack, KvAsk, NodeState, Recall, Status, Submit, ToNode, Welcome};

pub(super) fn offer(welcome: Welcome) -> Offer {
    let Welcome { node, epoch, model, limits, .. } = welcome;
    Offer {
        node,
        epoch,
        model: ModelKey {
            name: model.name,
            revision: model.revision,
            adapter: model.adapter,
            weights_digest: model.weights_digest,
            tokenizer_digest: model.tokenizer_digest,
        },
        numerics: model.numerics,
        limits: ReplicaLimits {
            vocabulary: limits.vocabulary,
            max_sequence_tokens: limits.max_sequence_tokens,
            max_sequences: limits.max_sequences,
            max_waiting_sequences: limits.max_waiting_sequences,
            total_blocks: limits.total_blocks,
            block_tokens: limits.block_tokens,
            eos_tokens: limits.eos_tokens,
        },
        // A status follows at once and says more.
        state: ReplicaState::Starting,
    }
}

pub(super) fn report(status: &Status) -> Report {
    Report {
        state: match status.state {
            NodeState::Starting => ReplicaState::Starting,
            NodeState::Ready => ReplicaState::Ready,
            NodeState::Recovering => ReplicaState::Recovering,
            NodeState::Draining => ReplicaState::Draining,
        },
        running: status.running,
        waiting: status.waiting,
        queued_tokens: status.queued_tokens,
        predicted_backlog_ns: status.predicted_backlog_ns,
        free_blocks: status.free_blocks,
        steps: status.steps,
        preemptions: status.preemptions,
        prefix_queries: status.prefix_queries,
        prefix_hits: status.prefix_hits,
        offloaded_blocks: status.offloaded_blocks,
        restored_blocks: status.restored_blocks,
        bad_host_blocks: status.bad_host_blocks,
        worker_restarts: status.worker_restarts,
        worker_pid: status.worker_pid,
        step_ns: status.step_ns,
        stage_wait_ns: status.stage_wait_ns,
        kv_changes: status.kv_changes,
        disk_written_blocks: status.disk_written_blocks,
        disk_read_blocks: status.disk_read_blocks,
        bad_disk_blocks: status.bad_disk_blocks,
        failed_disk_writes: status.failed_disk_writes,
        disk_waits: status.disk_waits,
        lost_disk_records: status.lost_disk_records,
        predicted_step_ns: status.predicted_step_ns,
        step_error_ns: status.step_error_ns,
        paced_steps: status.paced_steps,
    }
}

pub(super) fn give_back(give_back: &GiveBack) -> ReplicaFrame {
    let GiveBack { request, attempt, refusal, suspect, .. } = *give_back;
    ReplicaFrame::GiveBack { request, attempt, refusal, suspect }
}

pub(super) fn to_node(message: ToReplica, now: Time) -> ToNode {
    match message {
        ToReplica::Submit(submission) => ToNode::Submit(Submit::depart(*submission, now)),
        ToReplica::Abort { request, attempt, at_token } => ToNode::Abort(Abort { request, attempt, at_token }),
        ToReplica::Recall { request, attempt } => ToNode::Recall(Recall { request, attempt }),
        ToReplica::KvAsk { from } => ToNode::KvAsk(KvAsk { from }),
    }
}
