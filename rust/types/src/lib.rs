//! The words that all crates share: ids, time, limits, requests, the plan contract, outputs, errors.
//! A leaf: it depends on nothing of ours and holds no behaviour beyond checks of its own values.

pub mod error;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod output;
pub mod plan;
pub mod planted;
pub mod prefix;
pub mod request;
pub mod time;

pub use error::{LimitError, Refusal};
pub use ids::{
    Attempt, BlockId, DiskBlockId, Epoch, FrontId, GroupId, HostBlockId, NodeId, ReplicaId, RequestId, SequenceKey,
    Slot, StepId, TenantId, Token,
};
pub use limits::{EngineLimits, FrontLimits};
pub use output::{FinishReason, Finished, Outputs, TokenLogprobs};
pub use plan::{
    Admission, BlockCopy, Chunk, CopyDirection, Delta, DiskDirection, DiskReport, DiskTransfer, RowError, StepResult,
};
pub use planted::Planted;
pub use prefix::{KvEvent, PrefixKey};
pub use request::{Class, Sampling, Submission};
pub use time::{Duration, Time};
