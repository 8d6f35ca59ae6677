//! The replicas that a front sees and the choice among them: `member` is one replica with its load, `fleet` the bounded
//! table, `policy` the door for ways to choose, `index` what replicas hold in their prefix caches, `health` and `ejection`
//! who is left alone because it answers badly. Looking at one replica is O(1), choosing O(1) or O(replicas) as the policy
//! says; nothing here allocates per request. Knows nothing of requests beyond their size, and nothing of connections.

mod ejection;
mod fleet;
mod health;
mod index;
mod member;
pub mod policy;
mod ranking;

pub use ejection::HealthCounters;
pub use fleet::{Fleet, FleetFull, MemberMut};
pub use health::{Health, HealthOptions, Tally, Trust};
pub use index::{IndexCounters, IndexOptions, Level, Levels, PrefixIndex, Taken};
pub use llmscale_types::{KvEvent, PrefixKey};
pub use member::{Load, Member, ModelKey, Offer, PoolId, ReplicaLimits, ReplicaState, Report};
pub use policy::{LeastWork, Need, Policy, PredictedSeconds};
