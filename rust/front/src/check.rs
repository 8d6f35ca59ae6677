//! The invariants of a front, each compared with a count made from scratch. Linear in everything, so for tests, the
//! simulator and debugging doors; the cheap half of them is asserted in every change anyway.

use crate::counters::FrontCounters;
use crate::front::Front;
use crate::request::{Place, Request};
use crate::timers::Due;
use llmscale_fleet::Load;
use llmscale_types::{ReplicaId, RequestId};
use std::collections::BTreeMap;

impl Front {
    /// Panics with what is wrong if the books disagree.
    pub fn check(&self) {
        let limits = &self.options.limits;
        assert!(self.requests.len() as u64 <= u64::from(limits.max_live_requests), "too many live requests");
        let counters = &self.counters;
        let live = self.requests.len() as u64;
        assert_eq!(counters.submitted, counters.finished + live, "every request lives or has ended once");
        let requests: BTreeMap<RequestId, &Request> =
            self.requests.iter().map(|(&id, request)| (id, request)).collect();
        for (&id, request) in &requests {
            self.check_request(id, request);
        }
        self.check_queues(&requests);
        self.check_loads(&requests);
        self.check_timers(&requests);
        self.fleet.check_health();
        self.check_hedges(&requests);
    }

    fn check_hedges(&self, requests: &BTreeMap<RequestId, &Request>) {
        let raced = requests.values().filter(|request| request.rival.is_some());
        assert_eq!(raced.count(), self.hedging.live as usize, "second attempts are counted");
        let permille = self.options.hedging.map_or(0, |options| u64::from(options.permille));
        let FrontCounters { hedged_tokens, first_attempt_tokens, .. } = self.counters;
        assert!(hedged_tokens * 1_000 <= first_attempt_tokens * permille, "too many tokens were sent twice");
        for (id, request) in requests {
            if let Some(rival) = request.rival {
                assert_eq!(request.output_tokens(), 0, "request {id} has two attempts after its first token");
                assert!(matches!(request.place, Place::Sent(sent) if sent.replica != rival.sent.replica));
                assert!(rival.attempt != request.attempt && request.lost == 0 && request.restarts == 0);
            }
        }
    }

    fn check_request(&self, id: RequestId, request: &Request) {
        assert!(id <= self.last_request, "request {id} was never given out");
        assert!(request.output_tokens() <= request.sampling.max_tokens, "request {id} has surplus tokens");
        assert!(request.read_tokens() <= request.output_tokens(), "request {id} was read beyond its end");
        assert!(request.unread_tokens() <= self.options.limits.max_unread_tokens, "request {id} keeps too much");
        let over = matches!(request.place, Place::Held(_));
        assert!(over || request.lost < self.options.limits.max_attempts, "request {id} had too many attempts");
        for index in request.kept_logprobs() {
            let unread = request.read_tokens()..request.output_tokens();
            assert!(unread.contains(&index), "request {id} keeps log probabilities that nobody wants");
        }
        if let Place::Held(_) = request.place {
            assert!(request.reader != crate::request::Reader::Attached, "request {id} keeps its end from its reader");
        }
    }

    fn check_queues(&self, requests: &BTreeMap<RequestId, &Request>) {
        let mut queued = 0;
        for (pool, queue) in self.queues.iter().enumerate() {
            let (mut context_tokens, mut output_tokens) = (0, 0);
            for id in queue.all() {
                let request = requests[&id];
                assert_eq!(request.place, Place::Queued, "request {id} waits and does not");
                assert_eq!(request.pool.0 as usize, pool, "request {id} waits in a foreign pool");
                assert!(queue.contains(request.class, id), "request {id} waits in a foreign class");
                context_tokens += u64::from(request.context_tokens());
                output_tokens += u64::from(request.expected_tokens);
                queued += 1;
            }
            assert_eq!((queue.context_tokens, queue.output_tokens), (context_tokens, output_tokens), "pool {pool}");
            if queue.alone_since.is_some() {
                let pool = llmscale_fleet::PoolId(pool as u32);
                assert!(!self.fleet.has_prospect(pool), "pool {pool:?} is given up though it has replicas");
            }
        }
        let waiting = requests.values().filter(|request| request.place == Place::Queued).count();
        assert_eq!(waiting, queued, "every request that waits is in a queue");
    }

    fn check_loads(&self, requests: &BTreeMap<RequestId, &Request>) {
        let mut loads: BTreeMap<ReplicaId, Load> = BTreeMap::new();
        for (id, request) in requests {
            let Place::Sent(sent) = request.place else { continue };
            for sent in std::iter::once(sent).chain(request.rival.map(|rival| rival.sent)) {
                let listed = self.sent.get(&sent.replica).is_some_and(|there| there.contains(id));
                assert!(listed, "request {id} is not listed on its replica");
                let load = loads.entry(sent.replica).or_default();
                load.sequences += 1;
                load.output_tokens += u64::from(request.expected_tokens);
                if !sent.started {
                    load.unstarted_sequences += 1;
                    load.unstarted_tokens += u64::from(sent.context_tokens);
                }
            }
        }
        for member in self.fleet.members() {
            let load = loads.remove(&member.id).unwrap_or_default();
            assert_eq!(member.load, load, "replica {}", member.id);
            let listed = self.sent.get(&member.id).map_or(0, |there| there.len() as u32);
            assert_eq!(listed, load.sequences, "replica {}", member.id);
            assert!(member.state.is_some() || load.sequences == 0, "replica {} is dead", member.id);
        }
        assert!(loads.is_empty(), "requests are on replicas that nobody knows");
    }

    fn check_timers(&self, requests: &BTreeMap<RequestId, &Request>) {
        for (id, request) in requests {
            // Silence is checked lazily: an entry may be earlier than what is due, never later.
            let due = request.next_due();
            assert!(request.timer <= due || due.is_none(), "request {id} is woken too late");
            assert_eq!(request.timer.is_some(), due.is_some(), "request {id}");
            if let Some(at) = request.timer {
                assert!(self.timers.contains(at, Due::Request(*id)), "request {id} has no timer");
            }
        }
        for (at, due) in self.timers.iter() {
            let wanted = match due {
                Due::Request(id) => requests.get(&id).and_then(|request| request.timer),
                Due::Replica(id) => self.fleet.get(id).and_then(|member| member.refused_until),
                Due::Trial(pool) => self.queue(pool).trial_at,
                Due::Pool(pool) => self.queue(pool).alone_since.map(|since| since + self.options.max_without_replica),
            };
            assert_eq!(wanted, Some(at), "{due:?} is due for nothing");
        }
    }
}
