//! The door for a worker process: the link to the engine, the mirror's buffers, sampling and the reply.
#![expect(unsafe_code, reason = "words of torch are reached by address")]

use crate::buffer::Int32Buffer;
use crate::detach::{asked, asked_detached, detached};
use crate::device_step::{self, PyPackedStep};
use crate::disk_region::PyDiskRegion;
use crate::error::{self, Refused};
use crate::group_door::load_keys;
use crate::host_region::PyHostRegion;
use crate::kernels::{CpuKernels, Dtype, Memory, view};
use crate::limits::PyEngineLimits;
use crate::program::PyNativeProgram;
use crate::request::parse_address;
use crate::sample::{Share, draw_words, read_tokens, word_parts, write_tokens};
use crate::step::{PyStepCounts, buffer};
use llmscale_engine::drawn;
use llmscale_engine::unanswered::Unanswered;
use llmscale_engine::worker::SessionError;
use llmscale_engine::{Order, WorkerSession};
use llmscale_net::link::socket::SocketWorker;
use llmscale_net::{Address, EndpointOptions};
use llmscale_scheduler::Mirror;
use llmscale_types::{Epoch, HostBlockId};
use llmscale_wire::{Dtype as WireDtype, FailureCode, Ready};
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a worker that waits for an order lets a transfer go unnoticed: less than reading a block takes.
const TRANSFER_POLL_US: u64 = 500;

/// The worker's session with the engine that started it. One thread drives it.
#[pyclass(frozen, name = "WorkerSession", module = "llmscale._core")]
pub(crate) struct PyWorkerSession {
    inner: Mutex<WorkerSession>,
}

/// What the engine wants: "configure" with a model, "step" with counts, or "stop".
#[pyclass(frozen, name = "WorkerOrder", module = "llmscale._core")]
pub(crate) struct WorkerOrder {
    #[pyo3(get)]
    kind: &'static str,
    #[pyo3(get)]
    model_folder: String,
    #[pyo3(get)]
    dtype: &'static str,
    limits: Option<Py<PyEngineLimits>>,
    counts: Option<Py<PyStepCounts>>,
}

#[pymethods]
impl WorkerOrder {
    /// Sizes of the buffers; of a "configure" only.
    #[getter]
    fn limits(&self, py: Python<'_>) -> PyResult<Py<PyEngineLimits>> {
        let limits = self.limits.as_ref().map(|limits| limits.clone_ref(py));
        limits.ok_or_else(|| error::worker("this order has no limits".to_owned()))
    }

    /// How much of the buffers is used; of a "step" only.
    #[getter]
    fn counts(&self, py: Python<'_>) -> PyResult<Py<PyStepCounts>> {
        let counts = self.counts.as_ref().map(|counts| counts.clone_ref(py));
        counts.ok_or_else(|| error::worker("this order has no counts".to_owned()))
    }
}

fn no_step() -> Refused {
    Refused("there is no step before ready".to_owned())
}

fn session_error(error: &SessionError) -> PyErr {
    error::worker(error.to_string())
}

/// What reads the mirror must not be asked of a step that the mirror does not hold any more.
pub(crate) fn require_alone(steps: &Unanswered) -> Result<(), Refused> {
    match steps.len() {
        1 => Ok(()),
        other => Err(Refused(format!("one step is drawn for by the processor, and {other} are not answered"))),
    }
}

#[pymethods]
impl PyWorkerSession {
    /// Connects to the engine's link at `address`, in the background; with a key file, only to a node of this fleet.
    #[new]
    #[pyo3(signature = (address, epoch, key_file = None))]
    fn new(address: &str, epoch: u64, key_file: Option<&str>) -> PyResult<Self> {
        let address: Address = parse_address(address)?;
        let keys = load_keys(key_file)?;
        let context = keys.context().map_err(|error| error::worker(error.to_string()))?;
        let side = SocketWorker::connect(&context, &address, keys.client().as_ref(), &EndpointOptions::default())
            .map_err(|error| error::worker(error.to_string()))?;
        let session = WorkerSession::new(Box::new(side), Epoch(epoch));
        Ok(Self { inner: Mutex::new(session) })
    }

    /// Waits for the next order, at most `timeout_us`; `None` if none came. Tells the engine what becomes of the transfers
    /// of `disk` meanwhile.
    #[pyo3(signature = (timeout_us, disk = None))]
    fn receive(&self, py: Python<'_>, timeout_us: u64, disk: Option<&PyDiskRegion>) -> PyResult<Option<WorkerOrder>> {
        let order = detached(py, || self.receive_beside(timeout_us, disk)).map_err(|error| session_error(&error))?;
        let empty = |kind| WorkerOrder { kind, model_folder: String::new(), dtype: "auto", limits: None, counts: None };
        Ok(match order {
            None => None,
            Some(Order::Stop) => Some(empty("stop")),
            Some(Order::Step(counts)) => {
                Some(WorkerOrder { counts: Some(Py::new(py, PyStepCounts::from(counts))?), ..empty("step") })
            }
            Some(Order::Configure(configure)) => Some(WorkerOrder {
                model_folder: configure.model_folder.clone(),
                dtype: dtype_name(configure.dtype)?,
                limits: Some(Py::new(py, PyEngineLimits(configure.limits))?),
                ..empty("configure")
            }),
        })
    }

    /// Tells the engine that the model is loaded, how many KV blocks there are, and which incarnations of the host tier's
    /// memory and the disk tier's file; 0 for none.
    #[pyo3(signature = (layers, numerics, loading_ns, total_blocks, host_memory = 0, disk_files = 0))]
    fn ready(
        &self,
        layers: u32,
        numerics: String,
        loading_ns: u64,
        total_blocks: u32,
        host_memory: u64,
        disk_files: u64,
    ) -> PyResult<()> {
        // The session knows the epoch.
        let (epoch, pid) = (Epoch(0), std::process::id());
        let ready = Ready { epoch, pid, total_blocks, layers, numerics, loading_ns, host_memory, disk_files };
        self.lock().ready(ready).map_err(|error| session_error(&error))
    }

    /// Makes the copies of the step that was received last between the host tier and `kv`, (address, bytes) of the KV
    /// region, and begins its transfers between that and `disk`. False if host blocks do not hold what they should: then the
    /// step is given up and the engine knows.
    #[pyo3(signature = (host, kv, disk = None))]
    fn copy_blocks(
        &self,
        py: Python<'_>,
        host: &PyHostRegion,
        kv: Memory,
        disk: Option<&PyDiskRegion>,
    ) -> PyResult<bool> {
        asked_detached(py, &self.inner, |session| {
            let mirror = session.mirror().ok_or_else(no_step)?;
            let (bad, took) = copy_step(mirror, host, kv, disk)?;
            session.set_copied(took);
            if bad.is_empty() {
                return Ok(true);
            }
            session.host_blocks_are_bad(bad).map_err(|error| Refused::of(&error))?;
            Ok(false)
        })
    }

    /// One of the step's buffers, valid as long as this object lives. Only after `ready`.
    fn buffer(slf: Bound<'_, Self>, name: &str) -> PyResult<Int32Buffer> {
        let owner = slf.clone().into_any().unbind();
        let session = slf.get().lock();
        let mirror = session.mirror().ok_or_else(|| error::worker("there are no buffers before ready".to_owned()))?;
        buffer(mirror, owner, name)
    }

    /// Most int32 that a row takes among what ranks tell each other.
    #[classattr]
    const MAX_ROW_WORDS: usize = drawn::MAX_ROW_WORDS;

    /// Draws, for the step that was received last, a token for the sampling rows that are dealt to `rank`, `row_bounds[rank]..row_bounds[rank + 1]`, from
    /// `logits`, (address, elements) of a contiguous tensor `[those rows, vocabulary]` of `dtype`. Fills their part of the
    /// int32 `words`, for the other ranks, and returns where each rank's part begins, and where the last ends.
    #[expect(clippy::too_many_arguments, reason = "three of them are what, where to and which")]
    fn draw(
        &self,
        py: Python<'_>,
        kernels: &CpuKernels,
        logits: Memory,
        dtype: &str,
        row_bounds: Vec<usize>,
        rank: usize,
        words: Memory,
    ) -> PyResult<Vec<usize>> {
        let dtype = Dtype::parse(dtype)?;
        asked_detached(py, &self.inner, |session| {
            let mirror = session.mirror().ok_or_else(no_step)?;
            // The sampler reads the mirror.
            require_alone(session.unanswered())?;
            draw_words(kernels, mirror, Share { row_bounds, rank }, logits, dtype, words)
        })
    }

    /// Computes the step with the native executor; its logits are in `program`.
    fn compute(
        &self,
        py: Python<'_>,
        kernels: &CpuKernels,
        program: &PyNativeProgram,
        counts: &PyStepCounts,
    ) -> PyResult<()> {
        asked_detached(py, &self.inner, |session| {
            let mirror = session.mirror().ok_or_else(no_step)?;
            program.compute(kernels, mirror, counts.into()).map_err(|problem| Refused::of(&problem))
        })
    }

    /// Packs rows `rows[0]` to `rows[1]` of the step into the int32 `out`, for `room` (rows, sequences), and the logits that
    /// change before sampling into `changes`.
    fn pack_step(
        &self,
        rows: (usize, usize),
        room: (usize, usize),
        out: Memory,
        changes: Memory,
    ) -> PyResult<PyPackedStep> {
        asked(&self.inner, |session| {
            device_step::pack_rows(session.mirror().ok_or_else(no_step)?, rows, room, out, changes)
        })
    }

    /// Whether a device can compute the step that was received last before the one in front of it is answered: nothing but
    /// ids depends on what that one samples, and `pack_step` says which of its rows they come from.
    fn follows_on(&self) -> PyResult<bool> {
        asked(&self.inner, |session| Ok(session.mirror().ok_or_else(no_step)?.follows_on()))
    }

    /// Fills the words of sampling rows `rows[0]` to `rows[1]` of the oldest step that is not answered from what a device's
    /// sampler for `max_rows` rows has left.
    fn take_drawn(&self, rows: (usize, usize), sampled: Memory, max_rows: usize, words: Memory) -> PyResult<()> {
        asked(&self.inner, |session| {
            let step = session.unanswered().oldest().ok_or_else(no_step)?;
            device_step::take_drawn(step, rows.0..rows.1, sampled, max_rows, words)
        })
    }

    /// Where the words of rows `row_bounds` of that step begin, as `draw` says it.
    fn word_parts(&self, row_bounds: Vec<usize>) -> PyResult<Vec<usize>> {
        asked(&self.inner, |session| word_parts(session.unanswered().oldest().ok_or_else(no_step)?, &row_bounds))
    }

    /// What the step copies between tiers, in order: (comes back, block, host block, tag). Waits for what moves between
    /// these host blocks and the disk.
    #[pyo3(signature = (disk = None))]
    fn copies(&self, py: Python<'_>, disk: Option<&PyDiskRegion>) -> PyResult<Vec<device_step::Copy>> {
        asked_detached(py, &self.inner, |session| device_step::copies(session.mirror().ok_or_else(no_step)?, disk))
    }

    /// A device makes the step's copies, which take `took_ns`; begins its transfers. False if there are bad host blocks: the
    /// step is given up.
    #[pyo3(signature = (took_ns, bad_host_blocks, disk = None))]
    fn copies_made(&self, took_ns: u64, bad_host_blocks: Vec<u32>, disk: Option<&PyDiskRegion>) -> PyResult<bool> {
        asked(&self.inner, |session| {
            session.set_copied(Duration::from_nanos(took_ns));
            if bad_host_blocks.is_empty() {
                disk.map_or(Ok(()), |disk| disk.start(session.mirror().ok_or_else(no_step)?))?;
                return Ok(true);
            }
            let bad = bad_host_blocks.into_iter().map(HostBlockId).collect();
            session.host_blocks_are_bad(bad).map_err(|error| Refused::of(&error))?;
            Ok(false)
        })
    }

    /// Takes what all ranks have drawn for the oldest step that is not answered from `words`, and sends its result, unless
    /// another rank does. `tokens` takes
    /// the ids as int32, -1 for a row that has none. `waited_ns` is what this rank waited for the stages before it.
    #[pyo3(signature = (words, *, reply = true, tokens = None, waited_ns = 0))]
    fn complete(
        &self,
        py: Python<'_>,
        words: Memory,
        reply: bool,
        tokens: Option<Memory>,
        waited_ns: u64,
    ) -> PyResult<()> {
        asked_detached(py, &self.inner, |session| {
            let step = session.unanswered().oldest().ok_or_else(no_step)?;
            // SAFETY: the caller holds a contiguous int32 tensor that nobody writes during the call.
            let words = unsafe { view::<u32>(words) };
            let rows = step.read_rows(words).map_err(|error| Refused::of(&error))?;
            if let Some(tokens) = tokens {
                write_tokens(&rows, tokens)?;
            }
            let mut result = session.complete(rows).map_err(|error| Refused::of(&error))?;
            if !reply {
                return Ok(());
            }
            result.waited_ns = waited_ns.min(result.elapsed_ns);
            session.reply(result).map_err(|error| Refused::of(&error))
        })
    }

    /// Another rank answers the steps that were received so far.
    fn leave_answers(&self) {
        self.lock().leave_answers();
    }

    /// On a rank that does not sample: how many rows sampled in the oldest step that is not recorded, if the step that was
    /// received last needs it or one behind it; `None` if it needs none.
    fn awaited_samples(&self) -> PyResult<Option<usize>> {
        asked(&self.inner, |session| Ok(session.mirror().ok_or_else(no_step)?.awaited_samples()))
    }

    /// Takes the ids that another rank has sampled in the oldest step that is not recorded, as `sample` wrote them.
    fn record(&self, tokens: Memory) -> PyResult<()> {
        asked(&self.inner, |session| {
            let mirror = session.mirror_mut().ok_or_else(no_step)?;
            let samples = mirror.oldest_samples().ok_or_else(|| Refused("every step is recorded".to_owned()))?;
            let sampled = read_tokens(tokens, samples)?;
            mirror.record(&sampled);
            Ok(())
        })
    }

    /// On a rank that neither embeds nor samples: what was sampled so far is never asked for.
    fn pass_over_samples(&self) -> PyResult<()> {
        asked(&self.inner, |session| {
            session.mirror_mut().ok_or_else(no_step)?.pass_over_samples();
            Ok(())
        })
    }

    /// The oldest step that is not answered raised. The session goes on; what it and those behind it computed is told and
    /// computed again.
    fn step_failed(&self, message: &str) -> PyResult<()> {
        self.lock().give_up_step(message).map_err(|error| session_error(&error))
    }

    /// Last words to the engine. `code` is configuration, model, memory or step.
    fn failed(&self, code: &str, message: &str) -> PyResult<()> {
        let code = match code {
            "configuration" => FailureCode::Configuration,
            "model" => FailureCode::Model,
            "memory" => FailureCode::Memory,
            "step" => FailureCode::Step,
            other => return Err(error::config(format!("there is no failure code {other:?}"))),
        };
        self.lock().fail(code, message).map_err(|error| session_error(&error))
    }
}

/// Makes a step's copies, and begins its transfers where there is a disk.
pub(crate) fn copy_step(
    mirror: &Mirror,
    host: &PyHostRegion,
    kv: Memory,
    disk: Option<&PyDiskRegion>,
) -> Result<(Vec<HostBlockId>, Duration), Refused> {
    match disk {
        Some(disk) => disk.copy_beside(mirror, host, kv),
        None => host.copy(mirror.copies(), kv),
    }
}

impl PyWorkerSession {
    /// Waits for an order, and says what becomes of transfers while any are under way.
    fn receive_beside(&self, timeout_us: u64, disk: Option<&PyDiskRegion>) -> Result<Option<Order>, SessionError> {
        let deadline = Instant::now() + Duration::from_micros(timeout_us);
        loop {
            let mut session = self.lock();
            let mut wait_us = deadline.saturating_duration_since(Instant::now()).as_micros() as u64;
            if let Some(disk) = disk {
                // The session knows the epoch.
                if let Some(report) = disk.report(Epoch(0)) {
                    session.tell_transfers(report)?;
                }
                if disk.is_busy() {
                    wait_us = wait_us.min(TRANSFER_POLL_US);
                }
            }
            let order = session.receive(wait_us)?;
            if order.is_some() || Instant::now() >= deadline {
                return Ok(order);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, WorkerSession> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn dtype_name(dtype: WireDtype) -> PyResult<&'static str> {
    match dtype {
        WireDtype::Auto => Ok("auto"),
        WireDtype::Float32 => Ok("float32"),
        WireDtype::Bfloat16 => Ok("bfloat16"),
        WireDtype::Float16 => Err(error::config("float16 is slower than float32 on CPUs; use bfloat16".to_owned())),
    }
}
