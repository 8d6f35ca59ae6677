//! What fronts ask of a simulated node: greetings, submissions, aborts, recalls, pings. A copy of what the live node
//! answers, frame by frame; decides nothing that the live one does not.

use super::{Grown, NodeProcess};
use crate::around::Around;
use crate::network::Peer;
use llmscale_scheduler::Event;
use llmscale_types::{FrontId, Refusal, SequenceKey, Time};
use llmscale_wire::{
    FromNode, Hello, ModelIdentity, Pong, RejectCode, Rejected, ToNode, Welcome, WireError, decode_as,
};

/// Frames taken per round.
const MAX_FRAMES_PER_ROUND: usize = 256;

impl NodeProcess {
    pub(super) fn read_fronts(&mut self, around: &mut Around) {
        for _ in 0..MAX_FRAMES_PER_ROUND {
            let Some((peer, bytes)) = self.inbox.pop_front() else { return };
            match decode_as::<ToNode>(self.spoken, &bytes, &around.codec) {
                Ok(message) => self.answer(peer, message, around),
                // A front that stood still while another build took over here goes on as it was agreed before.
                Err(WireError::UnsupportedVersion { .. }) => self.reject(peer, RejectCode::UnsupportedVersion, around),
                Err(error) => panic!("a front's frame can be read: {error}"),
            }
        }
    }

    fn answer(&mut self, peer: Peer, message: ToNode, around: &mut Around) {
        let now = around.now();
        if let ToNode::Hello(hello) = message {
            return self.greet(peer, &hello, around);
        }
        let Some(front) = self.peers.heard(peer, now) else {
            return self.reject(peer, RejectCode::NotGreeted, around);
        };
        let key = |request, attempt| SequenceKey { front, request, attempt };
        match message {
            ToNode::Hello(_) => unreachable!("answered above"),
            ToNode::Submit(submit) if self.refuses_wrongly(around) => {
                self.out.give_back.push((key(submit.request, submit.attempt), Refusal::Duplicate.into()));
            }
            ToNode::Submit(submit) => self.event(now, Event::Submit(Box::new(submit.arrive(front, now)))),
            ToNode::Abort(abort) => self.event(now, Event::Abort(key(abort.request, abort.attempt))),
            ToNode::Recall(recall) => self.event(now, Event::Recall(key(recall.request, recall.attempt))),
            ToNode::Ping(ping) => {
                let pong = Pong { node: self.node, epoch: self.epoch, nonce: ping.nonce };
                self.tell(front, &FromNode::Pong(pong), around);
            }
            ToNode::Goodbye => self.drop_front(peer, now),
            ToNode::KvAsk(ask) => {
                around.coverage.add("caches_asked_again", u64::from(ask.from > 0));
                self.event(now, Event::KvAsk { front, from: ask.from });
            }
        }
    }

    fn refuses_wrongly(&self, around: &mut Around) -> bool {
        let refuses = around.now() < self.errs_until && around.random.chance(300);
        if refuses {
            around.reach("node_refused_wrongly", [self.place as u64, self.node.0, 0, 0]);
        }
        refuses
    }

    fn greet(&mut self, peer: Peer, hello: &Hello, around: &mut Around) {
        let now = around.now();
        let version = hello.versions.newest_common(self.spoken).expect("neighbouring builds have a version in common");
        if self.grown == Grown::Bare {
            return;
        }
        // A front that greets again has given up what it had here.
        self.drop_front(peer, now);
        let Some(front) = self.peers.greet(peer, version, now) else {
            return self.reject(peer, RejectCode::TooManyFronts, around);
        };
        let left = self.replica.attempts_of(front);
        assert_eq!(left, 0, "front {front} of node {} takes over attempts that it never sent", self.node);
        let welcome = Welcome {
            version,
            node: self.node,
            epoch: self.epoch,
            model: identity(around.mix.numerics(self.place)),
            limits: self.replica.limits().into(),
        };
        self.tell(front, &FromNode::Welcome(welcome), around);
        let status = self.status();
        self.tell(front, &FromNode::Status(status), around);
    }

    fn reject(&mut self, peer: Peer, code: RejectCode, around: &mut Around) {
        match code {
            RejectCode::NotGreeted => around.reach("node_not_greeted", [self.place as u64, peer.0, 0, 0]),
            RejectCode::UnsupportedVersion => around.reach("version_refused", [self.place as u64, peer.0, 0, 0]),
            _ => {}
        }
        let rejected = Rejected { code, message: "not wanted".to_owned(), versions: self.spoken };
        around.send_to_front(self.place, peer, self.spoken.high, &FromNode::Rejected(rejected));
    }

    fn drop_front(&mut self, peer: Peer, now: Time) {
        if let Some(front) = self.peers.leave(peer) {
            self.event(now, Event::FrontGone(front));
        }
    }

    /// Returns false if the front is not there any more.
    pub(super) fn tell(&self, front: FrontId, message: &FromNode, around: &mut Around) -> bool {
        self.peers.peer(front).is_some_and(|(peer, version)| around.send_to_front(self.place, peer, version, message))
    }
}

/// All nodes of a simulation run the same model.
fn identity(numerics: &str) -> ModelIdentity {
    ModelIdentity {
        name: crate::clients::MODEL.to_owned(),
        revision: "1".to_owned(),
        adapter: None,
        weights_digest: [1; 32],
        tokenizer_digest: [2; 32],
        numerics: numerics.to_owned(),
    }
}
