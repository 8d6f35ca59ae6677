//! A second attempt at a request whose first token is late: the first token of either wins, the other attempt is aborted at
//! once, and the request pays for the winner alone. Late is what the slowest twentieth of a pool's first tokens are, beside
//! what was predicted for them. Of all prompt tokens, at most a twentieth are sent twice, and none while a pool is busy or
//! a worker has died with the request: two attempts at a prompt that kills would take down twice as many. O(replicas) per
//! second attempt, O(1) for everything else. Knows nothing of what the tokens are.

use crate::event::{FrontAction, ToReplica};
use crate::front::Front;
use crate::request::{Place, Sent};
use llmscale_fleet::{Member, Need, PoolId, ReplicaState};
use llmscale_types::{Attempt, Duration, LimitError, Planted, ReplicaId, RequestId, Time};

/// Settings of second attempts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HedgeOptions {
    /// Context tokens that may be sent twice, per thousand of first attempts.
    pub permille: u32,
    /// Most context tokens that are saved up for later.
    pub max_saved_tokens: u32,
    /// Before a pool has given so many first tokens, nobody knows what is late.
    pub least_answers: u32,
    /// A first token that is late by less is waited for.
    pub least_wait: Duration,
    /// With more sequences per thousand seats than these, a pool has no room for second attempts.
    pub max_busy_permille: u32,
}

impl Default for HedgeOptions {
    fn default() -> Self {
        Self {
            permille: 50,
            max_saved_tokens: 65_536,
            least_answers: 100,
            least_wait: Duration::from_millis(50),
            max_busy_permille: 850,
        }
    }
}

impl HedgeOptions {
    /// Checks that the sizes fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        LimitError::at_most("hedge permille", u64::from(self.permille), 1_000)?;
        LimitError::at_least("least_answers", u64::from(self.least_answers), 1)?;
        LimitError::at_most("max_busy_permille", u64::from(self.max_busy_permille), 1_000)
    }
}

/// A second attempt beside the one that the request's place names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rival {
    pub(crate) attempt: Attempt,
    pub(crate) sent: Sent,
}

/// How much longer than predicted first tokens took: two buckets per doubling, halved when they are full.
#[derive(Clone, Debug)]
struct Lateness {
    counts: [u32; Self::BUCKETS],
    total: u32,
}

impl Default for Lateness {
    fn default() -> Self {
        Self { counts: [0; Self::BUCKETS], total: 0 }
    }
}

impl Lateness {
    const BUCKETS: usize = 96;
    const MOST: u32 = 1_024;

    fn bucket(excess_us: u64) -> usize {
        let doublings = (excess_us | 1).ilog2();
        let upper_half = if doublings == 0 { 0 } else { excess_us >> (doublings - 1) & 1 };
        ((2 * u64::from(doublings) + upper_half) as usize).min(Self::BUCKETS - 1)
    }

    /// The largest excess of a bucket.
    fn end(bucket: usize) -> Duration {
        let (doublings, half) = (bucket as u32 / 2, bucket as u64 % 2);
        Duration((1 << doublings) + ((half + 1) << doublings >> 1))
    }

    fn observe(&mut self, excess: Duration) {
        self.counts[Self::bucket(excess.0)] += 1;
        self.total += 1;
        if self.total >= Self::MOST {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().sum();
        }
    }

    /// What 95 of 100 stay below.
    fn late(&self) -> Duration {
        let mut above = self.total / 20;
        let found = (0..Self::BUCKETS).rev().find(|&bucket| {
            let reached = self.counts[bucket] > above;
            above = above.saturating_sub(self.counts[bucket]);
            reached
        });
        Self::end(found.unwrap_or(0))
    }
}

/// What a front keeps for second attempts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hedging {
    /// Thousandths of context tokens that may be sent twice.
    saved: u64,
    /// By pool number.
    lateness: Vec<Lateness>,
    /// Second attempts under way.
    pub(crate) live: u32,
}

impl Front {
    /// The first token of an attempt of a pool took so much longer than predicted.
    pub(crate) fn observe_lateness(&mut self, pool: PoolId, excess: Duration) {
        let place = pool.0 as usize;
        if self.hedging.lateness.len() <= place {
            self.hedging.lateness.resize_with(place + 1, Lateness::default);
        }
        self.hedging.lateness[place].observe(excess);
    }

    /// A first attempt was sent: when a second one would follow.
    pub(crate) fn plan_hedge(&mut self, now: Time, id: RequestId, sent: &Sent) {
        let Some(options) = self.options.hedging else { return };
        let request = &self.requests[&id];
        if request.last_attempt != Attempt(1) || request.suspect {
            return;
        }
        let context_tokens = u64::from(request.context_tokens());
        self.counters.first_attempt_tokens += context_tokens;
        let most = u64::from(options.max_saved_tokens) * 1_000;
        self.hedging.saved = (self.hedging.saved + context_tokens * u64::from(options.permille)).min(most);
        let known = self.hedging.lateness.get(request.pool.0 as usize);
        let known = known.filter(|lateness| lateness.total >= options.least_answers);
        let hedge_at = known.map(|lateness| now + sent.predicted + lateness.late().max(options.least_wait));
        self.request_mut(id).hedge_at = hedge_at;
    }

    /// The first token is late.
    pub(crate) fn hedge(&mut self, now: Time, id: RequestId, out: &mut Vec<FrontAction>) {
        self.request_mut(id).hedge_at = None;
        if let Some(replica) = self.rival_for(now, id) {
            let context_tokens = u64::from(self.requests[&id].context_tokens());
            if self.hedging.saved >= context_tokens * 1_000 {
                self.hedging.saved -= context_tokens * 1_000;
                self.counters.hedges += 1;
                self.counters.hedged_tokens += context_tokens;
                let (attempt, sent) = self.launch(now, id, replica, out);
                self.hedging.live += 1;
                self.request_mut(id).rival = Some(Rival { attempt, sent });
            }
        }
        self.arm(id);
    }

    /// The best other replica, if there is one, and room for a second attempt.
    fn rival_for(&self, now: Time, id: RequestId) -> Option<ReplicaId> {
        let options = self.options.hedging?;
        let Place::Sent(sent) = self.requests[&id].place else { return None };
        let state = self.fleet.get(sent.replica).and_then(|member| member.state);
        if sent.started || state != Some(ReplicaState::Ready) {
            return None;
        }
        let need = self.need(now, id);
        if !self.queue(need.pool).is_empty() || self.is_busy(need.pool, options.max_busy_permille) {
            return None;
        }
        let cost_ns = |member: &&Member| (member.backlog_ns(now) + member.prefill_ns(need.context_tokens), member.id);
        self.rivals(&need, sent.replica).min_by_key(cost_ns).map(|member| member.id)
    }

    fn rivals<'a>(&'a self, need: &'a Need, first: ReplicaId) -> impl Iterator<Item = &'a Member> {
        let others = self.fleet.pool_members(need.pool).filter(move |member| member.id != first);
        others.filter(|member| need.fits(member) && member.health.is_trusted())
    }

    fn is_busy(&self, pool: PoolId, max_busy_permille: u32) -> bool {
        let ready = self.fleet.pool_members(pool).filter(|member| member.state == Some(ReplicaState::Ready));
        let (running, seats) = ready.fold((0, 0), |(running, seats), member| {
            let reported = member.report.map_or(0, |(_, report)| report.running);
            let here = member.load.sequences.max(reported);
            (running + u64::from(here), seats + u64::from(member.limits.max_sequences))
        });
        running * 1_000 > seats * u64::from(max_busy_permille)
    }

    /// An attempt is the first to say something: the other one is over.
    pub(crate) fn settle_race(
        &mut self,
        now: Time,
        (id, attempt): (RequestId, Attempt),
        replica: ReplicaId,
        out: &mut Vec<FrontAction>,
    ) {
        let Some(request) = self.requests.get(&id) else { return };
        let (Some(rival), Place::Sent(first)) = (request.rival, request.place) else { return };
        if (rival.sent.replica, rival.attempt) == (replica, attempt) {
            self.counters.hedge_wins += 1;
            let taken = now.since(first.at);
            // It may still answer, but nobody will hear of it.
            if self.fleet.health_options().is_late(first.predicted, taken) {
                self.fleet.answered(now, first.replica, id, first.predicted, taken);
            }
            self.swap_rival(id);
        } else if (first.replica, request.attempt) != (replica, attempt) {
            return;
        }
        if !Planted::KeepsRacingAfterTheFirstToken.is_here() {
            self.drop_rival(id, true, out);
        }
    }

    /// Before the rows of a frame are taken: first tokens decide races.
    pub(crate) fn settle_races(
        &mut self,
        now: Time,
        replica: ReplicaId,
        rows: impl Iterator<Item = ((RequestId, Attempt), u32)>,
        out: &mut Vec<FrontAction>,
    ) {
        for (key, _) in rows.filter(|&(_, index)| index == 0) {
            self.settle_race(now, key, replica, out);
        }
    }

    /// The second attempt takes the place of the first, and the first of the second.
    pub(crate) fn swap_rival(&mut self, id: RequestId) {
        let request = self.request_mut(id);
        if let (Some(rival), Place::Sent(sent)) = (request.rival, request.place) {
            request.rival = Some(Rival { attempt: request.attempt, sent });
            request.place = Place::Sent(rival.sent);
            request.attempt = rival.attempt;
            self.arm(id);
        }
    }

    /// Whether an attempt is the second one of a request.
    pub(crate) fn is_rival(&self, id: RequestId, attempt: Attempt, replica: ReplicaId) -> bool {
        let rival = self.requests.get(&id).and_then(|request| request.rival);
        rival.is_some_and(|rival| (rival.attempt, rival.sent.replica) == (attempt, replica))
    }

    /// There is only one attempt from now on.
    pub(crate) fn drop_rival(&mut self, id: RequestId, abort: bool, out: &mut Vec<FrontAction>) {
        if let Some(rival) = self.request_mut(id).rival.take() {
            self.hedging.live -= 1;
            self.take_off(id, &rival.sent);
            if abort {
                let (replica, attempt) = (rival.sent.replica, rival.attempt);
                let message = ToReplica::Abort { request: id, attempt, at_token: None };
                out.push(FrontAction::Send { replica, message });
            }
        }
    }

    /// A worker died: what it was computing is not tried at two places, now or later.
    pub(crate) fn end_races_on(&mut self, replica: ReplicaId, out: &mut Vec<FrontAction>) {
        let here: Vec<RequestId> = self.sent.get(&replica).into_iter().flatten().copied().collect();
        for id in here {
            self.request_mut(id).hedge_at = None;
            self.drop_rival(id, true, out);
        }
    }

    /// Whether two attempts at a request are under way.
    pub fn is_hedged(&self, id: RequestId) -> bool {
        self.requests.get(&id).is_some_and(|request| request.rival.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::Lateness;
    use llmscale_types::Duration;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_late_is_within_half_of_the_slowest_twentieth(
            excesses in prop::collection::vec(0_u64..1 << 30, 1..1_000),
        ) {
            let mut lateness = Lateness::default();
            for &excess in &excesses {
                lateness.observe(Duration(excess));
            }
            let mut sorted = excesses.clone();
            sorted.sort_unstable_by_key(|&excess| std::cmp::Reverse(excess));
            let exact = sorted[sorted.len() / 20];
            let late = lateness.late().0;
            prop_assert!(late >= exact && late <= exact + exact / 2 + 2, "{late} for {exact}");
        }
    }

    #[test]
    fn old_answers_fade() {
        let mut lateness = Lateness::default();
        (0..1_000).for_each(|_| lateness.observe(Duration(1_000_000)));
        (0..20_000).for_each(|_| lateness.observe(Duration(100)));
        assert!(lateness.late().0 < 200);
    }
}
