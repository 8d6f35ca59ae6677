//! A simulated worker process: the hash model behind the worker half of the wire protocol, one step at a time, in the
//! order in which they were sent. Its results go through the real codec. Knows nothing of nodes or fronts.

use crate::around::Around;
use crate::disk_memory::DiskMemory;
use crate::hash_worker::{HashWorker, StepFailure};
use crate::host_memory::HostMemory;
use llmscale_cost::StepShape;
use llmscale_types::{Delta, Duration, Epoch, HostBlockId, StepId, Time};
use llmscale_wire::{CodecLimits, Failed, FailureCode, FromWorker, NeedSnapshot, ToWorker, decode, encode};
use std::collections::VecDeque;

/// How a worker that lives is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Condition {
    /// It loads the model.
    Loading,
    /// It computes what it is sent.
    Ready,
    /// It never finishes the step that it is at.
    Hung,
}

/// What goes wrong in a worker that lives on, until it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lapse {
    /// The next delta never arrives.
    DropsDelta,
    /// The next step finds the mirror void.
    LosesMirror,
    /// The next step raises.
    Raises,
}

/// How a step came to its end.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The worker says so.
    Said(Vec<u8>),
    /// It was passed over in silence.
    PassedOver,
    /// The worker is dead: it computed the deadly token.
    Died,
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct WorkerProcess {
    pub(crate) epoch: Epoch,
    pub(crate) condition: Condition,
    /// It lives; a dead one is buried a little later.
    pub(crate) alive: bool,
    /// It died, or its last step that raised did, by an ordinary fault and not by what it computed.
    pub(crate) failed_ordinarily: bool,
    /// The node has condemned it.
    pub(crate) failed: bool,
    /// It is slow until then.
    pub(crate) slow_until: Time,
    pub(crate) lapse: Option<Lapse>,
    model: HashWorker,
    steps: VecDeque<Delta>,
}

impl WorkerProcess {
    pub(crate) fn new(epoch: Epoch, host: HostMemory, disk: DiskMemory, around: &Around) -> Self {
        let (limits, deadly) = (&around.mix.engine, around.mix.deadly_token());
        Self {
            epoch,
            condition: Condition::Loading,
            alive: true,
            failed_ordinarily: false,
            failed: false,
            slow_until: Time(0),
            lapse: None,
            model: HashWorker::new(limits, epoch).killed_by(deadly).with_host(host, around.mix.copy_ns).with_disk(disk),
            steps: VecDeque::new(),
        }
    }

    /// It has loaded the model.
    pub(crate) fn be_ready(&mut self) {
        if self.condition == Condition::Loading {
            self.condition = Condition::Ready;
        }
    }

    /// The node sends it steps: from outside, a hung worker looks like any other.
    pub(crate) fn takes_steps(&self) -> bool {
        self.condition != Condition::Loading && !self.failed
    }

    /// Takes a step. Returns how long it computes, if it was idle.
    pub(crate) fn receive(&mut self, delta: Delta, around: &mut Around) -> Option<Duration> {
        let frame = encode(&ToWorker::Step(delta), &around.codec).expect("a delta is within the codec's limits");
        let Ok(ToWorker::Step(delta)) = decode(&frame, &around.codec) else { panic!("a step arrives as a step") };
        if self.lapse.take_if(|lapse| *lapse == Lapse::DropsDelta).is_some() {
            around.reach("worker_dropped_delta", [self.epoch.0, delta.step.0, 0, 0]);
            return None;
        }
        self.steps.push_back(delta);
        (self.steps.len() == 1).then(|| self.step_time(around))
    }

    /// Finishes the oldest step. Returns what it says, and how long the next step computes.
    pub(crate) fn finish(&mut self, around: &mut Around) -> (Ending, Option<Duration>) {
        let delta = self.steps.pop_front().expect("a worker finishes what it was sent");
        let ending = self.end_step(&delta, around);
        let goes_on = !self.steps.is_empty() && !matches!(ending, Ending::Died);
        let next = goes_on.then(|| self.step_time(around));
        (ending, next)
    }

    fn end_step(&mut self, delta: &Delta, around: &mut Around) -> Ending {
        if self.model.passes_over(delta) {
            return Ending::PassedOver;
        }
        if self.lapse.take_if(|lapse| *lapse == Lapse::LosesMirror).is_some() {
            around.reach("worker_lost_mirror", [self.epoch.0, delta.step.0, 0, 0]);
            self.model.lose_mirror();
        }
        // What a step is said to take is the same for all where nobody decides anything by it, as it always was.
        let mut shape = StepShape::default();
        delta.chunks.iter().for_each(|chunk| shape.add_prefill(chunk.start_tokens, chunk.tokens));
        let paced = around.mix.step_target > Duration(0);
        let token_ns = if paced || around.mix.engine.host_blocks > 0 { 40_000 } else { 0 };
        // The end of a long context costs a few times what the start of the next one does.
        let pair_ns = if paced { 4_000 } else { 0 };
        let prefill_ns = u64::from(shape.prefill_tokens) * token_ns + shape.prefill_pairs * pair_ns;
        let outcome = self.model.run(delta, 500_000 + prefill_ns);
        let message = match outcome {
            Ok(_) if self.lapse.take_if(|lapse| *lapse == Lapse::Raises).is_some() => {
                around.reach("worker_raised", [self.epoch.0, delta.step.0, 0, 0]);
                self.give_up(delta.step, true)
            }
            Ok(result) => FromWorker::Result(result),
            Err(StepFailure::Gap(gap)) => {
                around.reach("worker_needs_snapshot", [self.epoch.0, gap.step.0, 0, 0]);
                self.need_snapshot(gap.step, Vec::new())
            }
            Err(StepFailure::BadHostBlocks(bad)) => {
                around.reach("worker_found_bad_host_blocks", [self.epoch.0, delta.step.0, 0, 0]);
                self.need_snapshot(delta.step, bad)
            }
            Err(StepFailure::Poison) if around.mix.deadly_raises => {
                around.reach("worker_deadly_token", [self.epoch.0, delta.step.0, 0, 0]);
                around.coverage.reach("worker_deadly_token_raised");
                self.give_up(delta.step, false)
            }
            Err(StepFailure::Poison) => return Ending::Died,
        };
        Ending::Said(encode(&message, &around.codec).expect("what a worker says is within the codec's limits"))
    }

    fn need_snapshot(&self, step: StepId, bad_host_blocks: Vec<HostBlockId>) -> FromWorker {
        FromWorker::NeedSnapshot(NeedSnapshot { epoch: self.epoch, step, last: None, bad_host_blocks })
    }

    /// What outlives it: the host tier's memory and the disk, with what its death cut off, and whether a place of the disk
    /// is torn.
    pub(crate) fn leave(self) -> (HostMemory, DiskMemory, bool) {
        let at_work = self.steps.front().filter(|delta| !self.model.passes_over(delta)).cloned();
        self.model.leave(at_work.as_ref())
    }

    /// How long the next transfer takes, if one begins now.
    pub(crate) fn begin_transfer(&mut self, around: &mut Around) -> Option<Duration> {
        let disk = self.model.disk_mut();
        if disk.moves || disk.under_way() == 0 {
            return None;
        }
        disk.moves = true;
        let slow = if around.now() < self.slow_until { 20 } else { 1 };
        Some(Duration((around.mix.disk_us + around.random.span(0, around.mix.disk_us).0) * slow))
    }

    /// The oldest transfer has ended. Returns what the worker says of it.
    pub(crate) fn end_transfer(&mut self, around: &mut Around) -> Option<Vec<u8>> {
        self.model.disk_mut().moves = false;
        self.model.end_transfer();
        self.say_transfers(around)
    }

    fn say_transfers(&mut self, around: &mut Around) -> Option<Vec<u8>> {
        let report = self.model.disk_mut().report(self.epoch, around.mix.disk_us * 1_000)?;
        around.coverage.add("disk_waits", u64::from(report.waits));
        Some(encode(&FromWorker::Disk(report), &around.codec).expect("a report is within the codec's limits"))
    }

    /// The disk takes nothing in any more, or takes in again.
    pub(crate) fn fill_disk(&mut self, full: bool) {
        self.model.disk_mut().full = full;
    }

    /// A bit flips on the disk.
    pub(crate) fn flip_disk_bit(&mut self, place: usize) -> bool {
        self.model.disk_mut().flip(place)
    }

    /// Which file of the disk tier it found.
    pub(crate) fn disk_files(&self) -> u64 {
        self.model.disk().incarnation()
    }

    /// A bit flips in the host tier's memory.
    pub(crate) fn flip_host_bit(&mut self, place: usize) -> bool {
        self.model.host_mut().flip(place)
    }

    /// Which host memory it found.
    pub(crate) fn host_memory(&self) -> u64 {
        self.model.host_memory()
    }

    /// The step raised: the worker lives and waits for a snapshot.
    fn give_up(&mut self, step: StepId, ordinary: bool) -> FromWorker {
        self.failed_ordinarily = ordinary;
        self.model.lose_mirror();
        let message = "the step raised".to_owned();
        FromWorker::Failed(Failed { epoch: self.epoch, step: Some(step), code: FailureCode::Step, message })
    }

    fn step_time(&self, around: &mut Around) -> Duration {
        let delta = self.steps.front().expect("it was just looked at");
        let tokens: u32 = delta.chunks.iter().map(|chunk| chunk.tokens).sum();
        let slow = if around.now() < self.slow_until { 20 } else { 1 };
        Duration((around.random.between(500, 3_000) + u64::from(tokens) * 40) * slow)
    }
}

/// What a worker's frame says.
pub(crate) fn open(frame: &[u8], codec: &CodecLimits) -> FromWorker {
    decode(frame, codec).expect("a worker's frame can be read")
}
