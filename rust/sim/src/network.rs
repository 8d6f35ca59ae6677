//! Connections between fronts and nodes. A live connection delivers everything once and in order, as TCP does; what is
//! under way when it breaks is lost, or arrives late all the same when a mix says so, which the fences must survive.
//! A peer that connects again is another peer. Knows bytes, not what they mean; O(1) per frame.

use crate::agenda::Agenda;
use crate::happening::{Frame, Happening, Towards};
use crate::random::Random;
use llmscale_types::{Duration, NodeId, Time};

/// One connection, for as long as it lasts; never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Peer(pub(crate) u64);

/// The way between one front and one place.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    /// The connection and the processes at its ends, the front's by its incarnation.
    up: Option<(Peer, NodeId, u64)>,
    /// Nothing overtakes: the latest arrival in each direction.
    last_at_front: Time,
    last_at_node: Time,
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Network {
    links: Vec<Vec<Link>>,
    connections: u64,
    max_delay: Duration,
}

impl Network {
    /// All ends, none of them connected.
    pub(crate) fn new(fronts: usize, nodes: usize, max_delay: Duration) -> Self {
        Self { links: vec![vec![Link::default(); nodes]; fronts], connections: 0, max_delay }
    }

    /// A front reaches the process at a place.
    pub(crate) fn connect(&mut self, (front, incarnation): (usize, u64), place: usize, node: NodeId) {
        self.connections += 1;
        self.links[front][place].up = Some((Peer(self.connections), node, incarnation));
    }

    /// A connection breaks. Returns whether there was one.
    pub(crate) fn disconnect(&mut self, front: usize, place: usize) -> bool {
        self.links[front][place].up.take().is_some()
    }

    /// Whether a front and a place are connected.
    pub(crate) fn is_up(&self, front: usize, place: usize) -> bool {
        self.links[front][place].up.is_some()
    }

    /// A front sends to a place. False if it is not connected.
    pub(crate) fn send_to_node(
        &mut self,
        agenda: &mut Agenda<Happening>,
        random: &mut Random,
        (front, place): (usize, usize),
        bytes: Vec<u8>,
    ) -> bool {
        let delay = self.delay(random);
        let link = &mut self.links[front][place];
        let Some((peer, node, incarnation)) = link.up else { return false };
        link.last_at_node = link.last_at_node.max(agenda.now() + delay);
        let frame = Frame { front, incarnation, place, peer, node, towards: Towards::Node, bytes, late: false };
        agenda.at(link.last_at_node, Happening::Frame(frame));
        true
    }

    /// A node sends to a peer. False if that connection is gone.
    pub(crate) fn send_to_front(
        &mut self,
        agenda: &mut Agenda<Happening>,
        random: &mut Random,
        (place, peer): (usize, Peer),
        bytes: Vec<u8>,
    ) -> bool {
        let delay = self.delay(random);
        let is_up = |links: &Vec<Link>| links[place].up.is_some_and(|(up, ..)| up == peer);
        let Some(front) = self.links.iter().position(is_up) else { return false };
        let link = &mut self.links[front][place];
        let (_, node, incarnation) = link.up.expect("its peer was just compared");
        link.last_at_front = link.last_at_front.max(agenda.now() + delay);
        let frame = Frame { front, incarnation, place, peer, node, towards: Towards::Front, bytes, late: false };
        agenda.at(link.last_at_front, Happening::Frame(frame));
        true
    }

    /// Whether the connection that carries a frame still stands.
    pub(crate) fn carries(&self, frame: &Frame) -> bool {
        self.links[frame.front][frame.place].up.is_some_and(|(peer, ..)| peer == frame.peer)
    }

    fn delay(&self, random: &mut Random) -> Duration {
        random.span(50, self.max_delay.0)
    }
}
