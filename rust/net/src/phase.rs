//! Where a client's connection stands, as the watch thread last saw it.
//! libzmq connects again by itself after a lost connection, but not after a refused handshake or a broken frame, and
//! it does not say so: a disconnection that no retry follows is that case. One atomic byte; it knows no socket.

use std::sync::atomic::{AtomicU8, Ordering};

/// Where a connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// libzmq is connecting or in the handshake.
    Connecting,
    /// The handshake succeeded; frames pass.
    Up,
    /// The connection ended, and libzmq has not announced another attempt.
    Stopped,
}

/// A phase that one thread sets and others read.
#[derive(Debug)]
pub(crate) struct SharedPhase(AtomicU8);

impl Default for SharedPhase {
    fn default() -> Self {
        Self(AtomicU8::new(Phase::Connecting as u8))
    }
}

impl SharedPhase {
    pub(crate) fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Release);
    }

    pub(crate) fn get(&self) -> Phase {
        match self.0.load(Ordering::Acquire) {
            0 => Phase::Connecting,
            1 => Phase::Up,
            _ => Phase::Stopped,
        }
    }
}
