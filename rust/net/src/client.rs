//! The connecting side: one DEALER socket, one server, no blocking call.
//! Frames are taken only while the connection is up, so nothing stale waits for a server that comes back; libzmq
//! connects again after a loss, and this endpoint does so after a refusal, with a pause that doubles up to a bound.
//! Each call moves one message, in O(its bytes). The owner may move it to another thread, but not share it:
//!
//! ```compile_fail,E0277
//! fn share<T: Sync>() {}
//! share::<llmscale_net::ClientEndpoint>();
//! ```

use crate::address::Address;
use crate::context::Context;
use crate::counters::{ConnectionCounters, Counters};
use crate::error::NetError;
use crate::key::{KeyPair, PublicKey};
use crate::message::Message;
use crate::options::EndpointOptions;
use crate::phase::Phase;
use crate::poller::PollHandle;
use crate::receive::{ReceiveError, into_message};
use crate::send::{SendError, check_limits, note_outcome};
use crate::socket::{Socket, Unsent};
use crate::wake::Waker;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a client proves itself, and whom it trusts.
#[derive(Clone, Debug)]
pub struct ClientKeys {
    /// Its own pair; the public half is on the server's allow-list.
    pub own: KeyPair,
    /// The server's public key; a server that cannot prove it is not talked to.
    pub server: PublicKey,
}

/// A connecting endpoint.
pub struct ClientEndpoint {
    // Declared before the context, hence dropped first: a context waits for its sockets.
    socket: Socket,
    address: Address,
    options: EndpointOptions,
    counters: Counters,
    connections: Arc<ConnectionCounters>,
    /// Next pause before this endpoint itself connects again.
    pause: Duration,
    /// When it does, once libzmq has stopped.
    reconnect_at: Option<Instant>,
    _context: Context,
}

impl ClientEndpoint {
    /// Connects in the background. An address on another host needs keys.
    pub fn connect(
        context: &Context,
        address: &Address,
        keys: Option<&ClientKeys>,
        options: &EndpointOptions,
    ) -> Result<Self, NetError> {
        address.check_exposure(keys.is_some())?;
        address.check_connectable()?;
        let mut socket = Socket::open(context.raw(), zmq::DEALER, address, options)?;
        let inner = socket.inner();
        // A frame that waits for a server that is away would reach its successor, long after it made sense.
        inner.set_immediate(true).map_err(NetError::system("setting socket options"))?;
        if let Some(keys) = keys {
            let set = inner.set_curve_serverkey(keys.server.as_bytes());
            let set = set.and_then(|()| inner.set_curve_publickey(keys.own.public.as_bytes()));
            let set = set.and_then(|()| inner.set_curve_secretkey(keys.own.secret.as_bytes()));
            set.map_err(NetError::system("setting CURVE keys"))?;
        }
        let connections = context.watch(&socket)?;
        if matches!(address, Address::InProcess(_)) {
            // A queue inside the process reports no events.
            connections.phase.set(Phase::Up);
        }
        socket.connect(address)?;
        Ok(Self {
            socket,
            address: address.clone(),
            options: options.clone(),
            counters: Counters::default(),
            connections,
            pause: Duration::from_micros(options.min_reconnect_us),
            reconnect_at: None,
            _context: context.clone(),
        })
    }

    /// The server's address.
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// Where the connection stands, as last reported.
    pub fn phase(&self) -> Phase {
        self.connections.phase.get()
    }

    /// The next message, if one has arrived. An error other than `System` is about one message, which was dropped.
    pub fn receive(&mut self) -> Result<Option<Message>, ReceiveError> {
        let parts = self.socket.receive().map_err(|error| ReceiveError::System(error.into()))?;
        if let Some(parts) = parts {
            return into_message(&parts, None, &self.options, &mut self.counters).map(Some);
        }
        self.connect_again().map_err(|error| ReceiveError::System(std::io::Error::other(error)))?;
        Ok(None)
    }

    /// Sends one message, or gives it back: `Unreachable` while there is no connection, `Full` when it is slow.
    pub fn send(&mut self, message: impl Into<Message>) -> Result<(), SendError> {
        let message = message.into();
        check_limits(&message, &self.options)?;
        let bytes = message.bytes();
        let outcome = match self.socket.send(message) {
            Err(Unsent::Full(message)) if self.phase() != Phase::Up => {
                self.connect_again().map_err(|error| SendError::System(std::io::Error::other(error)))?;
                Err(Unsent::Away(message))
            }
            outcome => outcome,
        };
        note_outcome(outcome, bytes, &mut self.counters)
    }

    /// Connects again when libzmq has stopped, which it does after a refused handshake or a broken frame. The pause
    /// gives it time to announce an attempt of its own, and doubles while the server keeps refusing.
    fn connect_again(&mut self) -> Result<(), NetError> {
        match (self.phase(), self.reconnect_at) {
            (Phase::Up, _) => {
                self.reconnect_at = None;
                self.pause = Duration::from_micros(self.options.min_reconnect_us);
            }
            (Phase::Connecting, _) => self.reconnect_at = None,
            (Phase::Stopped, None) => self.reconnect_at = Some(Instant::now() + self.pause),
            (Phase::Stopped, Some(time)) if Instant::now() < time => {}
            (Phase::Stopped, Some(_)) => {
                self.reconnect_at = None;
                self.pause = (self.pause * 2).min(Duration::from_micros(self.options.max_reconnect_us));
                self.connections.phase.set(Phase::Connecting);
                self.socket.disconnect(&self.address)?;
                self.socket.connect(&self.address)?;
            }
        }
        Ok(())
    }

    /// What passed so far.
    pub fn counters(&self) -> Counters {
        self.connections.with(self.counters)
    }

    /// Wakes a poller whenever the connection begins, is admitted or refused, or ends. The first waker stays.
    pub fn wake_on_connections(&self, waker: Waker) {
        self.connections.set_waker(waker);
    }

    /// For a poller.
    pub fn poll_handle(&self) -> PollHandle<'_> {
        self.socket.poll_handle()
    }
}
