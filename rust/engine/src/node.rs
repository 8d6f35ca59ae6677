//! A node's thread: owns the sockets to fronts and to the worker, and drives one replica. The loop is four verbs; each
//! lives in a file below, and what fronts ask in one of its own. Commands come in through a channel, reports go out
//! through a noticeboard; nothing here blocks but the one wait for sockets.

mod answer;
mod deliver;
mod receive;
mod step;

use crate::client_namespaces::ClientNamespaces;
use crate::clock::Clock;
use crate::disk_index::{DiskIndex, IndexMeaning};
use crate::fronts::Fronts;
use crate::report::{FIRST_STATE, NodeEvent, NodeReport, Noticeboard};
use crossbeam_channel::{Receiver, Sender, bounded};
use llmscale_net::link::WorkerLink;
use llmscale_net::{Address, Context, EndpointOptions, NetError, PeerId, Poller, ServerEndpoint, ServerKeys, Waker};
use llmscale_scheduler::{Actions, FirstComeFirstServed, Pace, Replica};
use llmscale_types::{Duration, EngineLimits, Epoch, LimitError, NodeId, StepId, StepResult, Time};
use llmscale_wire::{CodecLimits, Configure, Hello, ModelIdentity, NodeState};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::thread::JoinHandle;

/// How long the ranks of a worker may take to connect. They are copies of a process that imports torch first, once per host:
/// seconds, on a slow machine with a cold disk more than a minute. Loading the model comes after and is not limited.
pub const MAX_ATTACH: Duration = Duration::from_millis(120_000);

/// What a node is.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Sizes and bounds of its replica.
    pub limits: EngineLimits,
    /// What it serves.
    pub model: ModelIdentity,
    /// The fleet it belongs to.
    pub fleet: String,
    /// Its incarnation: drawn anew by every process.
    pub node: NodeId,
    /// Keys the prefix hashes.
    pub secret: [u8; 32],
    /// Where what the disk tier holds is kept, if there is one; of this process alone.
    pub disk_index: Option<PathBuf>,
    /// Most fronts that are served at once.
    pub max_fronts: u32,
    /// A front that is silent for this long is gone.
    pub max_front_silence: Duration,
    /// How often fronts are told how the node is doing.
    pub status_interval: Duration,
    /// A worker whose step takes longer is hung.
    pub max_step: Duration,
    /// A worker of which a rank has not connected after this long will never be whole; `MAX_ATTACH` outside of tests.
    pub max_attach: Duration,
    /// How long prefill may make its steps.
    pub pace: Pace,
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A size is out of bounds.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The sockets cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The index of the disk tier cannot be had.
    #[error("the disk tier's index {path}: {error}")]
    DiskIndex {
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The thread cannot be had.
    #[error("starting the engine's thread: {0}")]
    Thread(std::io::Error),
}

/// An order to a running node.
pub enum Command {
    /// A worker process was started at the other end of this link.
    WorkerStarted {
        /// Its incarnation; larger than any before.
        epoch: Epoch,
        /// The way to it.
        link: Box<dyn WorkerLink>,
        /// What it is told first.
        configure: Box<Configure>,
    },
    /// The worker process of this incarnation is dead.
    WorkerDied(Epoch),
    /// Hand waiting work back, finish what runs, save what is cached, then report.
    Drain {
        /// From now on: nothing is saved any more afterwards.
        max_drain: Duration,
        /// How long saving may take.
        max_saving: Duration,
    },
    /// End the thread now.
    Stop,
}

/// Most commands that wait; there are never more than a few.
const MAX_COMMANDS: usize = 256;

/// Attempts are handed back one frame each, all that wait when the node drains and a front's whole burst when it is full. A
/// front has at most as many here as can run and wait; beyond that, only one that does not read has a full queue.
fn endpoint_options(limits: &EngineLimits, options: &EndpointOptions) -> EndpointOptions {
    let returns = limits.max_sequences.saturating_add(limits.max_waiting_sequences);
    let queue = options.max_send_queue_frames.saturating_add(returns).min(EndpointOptions::MAX_QUEUE_FRAMES);
    EndpointOptions { max_send_queue_frames: queue, ..options.clone() }
}

/// The process's side of a node's thread.
pub struct NodeHandle {
    address: Address,
    commands: Sender<Command>,
    waker: Waker,
    board: Noticeboard,
    thread: Option<JoinHandle<()>>,
}

impl NodeHandle {
    /// Binds, starts the thread and returns. The node is ready when a worker has run its first step.
    pub fn start(
        config: NodeConfig,
        context: &Context,
        address: &Address,
        keys: Option<&ServerKeys>,
        options: &EndpointOptions,
    ) -> Result<Self, NodeError> {
        let replica = Replica::new(config.limits.clone(), config.secret, Box::new(FirstComeFirstServed))?;
        let mut replica = replica.with_pace(config.pace);
        let mut disk_index = None;
        if let Some(path) = &config.disk_index {
            let failed = |error| NodeError::DiskIndex { path: path.clone(), error };
            let (blocks, tokens) = (config.limits.disk_blocks, config.limits.block_tokens);
            let meaning = IndexMeaning::new(&config.secret, &config.model.weights_digest, blocks, tokens);
            let (index, recalled) = DiskIndex::open(path, meaning).map_err(failed)?;
            replica = replica.with_disk(recalled.incarnation, recalled.records);
            disk_index = Some(index);
        }
        let server = ServerEndpoint::bind(context, address, keys, &endpoint_options(&config.limits, options))?;
        let address = server.address().clone();
        let poller = Poller::new()?;
        let waker = poller.waker();
        let board = Noticeboard::new(Waker::new().map_err(NodeError::Thread)?);
        let (commands, orders) = bounded(MAX_COMMANDS);
        let mut node = Node::new(config, replica, disk_index, server, poller, orders, board.clone());
        node.clients = keys.map(|keys| ClientNamespaces::new(&keys.own.secret));
        let thread = std::thread::Builder::new().name("llmscale-engine".into()).spawn(move || node.run());
        Ok(Self { address, commands, waker, board, thread: Some(thread.map_err(NodeError::Thread)?) })
    }

    /// Where fronts connect.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What a worker's link wakes the engine with.
    pub fn link_waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Gives an order. Returns false if the thread has ended.
    pub fn order(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        self.waker.wake();
        sent
    }

    /// The latest report, once there is one.
    pub fn report(&self) -> Option<NodeReport> {
        self.board.report()
    }

    /// Events since the last call.
    pub fn take_events(&self) -> Vec<NodeEvent> {
        self.board.take_events()
    }

    /// Readable when `take_events` has something.
    pub fn event_waker(&self) -> &Waker {
        self.board.waker()
    }

    /// Whether the thread still runs.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for NodeHandle {
    fn drop(&mut self) {
        self.order(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            assert!(outcome.is_ok() || std::thread::panicking(), "the engine's thread panicked");
        }
    }
}

/// The worker's connection.
struct Worker {
    epoch: Epoch,
    link: Box<dyn WorkerLink>,
    /// When it was to be started.
    started: Time,
    /// What it is told first, until it has attached.
    configure: Option<Vec<u8>>,
    /// Its process, once it has loaded the model.
    pid: Option<u32>,
    /// It failed and is ignored until it is dead.
    failed: bool,
    /// And what it ran was taken from it.
    given_up: bool,
    /// Steps that had been completed when it gave up its steps for the last time.
    steps_at_reset: Option<u64>,
}

/// A step that the worker has been sent.
struct Sent {
    step: StepId,
    at: Time,
}

/// The thread's state. Each field has one writer: the file of the verb that names it.
struct Node {
    config: NodeConfig,
    clock: Clock,
    codec: CodecLimits,
    replica: Replica,
    disk_index: Option<DiskIndex>,
    out: Actions,
    server: ServerEndpoint,
    poller: Poller,
    commands: Receiver<Command>,
    fronts: Fronts,
    /// Where peers have keys, and so roles.
    clients: Option<ClientNamespaces>,
    worker: Option<Worker>,
    /// Incarnation of the latest worker, dead or alive: what frames to fronts carry, so that it never goes back.
    epoch: Epoch,
    worker_restarts: u32,
    step_ns: u64,
    stage_wait_ns: u64,
    results: Vec<StepResult>,
    sent: VecDeque<Sent>,
    state: NodeState,
    has_run: bool,
    knows_numerics: bool,
    /// Fronts that greeted before that, the latest greeting of each.
    early: Vec<(PeerId, Hello)>,
    told_drained: bool,
    next_status: Time,
    next_caches: Time,
    dropped_frames: u64,
    board: Noticeboard,
}

impl Node {
    fn new(
        config: NodeConfig,
        replica: Replica,
        disk_index: Option<DiskIndex>,
        server: ServerEndpoint,
        poller: Poller,
        commands: Receiver<Command>,
        board: Noticeboard,
    ) -> Self {
        Self {
            clock: Clock::new(),
            codec: CodecLimits::default(),
            out: Actions::default(),
            fronts: Fronts::new(config.max_fronts, config.max_front_silence),
            clients: None,
            worker: None,
            epoch: Epoch(0),
            worker_restarts: 0,
            step_ns: 0,
            stage_wait_ns: 0,
            results: Vec::new(),
            sent: VecDeque::new(),
            state: FIRST_STATE,
            has_run: false,
            knows_numerics: false,
            early: Vec::new(),
            told_drained: false,
            next_status: Time(0),
            next_caches: Time(0),
            dropped_frames: 0,
            config,
            replica,
            disk_index,
            server,
            poller,
            commands,
            board,
        }
    }

    /// The whole engine: what arrived, what it completes, what runs next, who is told.
    fn run(mut self) {
        while self.receive() {
            self.complete();
            self.execute();
            self.deliver();
        }
    }
}
