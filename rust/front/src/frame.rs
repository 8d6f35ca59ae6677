//! What nodes say. Every frame passes two fences: the connection's incarnation (node and worker epoch), then per row the
//! attempt and the position, which must be the next. What is old is dropped and counted; a gap ends the attempt, and the
//! request goes on from its record. O(rows), no allocation per row besides the growing record.

use crate::attempt::Loss;
use crate::delivery::Deliveries;
use crate::event::{EndReason, FrontAction, ReplicaFrame};
use crate::front::Front;
use crate::health::FirstToken;
use crate::request::{Place, Reader};
use crate::timers::Due;
use llmscale_cost::StepShape;
use llmscale_fleet::ReplicaState;
use llmscale_types::{
    Attempt, Duration, Epoch, FinishReason, Finished, NodeId, Outputs, Planted, Refusal, ReplicaId, RequestId, Time,
};
use std::cmp::Ordering;
use std::sync::Arc;

/// A replica that is full is left alone at least this long, or a refused request would bounce without end.
const LEAST_REFUSED: Duration = Duration::from_millis(10);

/// What a frame asks for besides taking its tokens.
#[derive(Default)]
struct Findings {
    gaps: Vec<(RequestId, Attempt)>,
    overruns: Vec<RequestId>,
    first_tokens: Vec<FirstToken>,
    shape: StepShape,
}

impl Front {
    pub(crate) fn frame(
        &mut self,
        now: Time,
        replica: ReplicaId,
        node: NodeId,
        epoch: Epoch,
        frame: ReplicaFrame,
        out: &mut Vec<FrontAction>,
    ) {
        let Some(rose) = self.fleet.get_mut(replica).and_then(|mut member| member.fence(node, epoch)) else {
            self.counters.stale_frames += 1;
            return;
        };
        if rose {
            self.worker_restarted(replica);
            self.end_races_on(replica, out);
        }
        match frame {
            ReplicaFrame::Outputs(outputs) => self.outputs(now, replica, outputs, out),
            ReplicaFrame::GiveBack { request, attempt, refusal, suspect } => {
                self.given_back(now, replica, (request, attempt), refusal, suspect, out);
            }
            ReplicaFrame::Status(report) => self.reported(now, replica, *report, out),
            ReplicaFrame::Pong => {}
            ReplicaFrame::KvChanges { number, events } => self.kv_changes(now, replica, number, &events, out),
            ReplicaFrame::KvSnapshot { number, keys } => self.kv_snapshot(replica, number, &keys),
        }
    }

    /// The node kept its sequences over a worker's death; streams that had begun survived one more restart.
    fn worker_restarted(&mut self, replica: ReplicaId) {
        for id in self.sent.get(&replica).into_iter().flatten() {
            let request = self.requests.get_mut(id).expect("its replica names it, so it lives");
            if matches!(request.place, Place::Sent(sent) if sent.started) {
                request.restarts += 1;
            }
        }
    }

    fn outputs(&mut self, now: Time, replica: ReplicaId, mut outputs: Outputs, out: &mut Vec<FrontAction>) {
        let step = outputs.step;
        let finished = std::mem::take(&mut outputs.finished);
        let mut findings = Findings::default();
        if self.hedging.live > 0 {
            let keys = outputs.requests.iter().copied().zip(outputs.attempts.iter().copied());
            self.settle_races(now, replica, keys.zip(outputs.indexes.iter().copied()), out);
        }
        let deliveries = self.take_rows(now, replica, outputs, &mut findings);
        if !deliveries.is_empty() {
            out.push(FrontAction::Deliver(deliveries));
        }
        // A frame of ends alone need not belong to a step.
        if findings.shape != StepShape::default() {
            self.fleet.get_mut(replica).expect("the fence has passed").observe(step, now, findings.shape);
        }
        self.credit(now, replica, &findings.first_tokens);
        for (id, attempt) in findings.gaps {
            self.gap(now, id, attempt, out);
        }
        for end in finished {
            self.finished(now, replica, end, out);
        }
        for id in findings.overruns {
            self.overrun(id, out);
        }
    }

    /// Takes the tokens that are next into their records, and batches those that have a reader.
    fn take_rows(&mut self, now: Time, replica: ReplicaId, outputs: Outputs, findings: &mut Findings) -> Deliveries {
        let mut member = self.fleet.get_mut(replica).expect("the fence has passed");
        let mut deliveries = Deliveries::with_capacity(outputs.tokens.len());
        let mut all_logprobs = outputs.logprobs.into_iter().peekable();
        let mut all_cached = outputs.cached.into_iter().peekable();
        let keys = outputs.requests.into_iter().zip(outputs.attempts);
        let values = outputs.indexes.into_iter().zip(outputs.tokens);
        for (row, ((id, attempt), (index, token))) in keys.zip(values).enumerate() {
            let logprobs = all_logprobs.next_if(|(at, _)| *at as usize == row).map(|(_, logprobs)| logprobs);
            let cached = all_cached.next_if(|(at, _)| *at as usize == row).map(|(_, cached)| cached);
            let Some(request) = self.requests.get_mut(&id) else {
                self.counters.late += 1;
                continue;
            };
            let here = matches!(request.place, Place::Sent(sent) if sent.replica == replica);
            if !here || (request.attempt != attempt && !Planted::TakesTokensOfOldAttempts.is_here()) {
                self.counters.stale_rows += 1;
                continue;
            }
            match index.cmp(&request.output_tokens()) {
                Ordering::Less => {
                    self.counters.duplicate_tokens += 1;
                    continue;
                }
                Ordering::Greater => {
                    findings.gaps.push((id, attempt));
                    continue;
                }
                Ordering::Equal if request.remaining_tokens() == 0 => {
                    self.counters.surplus_tokens += 1;
                    continue;
                }
                Ordering::Equal => {}
            }
            if row == 3 && Planted::LosesATokenOfALargeFrame.is_here() {
                continue;
            }
            let context_tokens = request.context_tokens();
            let Place::Sent(sent) = &mut request.place else { unreachable!("it was just found here") };
            sent.heard = now;
            // It has a place on the worker again: what was asked back stays.
            (sent.recalled, sent.doubted) = (false, false);
            if sent.started {
                findings.shape.decodes += 1;
                findings.shape.context_tokens += u64::from(context_tokens);
            } else {
                sent.started = true;
                request.hedge_at = None;
                // Its whole context has gone through the model.
                request.suspect = false;
                let (predicted, taken) = (sent.predicted, now.since(sent.at));
                findings.first_tokens.push(FirstToken { request: id, predicted, taken });
                if request.numerics.as_ref().is_some_and(|last| *last != member.numerics) {
                    self.counters.numerics_changes += 1;
                }
                request.numerics = Some(Arc::clone(&member.numerics));
                findings.shape.add_prefill(context_tokens - sent.context_tokens, sent.context_tokens);
                member.load.unstarted_sequences -= 1;
                member.load.unstarted_tokens -= u64::from(sent.context_tokens);
            }
            if request.expected_tokens > 0 {
                request.expected_tokens -= 1;
                member.load.output_tokens -= 1;
            }
            if let Some(cached) = cached {
                request.found_cached(cached);
            }
            request.push(token, logprobs.as_ref());
            self.counters.tokens += 1;
            if request.reader == Reader::Attached {
                deliveries.push(id, request.so_far(), index, token, logprobs);
            }
            if request.unread_tokens() > self.options.limits.max_unread_tokens {
                findings.overruns.push(id);
            }
        }
        deliveries
    }

    /// A token is missing: the attempt cannot be trusted any more, the record can. A frame may show the same gap in
    /// several rows.
    fn gap(&mut self, now: Time, id: RequestId, attempt: Attempt, out: &mut Vec<FrontAction>) {
        let Some(request) = self.requests.get(&id) else {
            return;
        };
        if let Place::Sent(sent) = request.place
            && request.attempt == attempt
        {
            self.counters.gaps += 1;
            self.blame(now, id);
            self.abort(id, sent.replica, None, out);
            self.lose(id, Loss::Fault, out);
        }
    }

    /// An attempt came to its end.
    fn finished(&mut self, now: Time, replica: ReplicaId, end: Finished, out: &mut Vec<FrontAction>) {
        self.settle_race(now, (end.request, end.attempt), replica, out);
        let Some(request) = self.requests.get_mut(&end.request) else {
            self.counters.late += 1;
            return;
        };
        let here = matches!(request.place, Place::Sent(sent) if sent.replica == replica);
        if !here || request.attempt != end.attempt {
            self.counters.stale_rows += 1;
            return;
        }
        if request.output_tokens() != end.output_tokens {
            self.gap(now, end.request, end.attempt, out);
            return;
        }
        self.release(end.request);
        self.conclude(end.request, EndReason::Finished(end.reason), out);
    }

    /// The reader has left more unread than may be kept.
    fn overrun(&mut self, id: RequestId, out: &mut Vec<FrontAction>) {
        if self.requests.contains_key(&id) {
            self.counters.slow_readers += 1;
            self.withdraw(id, None, out);
            self.finish(id, EndReason::Finished(FinishReason::Aborted), None, out);
        }
    }

    /// An attempt comes back unfinished.
    fn given_back(
        &mut self,
        now: Time,
        replica: ReplicaId,
        (id, attempt): (RequestId, Attempt),
        refusal: Option<Refusal>,
        suspect: bool,
        out: &mut Vec<FrontAction>,
    ) {
        if self.is_rival(id, attempt, replica) {
            self.swap_rival(id);
        }
        let Some(request) = self.requests.get(&id) else {
            self.counters.late += 1;
            return;
        };
        let here = matches!(request.place, Place::Sent(sent) if sent.replica == replica);
        if !here || request.attempt != attempt {
            self.counters.stale_rows += 1;
            return;
        }
        let started = matches!(request.place, Place::Sent(sent) if sent.started);
        let mut member = self.fleet.get_mut(replica).expect("the fence has passed");
        match refusal {
            None => {
                drop(member);
                self.counters.moved += u64::from(started);
            }
            Some(Refusal::Draining) => {
                member.state = Some(ReplicaState::Draining);
                let pool = member.pool;
                drop(member);
                self.watch_pool(now, pool);
            }
            Some(Refusal::QueueFull { retry_after, .. }) => {
                let until = now + retry_after.max(LEAST_REFUSED);
                let last = member.refused_until.replace(until);
                drop(member);
                if let Some(last) = last {
                    self.timers.clear(last, Due::Replica(replica));
                }
                self.timers.set(until, Due::Replica(replica));
            }
            Some(Refusal::Duplicate) => {
                drop(member);
                self.blame(now, id);
                self.lose(id, Loss::Fault, out);
                return;
            }
            Some(
                Refusal::TooLong { .. } | Refusal::EmptyPrompt | Refusal::UnknownToken { .. } | Refusal::BadSampling,
            ) => {
                drop(member);
                // This front has checked it against what the replica offered.
                self.blame(now, id);
                self.drop_rival(id, true, out);
                self.release(id);
                self.conclude(id, EndReason::Refused(refusal.expect("it was just matched")), out);
                return;
            }
        }
        self.counters.given_back += 1;
        self.request_mut(id).suspect |= suspect;
        self.lose(id, Loss::NoFault, out);
    }
}
