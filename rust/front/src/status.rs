//! What a front shows of itself: a copy for status pages and metrics, made on demand in O(replicas).

use crate::counters::FrontCounters;
use crate::front::Front;
use llmscale_fleet::{
    HealthCounters, IndexCounters, Load, ModelKey, PrefixIndex, ReplicaLimits, ReplicaState, Report, Tally, Trust,
};
use llmscale_types::{Epoch, NodeId, ReplicaId, Time};

/// A front at one moment.
#[derive(Clone, PartialEq, Debug)]
pub struct FrontStatus {
    /// Requests that wait for a replica.
    pub queued_requests: u64,
    /// Their context tokens.
    pub queued_tokens: u64,
    /// Requests that have not ended.
    pub live_requests: u64,
    /// All replicas that are known, in the order of their numbers.
    pub replicas: Vec<ReplicaStatus>,
    /// Counts since the start.
    pub counters: FrontCounters,
    /// Counts of replicas that were left alone, since the start.
    pub health: HealthCounters,
    /// Prefixes that some replica is known to hold.
    pub known_prefixes: u64,
    /// Memory of what is known of caches.
    pub prefix_bytes: u64,
    /// Changes of caches that were missed and asked for, and prefixes forgotten for want of memory, since the start.
    pub prefixes: IndexCounters,
}

/// One replica at one moment.
#[derive(Clone, PartialEq, Debug)]
pub struct ReplicaStatus {
    /// Its number.
    pub replica: ReplicaId,
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// What it can do; `None` while it is not connected.
    pub state: Option<ReplicaState>,
    /// What it runs.
    pub model: ModelKey,
    /// How it computes.
    pub numerics: String,
    /// Its bounds.
    pub limits: ReplicaLimits,
    /// What it last said; `None` before the first report and while it is down.
    pub report: Option<Report>,
    /// What this front has there.
    pub load: Load,
    /// Predicted time until that is done.
    pub remaining_ns: u64,
    /// Whether it gets work.
    pub trust: Trust,
    /// How it answered lately.
    pub tally: Tally,
    /// How often it was left alone.
    pub ejections: u64,
}

impl Front {
    /// A copy of what is to be seen.
    pub fn status(&self, now: Time) -> FrontStatus {
        let replicas = self.fleet.members().map(|member| ReplicaStatus {
            replica: member.id,
            node: member.node,
            epoch: member.epoch,
            state: member.state,
            model: self.fleet.model(member.pool).clone(),
            numerics: member.numerics.as_ref().to_owned(),
            limits: member.limits.clone(),
            report: member.report.map(|(_, report)| report),
            load: member.load,
            remaining_ns: member.remaining_ns(now),
            trust: member.health.trust(),
            tally: member.health.tally(now, self.fleet.health_options()),
            ejections: member.health.ejections(),
        });
        let prefixes = self.fleet.prefixes();
        FrontStatus {
            queued_requests: self.queued_requests(),
            queued_tokens: self.queued_tokens(),
            live_requests: self.requests.len() as u64,
            replicas: replicas.collect(),
            counters: self.counters,
            health: self.fleet.health_counters(),
            known_prefixes: prefixes.map_or(0, PrefixIndex::keys) as u64,
            prefix_bytes: prefixes.map_or(0, PrefixIndex::bytes) as u64,
            prefixes: prefixes.map(PrefixIndex::counters).unwrap_or_default(),
        }
    }
}
