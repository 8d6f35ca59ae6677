//! Newtypes for everything that is named by a number, so that a block can never be passed where a slot is meant.
//! Plain `u32`/`u64` inside; ordering follows the number, which keeps every iteration deterministic.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A vocabulary id. Not a newtype: tokens live in long columns that are handed to kernels as they are.
pub type Token = u32;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The id that follows this one; ids are never reused within an incarnation.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("id space is exhausted"))
            }

            /// The number as an index into a column.
            #[must_use]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(formatter)
            }
        }
    };
}

id!(
    /// One client request; unique within the front that made it.
    RequestId(u64)
);
id!(
    /// How often a front has started this request somewhere; frames of an older attempt are stale.
    Attempt(u32)
);
id!(
    /// A front's connection as one replica numbers it; local to that replica.
    FrontId(u32)
);
id!(
    /// The tenant that pays; numbered by the front, mapped to a salt for cache keys.
    TenantId(u32)
);
id!(
    /// A whole model copy, as a front numbers it.
    ReplicaId(u32)
);
id!(
    /// One incarnation of a node process; a restarted node gets a new one.
    NodeId(u64)
);
id!(
    /// One incarnation of a worker group; results of an older epoch are dropped.
    Epoch(u64)
);
id!(
    /// One scheduled round of the model; consecutive within an epoch.
    StepId(u64)
);
id!(
    /// A row of the column arrays that describe running sequences, on the engine and on every worker.
    Slot(u32)
);
id!(
    /// One of the groups that the running set is split into, so that the stages of a pipeline compute side by side.
    GroupId(u32)
);
id!(
    /// One block of KV memory of a replica.
    BlockId(u32)
);
id!(
    /// One block of a replica's host tier: memory of the host that holds what the device had no room for.
    HostBlockId(u32)
);
id!(
    /// One block of a replica's disk tier: a place in every rank's file, below the host tier.
    DiskBlockId(u32)
);

/// Names one try at one request of one front: what every output frame carries, so that stale ones can be dropped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct SequenceKey {
    /// The front that owns the request's life.
    pub front: FrontId,
    /// The request within that front.
    pub request: RequestId,
    /// The try.
    pub attempt: Attempt,
}
