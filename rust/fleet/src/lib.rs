//! The replicas that a front sees and the choice among them: `member` is one replica with its load, `fleet` the bounded
//! table, `policy` the door for ways to choose, `index` what replicas hold in their prefix caches. Looking at one replica
//! is O(1), choosing O(1) or O(replicas) as the policy says; nothing here allocates per request. Knows nothing of requests beyond their size, and
//! nothing of connections.

mod fleet;
mod index;
mod member;
pub mod policy;
mod ranking;

pub use fleet::{Fleet, FleetFull, MemberMut};
pub use index::{IndexCounters, IndexOptions, Level, Levels, PrefixIndex, Taken};
pub use llmscale_types::{KvEvent, PrefixKey};
pub use member::{Load, Member, ModelKey, Offer, PoolId, ReplicaLimits, ReplicaState, Report};
pub use policy::{LeastWork, Need, Policy, PredictedSeconds};
