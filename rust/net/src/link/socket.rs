//! A link to a worker in another process or on another host, over ipc or tcp, with or without keys.
//! The engine listens and belongs to the first peer that greets it; whoever comes later is not heard. Empty frames are the
//! link's own and no caller sees them: the worker greets with one, the engine asks with one whether a worker that seems
//! lost still is there. A connection that is lost ends the link on both sides, so that no frame is ever sent twice or
//! skipped. Costs are those of the endpoints beneath.

use super::{LinkError, WorkerLink, WorkerSide, check_size};
use crate::address::Address;
use crate::client::{ClientEndpoint, ClientKeys};
use crate::context::Context;
use crate::counters::Counters;
use crate::error::NetError;
use crate::message::Message;
use crate::options::EndpointOptions;
use crate::peer::PeerId;
use crate::phase::Phase;
use crate::poller::{PollHandle, Poller};
use crate::receive::ReceiveError;
use crate::send::SendError;
use crate::server::{ServerEndpoint, ServerKeys};
use crate::wake::Waker;
use std::time::{Duration, Instant};

/// Frames of strangers that one call skips before the engine gets its turn.
const MAX_SKIPS: usize = 64;

/// The engine's side.
pub struct SocketLink {
    server: ServerEndpoint,
    worker: Option<PeerId>,
    /// Whether the worker's connection has ended; frames that it sent before may still be unread.
    ended: bool,
    engine: Waker,
    limit_bytes: u64,
}

impl SocketLink {
    /// Waits for a worker at an address; the waker is the one of the engine's poller and reports a lost worker.
    pub fn listen(
        context: &Context,
        address: &Address,
        keys: Option<&ServerKeys>,
        options: &EndpointOptions,
        engine: Waker,
    ) -> Result<Self, NetError> {
        // Frames of a link have no attachments.
        let options = EndpointOptions { max_parts: 1, ..options.clone() };
        let server = ServerEndpoint::bind(context, address, keys, &options)?;
        server.wake_on_connections(engine.clone());
        Ok(Self { server, worker: None, ended: false, engine, limit_bytes: options.max_frame_bytes })
    }

    /// Where the worker connects to, wildcards resolved.
    pub const fn address(&self) -> &Address {
        self.server.address()
    }

    /// What passed so far.
    pub fn counters(&self) -> Counters {
        self.server.counters()
    }

    /// Whether the worker's connection has ended and its last frames are here. The second question is needed because
    /// libzmq reports the end a moment before it hands over the last frames. It is a frame to a worker that is still there:
    /// asked before the beginning was reported, on a busy machine, questions filled the queue of a worker that was loading
    /// its model, and the engine ended it as one that does not read.
    fn has_ended(&self, worker: PeerId) -> bool {
        if !self.server.counters().all_have_ended() {
            return false;
        }
        let ended = self.server.is_gone(worker);
        if !ended {
            self.engine.wake();
        }
        ended
    }
}

impl WorkerLink for SocketLink {
    fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError> {
        check_size(&frame, self.limit_bytes)?;
        let Some(worker) = self.worker else { return Err(LinkError::NotAttached(frame)) };
        self.server.send(worker, frame).map_err(|error| match error {
            SendError::Full(message) => LinkError::Full(message.payload),
            SendError::Unreachable(_) => LinkError::Down,
            error => from_send_error(error),
        })
    }

    fn receive(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        for _ in 0..MAX_SKIPS {
            let received = match self.server.receive() {
                Ok(Some(received)) => received,
                Ok(None) if self.ended => return Err(LinkError::Down),
                Ok(None) if self.worker.is_some_and(|worker| self.has_ended(worker)) => {
                    self.ended = true;
                    continue;
                }
                Ok(None) => return Ok(None),
                Err(ReceiveError::System(error)) => return Err(LinkError::System(error)),
                Err(error) if self.worker.is_some() && error.peer() == self.worker => {
                    return Err(LinkError::Dropped(error));
                }
                Err(error) => {
                    if let Some(stranger) = error.peer() {
                        self.server.ignore(stranger);
                    }
                    continue;
                }
            };
            match self.worker {
                Some(worker) if worker == received.peer => {
                    if !received.message.payload.is_empty() {
                        return Ok(Some(received.message.payload));
                    }
                }
                None if received.message.payload.is_empty() => self.worker = Some(received.peer),
                // A second worker, or one that does not greet.
                _ => self.server.ignore(received.peer),
            }
        }
        Ok(None)
    }

    fn is_attached(&self) -> bool {
        self.worker.is_some()
    }

    fn poll_handle(&self) -> Option<PollHandle<'_>> {
        Some(self.server.poll_handle())
    }
}

/// The worker's side.
pub struct SocketWorker {
    client: ClientEndpoint,
    poller: Poller,
    limit_bytes: u64,
    /// How many handshakes had succeeded when this side greeted; one more is another connection.
    greeted_at: Option<u64>,
}

impl SocketWorker {
    /// Connects to an engine in the background.
    pub fn connect(
        context: &Context,
        address: &Address,
        keys: Option<&ClientKeys>,
        options: &EndpointOptions,
    ) -> Result<Self, NetError> {
        let options = EndpointOptions { max_parts: 1, ..options.clone() };
        let client = ClientEndpoint::connect(context, address, keys, &options)?;
        let poller = Poller::new()?;
        client.wake_on_connections(poller.waker());
        Ok(Self { client, poller, limit_bytes: options.max_frame_bytes, greeted_at: None })
    }

    /// What passed so far; a worker that is never admitted sees its refusals here.
    pub fn counters(&self) -> Counters {
        self.client.counters()
    }

    /// Whether the connection that was greeted has ended, whatever libzmq has connected since.
    fn is_down(&self) -> bool {
        let admitted = self.client.counters().admitted_peers;
        self.greeted_at.is_some_and(|greeted_at| self.client.phase() != Phase::Up || admitted != greeted_at)
    }

    /// Greets once the connection is up.
    fn greet(&mut self) -> Result<(), LinkError> {
        if self.greeted_at.is_none() && self.client.phase() == Phase::Up {
            let admitted = self.client.counters().admitted_peers;
            match self.client.send(Message::default()) {
                Ok(()) => self.greeted_at = Some(admitted),
                Err(SendError::Full(_) | SendError::Unreachable(_)) => {}
                Err(error) => return Err(from_send_error(error)),
            }
        }
        Ok(())
    }
}

impl WorkerSide for SocketWorker {
    fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError> {
        check_size(&frame, self.limit_bytes)?;
        self.greet()?;
        if self.is_down() {
            return Err(LinkError::Down);
        }
        if self.greeted_at.is_none() {
            return Err(LinkError::NotAttached(frame));
        }
        self.client.send(frame).map_err(|error| match error {
            SendError::Full(message) => LinkError::Full(message.payload),
            SendError::Unreachable(_) => LinkError::Down,
            error => from_send_error(error),
        })
    }

    fn receive(&mut self, max_wait_us: u64) -> Result<Option<Vec<u8>>, LinkError> {
        let deadline = Instant::now() + Duration::from_micros(max_wait_us);
        loop {
            self.greet()?;
            // Asked before the frames are read, so that none that arrived before the end is missed.
            let down = self.is_down();
            match self.client.receive() {
                // The engine's question, which libzmq answers. Reports of connections lag behind frames, so a worker that
                // has just attached may be asked; it read the question as a broken frame in one of six runs.
                Ok(Some(message)) if message.payload.is_empty() => continue,
                Ok(Some(message)) => return Ok(Some(message.payload)),
                Ok(None) if down => return Err(LinkError::Down),
                Ok(None) => {}
                Err(ReceiveError::System(error)) => return Err(LinkError::System(error)),
                Err(error) => return Err(LinkError::Dropped(error)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let wait = self.poller.wait(&[self.client.poll_handle()], Some(left.as_micros().max(1) as u64));
            wait.map_err(|error| LinkError::System(std::io::Error::other(error)))?;
        }
    }
}

/// The errors that leave no frame to give back.
fn from_send_error(error: SendError) -> LinkError {
    match error {
        SendError::TooLarge { part_bytes, limit_bytes } => LinkError::TooLarge { frame_bytes: part_bytes, limit_bytes },
        SendError::System(error) => LinkError::System(error),
        error => LinkError::System(std::io::Error::other(error)),
    }
}
