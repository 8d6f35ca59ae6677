//! What passed through an endpoint and what was turned away, as plain counts that only grow.
//! Frames are counted by the thread that owns the endpoint; connections are counted by the context's watch thread
//! through shared atomics, because libzmq reports them from a thread of its own. Reading is O(1).

use crate::phase::SharedPhase;
use crate::wake::Waker;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one endpoint since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Messages handed to the owner.
    pub frames_in: u64,
    /// Messages given to libzmq.
    pub frames_out: u64,
    /// Payload bytes handed to the owner.
    pub bytes_in: u64,
    /// Payload bytes given to libzmq.
    pub bytes_out: u64,
    /// Sends refused because the peer's queue was full.
    pub full: u64,
    /// Sends refused because nobody was connected.
    pub unreachable: u64,
    /// Received messages over `max_frame_bytes`; dropped.
    pub oversized: u64,
    /// Received messages of the wrong form: too many parts, or a peer that chose its own identity; dropped.
    pub malformed: u64,
    /// Connections accepted (server) or opened (client), before their handshake.
    pub connections: u64,
    /// Peers whose handshake succeeded.
    pub admitted_peers: u64,
    /// Handshakes that failed: no or wrong key, a key not on the list, not `ZeroMQ` at all, or too slow.
    pub refused_peers: u64,
    /// Connections that ended, for whatever reason; libzmq cuts those whose frame is over the hard limit.
    pub ended_connections: u64,
    /// Connections that could not be accepted, for want of descriptors.
    pub failed_accepts: u64,
}

impl Counters {
    /// Connections that are open now, in handshake or after it.
    pub const fn open_connections(&self) -> u64 {
        self.connections.saturating_sub(self.ended_connections)
    }

    /// Whether there were connections and all have ended. Reports lag behind frames, so that none is open before the first
    /// is reported, though a peer may be heard already.
    pub const fn all_have_ended(&self) -> bool {
        self.ended_connections > 0 && self.open_connections() == 0
    }
}

/// What the watch thread counts for one endpoint.
#[derive(Debug, Default)]
pub(crate) struct ConnectionCounters {
    pub(crate) connections: AtomicU64,
    pub(crate) admitted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) ended: AtomicU64,
    pub(crate) failed_accepts: AtomicU64,
    /// Where a client's connection stands.
    pub(crate) phase: SharedPhase,
    /// Woken after every change.
    pub(crate) waker: OnceLock<Waker>,
}

impl ConnectionCounters {
    /// The counts as they are now, with those of the owner. `ended` is read first, so that `open_connections` is never
    /// too small.
    pub(crate) fn with(&self, mut counters: Counters) -> Counters {
        counters.ended_connections = self.ended.load(Ordering::Acquire);
        counters.refused_peers = self.refused.load(Ordering::Acquire);
        counters.admitted_peers = self.admitted.load(Ordering::Acquire);
        counters.connections = self.connections.load(Ordering::Acquire);
        counters.failed_accepts = self.failed_accepts.load(Ordering::Acquire);
        counters
    }

    /// The first waker stays; it is woken at once, in case something happened before.
    pub(crate) fn set_waker(&self, waker: Waker) {
        self.waker.get_or_init(|| waker).wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_is_not_reported_yet_has_not_ended() {
        let after = |connections, ended_connections| Counters { connections, ended_connections, ..Counters::default() };
        assert!(!after(0, 0).all_have_ended());
        assert!(!after(1, 0).all_have_ended());
        assert!(after(1, 1).all_have_ended());
        assert!(!after(3, 2).all_have_ended());
    }
}
