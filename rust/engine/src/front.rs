//! The live driver of a front: one thread owns the connections to nodes; the front itself is behind a lock that callers
//! hold for microseconds, so that a submission is taken or refused at once. What arrives for readers is merged per request
//! until somebody takes it, and one descriptor says that there is something. Decides nothing.

mod arrivals;
mod connection;
mod translate;

pub use arrivals::Arrival;

use crate::clock::Clock;
use arrivals::Arrivals;
use connection::Connection;
use crossbeam_channel::{Receiver, Sender, bounded};
use llmscale_blocks::ChainHasher;
use llmscale_front::{Front, FrontAction, FrontEvent, FrontOptions, FrontStatus, NewRequest, SubmitError, ToReplica};
use llmscale_net::{Address, ClientKeys, Context, EndpointOptions, NetError, Poller, Waker};
use llmscale_types::{Duration, LimitError, PrefixKey, ReplicaId, RequestId, Time};
use llmscale_wire::CodecLimits;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// How a front behaves.
#[derive(Clone, Debug)]
pub struct FrontConfig {
    /// Its name, for the nodes' logs.
    pub name: String,
    /// The fleet it belongs to.
    pub fleet: String,
    /// Queues and spans of the state machine.
    pub options: FrontOptions,
    /// Keys the names of prefixes; the nodes of the fleet have the same.
    pub secret: [u8; 32],
    /// A node that is silent for this long is lost; nodes report every 250 ms.
    pub max_node_silence: Duration,
}

/// A node to connect to.
#[derive(Clone, Debug)]
pub struct NodeAddress {
    /// Where it listens.
    pub address: Address,
    /// How to prove who we are and whom we trust; needed beyond this machine.
    pub keys: Option<ClientKeys>,
}

/// Why a front does not start.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// A size is out of bounds.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The sockets cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The thread cannot be had.
    #[error("starting the front's thread: {0}")]
    Thread(std::io::Error),
}

/// What the callers and the thread share.
struct Core {
    front: Front,
    actions: Vec<FrontAction>,
    outgoing: VecDeque<(ReplicaId, ToReplica)>,
    arrivals: Arrivals,
    wake_at: Option<Time>,
}

struct Shared {
    clock: Clock,
    core: Mutex<Core>,
    /// Wakes the reader of arrivals.
    reader: Waker,
    /// Wakes the thread that owns the connections.
    sender: Waker,
    hasher: ChainHasher,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self, event: FrontEvent) {
        let mut core = self.lock();
        let core = &mut *core;
        core.front.on_event(self.clock.now(), event, &mut core.actions);
        self.carry_out(core);
    }

    /// Sorts actions into what leaves, what arrives for readers, and when to wake.
    fn carry_out(&self, core: &mut Core) {
        let (mut leaves, mut arrives) = (false, false);
        for action in core.actions.drain(..) {
            match action {
                FrontAction::Send { replica, message } => {
                    core.outgoing.push_back((replica, message));
                    leaves = true;
                }
                FrontAction::Deliver(deliveries) => {
                    for delivery in deliveries.iter() {
                        core.arrivals.tokens(&delivery);
                    }
                    arrives = true;
                }
                FrontAction::Finish { request, reason, usage, restarts } => {
                    core.arrivals.end(request, reason, usage, restarts);
                    arrives = true;
                }
                FrontAction::WakeAt(at) => {
                    core.wake_at = Some(at);
                    leaves = true;
                }
            }
        }
        if arrives {
            self.reader.wake();
        }
        if leaves {
            self.sender.wake();
        }
    }
}

/// A running front.
pub struct FrontHandle {
    shared: Arc<Shared>,
    stop: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl FrontHandle {
    /// Starts to connect to the nodes, in the background.
    pub fn start(config: FrontConfig, context: &Context, nodes: &[NodeAddress]) -> Result<Self, FrontError> {
        let front = Front::new(config.options.clone())?;
        let poller = Poller::new()?;
        let core = Core {
            front,
            actions: Vec::new(),
            outgoing: VecDeque::new(),
            arrivals: Arrivals::default(),
            wake_at: None,
        };
        let shared = Arc::new(Shared {
            clock: Clock::new(),
            core: Mutex::new(core),
            reader: Waker::new().map_err(FrontError::Thread)?,
            sender: poller.waker(),
            hasher: ChainHasher::new(config.secret),
        });
        let mut connections = Vec::with_capacity(nodes.len());
        for (number, node) in nodes.iter().enumerate() {
            let replica = ReplicaId(number as u32);
            let endpoint = endpoint_options(config.options.limits.max_live_requests, &node.address);
            let connection = Connection::open(context, replica, node, &endpoint)?;
            connection.wake_on_connections(poller.waker());
            connections.push(connection);
        }
        let (stop, stopped) = bounded(1);
        let codec = CodecLimits::default();
        let driver = Driver { shared: Arc::clone(&shared), config, codec, poller, connections, stopped };
        let thread = std::thread::Builder::new().name("llmscale-front".into()).spawn(move || driver.run());
        Ok(Self { shared, stop, thread: Some(thread.map_err(FrontError::Thread)?) })
    }

    /// Now, on the front's clock: what deadlines are relative to.
    pub fn now(&self) -> Time {
        self.shared.clock.now()
    }

    /// Takes a request or says why not.
    pub fn submit(&self, mut new: NewRequest) -> Result<RequestId, SubmitError> {
        // Hashes take 0.2 us per block, hence a millisecond for a book: not while everybody waits for the lock.
        let block_tokens = self.shared.lock().front.block_tokens_for_names(&new.model);
        if let Some(block_tokens) = block_tokens {
            new.prefix = self.shared.hasher.keys(&new.namespace, &new.prompt, block_tokens, PrefixKey::TOKENS).into();
        }
        let mut core = self.shared.lock();
        let core = &mut *core;
        let outcome = core.front.submit(self.shared.clock.now(), new, &mut core.actions);
        self.shared.carry_out(core);
        outcome
    }

    /// Applies a reader's event: cancel, detach, attach, read.
    pub fn event(&self, event: FrontEvent) {
        self.shared.event(event);
    }

    /// Everything that arrived since the last call, at most one entry per request, in order of arrival.
    pub fn take(&self) -> Vec<Arrival> {
        self.shared.reader.take();
        self.shared.lock().arrivals.take()
    }

    /// Readable when `take` has something.
    pub fn reader(&self) -> &Waker {
        &self.shared.reader
    }

    /// The front at this moment.
    pub fn status(&self) -> FrontStatus {
        self.shared.lock().front.status(self.shared.clock.now())
    }
}

impl Drop for FrontHandle {
    fn drop(&mut self) {
        // A full channel means that the order was given already.
        let _ = self.stop.try_send(());
        self.shared.sender.wake();
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            assert!(outcome.is_ok() || std::thread::panicking(), "the front's thread panicked");
        }
    }
}

/// Everything that waits may leave for one node in one go, when that is the first to come up: 1,000 requests overran a
/// queue of 256 frames, and the front took a node that was reading for a lost one until the requests had no attempts left.
/// An attempt is submitted, asked back and aborted at most once each.
/// A node of this host, which may be starting beside us, is looked for ten times a second: that is a call of the system.
fn endpoint_options(max_live_requests: u32, node: &Address) -> EndpointOptions {
    let default = EndpointOptions::default();
    let burst = max_live_requests.saturating_mul(3).saturating_add(default.max_send_queue_frames);
    let max_reconnect_us = if matches!(node, Address::Ipc(_)) { 100_000 } else { default.max_reconnect_us };
    EndpointOptions { max_send_queue_frames: burst.min(EndpointOptions::MAX_QUEUE_FRAMES), max_reconnect_us, ..default }
}

/// The thread's state.
struct Driver {
    shared: Arc<Shared>,
    config: FrontConfig,
    codec: CodecLimits,
    poller: Poller,
    connections: Vec<Connection>,
    stopped: Receiver<()>,
}

/// Longest sleep; connections are looked at this often even if nothing happens.
const MAX_SLEEP: Duration = Duration::from_millis(250);

impl Driver {
    /// What arrived, what is due, what leaves.
    fn run(mut self) {
        while self.stopped.is_empty() {
            self.wait();
            self.receive();
            self.look_at_time();
            self.send();
        }
        for connection in &mut self.connections {
            connection.say_goodbye(&self.codec);
        }
    }

    fn wait(&mut self) {
        let now = self.shared.clock.now();
        let due = self.shared.lock().wake_at.map_or(MAX_SLEEP, |at| at.since(now).min(MAX_SLEEP));
        let handles: Vec<_> = self.connections.iter().map(Connection::poll_handle).collect();
        if let Err(error) = self.poller.wait(&handles, Some(due.0)) {
            panic!("waiting for nodes failed: {error}");
        }
    }

    fn receive(&mut self) {
        for connection in &mut self.connections {
            let now = self.shared.clock.now();
            for event in connection.receive(&self.codec, now) {
                self.shared.event(event);
            }
        }
    }

    fn look_at_time(&mut self) {
        let now = self.shared.clock.now();
        for connection in &mut self.connections {
            if let Some(event) = connection.look_at_time(&self.config, &self.codec, now) {
                self.shared.event(event);
            }
        }
        let due = {
            let mut core = self.shared.lock();
            core.wake_at.take_if(|at| *at <= now).is_some()
        };
        if due {
            self.shared.event(FrontEvent::Tick);
        }
    }

    fn send(&mut self) {
        loop {
            let next = self.shared.lock().outgoing.pop_front();
            let Some((replica, message)) = next else { return };
            let now = self.shared.clock.now();
            let connection = &mut self.connections[replica.index()];
            if let Some(event) = connection.send(message, &self.codec, now) {
                self.shared.event(event);
            }
        }
    }
}
