//! What happens to a replica and what it wants done. Drivers and the simulator own everything in between.

use llmscale_types::{
    Attempt, Delta, DiskReport, Duration, Epoch, FrontId, HostBlockId, KvEvent, Outputs, PrefixKey, Refusal, RequestId,
    SequenceKey, StepId, StepResult, Submission, Time,
};
use std::sync::Arc;

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// A front wants a sequence to run.
    Submit(Box<Submission>),
    /// A front wants an attempt to end; one terminal output follows if it was alive.
    Abort(SequenceKey),
    /// A front wants an attempt back if it has not been admitted.
    Recall(SequenceKey),
    /// A front wants to know what the prefix cache holds, from a number on, and what changes from then on.
    KvAsk {
        /// Who.
        front: FrontId,
        /// The first change that it has not heard of.
        from: u64,
    },
    /// A front is gone: its attempts end without outputs.
    FrontGone(FrontId),
    /// A worker group finished a step.
    StepDone(StepResult),
    /// Before the first worker group is ready: its device has room for fewer KV blocks than were planned.
    FewerBlocks(u32),
    /// A fresh worker group is ready; its device's memory holds nothing.
    WorkerUp {
        /// Its incarnation.
        epoch: Epoch,
        /// Which incarnation of the host tier's memory it has found.
        host_memory: u64,
        /// Which incarnation of the disk tier's files it has found.
        disk_files: u64,
    },
    /// Transfers between the host tier and the disk have ended.
    DiskDone(DiskReport),
    /// The worker group died: KV memory is gone, sequences are not.
    WorkerDown,
    /// The worker group lives and its memory is whole, but it has given up all steps in flight: it lost their order, or one
    /// raised. It waits for a snapshot.
    StepsLost {
        /// The step that raised; it is the oldest one, as workers work in order.
        raised: Option<StepId>,
        /// Blocks of the host tier that do not hold what they should.
        bad_host_blocks: Vec<HostBlockId>,
    },
    /// The node goes down: hand waiting work back, take no more, and when nothing runs any more save what is cached.
    Drain {
        /// When saving is given up, whenever it began.
        deadline: Time,
        /// How long it may take.
        max_saving: Duration,
    },
    /// Time has passed.
    Tick,
}

/// Why an attempt comes back to its front unstarted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GiveBack {
    /// It cannot run here, or not now; `None` where the front asked for it.
    pub refusal: Option<Refusal>,
    /// A worker died or raised while computing it: it stays a suspect wherever it goes, or a request that kills workers
    /// would go from node to node for ever.
    pub suspect: bool,
}

impl From<Refusal> for GiveBack {
    /// Of what never got as far as a worker here.
    fn from(refusal: Refusal) -> Self {
        Self { refusal: Some(refusal), suspect: false }
    }
}

/// What a front is told about the prefix cache.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvWord {
    /// One numbered change.
    Changes {
        /// Its number.
        number: u64,
        /// What changed, in order.
        events: Arc<[KvEvent]>,
    },
    /// All that is held after a change.
    Snapshot {
        /// The number of that change.
        number: u64,
        /// The names of all prefixes that have one.
        keys: Vec<PrefixKey>,
    },
}

/// What the driver has to do. Reused between calls, so that a steady step allocates nothing here.
#[derive(Debug, Default)]
pub struct Actions {
    /// Send this step to all ranks.
    pub execute: Option<Delta>,
    /// Per front, by its number: what to send it.
    pub outputs: Vec<Outputs>,
    /// Attempts to hand back.
    pub give_back: Vec<(SequenceKey, GiveBack)>,
    /// What fronts are told about the prefix cache, in order.
    pub kv: Vec<(FrontId, KvWord)>,
}

impl Actions {
    /// The outputs of one front, made on first use.
    pub(crate) fn outputs_of(&mut self, front: FrontId) -> &mut Outputs {
        if self.outputs.len() <= front.index() {
            self.outputs.resize_with(front.index() + 1, Outputs::default);
        }
        &mut self.outputs[front.index()]
    }

    /// Drops what was to be told to a front that is gone.
    pub(crate) fn forget(&mut self, front: FrontId) {
        if let Some(outputs) = self.outputs.get_mut(front.index()) {
            outputs.clear();
        }
        self.give_back.retain(|(key, _)| key.front != front);
        self.kv.retain(|(listener, _)| *listener != front);
    }

    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.execute = None;
        self.outputs.iter_mut().for_each(Outputs::clear);
        self.give_back.clear();
        self.kv.clear();
    }
}

/// Names a request of a front whatever its attempt.
pub(crate) type RequestKey = (FrontId, RequestId);

/// The part of a key that does not change with the attempt.
pub(crate) fn request_key(key: SequenceKey) -> RequestKey {
    (key.front, key.request)
}

/// Whether `attempt` of an order is the one that lives here.
pub(crate) fn same_attempt(lives: Attempt, named: Attempt) -> bool {
    lives == named
}

/// Monotone counts since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReplicaCounters {
    /// Steps completed.
    pub steps: u64,
    /// Tokens emitted.
    pub emitted_tokens: u64,
    /// Prompt and recomputed tokens that went through the model.
    pub prefill_tokens: u64,
    /// Sequences preempted for want of blocks.
    pub preemptions: u64,
    /// Worker groups lost.
    pub worker_losses: u64,
    /// Steps that a living worker group gave up.
    pub steps_lost: u64,
    /// Sequences ended because a worker died or a step raised twice while computing them.
    pub poisoned: u64,
    /// Results of an older epoch or an unknown step, dropped.
    pub stale_results: u64,
    /// Rows planned after their sequence had ended, dropped.
    pub discarded_rows: u64,
    /// Orders for attempts that are not here, ignored.
    pub unknown_orders: u64,
    /// Records that waited for the disk as long as computing would have taken, and were computed then.
    pub late_fetches: u64,
    /// Steps whose prefill was cut by the pace.
    pub paced_steps: u64,
    /// What completed steps were predicted to take when they were planned, without their copies.
    pub predicted_step_ns: u64,
    /// By how much they took longer or shorter, added up.
    pub step_error_ns: u64,
}

/// How full the replica is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReplicaLoad {
    /// Sequences that wait.
    pub waiting: u32,
    /// Context tokens that wait.
    pub waiting_tokens: u64,
    /// Sequences that hold a slot.
    pub running: u32,
    /// Of these, sequences whose prompt is not computed yet: tokens left to compute.
    pub prefill_backlog_tokens: u64,
    /// Blocks that nobody references.
    pub free_blocks: u32,
    /// Blocks in all.
    pub total_blocks: u32,
    /// Steps planned and not completed.
    pub steps_in_flight: u32,
}
