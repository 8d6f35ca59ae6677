//! The door for a node process: starts the engine's thread, links worker processes to it, reports how it is doing.

use crate::error;
use crate::limits::PyEngineLimits;
use crate::request::{fleet_secret, parse_address};
use crate::sampling::random_seed;
use llmscale_engine::{Command, GroupKeys, MAX_ATTACH, NodeConfig, NodeEvent, NodeHandle, NodeReport, RankLinks};
use llmscale_net::link::WorkerLink;
use llmscale_net::link::socket::SocketLink;
use llmscale_net::{Address, AllowList, Context, EndpointOptions, KeyPair, Role, Roles, ServerKeys};
use llmscale_scheduler::Pace;
use llmscale_types::{Duration, EngineLimits, Epoch, NodeId};
use llmscale_wire::{Configure, Dtype, ModelIdentity};
use pyo3::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The engine of one replica, on a thread of its own.
#[pyclass(frozen, name = "Engine", module = "llmscale._core")]
pub(crate) struct Engine {
    inner: Mutex<Inner>,
    limits: EngineLimits,
    folder: String,
}

struct Inner {
    handle: Option<NodeHandle>,
    /// For links to ranks; it admits other nodes of the fleet and nobody else.
    context: Context,
    keys: GroupKeys,
    epoch: Epoch,
}

/// Something that the supervisor of the workers has to know: `worker_ready`, `worker_failed`,
/// `worker_reset` (it gave up its steps and goes on), `ready` or `drained`.
#[pyclass(frozen, get_all, name = "NodeEvent", module = "llmscale._core")]
pub(crate) struct PyNodeEvent {
    kind: &'static str,
    epoch: u64,
    pid: u32,
    loading_ns: u64,
    message: String,
    saved_blocks: u64,
    unsaved_blocks: u64,
}

/// How a node is doing.
#[pyclass(frozen, get_all, name = "NodeReport", module = "llmscale._core")]
pub(crate) struct PyNodeReport {
    state: &'static str,
    running: u32,
    waiting: u32,
    free_blocks: u32,
    steps: u64,
    worker_restarts: u32,
    worker_pid: Option<u32>,
    emitted_tokens: u64,
    prefill_tokens: u64,
    poisoned: u64,
    dropped_frames: u64,
    fronts: u32,
}

#[pymethods]
impl Engine {
    /// Binds and starts. `link_folder` is a folder that only this user can enter; worker links are made in it. `disk_index`
    /// is where what the disk tier holds is kept, a file of this process alone. Prefill adds `step_target_us` at most to a step
    /// that streams wait for, by prediction; zero bounds nothing.
    #[new]
    #[pyo3(signature = (*, limits, name, revision, weights_digest, tokenizer_digest, fleet, listen, link_folder,
        max_fronts = 64, max_step_us = 120_000_000, step_target_us = 20_000, key_file = None, allow_list = None, disk_index = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments, named by the caller")]
    fn new(
        limits: &PyEngineLimits,
        name: String,
        revision: String,
        weights_digest: [u8; 32],
        tokenizer_digest: [u8; 32],
        fleet: String,
        listen: &str,
        link_folder: String,
        max_fronts: u32,
        max_step_us: u64,
        step_target_us: u64,
        key_file: Option<&str>,
        allow_list: Option<&str>,
        disk_index: Option<&str>,
    ) -> PyResult<Self> {
        let text = |error: &dyn std::fmt::Display| error::config(error.to_string());
        let address: Address = parse_address(listen)?;
        let own = key_file.map(|path| KeyPair::load(Path::new(path))).transpose().map_err(|error| text(&error))?;
        let list = allow_list.map(|path| AllowList::load(Path::new(path))).transpose().map_err(|error| text(&error))?;
        let links = GroupKeys::new(own.clone());
        let keys = own.map(|own| ServerKeys { own, admitted: Roles::of(&[Role::Gateway, Role::Client, Role::Node]) });
        let context = Context::new(list.unwrap_or_default(), 1).map_err(|error| text(&error))?;
        let secret = fleet_secret(&fleet, keys.as_ref().map(|keys| &keys.own.public));
        let config = NodeConfig {
            limits: limits.0.clone(),
            model: ModelIdentity {
                name,
                revision,
                adapter: None,
                weights_digest,
                tokenizer_digest,
                numerics: "not known before a worker is ready".to_owned(),
            },
            fleet,
            node: NodeId(random_seed()?),
            secret,
            disk_index: disk_index.map(PathBuf::from),
            max_fronts,
            max_front_silence: Duration::from_millis(10_000),
            status_interval: Duration::from_millis(250),
            max_step: Duration(max_step_us),
            max_attach: MAX_ATTACH,
            pace: Pace::of(Duration(step_target_us)),
        };
        let handle = NodeHandle::start(config, &context, &address, keys.as_ref(), &EndpointOptions::default())
            .map_err(|error| text(&error))?;
        let context = links.context().map_err(|error| text(&error))?;
        let inner = Inner { handle: Some(handle), context, keys: links, epoch: Epoch(0) };
        Ok(Self { inner: Mutex::new(inner), limits: limits.0.clone(), folder: link_folder })
    }

    /// Where fronts connect.
    #[getter]
    fn address(&self) -> PyResult<String> {
        Ok(self.lock().handle()?.address().to_string())
    }

    /// Readable when `take_events` has something.
    fn fileno(&self) -> PyResult<i32> {
        Ok(self.lock().handle()?.event_waker().descriptor())
    }

    /// Makes the links for the ranks of the next group of workers and configures whoever connects to them. Rank `leader`
    /// speaks for all. The first `local_ranks` are on this host, all by default; the others reach the address `reach`,
    /// `tcp://HOST:*` for free ports. Returns (epoch, one address per rank).
    #[pyo3(signature = (model_folder, dtype, *, ranks = 1, leader = 0, local_ranks = None, reach = None))]
    fn prepare_worker(
        &self,
        model_folder: String,
        dtype: &str,
        ranks: usize,
        leader: usize,
        local_ranks: Option<usize>,
        reach: Option<&str>,
    ) -> PyResult<(u64, Vec<String>)> {
        let mut inner = self.lock();
        let epoch = inner.epoch.next();
        let local_ranks = local_ranks.unwrap_or(ranks);
        let mut paths = Vec::with_capacity(ranks);
        let mut links: Vec<Box<dyn WorkerLink>> = Vec::with_capacity(ranks);
        for rank in 0..ranks {
            let link = if rank < local_ranks {
                inner.listen(&format!("ipc://{}/worker-{epoch}-{rank}", self.folder), None)?
            } else {
                let reach =
                    reach.ok_or_else(|| error::config(format!("rank {rank} is elsewhere, and reach is unset")))?;
                inner.listen(reach, inner.keys.server().as_ref())?
            };
            paths.push(link.address().to_string());
            links.push(Box::new(link));
        }
        if leader >= links.len() {
            return Err(error::config(format!("rank {leader} of {ranks} is to lead; there is no such rank")));
        }
        let link = if links.len() == 1 { links.remove(0) } else { Box::new(RankLinks::new(links, leader, epoch)) };
        let dtype = match dtype {
            "float32" => Dtype::Float32,
            "bfloat16" => Dtype::Bfloat16,
            other => return Err(error::config(format!("dtype is {other:?}, it must be float32 or bfloat16"))),
        };
        let configure = Box::new(Configure { epoch, model_folder, dtype, limits: self.limits.clone() });
        inner.order(Command::WorkerStarted { epoch, link, configure })?;
        inner.epoch = epoch;
        Ok((epoch.0, paths))
    }

    /// The worker process of this epoch is dead: its sequences are computed again by the next one.
    fn worker_died(&self, epoch: u64) -> PyResult<()> {
        self.lock().order(Command::WorkerDied(Epoch(epoch)))
    }

    /// Hands waiting work back and takes no more. When nothing runs any more, what is cached is saved to the disk tier, for
    /// `max_saving_us` and until `max_drain_us` from now at most; a "drained" event follows.
    #[pyo3(signature = (*, max_drain_us, max_saving_us))]
    fn drain(&self, max_drain_us: u64, max_saving_us: u64) -> PyResult<()> {
        let (max_drain, max_saving) = (Duration(max_drain_us), Duration(max_saving_us));
        self.lock().order(Command::Drain { max_drain, max_saving })
    }

    /// Events since the last call.
    fn take_events(&self) -> PyResult<Vec<PyNodeEvent>> {
        Ok(self.lock().handle()?.take_events().into_iter().map(PyNodeEvent::from).collect())
    }

    /// The latest report.
    fn report(&self) -> PyResult<PyNodeReport> {
        let inner = self.lock();
        let handle = inner.handle()?;
        if !handle.is_alive() {
            return Err(error::worker("the engine's thread has ended".to_owned()));
        }
        Ok(handle.report().map_or_else(PyNodeReport::default, PyNodeReport::from))
    }

    /// Ends the engine's thread. Afterwards every other call raises `WorkerError`.
    fn close(&self, py: Python<'_>) {
        let handle = self.lock().handle.take();
        crate::detach::detached(py, || drop(handle));
    }
}

impl Engine {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn handle(&self) -> PyResult<&NodeHandle> {
        self.handle.as_ref().ok_or_else(|| error::worker("the engine is closed".to_owned()))
    }

    fn listen(&self, path: &str, keys: Option<&ServerKeys>) -> PyResult<SocketLink> {
        let address: Address = parse_address(path)?;
        let waker = self.handle()?.link_waker();
        SocketLink::listen(&self.context, &address, keys, &EndpointOptions::default(), waker)
            .map_err(|error| error::config(error.to_string()))
    }

    fn order(&self, command: Command) -> PyResult<()> {
        if self.handle()?.order(command) {
            Ok(())
        } else {
            Err(error::worker("the engine's thread has ended".to_owned()))
        }
    }
}

impl From<NodeEvent> for PyNodeEvent {
    fn from(event: NodeEvent) -> Self {
        let plain = |kind| Self {
            kind,
            epoch: 0,
            pid: 0,
            loading_ns: 0,
            message: String::new(),
            saved_blocks: 0,
            unsaved_blocks: 0,
        };
        match event {
            NodeEvent::WorkerReady { epoch, pid, loading_ns } => {
                Self { epoch: epoch.0, pid, loading_ns, ..plain("worker_ready") }
            }
            NodeEvent::WorkerFailed { epoch, message } => Self { epoch: epoch.0, message, ..plain("worker_failed") },
            NodeEvent::WorkerReset { epoch, message } => Self { epoch: epoch.0, message, ..plain("worker_reset") },
            NodeEvent::Ready => plain("ready"),
            NodeEvent::Drained(drained) => {
                Self { saved_blocks: drained.saved_blocks, unsaved_blocks: drained.unsaved_blocks, ..plain("drained") }
            }
        }
    }
}

impl Default for PyNodeReport {
    fn default() -> Self {
        Self {
            state: "starting",
            running: 0,
            waiting: 0,
            free_blocks: 0,
            steps: 0,
            worker_restarts: 0,
            worker_pid: None,
            emitted_tokens: 0,
            prefill_tokens: 0,
            poisoned: 0,
            dropped_frames: 0,
            fronts: 0,
        }
    }
}

impl From<NodeReport> for PyNodeReport {
    fn from(report: NodeReport) -> Self {
        Self {
            state: crate::request::state_name(report.status.state),
            running: report.status.running,
            waiting: report.status.waiting,
            free_blocks: report.status.free_blocks,
            steps: report.status.steps,
            worker_restarts: report.status.worker_restarts,
            worker_pid: report.status.worker_pid,
            emitted_tokens: report.emitted_tokens,
            prefill_tokens: report.prefill_tokens,
            poisoned: report.poisoned,
            dropped_frames: report.dropped_frames,
            fronts: report.fronts,
        }
    }
}
