//! How requests meet replicas: placed from the queue, sent as attempts, taken back, lost, ended. Every path that takes a
//! request off a replica goes through `release`, every path that ends one through `finish`, so the books cannot disagree.
//! O(log n) per change, O(replicas) per placement.

use crate::event::{EndReason, FrontAction, ToReplica};
use crate::front::Front;
use crate::order::{Head, most_urgent, promoted};
use crate::request::{Place, Reader, Sent};
use crate::timers::Due;
use llmscale_fleet::{Need, PoolId};
use llmscale_types::{Attempt, Duration, FinishReason, Planted, ReplicaId, RequestId, Time};
use std::sync::Arc;

/// How often the predicted time to start may pass before silence counts as loss.
const PATIENCE: u64 = 8;

/// Why an attempt is over though the request is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Loss {
    /// The replica lost a token, fell silent or refused what it should not: counts towards `max_attempts`, and takes from
    /// the retry budget.
    Fault,
    /// The replica died: counts towards `max_attempts`.
    Node,
    /// It was not admitted, or moves by our own wish.
    NoFault,
}

impl Front {
    /// Sends what waits in a pool to whoever can start it soon, most urgent first.
    pub(crate) fn place_waiting(&mut self, now: Time, pool: PoolId, out: &mut Vec<FrontAction>) {
        let mut longest = u64::MAX;
        while !self.queue(pool).is_empty() {
            // One that only a replica takes which is gone waits for it, and keeps nobody else waiting.
            longest = self.fleet.widest(pool, longest);
            let Some(id) = self.next_waiting(now, pool, longest) else {
                return;
            };
            let need = self.need(now, id);
            match self.policy.choose(&self.fleet, &need) {
                Some(replica) => self.send(now, id, replica, out),
                // So does one that only a replica takes which is full: what a narrower one takes is looked at next.
                None => longest = need.total_tokens - 1,
            }
        }
    }

    fn next_waiting(&self, now: Time, pool: PoolId, longest: u64) -> Option<RequestId> {
        let heads = self.queue(pool).heads(|id| self.requests[&id].max_total_tokens() <= longest);
        let heads = heads.map(|(class, request)| Head { class, request, arrived: self.requests[&request].arrived });
        most_urgent(heads, now, self.options.promote_after).map(|head| head.request)
    }

    pub(crate) fn need(&self, now: Time, id: RequestId) -> Need {
        let request = &self.requests[&id];
        let look_ahead = self.options.limits.look_ahead;
        Need {
            request: id,
            pool: request.pool,
            total_tokens: request.max_total_tokens(),
            context_tokens: u64::from(request.context_tokens()),
            output_tokens: u64::from(request.expected_tokens),
            prefix: Arc::clone(&request.prefix),
            numerics: request.numerics.clone().filter(|_| !Planted::IgnoresNumerics.is_here()),
            look_ahead,
            now,
        }
    }

    /// Puts a request in its place of the queue, by its age.
    pub(crate) fn enqueue(&mut self, id: RequestId) {
        let usual = self.usual_output;
        let request = self.request_mut(id);
        request.place = Place::Queued;
        request.expected_tokens = usual.expect(request.remaining_tokens());
        let (pool, class) = (request.pool, request.class);
        let (context, output) = (u64::from(request.context_tokens()), u64::from(request.expected_tokens));
        self.queue_mut(pool).insert(class, id, context, output);
        self.arm(id);
    }

    /// Takes a request out of the queue.
    pub(crate) fn dequeue(&mut self, id: RequestId) {
        let request = &self.requests[&id];
        let (pool, class) = (request.pool, request.class);
        let (context, output) = (u64::from(request.context_tokens()), u64::from(request.expected_tokens));
        self.queue_mut(pool).remove(class, id, context, output);
    }

    fn send(&mut self, now: Time, id: RequestId, replica: ReplicaId, out: &mut Vec<FrontAction>) {
        self.dequeue(id);
        let (attempt, sent) = self.launch(now, id, replica, out);
        let request = self.request_mut(id);
        request.attempt = attempt;
        request.place = Place::Sent(sent);
        self.plan_hedge(now, id, &sent);
        self.arm(id);
    }

    /// Puts an attempt on the books of a replica and sends it. The caller writes down what it is to the request.
    pub(crate) fn launch(
        &mut self,
        now: Time,
        id: RequestId,
        replica: ReplicaId,
        out: &mut Vec<FrontAction>,
    ) -> (Attempt, Sent) {
        let request = self.requests.get_mut(&id).expect("it was chosen because it lives");
        let cached_tokens = self.fleet.dispatch(now, replica, &request.prefix);
        let mut member = self.fleet.get_mut(replica).expect("it was chosen from the fleet");
        request.last_attempt = request.last_attempt.next();
        let attempt = request.last_attempt;
        // The last token is always computed: its output is the next one.
        let context_tokens = request.context_tokens();
        let context_tokens = context_tokens - cached_tokens.min(context_tokens - 1);
        member.load.sequences += 1;
        member.load.unstarted_sequences += 1;
        member.load.unstarted_tokens += u64::from(context_tokens);
        member.load.output_tokens += u64::from(request.expected_tokens);
        let predicted_ns = member.backlog_ns(now);
        member.health.sent(id);
        drop(member);
        let patience = self.options.max_silence + Duration::from_nanos(predicted_ns.saturating_mul(PATIENCE));
        let predicted = Duration::from_nanos(predicted_ns);
        let (started, recalled, doubted) = (false, false, false);
        let sent =
            Sent { replica, context_tokens, started, recalled, doubted, at: now, predicted, heard: now, patience };
        // A replica serves class by class and promotes nobody: with the client's own class, who was promoted here would wait
        // there behind every later one of a class that it had reached.
        let class = promoted(request.class, request.arrived, now, self.options.promote_after);
        let submission = Box::new(request.submission(id, attempt, class));
        let new = self.sent.entry(replica).or_default().insert(id);
        assert!(new, "request {id} is on replica {replica} twice");
        self.counters.attempts += 1;
        out.push(FrontAction::Send { replica, message: ToReplica::Submit(submission) });
        (attempt, sent)
    }

    /// Takes the only attempt off the books of its replica. The caller gives the request its next place.
    pub(crate) fn release(&mut self, id: RequestId) -> Sent {
        let request = self.requests.get_mut(&id).expect("its place names it, so it lives");
        assert_eq!(request.rival, None, "request {id} has another attempt");
        request.hedge_at = None;
        let Place::Sent(sent) = std::mem::replace(&mut request.place, Place::Queued) else {
            panic!("request {id} is not on a replica");
        };
        self.take_off(id, &sent);
        sent
    }

    /// Takes an attempt off the books of its replica.
    pub(crate) fn take_off(&mut self, id: RequestId, sent: &Sent) {
        let expected_tokens = self.requests[&id].expected_tokens;
        let mut member =
            self.fleet.get_mut(sent.replica).expect("attempts are released before their replica is forgotten");
        member.load.sequences -= u32::from(!Planted::ForgetsToReleaseLoad.is_here());
        member.load.output_tokens -= u64::from(expected_tokens);
        if !sent.started {
            member.load.unstarted_sequences -= 1;
            member.load.unstarted_tokens -= u64::from(sent.context_tokens);
        }
        if member.load.sequences == member.load.unstarted_sequences {
            member.pause();
        }
        // A probe that has not been answered yet decides nothing.
        member.health.let_go(sent.heard, id);
        drop(member);
        let known = self.sent.get_mut(&sent.replica).is_some_and(|there| there.remove(&id));
        assert!(known, "request {id} is not on replica {}", sent.replica);
    }

    /// Tells a replica to stop an attempt.
    pub(crate) fn abort(
        &mut self,
        id: RequestId,
        replica: ReplicaId,
        at_token: Option<u32>,
        out: &mut Vec<FrontAction>,
    ) {
        let attempt = self.requests[&id].attempt;
        out.push(FrontAction::Send { replica, message: ToReplica::Abort { request: id, attempt, at_token } });
    }

    /// An attempt is over and the request goes on: elsewhere, later, or not at all after too many.
    pub(crate) fn lose(&mut self, id: RequestId, loss: Loss, out: &mut Vec<FrontAction>) {
        if self.is_hedged(id) {
            // The other attempt goes on as the only one.
            self.counters.lost_attempts += u64::from(loss != Loss::NoFault);
            self.swap_rival(id);
            self.drop_rival(id, false, out);
            return;
        }
        let sent = self.release(id);
        let eos_tokens = &self.fleet.get(sent.replica).expect("it was just released there").limits.eos_tokens;
        let request = self.requests.get_mut(&id).expect("it was just released");
        let complete = request.complete(eos_tokens);
        let counts = loss != Loss::NoFault;
        if counts {
            request.lost += 1;
            self.counters.lost_attempts += 1;
        }
        if counts || sent.started {
            request.restarts += 1;
        }
        let lost = request.lost;
        if let Some(reason) = complete {
            self.conclude(id, EndReason::Finished(reason), out);
        } else if lost >= self.options.limits.max_attempts {
            self.conclude(id, EndReason::Unavailable, out);
        } else if loss == Loss::Fault {
            self.set_aside(id);
        } else {
            self.enqueue(id);
        }
    }

    /// Takes a request from wherever it is, in order to end it.
    pub(crate) fn withdraw(&mut self, id: RequestId, at_token: Option<u32>, out: &mut Vec<FrontAction>) {
        match self.requests[&id].place {
            Place::Queued => self.dequeue(id),
            Place::Sent(sent) => {
                self.drop_rival(id, true, out);
                self.abort(id, sent.replica, at_token, out);
                self.release(id);
            }
            Place::SetAside { .. } | Place::Held(_) => {}
        }
    }

    /// Ends a request that is nowhere any more; if its reader is away, once that one is back or the time is over.
    pub(crate) fn conclude(&mut self, id: RequestId, reason: EndReason, out: &mut Vec<FrontAction>) {
        let request = self.request_mut(id);
        match request.reader {
            Reader::Attached => self.finish(id, reason, None, out),
            Reader::Detached(_) => {
                request.place = Place::Held(reason);
                self.arm(id);
            }
        }
    }

    /// The terminal event. The request is forgotten.
    pub(crate) fn finish(
        &mut self,
        id: RequestId,
        reason: EndReason,
        at_token: Option<u32>,
        out: &mut Vec<FrontAction>,
    ) {
        let request = self.requests.remove(&id).expect("a request ends once");
        if let Some(at) = request.timer {
            self.timers.clear(at, Due::Request(id));
        }
        if matches!(reason, EndReason::Finished(FinishReason::Stop | FinishReason::Length)) {
            self.usual_output.observe(request.output_tokens());
        }
        self.counters.finished += 1;
        let output_tokens = at_token.unwrap_or(u32::MAX).min(request.output_tokens());
        let usage = request.usage(output_tokens);
        out.push(FrontAction::Finish { request: id, reason, usage, restarts: request.restarts });
    }

    /// A deadline, the end of a detached time, or a check for silence.
    pub(crate) fn request_due(&mut self, now: Time, id: RequestId, out: &mut Vec<FrontAction>) {
        let request = self.request_mut(id);
        request.timer = None;
        let away_too_long = matches!(request.reader, Reader::Detached(until) if until <= now);
        let expired = request.deadline.is_some_and(|deadline| deadline <= now);
        match request.place {
            Place::Held(reason) if away_too_long => self.finish(id, reason, None, out),
            Place::Queued | Place::SetAside { .. } | Place::Sent(_) if expired => {
                self.counters.expired += 1;
                self.withdraw(id, None, out);
                self.conclude(id, EndReason::Finished(FinishReason::Deadline), out);
                // A reader who is away for too long will not be told.
                if away_too_long {
                    self.finish(id, EndReason::Finished(FinishReason::Deadline), None, out);
                }
            }
            Place::Queued | Place::SetAside { .. } | Place::Sent(_) if away_too_long => {
                self.withdraw(id, None, out);
                self.finish(id, EndReason::Finished(FinishReason::Aborted), None, out);
            }
            Place::Sent(sent) if sent.silent_at() <= now => self.fell_silent(now, id, sent, out),
            Place::Sent(_) if request.hedge_at.is_some_and(|at| at <= now) => self.hedge(now, id, out),
            Place::SetAside { until } if until.is_none_or(|until| until <= now) => self.try_again(now, id, until, out),
            Place::Held(_) | Place::Queued | Place::SetAside { .. } | Place::Sent(_) => self.arm(id),
        }
    }

    /// A replica that is not ready is silent for a reason. A ready one is asked first: an attempt that waits there for
    /// memory, as long as an older one runs, comes back and nobody is blamed. Who says nothing to that has lost it.
    fn fell_silent(&mut self, now: Time, id: RequestId, sent: Sent, out: &mut Vec<FrontAction>) {
        let ready = self.fleet.get(sent.replica).is_some_and(|member| member.is_willing(now));
        let is_alone = self.requests[&id].rival.is_none();
        if ready && (sent.doubted || !is_alone) {
            self.counters.silences += 1;
            self.blame(now, id);
            self.abort(id, sent.replica, None, out);
            self.lose(id, Loss::Fault, out);
            return;
        }
        let doubted = Sent { heard: now, recalled: false, doubted: ready, ..sent };
        self.request_mut(id).place = Place::Sent(if ready { doubted } else { Sent { heard: now, ..sent } });
        if ready {
            self.recall(id, out);
        }
        self.arm(id);
    }
}
