//! The part of the first verb that is about fronts: who greets is welcome or told why not, and what a front asks becomes an
//! event. Bytes that are no message end the conversation of their sender.

use super::Node;
use super::receive::MAX_FRAMES_PER_ROUND;
use crate::fronts::send_frame;
use llmscale_net::{PeerId, Principal, ReceiveError, Role};
use llmscale_scheduler::Event;
use llmscale_types::{FrontId, SequenceKey, Time};
use llmscale_wire::{
    FromNode, Hello, ModelRef, Pong, RejectCode, Rejected, ToNode, VERSIONS, Welcome, WireError, decode, encode,
};

impl Node {
    pub(super) fn read_fronts(&mut self) {
        for _ in 0..MAX_FRAMES_PER_ROUND {
            match self.server.receive() {
                Ok(None) => return,
                Ok(Some(received)) => match decode::<ToNode>(&received.message.payload, &self.codec) {
                    Ok(message) => self.answer(received.peer, received.principal.as_deref(), message),
                    // A front that has not seen yet that this is another process than before; it will greet.
                    Err(error @ WireError::UnsupportedVersion { .. }) => {
                        self.reject(received.peer, RejectCode::UnsupportedVersion, &error.to_string());
                    }
                    Err(error) => self.reject(received.peer, RejectCode::Malformed, &error.to_string()),
                },
                Err(ReceiveError::System(error)) => panic!("reading from fronts failed: {error}"),
                Err(_) => self.dropped_frames += 1,
            }
        }
    }

    fn answer(&mut self, peer: PeerId, principal: Option<&Principal>, message: ToNode) {
        let now = self.clock.now();
        if let ToNode::Hello(hello) = message {
            self.greet(peer, &hello, now);
            return;
        }
        if matches!(message, ToNode::Goodbye) && self.forget_early(peer) {
            return;
        }
        let Some(front) = self.fronts.heard(peer, now) else {
            self.reject(peer, RejectCode::NotGreeted, "the first frame of a connection is a Hello");
            return;
        };
        let key = |request, attempt| SequenceKey { front, request, attempt };
        match message {
            ToNode::Hello(_) => unreachable!("answered above"),
            ToNode::Submit(mut submit) => {
                if let (Some(clients), Some(principal)) = (&self.clients, principal)
                    && let Some(namespace) = clients.of(principal, &submit.namespace)
                {
                    submit.namespace = namespace;
                }
                self.event(Event::Submit(Box::new(submit.arrive(front, now))));
            }
            ToNode::Abort(abort) => {
                self.event(Event::Abort(key(abort.request, abort.attempt)));
            }
            ToNode::Recall(recall) => {
                self.event(Event::Recall(key(recall.request, recall.attempt)));
            }
            ToNode::Ping(ping) => {
                let pong = Pong { node: self.config.node, epoch: self.epoch, nonce: ping.nonce };
                self.tell(front, &FromNode::Pong(pong));
            }
            ToNode::Goodbye => self.drop_front(peer),
            // The names of all tenants' prefixes are for those who place all tenants' requests.
            ToNode::KvAsk(_) if principal.is_some_and(|principal| principal.role() == Role::Client) => {
                self.dropped_frames += 1;
            }
            ToNode::KvAsk(ask) => {
                self.event(Event::KvAsk { front, from: ask.from });
            }
        }
    }

    pub(super) fn greet(&mut self, peer: PeerId, hello: &Hello, now: Time) {
        let Some(version) = hello.versions.newest_common(VERSIONS) else {
            return self.reject(peer, RejectCode::UnsupportedVersion, "no common protocol version");
        };
        if hello.fleet != self.config.fleet {
            let text = format!("this node belongs to fleet {:?}, not {:?}", self.config.fleet, hello.fleet);
            return self.reject(peer, RejectCode::WrongFleet, &text);
        }
        if hello.model.as_ref().is_some_and(|wanted| !self.serves(wanted)) {
            let text = format!("this node serves {:?}", self.config.model.name);
            return self.reject(peer, RejectCode::WrongModel, &text);
        }
        if !self.knows_numerics {
            // Which kernels run is known when the first worker is. A front that had to greet again then waited for a
            // quarter of a second, a tenth of a start.
            self.forget_early(peer);
            // A front that waits greets again and again: whoever has been silent for longest is most likely gone.
            if self.early.len() >= self.config.max_fronts as usize {
                self.early.remove(0);
            }
            self.early.push((peer, hello.clone()));
            return;
        }
        // A front that greets again has given up what it had here.
        self.drop_front(peer);
        let Some(front) = self.fronts.greet(peer, version, now) else {
            let text = format!("this node serves {} fronts at most (max_fronts)", self.config.max_fronts);
            return self.reject(peer, RejectCode::TooManyFronts, &text);
        };
        let welcome = Welcome {
            version,
            node: self.config.node,
            epoch: self.epoch,
            model: self.config.model.clone(),
            limits: (&self.config.limits).into(),
        };
        if !self.hand_over(front, &FromNode::Welcome(welcome)) {
            // It left while it waited, and its place is another's.
            return;
        }
        let status = self.status();
        self.tell(front, &FromNode::Status(status));
    }

    /// Returns whether it waited to be welcome.
    fn forget_early(&mut self, peer: PeerId) -> bool {
        let waiting = self.early.len();
        self.early.retain(|(known, _)| *known != peer);
        self.early.len() < waiting
    }

    fn serves(&self, wanted: &ModelRef) -> bool {
        let model = &self.config.model;
        wanted.name == model.name
            && wanted.revision.as_ref().is_none_or(|revision| *revision == model.revision)
            && wanted.adapter == model.adapter
    }

    fn reject(&mut self, peer: PeerId, code: RejectCode, text: &str) {
        self.dropped_frames += 1;
        let message = self.codec.bounded_text(text).to_owned();
        let rejected = FromNode::Rejected(Rejected { code, message, versions: VERSIONS });
        if let Ok(frame) = encode(&rejected, &self.codec)
            && !send_frame(&mut self.server, peer, frame)
        {
            self.dropped_frames += 1;
        }
        if code == RejectCode::Malformed {
            self.server.ignore(peer);
            self.drop_front(peer);
        }
    }

    fn drop_front(&mut self, peer: PeerId) {
        if let Some(front) = self.fronts.leave(peer) {
            self.event(Event::FrontGone(front));
        }
    }

    pub(super) fn tell(&mut self, front: FrontId, message: &FromNode) {
        if !self.fronts.send(&mut self.server, front, message, &self.codec) {
            self.dropped_frames += 1;
        }
    }
}
