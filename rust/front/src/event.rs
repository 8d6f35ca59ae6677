//! What happens to a front and what it wants done. Drivers and the simulator own everything in between: sockets, clocks,
//! waking the gateway. A driver hands over every event with its own monotonic time and carries out every action in order.

use crate::delivery::Deliveries;
use llmscale_fleet::{Offer, Report};
use llmscale_types::{
    Attempt, Class, Epoch, FinishReason, KvEvent, LimitError, NodeId, Outputs, PrefixKey, Refusal, ReplicaId,
    RequestId, Sampling, Submission, Time, Token,
};
use std::sync::Arc;

/// What a client wants.
#[derive(Clone, PartialEq, Debug)]
pub struct NewRequest {
    /// Salt of the tenant's cache keys.
    pub namespace: [u8; 32],
    /// The name under which the model is served.
    pub model: String,
    /// Latency class.
    pub class: Class,
    /// Prompt ids.
    pub prompt: Vec<Token>,
    /// Names of the prompt's prefixes, as replicas tell of them; empty if they are not known.
    pub prefix: Arc<[PrefixKey]>,
    /// How to choose tokens and when to end; the seed is drawn already.
    pub sampling: Sampling,
    /// When the request expires.
    pub deadline: Option<Time>,
    /// Nobody reads yet: tokens are kept until a reader attaches, for a bounded time.
    pub detached: bool,
}

/// Something happened.
#[derive(Clone, PartialEq, Debug)]
pub enum FrontEvent {
    /// The client or an operator ends a request. With `at_token`, the first that many output tokens are the answer (a
    /// stop string was matched in them) and the request ends as stopped; without, as aborted.
    Cancel {
        /// Which.
        request: RequestId,
        /// Output tokens that count.
        at_token: Option<u32>,
    },
    /// The client is gone and will not come back.
    ClientGone {
        /// Whose request.
        request: RequestId,
    },
    /// The reader is gone and may come back.
    Detach {
        /// Whose request.
        request: RequestId,
    },
    /// A reader takes over and has the first `from_index` output tokens already.
    Attach {
        /// Which request.
        request: RequestId,
        /// The first token that the reader lacks.
        from_index: u32,
    },
    /// The reader has got the first `up_to_index` output tokens for good. Drivers send this as the client reads: a request
    /// with more than `max_unread_tokens` beyond it is ended.
    Read {
        /// Which request.
        request: RequestId,
        /// Tokens read in all.
        up_to_index: u32,
    },
    /// A node said something.
    Frame {
        /// Over which connection.
        replica: ReplicaId,
        /// Incarnation of the node that the frame names.
        node: NodeId,
        /// Incarnation of its workers that the frame names.
        epoch: Epoch,
        /// What it said.
        frame: ReplicaFrame,
    },
    /// A node welcomed this front.
    ReplicaUp {
        /// The connection.
        replica: ReplicaId,
        /// What it offers.
        offer: Box<Offer>,
    },
    /// A node is lost or said goodbye.
    ReplicaDown {
        /// The connection.
        replica: ReplicaId,
    },
    /// Time has passed; due after `FrontAction::WakeAt`.
    Tick,
}

/// What nodes say.
#[derive(Clone, PartialEq, Debug)]
pub enum ReplicaFrame {
    /// Tokens and ends of one step.
    Outputs(Outputs),
    /// An attempt that may run elsewhere; without a refusal, because it was recalled.
    GiveBack {
        /// The request.
        request: RequestId,
        /// The try.
        attempt: Attempt,
        /// Why it was not taken.
        refusal: Option<Refusal>,
        /// A worker died or raised while computing it, and it has made no progress since.
        suspect: bool,
    },
    /// How the node is doing.
    Status(Box<Report>),
    /// It is there.
    Pong,
    /// Its prefix cache has changed.
    KvChanges {
        /// Which change.
        number: u64,
        /// What changed, in order.
        events: Vec<KvEvent>,
    },
    /// All that its prefix cache holds.
    KvSnapshot {
        /// The change after which this is so.
        number: u64,
        /// Names of prefixes.
        keys: Vec<PrefixKey>,
    },
}

/// Something is to be done.
#[derive(Clone, PartialEq, Debug)]
pub enum FrontAction {
    /// Send this to a replica.
    Send {
        /// The connection.
        replica: ReplicaId,
        /// What to send.
        message: ToReplica,
    },
    /// Hand tokens to readers.
    Deliver(Deliveries),
    /// The one terminal event of a request. Nothing follows; the front has forgotten it.
    Finish {
        /// Which.
        request: RequestId,
        /// Why.
        reason: EndReason,
        /// What it used.
        usage: Usage,
        /// Lost attempts and worker restarts that the stream survived.
        restarts: u32,
    },
    /// Send a `Tick` at this moment. Replaces the moment named before.
    WakeAt(Time),
}

/// What a replica is told.
#[derive(Clone, PartialEq, Debug)]
pub enum ToReplica {
    /// Run this. The deadline is on this front's clock, and the front's own number is for the replica to fill in.
    Submit(Box<Submission>),
    /// Stop that.
    Abort {
        /// The request.
        request: RequestId,
        /// The try.
        attempt: Attempt,
        /// Output tokens that count.
        at_token: Option<u32>,
    },
    /// Give that back, if it has no place on the worker.
    Recall {
        /// The request.
        request: RequestId,
        /// The try.
        attempt: Attempt,
    },
    /// Tell what your prefix cache holds.
    KvAsk {
        /// The first change that this front has not heard of.
        from: u64,
    },
}

/// Why a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndReason {
    /// As a replica or this front says.
    Finished(FinishReason),
    /// No replica could take it in time, or too many died with it.
    Unavailable,
    /// A replica will never take it.
    Refused(Refusal),
}

impl EndReason {
    /// The stable label used in answers, metrics and error codes.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Finished(reason) => reason.label(),
            Self::Unavailable => "unavailable",
            Self::Refused(refusal) => refusal.label(),
        }
    }
}

/// What a request used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of these, found in a prefix cache.
    pub cached_tokens: u32,
    /// Of the answer, up to where it was cut.
    pub output_tokens: u32,
}

/// Why a request is not taken. Nothing was started.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum SubmitError {
    /// A bound of the front or of the model.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A sampling field outside its bounds.
    #[error(transparent)]
    InvalidField(#[from] LimitError),
    /// No replica ever served this name.
    #[error("the model {model:?} is not served here; ask for one that is listed")]
    UnknownModel {
        /// The name.
        model: String,
    },
    /// Its replicas are gone, or none was ever connected.
    #[error("no replica of the model {model:?} is connected; retry later")]
    Unavailable {
        /// The name.
        model: String,
    },
}
