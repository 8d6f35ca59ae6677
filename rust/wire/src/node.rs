//! What a front says to a node and what the node answers. A front greets, the node welcomes it with its identity and
//! limits (or rejects it), then submissions and outputs flow; frames of a node name its incarnation and worker epoch, so
//! that a front can drop what a dead one sent. Time is always a span that is left, never a date.

use crate::caches::{KvAsk, KvChanges, KvSnapshot};
use crate::field::{codes, open_record, record};
use crate::frame::messages;
use crate::identity::{ModelIdentity, ModelRef, NodeLimits};
use crate::version::VersionRange;
use llmscale_types::{
    Attempt, Class, Duration, Epoch, FrontId, NodeId, Outputs, Refusal, RequestId, Sampling, SequenceKey, Submission,
    Time, Token,
};

/// From a front to a node.
#[derive(Clone, PartialEq, Debug)]
pub enum ToNode {
    /// The first frame of a connection.
    Hello(Hello),
    /// Run this.
    Submit(Submit),
    /// Stop that.
    Abort(Abort),
    /// Give that back, if it was not admitted yet.
    Recall(Recall),
    /// Are you there?
    Ping(Ping),
    /// The front goes away; what it left running is to be dropped.
    Goodbye,
    /// What does your prefix cache hold?
    KvAsk(KvAsk),
}

/// From a node to a front.
#[derive(Clone, PartialEq, Debug)]
pub enum FromNode {
    /// The answer to a greeting.
    Welcome(Welcome),
    /// Tokens and ends of one step.
    Outputs(NodeOutputs),
    /// An attempt that the node does not run (any more) and that may run elsewhere.
    GiveBack(GiveBack),
    /// How the node is doing.
    Status(Status),
    /// The answer to a ping.
    Pong(Pong),
    /// The connection is not wanted.
    Rejected(Rejected),
    /// The prefix cache has changed.
    KvChanges(KvChanges),
    /// All that the prefix cache holds.
    KvSnapshot(KvSnapshot),
}

messages!(ToNode { Hello = 0 (Hello), Submit = 1 (Submit), Abort = 2 (Abort), Recall = 3 (Recall), Ping = 4 (Ping), Goodbye = 5, KvAsk = 6 (KvAsk) } handshake Hello);
messages!(FromNode {
    Welcome = 0 (Welcome),
    Outputs = 1 (NodeOutputs),
    GiveBack = 2 (GiveBack),
    Status = 3 (Status),
    Pong = 4 (Pong),
    Rejected = 5 (Rejected),
    KvChanges = 6 (KvChanges),
    KvSnapshot = 7 (KvSnapshot),
} handshake Welcome, Rejected);

/// A greeting.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Versions that the front speaks.
    pub versions: VersionRange,
    /// The front's name, for logs and metrics.
    pub front: String,
    /// The fleet that the front belongs to.
    pub fleet: String,
    /// The model that the front expects; a node of another one rejects.
    pub model: Option<ModelRef>,
}

/// A submission on its way: without the front's number, which the node gives, and with time left instead of a date.
#[derive(Clone, PartialEq, Debug)]
pub struct Submit {
    /// The request, as the front numbers it.
    pub request: RequestId,
    /// The try.
    pub attempt: Attempt,
    /// Salt of the tenant's cache keys.
    pub namespace: [u8; 32],
    /// Latency class.
    pub class: Class,
    /// Prompt ids followed by the ids that earlier attempts emitted.
    pub context: Vec<Token>,
    /// How many ids of the context are prompt.
    pub prompt_tokens: u32,
    /// How to choose tokens and when to end.
    pub sampling: Sampling,
    /// Time until the request expires.
    pub remaining: Option<Duration>,
    /// A worker died or raised while computing it, and it has made no progress since.
    pub suspect: bool,
}

impl Submit {
    /// The wire form of a submission that leaves now.
    pub fn depart(submission: Submission, now: Time) -> Self {
        Self {
            request: submission.key.request,
            attempt: submission.key.attempt,
            namespace: submission.namespace,
            class: submission.class,
            context: submission.context,
            prompt_tokens: submission.prompt_tokens,
            sampling: submission.sampling,
            remaining: submission.deadline.map(|deadline| deadline.since(now)),
            suspect: submission.suspect,
        }
    }

    /// The submission as the receiver sees it: under its own number for the front and on its own clock.
    pub fn arrive(self, front: FrontId, now: Time) -> Submission {
        Submission {
            key: SequenceKey { front, request: self.request, attempt: self.attempt },
            namespace: self.namespace,
            class: self.class,
            context: self.context,
            prompt_tokens: self.prompt_tokens,
            sampling: self.sampling,
            deadline: self.remaining.map(|remaining| now + remaining),
            suspect: self.suspect,
        }
    }
}

/// The end of an attempt, by the front's wish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Abort {
    /// The request.
    pub request: RequestId,
    /// The try.
    pub attempt: Attempt,
    /// Output tokens that count; later ones are dropped.
    pub at_token: Option<u32>,
}

/// A try that the front would rather place elsewhere. One that has a place on the worker stays, and nothing is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recall {
    /// The request.
    pub request: RequestId,
    /// The try.
    pub attempt: Attempt,
}

/// A question for life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ping {
    /// Comes back in the answer.
    pub nonce: u64,
}

/// The answer to a greeting.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// The version that both will use.
    pub version: u8,
    /// Which incarnation of the node process this is.
    pub node: NodeId,
    /// Which incarnation of its workers.
    pub epoch: Epoch,
    /// What it runs.
    pub model: ModelIdentity,
    /// Its bounds.
    pub limits: NodeLimits,
}

/// The outputs of one step for one front.
#[derive(Clone, PartialEq, Debug)]
pub struct NodeOutputs {
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// The columns.
    pub outputs: Outputs,
}

/// An attempt that comes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GiveBack {
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// The request.
    pub request: RequestId,
    /// The try.
    pub attempt: Attempt,
    /// Why it was not taken; `None` when the front recalled it.
    pub refusal: Option<Refusal>,
    /// A worker died or raised while computing it, and it has made no progress since.
    pub suspect: bool,
}

/// What a node can do right now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeState {
    /// Workers load the model.
    Starting,
    /// It takes work.
    Ready,
    /// A worker died; its sequences wait for the next one.
    Recovering,
    /// It hands its work back and will go.
    Draining,
}

/// How a node is doing, every few hundred milliseconds and at every change of state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// What it can do.
    pub state: NodeState,
    /// Sequences that run.
    pub running: u32,
    /// Sequences that wait on the node.
    pub waiting: u32,
    /// Context tokens of those that wait.
    pub queued_tokens: u64,
    /// Predicted time until everything that waits has started.
    pub predicted_backlog_ns: u64,
    /// KV blocks without an owner.
    pub free_blocks: u32,
    /// Steps completed since the process started.
    pub steps: u64,
    /// Sequences that lost their blocks to others, since the start.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache, since the start.
    pub prefix_queries: u64,
    /// Prompt tokens found there, since the start.
    pub prefix_hits: u64,
    /// KV blocks copied to the host when they were evicted, since the start.
    pub offloaded_blocks: u64,
    /// KV blocks copied back from the host, since the start.
    pub restored_blocks: u64,
    /// Host blocks that did not hold what they should, since the start.
    pub bad_host_blocks: u64,
    /// Workers that were started again, since the start.
    pub worker_restarts: u32,
    /// Process id of the first worker; `None` while there is none.
    pub worker_pid: Option<u32>,
    /// Time that steps took, since the start.
    pub step_ns: u64,
    /// Of it, what the last stage of a pipeline waited for the stages before it: the bubble.
    pub stage_wait_ns: u64,
    /// Number of the last change of the prefix cache that fronts were told.
    pub kv_changes: u64,
    /// KV blocks written from the host to the disk, since the start.
    pub disk_written_blocks: u64,
    /// KV blocks read from the disk to the host, since the start.
    pub disk_read_blocks: u64,
    /// Disk blocks that did not hold what they should, or could not be read, since the start.
    pub bad_disk_blocks: u64,
    /// Writes to the disk that failed, since the start.
    pub failed_disk_writes: u64,
    /// How often a step's copies waited for the disk, since the start.
    pub disk_waits: u64,
    /// Records of what the disk holds that were not written beside it, since the start: misses after the next start.
    pub lost_disk_records: u64,
    /// What those steps were predicted to take without their copies, since the start.
    pub predicted_step_ns: u64,
    /// By how much each of them took longer or shorter, added up.
    pub step_error_ns: u64,
    /// Steps whose prefill was cut so that streams beside it wait less, since the start.
    pub paced_steps: u64,
}

/// The answer to a ping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pong {
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// From the ping.
    pub nonce: u64,
}

/// Why a node does not want a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RejectCode {
    /// No common version.
    UnsupportedVersion,
    /// The front belongs to another fleet.
    WrongFleet,
    /// The node runs another model.
    WrongModel,
    /// The node serves as many fronts as it may.
    TooManyFronts,
    /// A frame that could not be read.
    Malformed,
    /// A frame before the greeting.
    NotGreeted,
}

/// The end of a connection, by the node's wish.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejected {
    /// Why.
    pub code: RejectCode,
    /// Why, for people.
    pub message: String,
    /// Versions that the node speaks.
    pub versions: VersionRange,
}

record!(VersionRange { low: u8, high: u8 });
open_record!(Hello { versions: VersionRange, front: String, fleet: String, model: Option<ModelRef> });
record!(Submit {
    request: RequestId,
    attempt: Attempt,
    namespace: [u8; 32],
    class: Class,
    context: Vec<Token>,
    prompt_tokens: u32,
    sampling: Sampling,
    remaining: Option<Duration>,
    suspect: bool,
});
record!(Abort { request: RequestId, attempt: Attempt, at_token: Option<u32> });
record!(Recall { request: RequestId, attempt: Attempt });
record!(Ping { nonce: u64 });
open_record!(Welcome { version: u8, node: NodeId, epoch: Epoch, model: ModelIdentity, limits: NodeLimits });
record!(NodeOutputs { node: NodeId, epoch: Epoch, outputs: Outputs });
record!(GiveBack {
    node: NodeId,
    epoch: Epoch,
    request: RequestId,
    attempt: Attempt,
    refusal: Option<Refusal>,
    suspect: bool,
});
codes!(NodeState { Starting = 0, Ready = 1, Recovering = 2, Draining = 3 });
record!(Status {
    node: NodeId,
    epoch: Epoch,
    state: NodeState,
    running: u32,
    waiting: u32,
    queued_tokens: u64,
    predicted_backlog_ns: u64,
    free_blocks: u32,
    steps: u64,
    preemptions: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    offloaded_blocks: u64,
    restored_blocks: u64,
    bad_host_blocks: u64,
    worker_restarts: u32,
    worker_pid: Option<u32>,
    step_ns: u64,
    stage_wait_ns: u64,
    kv_changes: u64,
    disk_written_blocks: u64,
    disk_read_blocks: u64,
    bad_disk_blocks: u64,
    failed_disk_writes: u64,
    disk_waits: u64,
    lost_disk_records: u64,
    predicted_step_ns: u64,
    step_error_ns: u64,
    paced_steps: u64,
});
record!(Pong { node: NodeId, epoch: Epoch, nonce: u64 });
codes!(RejectCode {
    UnsupportedVersion = 0,
    WrongFleet = 1,
    WrongModel = 2,
    TooManyFronts = 3,
    Malformed = 4,
    NotGreeted = 5,
});
open_record!(Rejected { code: RejectCode, message: String, versions: VersionRange });
