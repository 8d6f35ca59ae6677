//! The door for offline use: a replica and its mirror in the caller's process, driven step by step by the caller. The
//! shortest path through the system: submit, plan, run the model, sample, take what came out.
#![expect(unsafe_code, reason = "words of torch are reached by address")]

use crate::detach::{asked, asked_detached, detached};
use crate::device_step::{self, PyPackedStep};
use crate::disk_region::PyDiskRegion;
use crate::error::{self, Refused};
use crate::host_region::PyHostRegion;
use crate::kernels::{CpuKernels, Memory, view};
use crate::limits::PyEngineLimits;
use crate::program::PyNativeProgram;
use crate::request::{Delivery, class, deliver, namespace};
use crate::sample::{Share, draw_words, word_parts};
use crate::sampling::{PySampling, random_bytes};
use crate::step::{PyStepCounts, buffer};
use crate::worker::{copy_step, require_alone};
use llmscale_engine::drawn::{DrawnRow, SampledStep};
use llmscale_engine::unanswered::Unanswered;
use llmscale_engine::{DiskIndex, IndexMeaning};
use llmscale_scheduler::{Actions, Event, FirstComeFirstServed, GiveBack, Mirror, Replica};
use llmscale_types::{
    Attempt, Duration as Span, Epoch, FrontId, HostBlockId, RequestId, SequenceKey, Submission, Time,
};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const EPOCH: Epoch = Epoch(1);
const FRONT: FrontId = FrontId(0);
/// How long a wait for the disk lasts at most before time is looked at: reads are given up when computing is as fast.
const DISK_POLL: Duration = Duration::from_millis(1);

/// A replica in this process. One thread drives it; others may submit and cancel.
#[pyclass(frozen, name = "LocalReplica", module = "llmscale._core")]
pub(crate) struct LocalReplica {
    inner: Mutex<Local>,
    secret: [u8; 32],
    started: Instant,
    disk: Option<Py<PyDiskRegion>>,
}

struct Local {
    replica: Replica,
    mirror: Mirror,
    out: Actions,
    next_request: RequestId,
    /// Steps that are planned and whose samples are awaited.
    unanswered: Unanswered,
    max_steps_in_flight: usize,
    deliveries: BTreeMap<RequestId, Delivery>,
    /// What the disk tier holds, kept for the next process.
    disk_index: Option<DiskIndex>,
}

impl LocalReplica {
    fn lock(&self) -> MutexGuard<'_, Local> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64)
    }

    fn plan_once(&self) -> Result<Option<PyStepCounts>, Refused> {
        let mut local = self.lock();
        let now = self.now();
        if let Some(report) = self.disk.as_ref().and_then(|disk| disk.get().report(EPOCH)) {
            let _ = local.event(now, Event::DiskDone(report));
        }
        let _ = local.event(now, Event::Tick);
        let Local { replica, mirror, out, unanswered, max_steps_in_flight, .. } = &mut *local;
        if unanswered.len() >= *max_steps_in_flight {
            return Err(Refused("the step before has not been sampled; call complete first".to_owned()));
        }
        replica.plan(out);
        let delta = out.execute.take();
        let counts = delta.map(|delta| mirror.expand(&delta)).transpose();
        let counts = counts.map_err(|gap| Refused::of(&gap))?;
        if counts.is_some() {
            unanswered.begin(mirror, Instant::now());
        }
        local.collect();
        Ok(counts.map(PyStepCounts::from))
    }
}

#[pymethods]
impl LocalReplica {
    /// With `disk`, the file at `disk_index` keeps what that holds, and `secret`, which outlives processes, keys its names:
    /// another process that gives the same finds it again. `weights_digest` tells models apart there.
    #[new]
    /// A caller that begins a step before it has completed the one in front of it says how many it has at once.
    #[pyo3(signature = (
        limits, disk = None, disk_index = None, secret = None, weights_digest = None, *, max_steps_in_flight = 1
    ))]
    fn new(
        py: Python<'_>,
        limits: &PyEngineLimits,
        disk: Option<Py<PyDiskRegion>>,
        disk_index: Option<&str>,
        secret: Option<[u8; 32]>,
        weights_digest: Option<[u8; 32]>,
        max_steps_in_flight: u32,
    ) -> PyResult<Self> {
        let mut drawn = [0; 32];
        random_bytes(&mut drawn)?;
        let secret = secret.unwrap_or(drawn);
        let mut limits = limits.0.clone();
        // Not the limit of a node: a caller that computes between plan and complete could start no second step earlier.
        limits.max_steps_in_flight = max_steps_in_flight;
        let mut replica = Replica::new(limits.clone(), secret, Box::new(FirstComeFirstServed))
            .map_err(|error| error::limit(&error))?;
        let mut index = None;
        if let Some(path) = disk_index {
            let digest = weights_digest.unwrap_or_default();
            let meaning = IndexMeaning::new(&secret, &digest, limits.disk_blocks, limits.block_tokens);
            let opened = DiskIndex::open(Path::new(path), meaning);
            let (opened, recalled) =
                opened.map_err(|problem| error::config(format!("the disk tier's index {path}: {problem}")))?;
            replica = replica.with_disk(recalled.incarnation, recalled.records);
            index = Some(opened);
        }
        let mut disk_files = 0;
        if let Some(disk) = &disk {
            let disk = disk.get();
            detached(py, || disk.begin())?;
            disk_files = disk.incarnation();
        }
        let mut out = Actions::default();
        let up = Event::WorkerUp { epoch: EPOCH, host_memory: 0, disk_files };
        let _ = replica.on_event(Time(0), up, &mut out);
        let inner = Local {
            replica,
            mirror: Mirror::new(&limits, EPOCH),
            out,
            next_request: RequestId(1),
            unanswered: Unanswered::default(),
            max_steps_in_flight: max_steps_in_flight as usize,
            deliveries: BTreeMap::new(),
            disk_index: index,
        };
        Ok(Self { inner: Mutex::new(inner), secret, started: Instant::now(), disk })
    }

    /// Queues a request and returns its number. Raises the refusal if it cannot run here.
    #[pyo3(signature = (prompt, sampling, *, tenant = "local", priority = "standard", timeout_us = None))]
    fn submit(
        &self,
        prompt: Vec<u32>,
        sampling: &PySampling,
        tenant: &str,
        priority: &str,
        timeout_us: Option<u64>,
    ) -> PyResult<u64> {
        let class = class(priority)?;
        let now = self.now();
        let mut local = self.lock();
        let request = local.next_request;
        let submission = Submission {
            key: SequenceKey { front: FRONT, request, attempt: Attempt(1) },
            namespace: namespace(&self.secret, &[tenant]),
            class,
            prompt_tokens: prompt.len() as u32,
            context: prompt,
            sampling: sampling.0.clone(),
            deadline: timeout_us.map(|span| Time(now.0.saturating_add(span))),
            suspect: false,
        };
        let _ = local.event(now, Event::Submit(Box::new(submission)));
        if let Some((_, GiveBack { refusal: Some(refusal), .. })) = local.out.give_back.pop() {
            drop(local);
            return Err(error::refusal(&refusal));
        }
        local.next_request = request.next();
        local.collect();
        Ok(request.0)
    }

    /// Ends a request; its delivery says "aborted". One that has ended already stays as it is.
    fn cancel(&self, request: u64) {
        let mut local = self.lock();
        let key = SequenceKey { front: FRONT, request: RequestId(request), attempt: Attempt(1) };
        let _ = local.event(self.now(), Event::Abort(key));
        local.collect();
    }

    /// Plans the next step and fills the buffers; `None` if there is nothing to compute. Waits for the disk where nothing
    /// else is left to do.
    fn plan(&self, py: Python<'_>) -> PyResult<Option<PyStepCounts>> {
        loop {
            let planned = self.plan_once()?;
            let waits = planned.is_none() && self.lock().waits_for_disk();
            match &self.disk {
                Some(disk) if waits => {
                    let disk = disk.get();
                    detached(py, || disk.wait_for_news(DISK_POLL));
                }
                _ => return Ok(planned),
            }
        }
    }

    /// Saves what is cached to the disk tier for `max_saving_us` at most: to be called when nothing runs, and then `plan` until
    /// that has no step any more. Nothing can be submitted from then on.
    fn drain(&self, max_saving_us: u64) {
        let now = self.now();
        let max_saving = Span(max_saving_us);
        let mut local = self.lock();
        let _ = local.event(now, Event::Drain { deadline: now + max_saving, max_saving });
        local.collect();
    }

    /// (saved, unsaved) blocks of a drain that has ended; `None` before.
    fn drained(&self) -> Option<(u64, u64)> {
        self.lock().replica.drained().map(|drained| (drained.saved_blocks, drained.unsaved_blocks))
    }

    /// One of the step's buffers, valid as long as this object lives.
    fn buffer(slf: Bound<'_, Self>, name: &str) -> PyResult<crate::buffer::Int32Buffer> {
        let owner = slf.clone().into_any().unbind();
        let local = slf.get().lock();
        buffer(&local.mirror, owner, name)
    }

    /// Makes the copies of the planned step between the host tier and `kv`, (address, bytes) of the KV region, and begins its
    /// transfers between that and `disk`. False if host blocks do not hold what they should: then the step is given up, and
    /// the next plan computes what was lost.
    #[pyo3(signature = (host, kv, disk = None))]
    fn copy_blocks(
        &self,
        py: Python<'_>,
        host: &PyHostRegion,
        kv: Memory,
        disk: Option<&PyDiskRegion>,
    ) -> PyResult<bool> {
        asked_detached(py, &self.inner, |local| {
            let now = self.now();
            if local.unanswered.is_empty() {
                return Err(Refused("there is no step to copy for; call plan first".to_owned()));
            }
            let (bad_host_blocks, took) = copy_step(&local.mirror, host, kv, disk)?;
            local.unanswered.set_copied(took);
            if bad_host_blocks.is_empty() {
                return Ok(true);
            }
            local.give_up_step(now, bad_host_blocks)?;
            Ok(false)
        })
    }

    /// What the step copies between tiers, in order: (comes back, block, host block, tag). Waits for what moves between
    /// these host blocks and the disk.
    #[pyo3(signature = (disk = None))]
    fn copies(&self, py: Python<'_>, disk: Option<&PyDiskRegion>) -> PyResult<Vec<device_step::Copy>> {
        asked_detached(py, &self.inner, |local| device_step::copies(&local.mirror, disk))
    }

    /// A device makes the step's copies, which take `took_ns`; begins its transfers. False if there are bad host blocks: the
    /// step is given up.
    #[pyo3(signature = (took_ns, bad_host_blocks, disk = None))]
    fn copies_made(&self, took_ns: u64, bad_host_blocks: Vec<u32>, disk: Option<&PyDiskRegion>) -> PyResult<bool> {
        asked(&self.inner, |local| {
            local.unanswered.set_copied(Duration::from_nanos(took_ns));
            if bad_host_blocks.is_empty() {
                disk.map_or(Ok(()), |disk| disk.start(&local.mirror))?;
                return Ok(true);
            }
            local.give_up_step(self.now(), bad_host_blocks.into_iter().map(HostBlockId).collect())?;
            Ok(false)
        })
    }

    /// See `WorkerSession.compute`.
    fn compute(
        &self,
        py: Python<'_>,
        kernels: &CpuKernels,
        program: &PyNativeProgram,
        counts: &PyStepCounts,
    ) -> PyResult<()> {
        asked_detached(py, &self.inner, |local| {
            program.compute(kernels, &local.mirror, counts.into()).map_err(|problem| Refused::of(&problem))
        })
    }

    /// See `WorkerSession.pack_step`.
    fn pack_step(
        &self,
        rows: (usize, usize),
        room: (usize, usize),
        out: Memory,
        changes: Memory,
    ) -> PyResult<PyPackedStep> {
        asked(&self.inner, |local| device_step::pack_rows(&local.mirror, rows, room, out, changes))
    }

    /// See `WorkerSession.follows_on`.
    fn follows_on(&self) -> bool {
        self.lock().mirror.follows_on()
    }

    /// See `WorkerSession.take_drawn`.
    fn take_drawn(&self, rows: (usize, usize), sampled: Memory, max_rows: usize, words: Memory) -> PyResult<()> {
        asked(&self.inner, |local| device_step::take_drawn(local.oldest()?, rows.0..rows.1, sampled, max_rows, words))
    }

    /// See `WorkerSession.draw`.
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
        let dtype = crate::kernels::Dtype::parse(dtype)?;
        asked_detached(py, &self.inner, |local| {
            require_alone(&local.unanswered)?;
            draw_words(kernels, &local.mirror, Share { row_bounds, rank }, logits, dtype, words)
        })
    }

    /// See `WorkerSession.word_parts`.
    fn word_parts(&self, row_bounds: Vec<usize>) -> PyResult<Vec<usize>> {
        asked(&self.inner, |local| word_parts(local.oldest()?, &row_bounds))
    }

    /// Completes the oldest step that is not completed with what was drawn for every sampling row, as `draw` and `take_drawn` have filled `words`.
    fn complete(&self, words: Memory) -> PyResult<()> {
        // SAFETY: the caller holds a contiguous int32 tensor that nobody writes during the call.
        let words = unsafe { view::<u32>(words) };
        asked(&self.inner, |local| {
            let rows = local.oldest()?.read_rows(words).map_err(|error| Refused::of(&error))?;
            local.finish(self.now(), rows)
        })
    }

    /// What came out since the last call, at most one delivery per request.
    fn take(&self) -> Vec<Delivery> {
        std::mem::take(&mut self.lock().deliveries).into_values().collect()
    }

    /// Whether nothing waits or runs.
    fn is_idle(&self) -> bool {
        self.lock().replica.is_idle()
    }

    /// Walks the whole state and panics if an invariant does not hold.
    fn check(&self) {
        self.lock().replica.check();
    }

    /// (evicted, offloaded, restored, bad) blocks since the start.
    fn copied_blocks(&self) -> (u64, u64, u64, u64) {
        let cache = self.lock().replica.cache_counters();
        (cache.evicted_blocks, cache.offloaded_blocks, cache.restored_blocks, cache.bad_host_blocks)
    }

    /// (written, read, bad, failed writes, waits) of the disk tier since the start.
    fn disk_blocks(&self) -> (u64, u64, u64, u64, u64) {
        let cache = self.lock().replica.cache_counters();
        let (written, read) = (cache.disk_written_blocks, cache.disk_read_blocks);
        (written, read, cache.bad_disk_blocks, cache.failed_disk_writes, cache.disk_waits)
    }

    /// Lets go of the index of the disk tier, written to its end; nothing may be asked of this replica any more.
    fn close(&self, py: Python<'_>) {
        let index = self.lock().disk_index.take();
        detached(py, || drop(index));
    }

    /// (running, waiting, free blocks, total blocks, preemptions, cached prompt tokens).
    fn load(&self) -> (u32, u32, u32, u32, u64, u64) {
        let local = self.lock();
        let (load, counters) = (local.replica.load(), local.replica.counters());
        let hits = local.replica.cache_counters().hit_tokens;
        (load.running, load.waiting, load.free_blocks, load.total_blocks, counters.preemptions, hits)
    }
}

impl Local {
    fn oldest(&self) -> Result<&SampledStep, Refused> {
        self.unanswered.oldest().ok_or_else(|| Refused("there is no step to sample; call plan first".to_owned()))
    }

    /// Nothing but the disk can make another step.
    fn waits_for_disk(&self) -> bool {
        self.unanswered.is_empty() && self.replica.waits_for_disk()
    }

    fn finish(&mut self, now: Time, rows: Vec<DrawnRow>) -> Result<(), Refused> {
        let step = self.unanswered.oldest().expect("its rows were read");
        let mut result = step.complete(&mut self.mirror, rows);
        self.unanswered.answer(&mut result, Instant::now());
        if !self.event(now, Event::StepDone(result)) {
            return Err(Refused("the samples do not fit the step".to_owned()));
        }
        self.replica.housekeeping(16);
        self.collect();
        Ok(())
    }

    /// Its copies found bad blocks: the next plan computes what was lost.
    fn give_up_step(&mut self, now: Time, bad_host_blocks: Vec<HostBlockId>) -> Result<(), Refused> {
        require_alone(&self.unanswered)?;
        self.unanswered.clear();
        self.mirror.lose();
        let taken = self.event(now, Event::StepsLost { raised: None, bad_host_blocks });
        assert!(taken, "steps that nobody raised are always taken back");
        self.collect();
        Ok(())
    }

    fn event(&mut self, now: Time, event: Event) -> bool {
        self.replica.on_event(now, event, &mut self.out)
    }

    /// Moves outputs into deliveries.
    fn collect(&mut self) {
        for outputs in &mut self.out.outputs {
            deliver(outputs, &mut self.deliveries);
        }
        self.out.clear();
        let changes = self.replica.take_index_changes();
        if let Some(index) = &self.disk_index {
            for change in changes {
                index.note(change);
            }
        }
    }
}
