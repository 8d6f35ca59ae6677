//! What the front said, held against what it had to say: every delivery, end and abort that the book predicts and none
//! else, placements in the order of the queue and within the replicas' limits, and no idle replica while somebody waits.

use crate::book::{Book, Entry, Place};
use llmscale_front::{FrontAction, ReplicaState, ToReplica};
use llmscale_types::{Class, Duration, RequestId, Time, Token};
use std::collections::BTreeMap;

impl Entry {
    /// Its class, less one for each time that it has waited long enough.
    fn rank(&self, now: Time, promote_after: Duration) -> u64 {
        let promotions = now.since(self.arrived).0 / promote_after.0;
        let class = Class::ALL.iter().position(|class| *class == self.class).expect("it is one of all") as u64;
        class.saturating_sub(promotions)
    }
}

impl Book {
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
        self.watch_waiting(now);
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
                let promote_after = self.options.promote_after;
                let entry = self.find(submission.key.request).expect("it was just found");
                assert!(submission.key.attempt > entry.attempt, "an attempt is used twice");
                assert_eq!(submission.context, entry.context, "the record is not what was emitted");
                assert_eq!(submission.prompt_tokens as usize, entry.prompt_tokens);
                assert_eq!((&submission.sampling, submission.deadline), (&entry.sampling, entry.deadline));
                let rank = entry.rank(now, promote_after);
                assert_eq!(Class::ALL[rank as usize], submission.class, "the class that it has reached");
                entry.attempt = submission.key.attempt;
                entry.place = Place::On(replica);
                entry.started = false;
            }
            ToReplica::KvAsk { .. } => panic!("a front without an index asks for caches"),
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
        let first =
            waiting.min_by_key(|entry| (entry.rank(now, self.options.promote_after), entry.id)).map(|entry| entry.id);
        assert_eq!(first, Some(id), "somebody else was first");
    }

    /// Nothing waits while a replica that could run it has nothing to do.
    fn hold_idle(&self, now: Time) {
        for replica in self.idle_replicas(now) {
            let model = self.models[replica];
            let waits = |entry: &&Entry| entry.place == Place::Waiting && entry.model == model;
            assert_eq!(self.entries.iter().find(waits).map(|entry| entry.id), None, "replica {replica} is idle");
        }
    }

    /// Replicas that could run anything and have nothing to do.
    pub(crate) fn idle_replicas(&self, now: Time) -> impl Iterator<Item = usize> {
        (0..self.links.len()).filter(move |&replica| {
            let free = self.links[replica].is_some_and(|link| {
                link.state == ReplicaState::Ready && link.refused_until.is_none_or(|until| until <= now)
            });
            let left_alone = self.left_alone.contains(&(replica as u32));
            free && !left_alone && self.on(replica as u32).is_empty()
        })
    }
}
