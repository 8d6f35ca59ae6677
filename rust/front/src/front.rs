//! The front itself: its tables and the one door for events. What is due is done first, then the event is applied
//! by the file that names its subject, what waits is placed, and the next wake-up is announced.

use crate::counters::FrontCounters;
use crate::event::{FrontAction, FrontEvent};
use crate::hedge::Hedging;
use crate::options::FrontOptions;
use crate::queue::Queue;
use crate::request::Request;
use crate::retry::RetryBudget;
use crate::timers::{Due, Timers};
use crate::usual_output::UsualOutput;
use llmscale_fleet::{Fleet, LeastWork, Policy, PoolId, PredictedSeconds, PrefixIndex};
use llmscale_types::{LimitError, ReplicaId, RequestId, Time};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};

/// Owns every request's life.
#[derive(Debug)]
pub struct Front {
    pub(crate) options: FrontOptions,
    pub(crate) policy: Box<dyn Policy>,
    pub(crate) fleet: Fleet,
    /// For look-ups only; nothing is decided by its order.
    pub(crate) requests: FxHashMap<RequestId, Request>,
    /// By pool number.
    pub(crate) queues: Vec<Queue>,
    /// Who is where.
    pub(crate) sent: BTreeMap<ReplicaId, BTreeSet<RequestId>>,
    /// Replicas without a worker, and since when.
    pub(crate) recovering: BTreeMap<ReplicaId, Time>,
    pub(crate) timers: Timers,
    pub(crate) retry_budget: RetryBudget,
    pub(crate) hedging: Hedging,
    pub(crate) last_request: RequestId,
    pub(crate) usual_output: UsualOutput,
    pub(crate) counters: FrontCounters,
}

impl Front {
    /// An empty front that places requests by predicted seconds, or by least work if it does not look at prefix caches.
    pub fn new(options: FrontOptions) -> Result<Self, LimitError> {
        let policy: Box<dyn Policy> =
            if options.prefixes.is_some() { Box::new(PredictedSeconds) } else { Box::new(LeastWork) };
        Self::with_policy(options, policy)
    }

    /// An empty front.
    pub fn with_policy(options: FrontOptions, policy: Box<dyn Policy>) -> Result<Self, LimitError> {
        options.check()?;
        let fleet = match &options.prefixes {
            Some(prefixes) => Fleet::with_prefixes(options.max_replicas, PrefixIndex::new(prefixes.clone())?),
            None => Fleet::new(options.max_replicas),
        };
        Ok(Self {
            fleet: fleet.with_health(options.health),
            policy,
            requests: FxHashMap::default(),
            queues: Vec::new(),
            sent: BTreeMap::new(),
            recovering: BTreeMap::new(),
            timers: Timers::default(),
            retry_budget: RetryBudget::default(),
            hedging: Hedging::default(),
            last_request: RequestId(0),
            usual_output: UsualOutput::new(),
            counters: FrontCounters::default(),
            options,
        })
    }

    /// Applies one event and appends what is to be done. `now` never goes back.
    pub fn on_event(&mut self, now: Time, event: FrontEvent, out: &mut Vec<FrontAction>) {
        if let FrontEvent::Read { request, up_to_index } = event {
            // There is one for every delivery, and it changes nothing that anybody waits for.
            return self.read(request, up_to_index);
        }
        self.fall_due(now, out);
        match event {
            FrontEvent::Cancel { request, at_token } => self.cancel(request, at_token, out),
            FrontEvent::ClientGone { request } => self.cancel(request, None, out),
            FrontEvent::Detach { request } => self.detach(now, request, out),
            FrontEvent::Attach { request, from_index } => self.attach(request, from_index, out),
            FrontEvent::Frame { replica, node, epoch, frame } => self.frame(now, replica, node, epoch, frame, out),
            FrontEvent::ReplicaUp { replica, offer } => self.replica_up(now, replica, *offer, out),
            FrontEvent::ReplicaDown { replica } => self.replica_down(now, replica, out),
            FrontEvent::Tick => self.relieve(now, out),
            FrontEvent::Read { .. } => unreachable!("it was looked at above"),
        }
        self.settle(now, out);
    }

    /// Before every event: a deadline that has passed comes before whatever arrives after it.
    pub(crate) fn fall_due(&mut self, now: Time, out: &mut Vec<FrontAction>) {
        while let Some(due) = self.timers.pop(now) {
            match due {
                Due::Request(id) => self.request_due(now, id, out),
                Due::Replica(replica) => self.refusal_over(replica),
                // Whoever waits is placed after every event.
                Due::Trial(pool) => self.queue_mut(pool).trial_at = None,
                Due::Pool(pool) => self.give_up_pool(pool, out),
            }
        }
    }

    /// After every event: what can be placed, when to wake.
    pub(crate) fn settle(&mut self, now: Time, out: &mut Vec<FrontAction>) {
        // An event may set a moment that has passed already, such as the deadline of a late submission.
        self.fall_due(now, out);
        self.fleet.review(now);
        for pool in (0..self.queues.len() as u32).map(PoolId) {
            if !self.queue(pool).is_empty() && self.queue(pool).alone_since.is_none() {
                // What comes back to a pool that was given up waits as long as the others did.
                self.watch_pool(now, pool);
            }
            self.place_waiting(now, pool, out);
            self.arm_trial(now, pool);
        }
        if let Some(at) = self.timers.announce() {
            out.push(FrontAction::WakeAt(at));
        }
    }

    pub(crate) fn queue(&self, pool: PoolId) -> &Queue {
        &self.queues[pool.0 as usize]
    }

    pub(crate) fn queue_mut(&mut self, pool: PoolId) -> &mut Queue {
        &mut self.queues[pool.0 as usize]
    }

    /// A request that is known to live.
    pub(crate) fn request_mut(&mut self, request: RequestId) -> &mut Request {
        self.requests.get_mut(&request).expect("its place names it, so it lives")
    }

    /// Moves the request's entry among the timers to where it belongs.
    pub(crate) fn arm(&mut self, id: RequestId) {
        let request = self.requests.get_mut(&id).expect("its place names it, so it lives");
        let next = request.next_due();
        if request.timer == next {
            return;
        }
        let last = std::mem::replace(&mut request.timer, next);
        if let Some(at) = last {
            self.timers.clear(at, Due::Request(id));
        }
        if let Some(at) = next {
            self.timers.set(at, Due::Request(id));
        }
    }

    /// Counts since the start.
    pub fn counters(&self) -> &FrontCounters {
        &self.counters
    }
}
