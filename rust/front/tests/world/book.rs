//! The reference: what a front must do, written down naively. It keeps every request in one list, searches it from end to
//! end for everything, and predicts each terminal event, delivery and abort. Only where a request is placed is the
//! front's choice; the book checks that the choice was allowed.

use crate::fake::{EOS, VOCABULARY, hash_token};
use llmscale_front::{
    EndReason, FrontAction, FrontOptions, NewRequest, ReplicaFrame, ReplicaState, SubmitError, ToReplica,
};
use llmscale_types::error::QueueUnit;
use llmscale_types::{
    Attempt, Class, Epoch, FinishReason, NodeId, Outputs, Refusal, ReplicaId, RequestId, Sampling, Time, Token,
};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Waiting,
    On(u32),
    Held(EndReason),
}

#[derive(Debug)]
struct Entry {
    id: RequestId,
    model: String,
    class: Class,
    arrived: Time,
    deadline: Option<Time>,
    sampling: Sampling,
    context: Vec<Token>,
    prompt_tokens: usize,
    attempt: Attempt,
    started: bool,
    lost: u32,
    restarts: u32,
    place: Place,
    away_until: Option<Time>,
    read: u32,
}

impl Entry {
    fn output(&self) -> &[Token] {
        &self.context[self.prompt_tokens..]
    }

    fn due(&self) -> Option<Time> {
        let deadline = if matches!(self.place, Place::Held(_)) { None } else { self.deadline };
        [deadline, self.away_until].into_iter().flatten().min()
    }

    fn unread(&self) -> u32 {
        self.output().len() as u32 - self.read
    }
}

#[derive(Clone, Copy, Debug)]
struct Link {
    node: NodeId,
    epoch: Epoch,
    state: ReplicaState,
    refused_until: Option<Time>,
}

/// What the front is expected to say about one event.
#[derive(Debug, Default)]
struct Expected {
    finishes: BTreeMap<RequestId, (EndReason, u32, u32)>,
    deliveries: BTreeMap<RequestId, Vec<(u32, Token)>>,
    aborts: BTreeSet<(u32, RequestId, Attempt, Option<u32>)>,
}

#[derive(Debug)]
pub(crate) struct Book {
    options: FrontOptions,
    /// Which model runs at which replica.
    models: Vec<&'static str>,
    links: Vec<Option<Link>>,
    /// Whether a replica of the model was ever there, and since when none is.
    known: BTreeMap<&'static str, Option<Time>>,
    given_up: BTreeSet<&'static str>,
    entries: Vec<Entry>,
    expected: Expected,
    pub(crate) max_sequence_tokens: u64,
    pub(crate) max_on_replica: usize,
}

impl Book {
    pub(crate) fn new(options: FrontOptions, models: Vec<&'static str>) -> Self {
        Self {
            options,
            links: vec![None; models.len()],
            models,
            known: BTreeMap::new(),
            given_up: BTreeSet::new(),
            entries: Vec::new(),
            expected: Expected::default(),
            max_sequence_tokens: 40,
            max_on_replica: 8,
        }
    }

    pub(crate) fn live(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn ids(&self) -> Vec<RequestId> {
        self.entries.iter().map(|entry| entry.id).collect()
    }

    fn find(&mut self, id: RequestId) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    fn on(&self, replica: u32) -> Vec<RequestId> {
        self.entries.iter().filter(|entry| entry.place == Place::On(replica)).map(|entry| entry.id).collect()
    }

    /// Everything that has become due by now.
    pub(crate) fn expire(&mut self, now: Time) {
        for link in self.links.iter_mut().flatten() {
            link.refused_until = link.refused_until.filter(|&until| until > now);
        }
        // In the order of their moments; a request comes before its whole model.
        loop {
            let entries = self.entries.iter().filter_map(|entry| Some((entry.due()?, 0, entry.id.0, "")));
            let models = self.known.iter().filter_map(|(model, since)| {
                since.map(|since| (since + self.options.max_without_replica, 1, 0, *model))
            });
            match entries.chain(models).min() {
                Some((at, 0, id, _)) if at <= now => self.entry_due(now, RequestId(id)),
                Some((at, _, _, model)) if at <= now => self.give_up(model),
                _ => return,
            }
        }
    }

    fn entry_due(&mut self, now: Time, id: RequestId) {
        let entry = self.find(id).expect("it is listed");
        let away = entry.away_until.is_some_and(|until| until <= now);
        let expired = entry.deadline.is_some_and(|deadline| deadline <= now);
        match entry.place {
            Place::Held(reason) => self.finish(id, reason, None),
            Place::Waiting | Place::On(_) if expired => {
                self.expect_abort(id, None);
                self.conclude(id, EndReason::Finished(FinishReason::Deadline));
                if away {
                    self.finish(id, EndReason::Finished(FinishReason::Deadline), None);
                }
            }
            Place::Waiting | Place::On(_) => {
                self.expect_abort(id, None);
                self.finish(id, EndReason::Finished(FinishReason::Aborted), None);
            }
        }
    }

    fn give_up(&mut self, model: &'static str) {
        self.known.insert(model, None);
        self.given_up.insert(model);
        for id in self.ids() {
            let entry = self.find(id).expect("it is listed");
            if entry.place == Place::Waiting && entry.model == model {
                self.conclude(id, EndReason::Unavailable);
            }
        }
    }

    fn expect_abort(&mut self, id: RequestId, at_token: Option<u32>) {
        let entry = self.entries.iter().find(|entry| entry.id == id).expect("it lives");
        if let Place::On(replica) = entry.place {
            self.expected.aborts.insert((replica, id, entry.attempt, at_token));
        }
    }

    fn conclude(&mut self, id: RequestId, reason: EndReason) {
        let entry = self.find(id).expect("it lives");
        if entry.away_until.is_some() {
            entry.place = Place::Held(reason);
        } else {
            self.finish(id, reason, None);
        }
    }

    fn finish(&mut self, id: RequestId, reason: EndReason, at_token: Option<u32>) {
        let place = self.entries.iter().position(|entry| entry.id == id).expect("a request ends once");
        let entry = self.entries.remove(place);
        let output_tokens = (entry.output().len() as u32).min(at_token.unwrap_or(u32::MAX));
        let twice = self.expected.finishes.insert(id, (reason, output_tokens, entry.restarts));
        assert!(twice.is_none());
    }

    /// Whether the front must take this, and how it must refuse it.
    pub(crate) fn admission(&self, new: &NewRequest) -> Result<(), SubmitError> {
        if self.known.is_empty() {
            return Err(SubmitError::Unavailable { model: new.model.clone() });
        }
        if !self.known.contains_key(new.model.as_str()) {
            return Err(SubmitError::UnknownModel { model: new.model.clone() });
        }
        if self.given_up.contains(new.model.as_str()) {
            return Err(SubmitError::Unavailable { model: new.model.clone() });
        }
        if new.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt.into());
        }
        if let Some(&given) = new.prompt.iter().find(|&&token| token >= VOCABULARY) {
            return Err(Refusal::UnknownToken { given: u64::from(given), limit: u64::from(VOCABULARY) }.into());
        }
        let needed = new.prompt.len() as u64 + u64::from(new.sampling.max_tokens);
        if needed > self.max_sequence_tokens {
            return Err(Refusal::TooLong { needed, limit: self.max_sequence_tokens }.into());
        }
        let limits = &self.options.limits;
        let waiting = || self.entries.iter().filter(|entry| entry.place == Place::Waiting);
        let queued = waiting().count() as u64;
        let tokens: u64 = waiting().map(|entry| entry.context.len() as u64).sum();
        let live = self.entries.len() as u64;
        let full = |queued, limit, unit| {
            let retry_after = llmscale_types::Duration(0);
            Err(Refusal::QueueFull { queued, limit, unit, retry_after }.into())
        };
        if live >= u64::from(limits.max_live_requests) {
            return full(live, u64::from(limits.max_live_requests), QueueUnit::LiveRequests);
        }
        if queued >= u64::from(limits.max_queued_requests) {
            return full(queued, u64::from(limits.max_queued_requests), QueueUnit::Requests);
        }
        if queued > 0 && tokens + new.prompt.len() as u64 > limits.max_queued_tokens {
            return full(tokens, limits.max_queued_tokens, QueueUnit::Tokens);
        }
        Ok(())
    }

    pub(crate) fn submitted(&mut self, now: Time, id: RequestId, new: NewRequest) {
        assert!(self.entries.iter().all(|entry| entry.id < id), "ids are given out in order");
        self.entries.push(Entry {
            id,
            model: new.model,
            class: new.class,
            arrived: now,
            deadline: new.deadline,
            sampling: new.sampling,
            prompt_tokens: new.prompt.len(),
            context: new.prompt,
            attempt: Attempt(0),
            started: false,
            lost: 0,
            restarts: 0,
            place: Place::Waiting,
            away_until: new.detached.then(|| now + self.options.limits.max_detached),
            read: 0,
        });
    }

    pub(crate) fn cancelled(&mut self, id: RequestId, at_token: Option<u32>) {
        if self.find(id).is_some() {
            let reason = if at_token.is_some() { FinishReason::Stop } else { FinishReason::Aborted };
            self.expect_abort(id, at_token);
            self.finish(id, EndReason::Finished(reason), at_token);
        }
    }

    pub(crate) fn detached(&mut self, now: Time, id: RequestId) {
        let until = now + self.options.limits.max_detached;
        if let Some(entry) = self.find(id) {
            entry.away_until.get_or_insert(until);
        }
    }

    pub(crate) fn attached(&mut self, id: RequestId, from_index: u32) {
        let Some(entry) = self.find(id) else { return };
        entry.away_until = None;
        let from = from_index.min(entry.output().len() as u32);
        entry.read = entry.read.max(from);
        let rest: Vec<(u32, Token)> = (0..).zip(entry.output().iter().copied()).skip(from as usize).collect();
        let place = entry.place;
        if !rest.is_empty() {
            self.expected.deliveries.insert(id, rest);
        }
        if let Place::Held(reason) = place {
            self.finish(id, reason, None);
        }
    }

    pub(crate) fn has_read(&mut self, id: RequestId, up_to_index: u32) {
        if let Some(entry) = self.find(id) {
            entry.read = entry.read.max(up_to_index.min(entry.output().len() as u32));
        }
    }

    pub(crate) fn up(&mut self, now: Time, replica: u32, node: NodeId, epoch: Epoch) {
        self.down(now, replica);
        let state = ReplicaState::Ready;
        self.links[replica as usize] = Some(Link { node, epoch, state, refused_until: None });
        self.known.insert(self.models[replica as usize], None);
        self.given_up.remove(self.models[replica as usize]);
    }

    pub(crate) fn down(&mut self, now: Time, replica: u32) {
        if self.links[replica as usize].take().is_none() {
            return;
        }
        for id in self.on(replica) {
            self.lose(id, true);
        }
        let model = self.models[replica as usize];
        let others = (0..self.models.len()).any(|other| self.models[other] == model && self.links[other].is_some());
        if !others {
            self.known.insert(model, Some(now));
        }
    }

    fn lose(&mut self, id: RequestId, fault: bool) {
        let max_attempts = self.options.limits.max_attempts;
        let entry = self.find(id).expect("it lives");
        entry.lost += u32::from(fault);
        entry.restarts += u32::from(fault || entry.started);
        entry.place = Place::Waiting;
        let reason = if entry.output().last() == Some(&EOS) {
            EndReason::Finished(FinishReason::Stop)
        } else if entry.output().len() as u32 == entry.sampling.max_tokens {
            EndReason::Finished(FinishReason::Length)
        } else if entry.lost >= max_attempts {
            EndReason::Unavailable
        } else {
            return;
        };
        self.conclude(id, reason);
    }

    /// A frame arrives.
    pub(crate) fn frame(&mut self, now: Time, replica: u32, node: NodeId, epoch: Epoch, frame: &ReplicaFrame) {
        let Some(link) = self.links[replica as usize].as_mut().filter(|link| link.node == node && link.epoch <= epoch)
        else {
            return;
        };
        if epoch > link.epoch {
            link.epoch = epoch;
            let started = |entry: &&mut Entry| entry.place == Place::On(replica) && entry.started;
            self.entries.iter_mut().filter(started).for_each(|entry| entry.restarts += 1);
        }
        match frame {
            ReplicaFrame::Outputs(outputs) => self.outputs(replica, outputs),
            ReplicaFrame::GiveBack { request, attempt, refusal } => {
                self.given_back(now, replica, *request, *attempt, *refusal);
            }
            ReplicaFrame::Status(report) => {
                self.links[replica as usize].as_mut().expect("it is up").state = report.state;
            }
            ReplicaFrame::Pong => {}
        }
    }

    fn is_current(&mut self, replica: u32, id: RequestId, attempt: Attempt) -> bool {
        self.find(id).is_some_and(|entry| entry.place == Place::On(replica) && entry.attempt == attempt)
    }

    fn outputs(&mut self, replica: u32, outputs: &Outputs) {
        let (mut gaps, mut overruns) = (Vec::new(), Vec::new());
        let max_unread = self.options.limits.max_unread_tokens;
        for row in 0..outputs.requests.len() {
            let (id, attempt) = (outputs.requests[row], outputs.attempts[row]);
            if !self.is_current(replica, id, attempt) {
                continue;
            }
            let (index, token) = (outputs.indexes[row] as usize, outputs.tokens[row]);
            let entry = self.find(id).expect("it is current");
            if index > entry.output().len() {
                gaps.push((id, attempt));
            } else if index == entry.output().len() && (index as u32) < entry.sampling.max_tokens {
                assert_eq!(token, hash_token(&entry.context, entry.sampling.seed), "a foreign token");
                entry.context.push(token);
                entry.started = true;
                let (overrun, here) = (entry.unread() > max_unread, entry.away_until.is_none());
                if overrun {
                    overruns.push(id);
                }
                if here {
                    self.expected.deliveries.entry(id).or_default().push((index as u32, token));
                }
            }
        }
        for (id, attempt) in gaps {
            self.gap(replica, id, attempt);
        }
        for end in &outputs.finished {
            if !self.is_current(replica, end.request, end.attempt) {
                continue;
            }
            if self.find(end.request).expect("it is current").output().len() as u32 == end.output_tokens {
                self.conclude(end.request, EndReason::Finished(end.reason));
            } else {
                self.gap(replica, end.request, end.attempt);
            }
        }
        for id in overruns {
            if self.find(id).is_some() {
                self.expect_abort(id, None);
                self.finish(id, EndReason::Finished(FinishReason::Aborted), None);
            }
        }
    }

    fn gap(&mut self, replica: u32, id: RequestId, attempt: Attempt) {
        if self.is_current(replica, id, attempt) {
            self.expect_abort(id, None);
            self.lose(id, true);
        }
    }

    fn given_back(&mut self, now: Time, replica: u32, id: RequestId, attempt: Attempt, refusal: Option<Refusal>) {
        if !self.is_current(replica, id, attempt) {
            return;
        }
        let link = self.links[replica as usize].as_mut().expect("its frame passed");
        match refusal {
            None => self.lose(id, false),
            Some(Refusal::Draining) => {
                link.state = ReplicaState::Draining;
                self.lose(id, false);
            }
            Some(Refusal::QueueFull { retry_after, .. }) => {
                link.refused_until = Some(now + retry_after);
                self.lose(id, false);
            }
            Some(Refusal::Duplicate) => self.lose(id, true),
            Some(hard) => self.conclude(id, EndReason::Refused(hard)),
        }
    }

    /// Holds everything that the front said against what it had to say.
    pub(crate) fn hold_against(&mut self, now: Time, actions: &[FrontAction]) {
        let mut delivered: BTreeMap<RequestId, Vec<(u32, Token)>> = BTreeMap::new();
        for action in actions {
            match action {
                FrontAction::Deliver(deliveries) => {
                    for delivery in deliveries.iter() {
                        assert!(!delivery.tokens.is_empty());
                        let tokens = (delivery.index..).zip(delivery.tokens.iter().copied());
                        assert!(delivered.insert(delivery.request, tokens.collect()).is_none(), "one per frame");
                    }
                }
                FrontAction::Finish { request, reason, usage, restarts } => {
                    let said = Some((*reason, usage.output_tokens, *restarts));
                    assert_eq!(self.expected.finishes.remove(request), said, "the end of {request}");
                }
                FrontAction::Send { replica, message } => self.hold_send(now, replica.0, message),
                FrontAction::WakeAt(at) => assert!(*at > now, "woken for the past"),
            }
        }
        let expected = std::mem::take(&mut self.expected);
        assert_eq!(delivered, expected.deliveries);
        assert!(expected.finishes.is_empty(), "not said: {:?}", expected.finishes);
        assert!(expected.aborts.is_empty(), "not sent: {:?}", expected.aborts);
        self.hold_idle(now);
    }

    fn hold_send(&mut self, now: Time, replica: u32, message: &ToReplica) {
        match message {
            ToReplica::Submit(submission) => {
                self.hold_placement(now, replica, submission.key.request);
                let entry = self.find(submission.key.request).expect("it was just found");
                assert!(submission.key.attempt > entry.attempt, "an attempt is used twice");
                assert_eq!(submission.context, entry.context, "the record is not what was emitted");
                assert_eq!(submission.prompt_tokens as usize, entry.prompt_tokens);
                assert_eq!((&submission.sampling, submission.deadline), (&entry.sampling, entry.deadline));
                entry.attempt = submission.key.attempt;
                entry.place = Place::On(replica);
                entry.started = false;
            }
            ToReplica::Abort { request, attempt, at_token } => {
                if self.expected.aborts.remove(&(replica, *request, *attempt, *at_token)) {
                    return;
                }
                // Nobody asked for it, so the stream moves away from a draining replica.
                assert!(self.is_current(replica, *request, *attempt), "an abort for nothing");
                let draining = self.links[replica as usize].is_some_and(|link| link.state == ReplicaState::Draining);
                assert!(draining && self.find(*request).expect("it is current").started, "an abort for nothing");
                self.lose(*request, false);
            }
            ToReplica::Recall { request, attempt } => {
                assert!(self.is_current(replica, *request, *attempt), "a recall for nothing");
                assert!(!self.find(*request).expect("it is current").started, "a recall of what runs");
            }
        }
    }

    /// A request may be placed when it is the first of its queue and the replica can take it.
    fn hold_placement(&mut self, now: Time, replica: u32, id: RequestId) {
        let link = self.links[replica as usize].expect("a request is sent to a dead replica");
        assert_eq!(link.state, ReplicaState::Ready, "a request is sent to a replica that cannot run it");
        assert!(link.refused_until.is_none(), "a request is sent to a full replica");
        assert!(self.on(replica).len() < self.max_on_replica, "a request is sent above the replica's limit");
        let model = self.models[replica as usize];
        let waiting = self.entries.iter().filter(|entry| entry.place == Place::Waiting && entry.model == model);
        let rank = |entry: &Entry| {
            let promotions = now.since(entry.arrived).0 / self.options.promote_after.0;
            let class = Class::ALL.iter().position(|class| *class == entry.class).expect("it is one of all") as u64;
            (class.saturating_sub(promotions), entry.id)
        };
        let first = waiting.min_by_key(|entry| rank(entry)).map(|entry| entry.id);
        assert_eq!(first, Some(id), "somebody else was first");
    }

    /// Nothing waits while a replica that could run it has nothing to do.
    fn hold_idle(&self, now: Time) {
        for (replica, link) in self.links.iter().enumerate() {
            let Some(link) = link else { continue };
            let free = link.state == ReplicaState::Ready && link.refused_until.is_none_or(|until| until <= now);
            if free && self.on(replica as u32).is_empty() {
                let model = self.models[replica];
                let waits = |entry: &&Entry| entry.place == Place::Waiting && entry.model == model;
                assert_eq!(self.entries.iter().find(waits).map(|entry| entry.id), None, "replica {replica} is idle");
            }
        }
    }

    /// Which replicas' connections the front believes in.
    pub(crate) fn is_up(&self, replica: ReplicaId) -> bool {
        self.links[replica.index()].is_some()
    }
}
