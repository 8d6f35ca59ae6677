//! The reference: what a front must do, written down naively. It keeps every request in one list, searches it from end to
//! end for everything, and predicts each terminal event, delivery and abort. Only where a request is placed is the
//! front's choice; the book checks that the choice was allowed.

use crate::fake::{EOS, hash_token};
use llmscale_front::{EndReason, FrontOptions, NewRequest, ReplicaFrame, ReplicaState};
use llmscale_types::{
    Attempt, Class, Epoch, FinishReason, NodeId, Outputs, Refusal, ReplicaId, RequestId, Sampling, Time, Token,
};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Waiting,
    On(u32),
    Held(EndReason),
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: RequestId,
    pub(crate) model: String,
    pub(crate) class: Class,
    pub(crate) arrived: Time,
    pub(crate) deadline: Option<Time>,
    pub(crate) sampling: Sampling,
    pub(crate) context: Vec<Token>,
    pub(crate) prompt_tokens: usize,
    pub(crate) attempt: Attempt,
    pub(crate) started: bool,
    pub(crate) lost: u32,
    pub(crate) restarts: u32,
    pub(crate) place: Place,
    pub(crate) away_until: Option<Time>,
    pub(crate) read: u32,
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
pub(crate) struct Link {
    pub(crate) node: NodeId,
    pub(crate) epoch: Epoch,
    pub(crate) state: ReplicaState,
    pub(crate) refused_until: Option<Time>,
}

/// What the front is expected to say about one event.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    pub(crate) finishes: BTreeMap<RequestId, (EndReason, u32, u32)>,
    pub(crate) deliveries: BTreeMap<RequestId, Vec<(u32, Token)>>,
    pub(crate) aborts: BTreeSet<(u32, RequestId, Attempt, Option<u32>)>,
}

#[derive(Debug)]
pub(crate) struct Book {
    pub(crate) options: FrontOptions,
    /// Which model runs at which replica.
    pub(crate) models: Vec<&'static str>,
    pub(crate) links: Vec<Option<Link>>,
    /// Whether a replica of the model was ever there, and since when none is that has its worker.
    pub(crate) known: BTreeMap<&'static str, Option<Time>>,
    pub(crate) given_up: BTreeSet<&'static str>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) expected: Expected,
    pub(crate) max_sequence_tokens: u64,
    pub(crate) max_on_replica: usize,
    /// Replicas that the front leaves alone because they answered badly; whom that may be is tested elsewhere.
    pub(crate) left_alone: BTreeSet<u32>,
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
            left_alone: BTreeSet::new(),
        }
    }

    pub(crate) fn live(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn ids(&self) -> Vec<RequestId> {
        self.entries.iter().map(|entry| entry.id).collect()
    }

    pub(crate) fn find(&mut self, id: RequestId) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    pub(crate) fn on(&self, replica: u32) -> Vec<RequestId> {
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
            let unbegun = matches!(entry.place, Place::On(_)) && entry.output().is_empty();
            if entry.model == model && (entry.place == Place::Waiting || unbegun) {
                self.expect_abort(id, None);
                self.conclude(id, EndReason::Unavailable);
            }
        }
    }

    /// A model's clock runs while no replica of it is connected but such as have lost their worker.
    fn watch(&mut self, now: Time, model: &'static str) {
        let prospect = self
            .links
            .iter()
            .zip(&self.models)
            .any(|(link, &runs)| runs == model && link.is_some_and(|link| link.state != ReplicaState::Recovering));
        let since = self.known.entry(model).or_default();
        *since = if prospect { None } else { since.or(Some(now)) };
        self.given_up.remove(model);
    }

    /// What waits for a model that was given up waits as long as the others did.
    pub(crate) fn watch_waiting(&mut self, now: Time) {
        for model in self.given_up.clone() {
            if self.entries.iter().any(|entry| entry.place == Place::Waiting && entry.model == model) {
                self.watch(now, model);
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
        self.watch(now, self.models[replica as usize]);
    }

    pub(crate) fn down(&mut self, now: Time, replica: u32) {
        if self.links[replica as usize].take().is_none() {
            return;
        }
        for id in self.on(replica) {
            self.lose(id, true);
        }
        self.watch(now, self.models[replica as usize]);
    }

    pub(crate) fn lose(&mut self, id: RequestId, fault: bool) {
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
            ReplicaFrame::GiveBack { request, attempt, refusal, .. } => {
                self.given_back(now, replica, *request, *attempt, *refusal);
            }
            ReplicaFrame::Status(report) => {
                self.told_state(now, replica, report.state);
            }
            ReplicaFrame::Pong | ReplicaFrame::KvChanges { .. } | ReplicaFrame::KvSnapshot { .. } => {}
        }
    }

    fn told_state(&mut self, now: Time, replica: u32, state: ReplicaState) {
        let link = self.links[replica as usize].as_mut().expect("its frame passed");
        if std::mem::replace(&mut link.state, state) != state {
            self.watch(now, self.models[replica as usize]);
        }
    }

    pub(crate) fn is_current(&mut self, replica: u32, id: RequestId, attempt: Attempt) -> bool {
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
                self.told_state(now, replica, ReplicaState::Draining);
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

    /// Which replicas' connections the front believes in.
    pub(crate) fn is_up(&self, replica: ReplicaId) -> bool {
        self.links[replica.index()].is_some()
    }
}
