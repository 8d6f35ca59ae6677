//! Replicas come, go, report, drain and recover, and their requests move with as little loss as each case allows: a dead
//! one loses attempts but no token, a draining one is left as soon as another that computes alike has room, a recovering
//! one keeps its streams for a while and gives back what it had not begun. O(requests on the replica) per change of state.

use crate::attempt::Loss;
use crate::event::{EndReason, FrontAction, ToReplica};
use crate::front::Front;
use crate::queue::Queue;
use crate::request::Place;
use crate::timers::Due;
use llmscale_fleet::{Need, Offer, PoolId, ReplicaState, Report};
use llmscale_types::{EngineLimits, ReplicaId, RequestId, Time};

impl Front {
    pub(crate) fn replica_up(&mut self, now: Time, replica: ReplicaId, mut offer: Offer, out: &mut Vec<FrontAction>) {
        // No node may make this front take a request whose submission would not fit a frame.
        offer.limits.max_sequence_tokens = offer.limits.max_sequence_tokens.min(EngineLimits::MAX_SEQUENCE_TOKENS);
        // A connection that comes up twice went down unseen, and the node has dropped what it ran for it.
        self.replica_down(now, replica, out);
        let Ok(pool) = self.fleet.join(replica, offer) else {
            self.counters.refused_replicas += 1;
            return;
        };
        self.queues.resize_with(self.fleet.pool_count() as usize, Queue::default);
        self.watch_pool(now, pool);
        for other in (0..self.fleet.pool_count()).map(PoolId).filter(|&other| other != pool) {
            self.rebind(other);
        }
        self.leave_draining(now, out);
    }

    pub(crate) fn replica_down(&mut self, now: Time, replica: ReplicaId, out: &mut Vec<FrontAction>) {
        let Some(member) = self.fleet.get(replica).filter(|member| member.state.is_some()) else {
            return;
        };
        let pool = member.pool;
        if let Some(until) = member.refused_until {
            self.timers.clear(until, Due::Replica(replica));
        }
        self.blame_lost(now, replica);
        for id in self.attempts_on(replica) {
            if self.requests[&id].rival.is_some_and(|rival| rival.sent.replica == replica) {
                self.drop_rival(id, false, out);
            } else {
                self.lose(id, Loss::Node, out);
            }
        }
        self.sent.remove(&replica);
        self.recovering.remove(&replica);
        self.fleet.leave(replica);
        self.watch_pool(now, pool);
        self.rebind(pool);
    }

    /// A pool's clock runs from when it has no replica to wait for until it has one again.
    pub(crate) fn watch_pool(&mut self, now: Time, pool: PoolId) {
        let max_alone = self.options.max_without_replica;
        match (self.fleet.has_prospect(pool), self.queue(pool).alone_since) {
            (true, Some(since)) => {
                self.queue_mut(pool).alone_since = None;
                self.timers.clear(since + max_alone, Due::Pool(pool));
            }
            (false, None) => {
                self.queue_mut(pool).alone_since = Some(now);
                self.timers.set(now + max_alone, Due::Pool(pool));
            }
            (true, None) | (false, Some(_)) => {}
        }
    }

    /// A replica that was full may be tried again.
    pub(crate) fn refusal_over(&mut self, replica: ReplicaId) {
        if let Some(mut member) = self.fleet.get_mut(replica) {
            member.refused_until = None;
        }
    }

    /// Nobody came back in time: what waits for this pool ends, here or on a replica without a worker, and nothing new is
    /// taken for it. Streams stay on such a replica, as nobody else has what they have computed.
    pub(crate) fn give_up_pool(&mut self, pool: PoolId, out: &mut Vec<FrontAction>) {
        self.queue_mut(pool).alone_since = None;
        for replica in self.replicas_in(ReplicaState::Recovering) {
            for id in self.attempts_on(replica) {
                let request = &self.requests[&id];
                if request.pool == pool && request.output_tokens() == 0 {
                    self.withdraw(id, None, out);
                    self.conclude(id, EndReason::Unavailable, out);
                }
            }
        }
        let waiting: Vec<RequestId> = self.queue(pool).all().collect();
        for id in waiting {
            self.dequeue(id);
            self.conclude(id, EndReason::Unavailable, out);
        }
    }

    /// Requests of a dead pool that have no token yet go to the pool that serves the name now, if it reads the same ids:
    /// a new revision takes over from an old one.
    fn rebind(&mut self, pool: PoolId) {
        if self.fleet.is_alive(pool) || self.queue(pool).is_empty() {
            return;
        }
        let Some((heir, longest)) = self.heir(pool) else {
            return;
        };
        let waiting: Vec<RequestId> = self.queue(pool).all().collect();
        for id in waiting {
            if self.may_inherit(id, longest) {
                self.dequeue(id);
                self.request_mut(id).pool = heir;
                self.enqueue(id);
            }
        }
    }

    /// The pool that takes over from a dead one, and the longest sequence that it takes.
    fn heir(&self, pool: PoolId) -> Option<(PoolId, u64)> {
        let model = self.fleet.model(pool);
        let heir = self.fleet.serving(model.served_name())?;
        let fits = heir != pool
            && self.fleet.is_alive(heir)
            && self.fleet.model(heir).tokenizer_digest == model.tokenizer_digest;
        let longest = self.fleet.pool_members(heir).map(|member| member.limits.max_sequence_tokens).max();
        fits.then(|| (heir, u64::from(longest.unwrap_or(0))))
    }

    fn may_inherit(&self, id: RequestId, longest: u64) -> bool {
        let request = &self.requests[&id];
        request.output_tokens() == 0 && request.max_total_tokens() <= longest
    }

    /// A request that is in no queue goes to the pool that takes over from its own. Whether one does.
    pub(crate) fn enqueue_for_heir(&mut self, id: RequestId) -> bool {
        let found = self.heir(self.requests[&id].pool).filter(|&(_, longest)| self.may_inherit(id, longest));
        if let Some((heir, _)) = found {
            self.request_mut(id).pool = heir;
            self.enqueue(id);
        }
        found.is_some()
    }

    pub(crate) fn reported(&mut self, now: Time, replica: ReplicaId, report: Report, out: &mut Vec<FrontAction>) {
        let mut member = self.fleet.get_mut(replica).expect("the fence has passed");
        member.report = Some((now, report));
        let last = member.state.replace(report.state);
        let pool = member.pool;
        drop(member);
        if last != Some(report.state) {
            self.watch_pool(now, pool);
        }
        if report.state == ReplicaState::Recovering {
            self.end_races_on(replica, out);
            self.recovering.entry(replica).or_insert(now);
        } else {
            self.recovering.remove(&replica);
        }
        self.kv_heard_of(now, replica, report.kv_changes, out);
        self.relieve(now, out);
    }

    /// Moves work off replicas that cannot do it soon, as far as others can.
    pub(crate) fn relieve(&mut self, now: Time, out: &mut Vec<FrontAction>) {
        self.leave_draining(now, out);
        self.recall_stranded(now, out);
    }

    /// Streams on draining replicas go on wherever there is room now and tokens come out the same; else they stay until the
    /// node goes.
    fn leave_draining(&mut self, now: Time, out: &mut Vec<FrontAction>) {
        for replica in self.replicas_in(ReplicaState::Draining) {
            for id in self.attempts_on(replica) {
                // What has not begun is given back by the node itself.
                if !self.has_started(id) || !self.can_move(now, id) {
                    continue;
                }
                self.counters.moved += 1;
                self.abort(id, replica, None, out);
                let pool = self.requests[&id].pool;
                self.lose(id, Loss::NoFault, out);
                self.place_waiting(now, pool, out);
            }
        }
    }

    fn can_move(&self, now: Time, id: RequestId) -> bool {
        let need = self.need(now, id);
        let chosen = self.policy.choose(&self.fleet, &need).and_then(|replica| self.fleet.get(replica));
        chosen.is_some_and(|member| !need.changes_numerics(member))
    }

    /// Asks back what has not begun on a replica that cannot begin it soon, when another one could; and the streams of one
    /// that is without a worker for longer than a spare takes, when another one computes alike.
    fn recall_stranded(&mut self, now: Time, out: &mut Vec<FrontAction>) {
        for replica in self.replicas_in(ReplicaState::Recovering) {
            let since = self.recovering.get(&replica);
            let long = since.is_some_and(|&since| now.since(since) >= self.options.max_recovering);
            for id in self.attempts_on(replica) {
                let wanted = if self.has_started(id) {
                    long && self.can_move(now, id)
                } else {
                    self.policy.choose(&self.fleet, &self.need(now, id)).is_some()
                };
                if wanted {
                    self.recall(id, out);
                }
            }
        }
        for replica in self.replicas_in(ReplicaState::Ready) {
            let member = self.fleet.get(replica).expect("it was just listed");
            let late = member.backlog_ns(now) / 2_000 > self.options.limits.look_ahead.0;
            if !late || !self.queue(member.pool).is_empty() {
                continue;
            }
            let mut unstarted = self.sent.get(&replica).into_iter().flatten().rev();
            let Some(&id) = unstarted.find(|&&id| !self.has_started(id)) else { continue };
            let need = self.need(now, id);
            if self.idle_elsewhere(replica, &need) {
                self.recall(id, out);
            }
        }
    }

    fn has_started(&self, id: RequestId) -> bool {
        matches!(self.requests[&id].place, Place::Sent(sent) if sent.started)
    }

    /// Whether another replica has nothing to begin and could begin this.
    fn idle_elsewhere(&self, replica: ReplicaId, need: &Need) -> bool {
        self.fleet
            .pool_members(need.pool)
            .any(|member| member.id != replica && member.load.unstarted_sequences == 0 && need.fits(member))
    }

    pub(crate) fn recall(&mut self, id: RequestId, out: &mut Vec<FrontAction>) {
        let request = self.request_mut(id);
        let attempt = request.attempt;
        let Place::Sent(sent) = &mut request.place else { panic!("request {id} is not on a replica") };
        // The race decides where a request with two attempts stays.
        if !sent.recalled && request.rival.is_none() {
            sent.recalled = true;
            let replica = sent.replica;
            self.counters.recalls += 1;
            out.push(FrontAction::Send { replica, message: ToReplica::Recall { request: id, attempt } });
        }
    }

    fn replicas_in(&self, state: ReplicaState) -> Vec<ReplicaId> {
        self.fleet.members().filter(|member| member.state == Some(state)).map(|member| member.id).collect()
    }

    /// Oldest first.
    fn attempts_on(&self, replica: ReplicaId) -> Vec<RequestId> {
        self.sent.get(&replica).into_iter().flatten().copied().collect()
    }
}
