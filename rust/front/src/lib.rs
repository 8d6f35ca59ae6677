//! The front as a pure state machine: events in, actions out, no clock, socket, thread or randomness. It owns every
//! request from submission to its one terminal event: where it waits, which replica tries it, what its reader has seen,
//! and how it goes on elsewhere when that replica dies. An event costs O(log requests) plus O(replicas) per request that
//! is placed; a frame of N tokens costs O(N). Knows nothing of text, HTTP or sockets.

mod attempt;
mod caches;
mod check;
mod counters;
mod delivery;
mod event;
mod frame;
mod front;
mod health;
mod hedge;
mod membership;
mod options;
mod order;
mod queue;
mod reader;
mod request;
mod retry;
mod status;
mod submit;
mod timers;
mod usual_output;

pub use counters::FrontCounters;
pub use delivery::{Deliveries, Delivery, SoFar};
pub use event::{EndReason, FrontAction, FrontEvent, NewRequest, ReplicaFrame, SubmitError, ToReplica, Usage};
pub use front::Front;
pub use hedge::HedgeOptions;
pub use llmscale_fleet::{
    HealthCounters, HealthOptions, IndexOptions, ModelKey, Offer, PoolId, ReplicaLimits, ReplicaState, Report, Tally,
    Trust,
};
pub use options::FrontOptions;
pub use retry::RetryOptions;
pub use status::{FrontStatus, ReplicaStatus};
