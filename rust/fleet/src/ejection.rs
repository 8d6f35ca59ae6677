//! Who of a pool is ejected: at most half of those that are ready, the worst first, and never the only one. What a replica
//! did is weighed against what the others did. Counting an event is O(1), one that speaks against a replica O(replicas), and
//! so is the review of step times, which happens once in a while. Running streams stay where they are.

use crate::fleet::Fleet;
use crate::health::{Badness, HealthOptions, Tally};
use crate::member::{Member, PoolId, ReplicaState};
use llmscale_types::{Duration, Planted, ReplicaId, RequestId, Time};
use std::collections::BTreeMap;

/// Step times are compared this often.
const REVIEW_INTERVAL: Duration = Duration::from_millis(1_000);
/// Steps that a replica must have shown before its step time counts, and sequences side by side for which it is compared.
const LEAST_STEPS: u64 = 32;
const COMPARED_SEQUENCES: u32 = 4;
/// Fewer than these have no median that means anything.
const LEAST_ALIKE: usize = 3;

/// Counts since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HealthCounters {
    /// Replicas that were left alone for a while, those included whose probe failed.
    pub ejections: u64,
    /// Probes that failed.
    pub failed_probes: u64,
    /// Replicas that deserved to be ejected while half of their pool was already, by worse ones.
    pub spared: u64,
}

/// How a fleet judges.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Court {
    pub(crate) options: HealthOptions,
    pub(crate) counters: HealthCounters,
    next_review: Time,
}

impl Fleet {
    /// The same fleet with other settings of its breakers.
    #[must_use]
    pub fn with_health(mut self, options: HealthOptions) -> Self {
        self.court.options = options;
        self
    }

    /// Settings of the breakers.
    pub fn health_options(&self) -> &HealthOptions {
        &self.court.options
    }

    /// Counts since the start.
    pub fn health_counters(&self) -> HealthCounters {
        self.court.counters
    }

    /// A replica gave the first token of a request after so long.
    pub fn answered(&mut self, now: Time, id: ReplicaId, request: RequestId, predicted: Duration, taken: Duration) {
        let options = self.court.options;
        let late = options.is_late(predicted, taken);
        let Some(mut member) = self.get_mut(id) else { return };
        let failed_probe = member.health.answered(now, &options, request, late);
        drop(member);
        self.count_probe(failed_probe);
        if late {
            self.judge(now, id);
        }
    }

    /// An attempt ended by its replica's fault, or the replica itself failed.
    pub fn failed(&mut self, now: Time, id: ReplicaId, request: Option<RequestId>) {
        let options = self.court.options;
        let Some(mut member) = self.get_mut(id) else { return };
        let failed_probe = member.health.failed(now, &options, request);
        drop(member);
        self.count_probe(failed_probe);
        self.judge(now, id);
    }

    fn count_probe(&mut self, failed: bool) {
        self.court.counters.failed_probes += u64::from(failed);
        self.court.counters.ejections += u64::from(failed);
    }

    /// Ejects a replica if what was counted is enough.
    fn judge(&mut self, now: Time, id: ReplicaId) {
        let options = self.court.options;
        let Some(member) = self.get(id).filter(|member| is_trusted_and_ready(member)) else { return };
        let others = self.pool_members(member.pool).filter(|other| other.id != id);
        let others = others.map(|other| other.health.tally(now, &options)).fold(Tally::default(), Tally::plus);
        if let Some(badness) = member.health.verdict(now, &options, others) {
            self.eject(now, id, badness);
        }
    }

    fn eject(&mut self, now: Time, id: ReplicaId, badness: Badness) {
        let Some(pool) = self.get(id).map(|member| member.pool) else { return };
        let ejected = self.ejected(pool);
        let is_enough = (ejected.len() + 1) * 2 > self.ranking(pool).count();
        if is_enough && !Planted::EjectsMoreThanHalf.is_here() {
            match ejected.first() {
                Some(&(least_bad, lucky)) if least_bad < badness => self.pardon(lucky),
                _ => {
                    self.court.counters.spared += 1;
                    return;
                }
            }
        }
        let options = self.court.options;
        self.court.counters.ejections += 1;
        self.get_mut(id).expect("it was just looked at").health.eject(now, &options, badness);
    }

    /// Ready replicas of a pool that are not trusted, least bad first.
    fn ejected(&self, pool: PoolId) -> Vec<(Badness, ReplicaId)> {
        let ejected = self.pool_members(pool).filter(|member| is_ready(member) && !member.health.is_trusted());
        let mut ejected: Vec<(Badness, ReplicaId)> =
            ejected.map(|member| (member.health.badness(), member.id)).collect();
        ejected.sort_unstable();
        ejected
    }

    fn pardon(&mut self, id: ReplicaId) {
        self.get_mut(id).expect("it was just listed").health.pardon();
    }

    /// The ready replicas of a pool are others than before: as many are let in again as it takes for half of them.
    pub(crate) fn keep_half(&mut self, pool: PoolId) {
        let ejected = self.ejected(pool);
        let most = self.ranking(pool).count() / 2;
        for &(_, lucky) in ejected.iter().take(ejected.len().saturating_sub(most)) {
            self.pardon(lucky);
        }
    }

    /// Compares step times, if that is due.
    pub fn review(&mut self, now: Time) {
        if now < self.court.next_review {
            return;
        }
        self.court.next_review = now + REVIEW_INTERVAL;
        let mut alike: BTreeMap<(PoolId, &str), Vec<(u64, ReplicaId)>> = BTreeMap::new();
        for member in self.members().filter(|member| is_ready(member) && member.cost().observations() >= LEAST_STEPS) {
            let step_ns = member.cost().predict_decode_step(COMPARED_SEQUENCES);
            alike.entry((member.pool, &member.numerics)).or_default().push((step_ns, member.id));
        }
        let mut slow = Vec::new();
        for mut group in alike.into_values().filter(|group| group.len() >= LEAST_ALIKE) {
            group.sort_unstable();
            let median_ns = group[group.len() / 2].0.max(1);
            let times = group.iter().map(|&(step_ns, id)| (step_ns / median_ns, id));
            slow.extend(times.filter(|&(times, _)| times >= u64::from(self.court.options.slow_factor)));
        }
        for (times, id) in slow {
            if self.get(id).is_some_and(is_trusted_and_ready) {
                self.eject(now, id, Badness::slow(times));
            }
        }
    }

    /// When the next replica of a pool that is left alone now may be tried; `None` if there is none, or it may be now.
    pub fn next_trial(&self, now: Time, pool: PoolId) -> Option<Time> {
        let ends = self.pool_members(pool).filter(|member| is_ready(member)).filter_map(|member| member.health.end());
        ends.filter(|&until| until > now).min()
    }

    /// Asserts what holds between events.
    pub fn check_health(&self) {
        for pool in (0..self.pool_count()).map(PoolId) {
            let (ejected, ready) = (self.ejected(pool).len(), self.ranking(pool).count());
            assert!(ejected * 2 <= ready, "{ejected} of {ready} ready replicas of pool {pool:?} are left alone");
        }
    }
}

fn is_ready(member: &Member) -> bool {
    member.state == Some(ReplicaState::Ready)
}

fn is_trusted_and_ready(member: &Member) -> bool {
    is_ready(member) && member.health.is_trusted()
}
