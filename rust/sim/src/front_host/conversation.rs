//! One node as a simulated front talks to it: greets until it is welcome, notices when it is gone, pings. A copy of what
//! the live front's connections do; decides nothing that they do not.

use crate::around::Around;
use crate::versions;
use llmscale_front::{FrontEvent, ModelKey, Offer, ReplicaFrame, ReplicaLimits, ReplicaState, Report, ToReplica};
use llmscale_types::{Duration, NodeId, ReplicaId, Time};
use llmscale_wire::{
    Abort, FromNode, Hello, KvAsk, KvSnapshot, NodeState, Ping, Recall, Status, Submit, ToNode, VersionRange, Welcome,
};

/// How often an unanswered greeting is repeated.
const GREETING_INTERVAL: Duration = Duration::from_millis(100);
/// How often a node is told that this front is alive.
const PING_INTERVAL: Duration = Duration::from_millis(1_000);

/// Where the conversation stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Greeting { again_at: Time },
    Welcome { node: NodeId, version: u8, heard: Time, ping_at: Time },
}

/// See the file's header.
#[derive(Debug)]
pub(super) struct Conversation {
    front: usize,
    place: usize,
    /// What the front's process speaks.
    spoken: VersionRange,
    stage: Stage,
    /// It has said in this conversation that a worker died.
    lost_worker: bool,
    pings: u64,
}

impl Conversation {
    pub(super) fn new(front: usize, place: usize, spoken: VersionRange) -> Self {
        Self { front, place, spoken, stage: Stage::Greeting { again_at: Time(0) }, lost_worker: false, pings: 0 }
    }

    pub(super) fn is_welcome(&self) -> bool {
        matches!(self.stage, Stage::Welcome { .. })
    }

    pub(super) fn has_lost_worker(&self) -> bool {
        self.lost_worker
    }

    fn replica(&self) -> ReplicaId {
        ReplicaId(self.place as u32)
    }

    pub(super) fn hear(&mut self, frame: FromNode, around: &mut Around) -> Option<FrontEvent> {
        let (replica, now) = (self.replica(), around.now());
        if let FromNode::Welcome(welcome) = frame {
            // A node that stood still answers every greeting that waited for it. Nothing was sent before the last of
            // them, so nothing is lost: taking each for a new start would use up the attempts of whatever is sent between.
            if let Stage::Welcome { node, heard, .. } = &mut self.stage
                && *node == welcome.node
            {
                *heard = now;
                around.coverage.reach("front_welcomed_again");
                return None;
            }
            let (node, version) = (welcome.node, welcome.version);
            assert!(self.spoken.has(version), "node {node} wants version {version}, which was not offered to it");
            if self.spoken == versions::NEXT {
                around.reach(versions::agreed(version), [self.front as u64, self.place as u64, node.0, 0]);
            }
            self.stage = Stage::Welcome { node, version, heard: now, ping_at: now + PING_INTERVAL };
            self.lost_worker = false;
            around.note("front is welcome", [self.front as u64, self.place as u64, welcome.node.0, welcome.epoch.0]);
            return Some(FrontEvent::ReplicaUp { replica, offer: Box::new(offer(welcome)) });
        }
        let Stage::Welcome { heard, .. } = &mut self.stage else { return None };
        *heard = now;
        let (node, epoch, frame) = match frame {
            FromNode::Outputs(outputs) => (outputs.node, outputs.epoch, ReplicaFrame::Outputs(outputs.outputs)),
            FromNode::GiveBack(back) => {
                let (request, attempt, refusal, suspect) = (back.request, back.attempt, back.refusal, back.suspect);
                (back.node, back.epoch, ReplicaFrame::GiveBack { request, attempt, refusal, suspect })
            }
            FromNode::Status(status) => {
                self.lost_worker |= status.state == NodeState::Recovering;
                (status.node, status.epoch, ReplicaFrame::Status(Box::new(report(&status))))
            }
            FromNode::Pong(pong) => (pong.node, pong.epoch, ReplicaFrame::Pong),
            FromNode::KvChanges(changes) => {
                let (node, epoch, number) = (changes.node, changes.epoch, changes.number);
                (node, epoch, ReplicaFrame::KvChanges { number, events: changes.arrive() })
            }
            FromNode::KvSnapshot(KvSnapshot { node, epoch, number, keys }) => {
                (node, epoch, ReplicaFrame::KvSnapshot { number, keys })
            }
            FromNode::Welcome(_) => unreachable!("handled above"),
            FromNode::Rejected(_) => return self.lose(around),
        };
        Some(FrontEvent::Frame { replica, node, epoch, frame })
    }

    /// Notices a lost or silent node, greets, pings.
    pub(super) fn look_at_time(&mut self, around: &mut Around) -> Option<FrontEvent> {
        let now = around.now();
        let connected = around.network.is_up(self.front, self.place);
        match self.stage {
            Stage::Greeting { again_at } if connected && now >= again_at => {
                self.stage = Stage::Greeting { again_at: now + GREETING_INTERVAL };
                let hello = Hello {
                    versions: self.spoken,
                    front: "front".to_owned(),
                    fleet: "simulated".to_owned(),
                    model: None,
                };
                self.offer(&ToNode::Hello(hello), around);
                None
            }
            Stage::Welcome { heard, .. } if !connected || now.since(heard) > around.mix.max_node_silence => {
                if connected {
                    around.reach("node_silent_for_front", [self.front as u64, self.place as u64, 0, 0]);
                }
                self.lose(around)
            }
            Stage::Welcome { node, version, heard, ping_at } if now >= ping_at => {
                self.stage = Stage::Welcome { node, version, heard, ping_at: now + PING_INTERVAL };
                self.pings += 1;
                self.offer(&ToNode::Ping(Ping { nonce: self.pings }), around);
                None
            }
            Stage::Greeting { .. } | Stage::Welcome { .. } => None,
        }
    }

    /// Sends what the front wants sent; a message that cannot be delivered means that the node is lost.
    pub(super) fn send(&mut self, message: ToReplica, around: &mut Around) -> Option<FrontEvent> {
        if !self.is_welcome() {
            return None;
        }
        let message = match message {
            ToReplica::Submit(submission) => ToNode::Submit(Submit::depart(*submission, around.now())),
            ToReplica::Abort { request, attempt, at_token } => ToNode::Abort(Abort { request, attempt, at_token }),
            ToReplica::Recall { request, attempt } => ToNode::Recall(Recall { request, attempt }),
            ToReplica::KvAsk { from } => ToNode::KvAsk(KvAsk { from }),
        };
        if self.offer(&message, around) { None } else { self.lose(around) }
    }

    pub(super) fn say_goodbye(&self, around: &mut Around) {
        self.offer(&ToNode::Goodbye, around);
    }

    fn offer(&self, message: &ToNode, around: &mut Around) -> bool {
        let version = if let Stage::Welcome { version, .. } = self.stage { version } else { self.spoken.low };
        around.send_to_node(self.front, self.place, version, message)
    }

    fn lose(&mut self, around: &mut Around) -> Option<FrontEvent> {
        let was_welcome = self.is_welcome();
        self.stage = Stage::Greeting { again_at: around.now() + GREETING_INTERVAL };
        around.note("front loses node", [self.front as u64, self.place as u64, u64::from(was_welcome), 0]);
        was_welcome.then_some(FrontEvent::ReplicaDown { replica: self.replica() })
    }
}

fn offer(welcome: Welcome) -> Offer {
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
        state: ReplicaState::Starting,
    }
}

fn report(status: &Status) -> Report {
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
