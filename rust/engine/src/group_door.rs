//! The door at which the hosts of one replica meet: the leader listens, followers connect, small frames pass both ways.
//! A thread owns the socket; its owner sleeps on a descriptor and never waits here. O(bytes) per frame, and at most
//! `MAX_WAITING_FRAMES` wait for the owner, who has lost the rest if it does not look. Knows who may come in, and nothing
//! of what is said.

use crate::group_keys::GroupKeys;
use crate::node::NodeError;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use llmscale_net::{
    Address, ClientEndpoint, Context, EndpointOptions, PeerId, Phase, PollHandle, Poller, ReceiveError, SendError,
    ServerEndpoint, Waker,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Largest frame. What hosts tell each other is a page of names and numbers.
pub const MAX_FRAME_BYTES: u64 = 64 << 10;
/// Frames that wait for the owner, and orders that wait for the thread.
const MAX_WAITING_FRAMES: usize = 1_024;
/// How long the thread sleeps when nothing happens: a connection that was refused is tried again after a look.
const MAX_SLEEP_US: u64 = 100_000;

/// A frame and whom it came from: a connection of the leader's door, `None` at a follower's.
pub type Heard = (Option<PeerId>, Vec<u8>);

enum Order {
    Send(Option<PeerId>, Vec<u8>),
    Ignore(PeerId),
}

#[derive(Default)]
struct Shared {
    heard: VecDeque<Heard>,
    ended: Vec<PeerId>,
    connected: bool,
    refusals: u64,
}

/// See the file's header.
pub struct GroupDoor {
    address: Address,
    /// Taken when the door is closed.
    orders: Option<Sender<Order>>,
    thread_waker: Waker,
    shared: Arc<Mutex<Shared>>,
    reader: Waker,
    thread: Option<JoinHandle<()>>,
}

impl GroupDoor {
    /// The leader's side.
    pub fn listen(address: &Address, keys: &GroupKeys) -> Result<Self, NodeError> {
        let context = keys.context()?;
        let server = ServerEndpoint::bind(&context, address, keys.server().as_ref(), &options())?;
        let address = server.address().clone();
        Self::start(address, Side::Leader(server), context)
    }

    /// A follower's side; it connects in the background, again and again.
    pub fn connect(address: &Address, keys: &GroupKeys) -> Result<Self, NodeError> {
        let context = keys.context()?;
        let client = ClientEndpoint::connect(&context, address, keys.client().as_ref(), &options())?;
        Self::start(address.clone(), Side::Follower(client), context)
    }

    fn start(address: Address, side: Side, context: Context) -> Result<Self, NodeError> {
        let poller = Poller::new()?;
        let thread_waker = poller.waker();
        side.wake_on_connections(thread_waker.clone());
        let reader = Waker::new().map_err(NodeError::Thread)?;
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (orders, inbox) = bounded(MAX_WAITING_FRAMES);
        let thread = Thread { side, poller, orders: inbox, shared: Arc::clone(&shared), reader: reader.clone() };
        let started = std::thread::Builder::new().name("llmscale-door".into()).spawn(move || {
            thread.run();
            // After the socket: a context waits for those that are open.
            drop(context);
        });
        let thread = Some(started.map_err(NodeError::Thread)?);
        Ok(Self { address, orders: Some(orders), thread_waker, shared, reader, thread })
    }

    /// Where it listens, or connects to.
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// Readable when `take` has something.
    pub const fn waker(&self) -> &Waker {
        &self.reader
    }

    /// What was heard since the last call.
    pub fn take(&self) -> Vec<Heard> {
        self.reader.take();
        lock(&self.shared).heard.drain(..).collect()
    }

    /// Connections that could not be sent to since the last call, because they have ended.
    pub fn take_ended(&self) -> Vec<PeerId> {
        std::mem::take(&mut lock(&self.shared).ended)
    }

    /// Whether a follower's connection is up.
    pub fn is_connected(&self) -> bool {
        lock(&self.shared).connected
    }

    /// Handshakes that failed: another key, or no `ZeroMQ` at all.
    pub fn refusals(&self) -> u64 {
        lock(&self.shared).refusals
    }

    /// Sends to a connection of the leader's door, or from a follower to the leader. A frame that cannot pass now is
    /// dropped: whatever matters is said again. Returns false for a frame that is too large, or too many at once.
    pub fn send(&self, peer: Option<PeerId>, frame: Vec<u8>) -> bool {
        frame.len() as u64 <= MAX_FRAME_BYTES && self.order(Order::Send(peer, frame))
    }

    /// Hears no more of a connection whose frames make no sense.
    pub fn ignore(&self, peer: PeerId) -> bool {
        self.order(Order::Ignore(peer))
    }

    fn order(&self, order: Order) -> bool {
        let sent = self.orders.as_ref().is_some_and(|orders| orders.try_send(order).is_ok());
        self.thread_waker.wake();
        sent
    }
}

impl Drop for GroupDoor {
    fn drop(&mut self) {
        self.orders = None;
        self.thread_waker.wake();
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            assert!(outcome.is_ok() || std::thread::panicking(), "the door's thread panicked");
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options() -> EndpointOptions {
    EndpointOptions {
        max_frame_bytes: MAX_FRAME_BYTES,
        max_parts: 1,
        // A host that starts again is to be back within a second.
        max_reconnect_us: 500_000,
        ..EndpointOptions::default()
    }
}

enum Side {
    Leader(ServerEndpoint),
    Follower(ClientEndpoint),
}

impl Side {
    fn wake_on_connections(&self, waker: Waker) {
        match self {
            Self::Leader(server) => server.wake_on_connections(waker),
            Self::Follower(client) => client.wake_on_connections(waker),
        }
    }

    fn poll_handle(&self) -> PollHandle<'_> {
        match self {
            Self::Leader(server) => server.poll_handle(),
            Self::Follower(client) => client.poll_handle(),
        }
    }

    fn receive(&mut self) -> Result<Option<Heard>, ReceiveError> {
        match self {
            Self::Leader(server) => {
                Ok(server.receive()?.map(|received| (Some(received.peer), received.message.payload)))
            }
            Self::Follower(client) => Ok(client.receive()?.map(|message| (None, message.payload))),
        }
    }

    /// What cannot be sent now is dropped: nothing that is said here makes sense later. Returns a peer that has ended.
    fn obey(&mut self, order: Order) -> Option<PeerId> {
        match (self, order) {
            (Self::Leader(server), Order::Send(Some(peer), frame)) => {
                matches!(server.send(peer, frame), Err(SendError::Unreachable(_))).then_some(peer)
            }
            (Self::Follower(client), Order::Send(None, frame)) => {
                drop(client.send(frame));
                None
            }
            (Self::Leader(server), Order::Ignore(peer)) => {
                server.ignore(peer);
                None
            }
            (Self::Leader(_), Order::Send(None, _)) | (Self::Follower(_), _) => {
                unreachable!("a leader names its peer, a follower has one")
            }
        }
    }

    fn standing(&self) -> (bool, u64) {
        match self {
            Self::Leader(server) => (true, server.counters().refused_peers),
            Self::Follower(client) => (client.phase() == Phase::Up, client.counters().refused_peers),
        }
    }
}

struct Thread {
    side: Side,
    poller: Poller,
    orders: Receiver<Order>,
    shared: Arc<Mutex<Shared>>,
    reader: Waker,
}

impl Thread {
    fn run(mut self) {
        loop {
            if let Err(error) = self.poller.wait(&[self.side.poll_handle()], Some(MAX_SLEEP_US)) {
                panic!("waiting at the door failed: {error}");
            }
            self.listen();
            loop {
                match self.orders.try_recv() {
                    Ok(order) => {
                        if let Some(peer) = self.side.obey(order) {
                            self.note_end(peer);
                        }
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
        }
    }

    fn note_end(&self, peer: PeerId) {
        let ended = &mut lock(&self.shared).ended;
        if ended.len() < MAX_WAITING_FRAMES && !ended.contains(&peer) {
            ended.push(peer);
        }
        self.reader.wake();
    }

    fn listen(&mut self) {
        let mut arrived = false;
        for _ in 0..MAX_WAITING_FRAMES {
            match self.side.receive() {
                Ok(None) => break,
                Ok(Some(heard)) => {
                    let mut shared = lock(&self.shared);
                    if shared.heard.len() < MAX_WAITING_FRAMES {
                        shared.heard.push_back(heard);
                        arrived = true;
                    }
                }
                Err(ReceiveError::System(error)) => panic!("reading at the door failed: {error}"),
                // About one message, which was dropped and counted.
                Err(_) => {}
            }
        }
        let (connected, refusals) = self.side.standing();
        let mut shared = lock(&self.shared);
        arrived |= (shared.connected, shared.refusals) != (connected, refusals);
        (shared.connected, shared.refusals) = (connected, refusals);
        drop(shared);
        if arrived {
            self.reader.wake();
        }
    }
}
