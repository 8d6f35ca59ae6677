//! The fronts that are connected to a node: who greeted, under which number the replica knows them, when they were last
//! heard. Number zero is the node's own probe. Knows frames and peers, nothing of requests.

use llmscale_net::{PeerId, SendError, ServerEndpoint};
use llmscale_types::{Duration, FrontId, Time};
use llmscale_wire::{CodecLimits, FromNode, encode_at};
use std::collections::BTreeMap;

/// The node itself, when it runs a first step to see that everything works.
pub(crate) const PROBE: FrontId = FrontId(0);

/// A front that has greeted.
#[derive(Debug)]
struct Connection {
    front: FrontId,
    /// What both speak.
    version: u8,
    heard: Time,
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Fronts {
    connections: BTreeMap<PeerId, Connection>,
    peers: BTreeMap<FrontId, PeerId>,
    max_connections: u32,
    max_silence: Duration,
}

impl Fronts {
    pub(crate) fn new(max_connections: u32, max_silence: Duration) -> Self {
        Self { connections: BTreeMap::new(), peers: BTreeMap::new(), max_connections, max_silence }
    }

    pub(crate) fn len(&self) -> u32 {
        self.connections.len() as u32
    }

    /// The number of a greeted peer; hearing from it counts as a sign of life.
    pub(crate) fn heard(&mut self, peer: PeerId, now: Time) -> Option<FrontId> {
        let connection = self.connections.get_mut(&peer)?;
        connection.heard = now;
        Some(connection.front)
    }

    /// Takes a new front under the lowest free number, if there is room. Numbers stay small, because the replica keeps
    /// one output column per number.
    pub(crate) fn greet(&mut self, peer: PeerId, version: u8, now: Time) -> Option<FrontId> {
        if let Some(front) = self.heard(peer, now) {
            return Some(front);
        }
        let front = (1..=self.max_connections).map(FrontId).find(|front| !self.peers.contains_key(front))?;
        self.connections.insert(peer, Connection { front, version, heard: now });
        self.peers.insert(front, peer);
        Some(front)
    }

    pub(crate) fn leave(&mut self, peer: PeerId) -> Option<FrontId> {
        let connection = self.connections.remove(&peer)?;
        self.peers.remove(&connection.front);
        Some(connection.front)
    }

    /// Ends the conversation with a front, by its number.
    pub(crate) fn forget(&mut self, front: FrontId) {
        if let Some(peer) = self.peers.remove(&front) {
            self.connections.remove(&peer);
        }
    }

    /// Fronts that have been silent for too long, removed.
    pub(crate) fn silent(&mut self, now: Time) -> Vec<FrontId> {
        let over = |connection: &Connection| now.since(connection.heard) > self.max_silence;
        let peers: Vec<PeerId> =
            self.connections.iter().filter(|(_, connection)| over(connection)).map(|(&peer, _)| peer).collect();
        peers.into_iter().filter_map(|peer| self.leave(peer)).collect()
    }

    pub(crate) fn all(&self) -> Vec<FrontId> {
        self.peers.keys().copied().collect()
    }

    /// Sends to a front. Returns false if it is gone or does not read: its attempts are then dropped.
    pub(crate) fn send(
        &self,
        server: &mut ServerEndpoint,
        front: FrontId,
        message: &FromNode,
        codec: &CodecLimits,
    ) -> bool {
        let Some(&peer) = self.peers.get(&front) else { return false };
        match encode_at(self.connections[&peer].version, message, codec) {
            Ok(frame) => send_frame(server, peer, frame),
            Err(error) => unreachable!("the node made a frame that breaks its own limits: {error}"),
        }
    }
}

/// Sends to any peer, greeted or not; false if it cannot be delivered.
pub(crate) fn send_frame(server: &mut ServerEndpoint, peer: PeerId, frame: Vec<u8>) -> bool {
    match server.send(peer, frame) {
        Ok(()) => true,
        Err(SendError::Full(_) | SendError::Unreachable(_)) => false,
        Err(error) => unreachable!("a frame within the codec's limits was refused: {error}"),
    }
}
