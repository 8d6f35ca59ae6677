//! One node as a front is connected to it: greets until it is welcome, notices when it is gone. A lost connection is seen
//! at once, a silent node after `max_node_silence`; both end in a greeting again, under which the node forgets what it ran.

use super::translate;
use super::{FrontConfig, NodeAddress};
use llmscale_front::{FrontEvent, ReplicaFrame, ToReplica};
use llmscale_net::{ClientEndpoint, Context, EndpointOptions, NetError, Phase, PollHandle, ReceiveError, Waker};
use llmscale_types::{Duration, NodeId, ReplicaId, Time};
use llmscale_wire::{CodecLimits, FromNode, Hello, KvSnapshot, Ping, ToNode, VERSIONS, decode, encode_at};

/// How often an unanswered greeting is repeated.
const GREETING_INTERVAL: Duration = Duration::from_millis(100);
/// How often a node is told that this front is alive; nodes give fronts up after ten seconds.
const PING_INTERVAL: Duration = Duration::from_millis(1_000);
/// Frames taken from one node per round.
const MAX_FRAMES_PER_ROUND: usize = 256;

/// Where the conversation stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Not welcome yet.
    Greeting { again_at: Time },
    /// Frames flow, in the version that the node has chosen.
    Welcome { node: NodeId, version: u8, heard: Time, ping_at: Time },
}

/// See the file's header.
pub(super) struct Connection {
    replica: ReplicaId,
    endpoint: ClientEndpoint,
    stage: Stage,
    pings: u64,
}

impl Connection {
    pub(super) fn open(
        context: &Context,
        replica: ReplicaId,
        node: &NodeAddress,
        options: &EndpointOptions,
    ) -> Result<Self, NetError> {
        let endpoint = ClientEndpoint::connect(context, &node.address, node.keys.as_ref(), options)?;
        Ok(Self { replica, endpoint, stage: Stage::Greeting { again_at: Time(0) }, pings: 0 })
    }

    pub(super) fn wake_on_connections(&self, waker: Waker) {
        self.endpoint.wake_on_connections(waker);
    }

    pub(super) fn poll_handle(&self) -> PollHandle<'_> {
        self.endpoint.poll_handle()
    }

    /// Events of the frames that have arrived.
    pub(super) fn receive(&mut self, codec: &CodecLimits, now: Time) -> Vec<FrontEvent> {
        let mut events = Vec::new();
        for _ in 0..MAX_FRAMES_PER_ROUND {
            match self.endpoint.receive() {
                Ok(None) => break,
                Ok(Some(message)) => match decode::<FromNode>(&message.payload, codec) {
                    Ok(frame) => events.extend(self.hear(frame, now)),
                    // A node that sends nonsense is left and greeted anew.
                    Err(_) => events.extend(self.lose(now)),
                },
                Err(ReceiveError::System(error)) => panic!("reading from a node failed: {error}"),
                Err(_) => events.extend(self.lose(now)),
            }
        }
        events
    }

    fn hear(&mut self, frame: FromNode, now: Time) -> Option<FrontEvent> {
        let replica = self.replica;
        if let FromNode::Welcome(welcome) = frame {
            if let Stage::Welcome { node, heard, .. } = &mut self.stage
                && *node == welcome.node
            {
                // A node that was paused answers every greeting that piled up. Only the first opens a conversation:
                // nothing was sent before the last greeting, so the node has dropped nothing of it.
                *heard = now;
                return None;
            }
            let (node, version) = (welcome.node, welcome.version);
            if !VERSIONS.has(version) {
                // It was told what is spoken here: nonsense like any other.
                return self.lose(now);
            }
            self.stage = Stage::Welcome { node, version, heard: now, ping_at: now + PING_INTERVAL };
            return Some(FrontEvent::ReplicaUp { replica, offer: Box::new(translate::offer(welcome)) });
        }
        // What a lost node says before it welcomes again comes from a conversation that is over. The front's fence drops
        // and counts it: nothing is decided here.
        if let Stage::Welcome { heard, .. } = &mut self.stage {
            *heard = now;
        }
        let (node, epoch, frame) = match frame {
            FromNode::Outputs(outputs) => (outputs.node, outputs.epoch, ReplicaFrame::Outputs(outputs.outputs)),
            FromNode::GiveBack(back) => (back.node, back.epoch, translate::give_back(&back)),
            FromNode::Status(status) => {
                (status.node, status.epoch, ReplicaFrame::Status(Box::new(translate::report(&status))))
            }
            FromNode::Pong(pong) => (pong.node, pong.epoch, ReplicaFrame::Pong),
            FromNode::KvChanges(changes) => {
                let (node, epoch, number) = (changes.node, changes.epoch, changes.number);
                (node, epoch, ReplicaFrame::KvChanges { number, events: changes.arrive() })
            }
            FromNode::KvSnapshot(KvSnapshot { node, epoch, number, keys }) => {
                (node, epoch, ReplicaFrame::KvSnapshot { number, keys })
            }
            FromNode::Welcome(_) => unreachable!("handled above"),
            FromNode::Rejected(_) => return self.lose(now),
        };
        Some(FrontEvent::Frame { replica, node, epoch, frame })
    }

    /// Notices a lost or silent node, greets, pings.
    pub(super) fn look_at_time(&mut self, config: &FrontConfig, codec: &CodecLimits, now: Time) -> Option<FrontEvent> {
        let connected = self.endpoint.phase() == Phase::Up;
        match self.stage {
            Stage::Greeting { again_at } if connected && now >= again_at => {
                self.stage = Stage::Greeting { again_at: now + GREETING_INTERVAL };
                let hello =
                    Hello { versions: VERSIONS, front: config.name.clone(), fleet: config.fleet.clone(), model: None };
                self.offer(&ToNode::Hello(hello), codec);
                None
            }
            Stage::Welcome { heard, .. } if !connected || now.since(heard) > config.max_node_silence => self.lose(now),
            Stage::Welcome { node, version, heard, ping_at } if now >= ping_at => {
                self.stage = Stage::Welcome { node, version, heard, ping_at: now + PING_INTERVAL };
                self.pings += 1;
                self.offer(&ToNode::Ping(Ping { nonce: self.pings }), codec);
                None
            }
            Stage::Greeting { .. } | Stage::Welcome { .. } => None,
        }
    }

    /// Sends what the front wants sent; a message that cannot be delivered means that the node is lost.
    pub(super) fn send(&mut self, message: ToReplica, codec: &CodecLimits, now: Time) -> Option<FrontEvent> {
        if !matches!(self.stage, Stage::Welcome { .. }) {
            // The front has been told that this replica is down; what it had sent before went with the connection.
            return None;
        }
        if self.offer(&translate::to_node(message, now), codec) { None } else { self.lose(now) }
    }

    pub(super) fn say_goodbye(&mut self, codec: &CodecLimits) {
        if matches!(self.stage, Stage::Welcome { .. }) {
            self.offer(&ToNode::Goodbye, codec);
        }
    }

    fn offer(&mut self, message: &ToNode, codec: &CodecLimits) -> bool {
        // Before the welcome only the greeting is sent, whose version never changes.
        let version = if let Stage::Welcome { version, .. } = self.stage { version } else { VERSIONS.low };
        let frame = encode_at(version, message, codec).expect("the front's limits keep messages within the codec's");
        self.endpoint.send(frame).is_ok()
    }

    fn lose(&mut self, now: Time) -> Option<FrontEvent> {
        let was_welcome = matches!(self.stage, Stage::Welcome { .. });
        self.stage = Stage::Greeting { again_at: now + GREETING_INTERVAL };
        was_welcome.then_some(FrontEvent::ReplicaDown { replica: self.replica })
    }
}
