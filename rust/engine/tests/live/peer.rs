//! A peer of a node that says what a test tells it to, frame by frame.

use super::{Node, wait_until};
use llmscale_net::{AllowList, ClientEndpoint, ClientKeys, Context, EndpointOptions, Phase};
use llmscale_types::{Attempt, Class, Duration, RequestId, Sampling, Token};
use llmscale_wire::{CodecLimits, FromNode, Hello, Ping, Submit, ToNode, VERSIONS, decode, encode_at};

pub(crate) struct Peer {
    endpoint: ClientEndpoint,
    codec: CodecLimits,
    pub(crate) heard: Vec<FromNode>,
}

impl Peer {
    /// One whose connection stands.
    pub(crate) fn connect(node: &Node, keys: Option<&ClientKeys>) -> Self {
        let context = Context::new(AllowList::default(), 1).unwrap();
        let options = EndpointOptions::default();
        let endpoint = ClientEndpoint::connect(&context, node.handle.address(), keys, &options).unwrap();
        wait_until("the node accepts connections", || endpoint.phase() == Phase::Up);
        Self { endpoint, codec: CodecLimits::default(), heard: Vec::new() }
    }

    /// One that the node has welcomed.
    pub(crate) fn greeted(node: &Node, keys: Option<&ClientKeys>) -> Self {
        let mut peer = Self::connect(node, keys);
        peer.greet("test");
        peer.hears("a welcome", |frame| matches!(frame, FromNode::Welcome(_)));
        peer
    }

    pub(crate) fn say(&mut self, message: &ToNode) {
        self.endpoint.send(encode_at(VERSIONS.low, message, &self.codec).unwrap()).unwrap();
    }

    pub(crate) fn greet(&mut self, fleet: &str) {
        let (front, fleet) = ("peer".to_owned(), fleet.to_owned());
        self.say(&ToNode::Hello(Hello { versions: VERSIONS, front, fleet, model: None }));
    }

    pub(crate) fn hears(&mut self, what: &str, wanted: impl Fn(&FromNode) -> bool) -> FromNode {
        let mut found = None;
        wait_until(what, || {
            if let Some(message) = self.endpoint.receive().unwrap() {
                let frame: FromNode = decode(&message.payload, &self.codec).unwrap();
                found = wanted(&frame).then(|| frame.clone());
                self.heard.push(frame);
            }
            found.is_some()
        });
        found.expect("it was just heard")
    }

    /// Everything that was said before has been read and answered.
    pub(crate) fn catch_up(&mut self, nonce: u64) {
        self.say(&ToNode::Ping(Ping { nonce }));
        self.hears("the answer", |frame| matches!(frame, FromNode::Pong(pong) if pong.nonce == nonce));
    }

    /// Runs a request to its first and only token. Returns how much of the prompt was in the cache.
    pub(crate) fn cached(&mut self, request: u64, namespace: [u8; 32], prompt: &[Token]) -> u32 {
        let sampling = Sampling { max_tokens: 1, ..Sampling::default() };
        self.say(&ToNode::Submit(Submit {
            request: RequestId(request),
            attempt: Attempt(1),
            namespace,
            class: Class::Standard,
            context: prompt.to_vec(),
            prompt_tokens: prompt.len() as u32,
            sampling,
            remaining: Some(Duration::from_millis(60_000)),
            suspect: false,
        }));
        let frame = self.hears("the token", |frame| matches!(frame, FromNode::Outputs(_)));
        let FromNode::Outputs(outputs) = frame else { unreachable!("it was asked for") };
        assert_eq!(outputs.outputs.requests, [RequestId(request)]);
        outputs.outputs.cached.first().map_or(0, |&(_, tokens)| tokens)
    }
}
