//! The door for ways to choose a replica. A policy sees the whole table and the size of one request, and keeps no state:
//! the same table gives the same choice. What a choice costs is each policy's to say.

mod least_work;
mod predicted;

pub use least_work::LeastWork;
pub use predicted::PredictedSeconds;

use crate::fleet::Fleet;
use crate::member::{Member, PoolId};
use llmscale_types::PrefixKey;
use llmscale_types::{Duration, ReplicaId, RequestId, Time};
use std::sync::Arc;

/// What a request needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Need {
    /// The request, for choices at random.
    pub request: RequestId,
    /// Whose replicas may run it.
    pub pool: PoolId,
    /// The longest that the sequence can become.
    pub total_tokens: u64,
    /// Tokens to compute before the next one, as far as they are in no cache.
    pub context_tokens: u64,
    /// Output that is expected.
    pub output_tokens: u64,
    /// Keys of the context in order, as the fleet's index has them; empty if they are not known.
    pub prefix: Arc<[PrefixKey]>,
    /// How its tokens so far were computed; `None` before the first.
    pub numerics: Option<Arc<str>>,
    /// A replica gets only what it can start within this much predicted work.
    pub look_ahead: Duration,
    /// The moment of the choice.
    pub now: Time,
}

impl Need {
    /// Whether a replica may get the request now.
    pub fn fits(&self, member: &Member) -> bool {
        member.pool == self.pool
            && member.takes_work(self.now)
            && self.total_tokens <= u64::from(member.limits.max_sequence_tokens)
            && member.load.sequences < member.seats(self.look_ahead)
            && member.backlog_ns(self.now) < self.look_ahead.0.saturating_mul(1_000).max(1)
    }

    /// Whether a replica would go on with other numbers than the stream has been computed with: its tokens may then differ
    /// from those that would have followed.
    pub fn changes_numerics(&self, member: &Member) -> bool {
        self.numerics.as_ref().is_some_and(|numerics| *numerics != member.numerics)
    }
}

/// A way to choose.
pub trait Policy: Send + std::fmt::Debug {
    /// The replica that gets the request, among those that it fits; `None` keeps it waiting.
    fn choose(&self, fleet: &Fleet, need: &Need) -> Option<ReplicaId>;
}
