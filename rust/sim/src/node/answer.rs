//! What fronts ask of a simulated node: greetings, submissions, aborts, recalls, pings. A copy of what the live node
//! answers, frame by frame; decides nothing that the live one does not.

use super::{Grown, NodeProcess};
use crate::around::Around;
use crate::network::Peer;
use llmscale_scheduler::Event;
use llmscale_types::{FrontId, SequenceKey, Time};
use llmscale_wire::{
    FromNode, ModelIdentity, NodeLimits, Pong, RejectCode, Rejected, ToNode, VERSIONS, Welcome, decode,
};

/// Frames taken per round.
const MAX_FRAMES_PER_ROUND: usize = 256;

impl NodeProcess {
    pub(super) fn read_fronts(&mut self, around: &mut Around) {
        for _ in 0..MAX_FRAMES_PER_ROUND {
            let Some((peer, bytes)) = self.inbox.pop_front() else { return };
            let message = decode::<ToNode>(&bytes, &around.codec).expect("a front's frame can be read");
            self.answer(peer, message, around);
        }
    }

    fn answer(&mut self, peer: Peer, message: ToNode, around: &mut Around) {
        let now = around.now();
        if let ToNode::Hello(_) = message {
            return self.greet(peer, around);
        }
        let Some(front) = self.peers.heard(peer, now) else {
            return self.reject(peer, RejectCode::NotGreeted, around);
        };
        let key = |request, attempt| SequenceKey { front, request, attempt };
        match message {
            ToNode::Hello(_) => unreachable!("answered above"),
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

    fn greet(&mut self, peer: Peer, around: &mut Around) {
        let now = around.now();
        if self.grown == Grown::Bare {
            return;
        }
        // A front that greets again has given up what it had here.
        self.drop_front(peer, now);
        let Some(front) = self.peers.greet(peer, now) else {
            return self.reject(peer, RejectCode::TooManyFronts, around);
        };
        let left = self.replica.attempts_of(front);
        assert_eq!(left, 0, "front {front} of node {} takes over attempts that it never sent", self.node);
        let limits = self.replica.limits();
        let welcome = Welcome {
            version: VERSIONS.high,
            node: self.node,
            epoch: self.epoch,
            model: identity(around.mix.numerics(self.place)),
            limits: NodeLimits {
                vocabulary: limits.vocabulary,
                max_sequence_tokens: limits.max_sequence_tokens,
                max_sequences: limits.max_sequences,
                max_waiting_sequences: limits.max_waiting_sequences,
                total_blocks: limits.total_blocks,
                block_tokens: limits.block_tokens,
                eos_tokens: limits.eos_tokens.clone(),
            },
        };
        self.tell(front, &FromNode::Welcome(welcome), around);
        let status = self.status();
        self.tell(front, &FromNode::Status(status), around);
    }

    fn reject(&mut self, peer: Peer, code: RejectCode, around: &mut Around) {
        if code == RejectCode::NotGreeted {
            around.reach("node_not_greeted", [self.place as u64, peer.0, 0, 0]);
        }
        let rejected = Rejected { code, message: "not wanted".to_owned(), versions: VERSIONS };
        around.send_to_front(self.place, peer, &FromNode::Rejected(rejected));
    }

    fn drop_front(&mut self, peer: Peer, now: Time) {
        if let Some(front) = self.peers.leave(peer) {
            self.event(now, Event::FrontGone(front));
        }
    }

    /// Returns false if the front is not there any more.
    pub(super) fn tell(&self, front: FrontId, message: &FromNode, around: &mut Around) -> bool {
        self.peers.peer(front).is_some_and(|peer| around.send_to_front(self.place, peer, message))
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
