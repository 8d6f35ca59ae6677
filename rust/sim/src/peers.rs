//! The fronts that have greeted a simulated node, as the live node keeps them: each under the lowest free number, gone
//! after a silence. Number zero is the node's own probe. Knows nothing of requests.

use crate::network::Peer;
use llmscale_types::{Duration, FrontId, Time};
use std::collections::BTreeMap;

/// The node itself, when it runs a first step to see that everything works.
pub(crate) const PROBE: FrontId = FrontId(0);

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Peers {
    connections: BTreeMap<Peer, (FrontId, Time)>,
    /// With the version that both speak.
    numbers: BTreeMap<FrontId, (Peer, u8)>,
    max_fronts: u32,
    max_silence: Duration,
}

impl Peers {
    pub(crate) fn new(max_fronts: u32, max_silence: Duration) -> Self {
        Self { connections: BTreeMap::new(), numbers: BTreeMap::new(), max_fronts, max_silence }
    }

    /// The number of a greeted peer; hearing from it counts as a sign of life.
    pub(crate) fn heard(&mut self, peer: Peer, now: Time) -> Option<FrontId> {
        let (front, heard) = self.connections.get_mut(&peer)?;
        *heard = now;
        Some(*front)
    }

    pub(crate) fn greet(&mut self, peer: Peer, version: u8, now: Time) -> Option<FrontId> {
        let front = (1..=self.max_fronts).map(FrontId).find(|front| !self.numbers.contains_key(front))?;
        self.connections.insert(peer, (front, now));
        self.numbers.insert(front, (peer, version));
        Some(front)
    }

    pub(crate) fn leave(&mut self, peer: Peer) -> Option<FrontId> {
        let (front, _) = self.connections.remove(&peer)?;
        self.numbers.remove(&front);
        Some(front)
    }

    /// Fronts that have been silent for too long, removed.
    pub(crate) fn silent(&mut self, now: Time) -> Vec<FrontId> {
        let over = |heard: Time| now.since(heard) > self.max_silence;
        let peers: Vec<Peer> =
            self.connections.iter().filter(|(_, (_, heard))| over(*heard)).map(|(&peer, _)| peer).collect();
        peers.into_iter().filter_map(|peer| self.leave(peer)).collect()
    }

    pub(crate) fn all(&self) -> Vec<FrontId> {
        self.numbers.keys().copied().collect()
    }

    /// Where a front is, and what both speak.
    pub(crate) fn peer(&self, front: FrontId) -> Option<(Peer, u8)> {
        self.numbers.get(&front).copied()
    }
}
