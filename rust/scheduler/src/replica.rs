//! One replica: scheduler and blocks as one state machine. Owns every sequence's life between a front's submission and its
//! terminal output. Events are O(1) or O(log n), a plan is O(changes), a completion is O(rows).
//! Knows no clock, socket, thread or text; time comes in with the events.

use crate::event::{Actions, Event, GiveBack, ReplicaCounters, RequestKey, request_key, same_attempt};
use crate::fetch::DiskSide;
use crate::groups::Groups;
use crate::kv_feed::KvFeed;
use crate::pace::Pace;
use crate::policy::{OrderKey, Policy};
use crate::queue::{Place, WaitingQueue};
use crate::record::Record;
use crate::save::Drain;
use crate::sequences::{Phase, Sequences};
use llmscale_blocks::{BlockStore, ChainHasher};
use llmscale_cost::{CopyCost, CostModel, StepShape};
use llmscale_types::error::QueueUnit;
use llmscale_types::frame::MAX_ADMISSION_BYTES;
use llmscale_types::{
    Attempt, Chunk, Delta, Duration, EngineLimits, Epoch, FinishReason, FrontId, GroupId, HostBlockId, LimitError,
    Planted, Refusal, RequestId, SequenceKey, Slot, StepId, Submission, Time, Token,
};
use rustc_hash::FxHashMap;
use std::collections::{BTreeSet, VecDeque};

/// A planned step whose result has not arrived.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) step: StepId,
    pub(crate) group: GroupId,
    /// The group's decoding round that it computes, if any.
    pub(crate) decodes: Option<u64>,
    pub(crate) chunks: Vec<Chunk>,
    /// Slots that got a block: the block before it is full when this step is complete.
    pub(crate) appended: Vec<Slot>,
    /// Rows that sample.
    pub(crate) samples: u32,
    /// What its time depends on.
    pub(crate) shape: StepShape,
    /// What it should take without its copies.
    pub(crate) predicted_ns: u64,
    /// Parts of contexts that it copies back instead of computing them.
    pub(crate) restored: Vec<Chunk>,
    /// Blocks that it copies between tiers.
    pub(crate) copies: u32,
    /// Where to it copies what is evicted.
    pub(crate) offloaded: Vec<HostBlockId>,
    /// Sequences with chunks in it that have lost their slots since.
    pub(crate) preempted: Vec<SequenceKey>,
}

/// Where an attempt is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Location {
    pub(crate) attempt: Attempt,
    pub(crate) at: At,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum At {
    Queue(Place),
    Slot(Slot),
}

/// See the file's header.
#[derive(Debug)]
pub struct Replica {
    pub(crate) limits: EngineLimits,
    /// Most bytes that the admissions of one delta take on the wire, unless it has only one.
    pub(crate) max_admission_bytes: u64,
    policy: Box<dyn Policy>,
    pub(crate) blocks: BlockStore,
    pub(crate) queue: WaitingQueue,
    pub(crate) sequences: Sequences,
    /// Looked up by request, never iterated.
    pub(crate) places: FxHashMap<RequestKey, Location>,
    pub(crate) deadlines: BTreeSet<(Time, FrontId, RequestId)>,
    /// Sequences with rows to come, in policy order; the last one is preempted first.
    pub(crate) running: BTreeSet<(OrderKey, u64, Slot)>,
    pub(crate) groups: Groups,
    pub(crate) flights: VecDeque<Flight>,
    pub(crate) step: StepId,
    /// The step that the next one builds on, as far as the workers know.
    pub(crate) base: StepId,
    /// The decoding part of the last step that had one.
    pub(crate) round: StepShape,
    pub(crate) prefill_backlog: u64,
    /// What the step that is being planned copies back.
    pub(crate) restored: Vec<Chunk>,
    pub(crate) cost: CostModel,
    pub(crate) pace: Pace,
    pub(crate) copy_cost: CopyCost,
    /// What reading a block from the disk takes.
    pub(crate) disk_cost: CopyCost,
    pub(crate) disk: DiskSide,
    /// When the last event was.
    pub(crate) now: Time,
    /// Which incarnation of the host tier's memory the last worker had.
    pub(crate) host_memory: Option<u64>,
    pub(crate) epoch: Option<Epoch>,
    pub(crate) last_epoch: Option<Epoch>,
    arrivals: u64,
    /// Slots that the workers have to forget with the next delta, and with the one after it.
    pub(crate) pending_leave: Vec<Slot>,
    pub(crate) leave_after_step: Vec<Slot>,
    /// Sequences with full blocks that the prefix index does not know yet, with the step that filled them.
    pub(crate) unregistered: VecDeque<(Slot, u64)>,
    pub(crate) ended: Vec<(Slot, FinishReason)>,
    pub(crate) kv_feed: KvFeed,
    pub(crate) drain: Option<Drain>,
    pub(crate) counters: ReplicaCounters,
}

impl Replica {
    /// An idle replica without a worker. `secret` keys the prefix hashes.
    pub fn new(limits: EngineLimits, secret: [u8; 32], policy: Box<dyn Policy>) -> Result<Self, LimitError> {
        limits.check()?;
        let blocks = BlockStore::new(limits.total_blocks, limits.block_tokens, ChainHasher::new(secret));
        Ok(Self {
            blocks: blocks.with_host_blocks(limits.host_blocks).with_disk_blocks(limits.disk_blocks),
            queue: WaitingQueue::default(),
            sequences: Sequences::new(limits.max_sequences),
            places: FxHashMap::default(),
            deadlines: BTreeSet::new(),
            running: BTreeSet::new(),
            groups: Groups::new(limits.groups, limits.block_tokens),
            flights: VecDeque::new(),
            step: StepId(0),
            base: Delta::NOTHING,
            round: StepShape::default(),
            prefill_backlog: 0,
            restored: Vec::new(),
            cost: CostModel::new(),
            pace: Pace::NONE,
            copy_cost: CopyCost::default(),
            disk_cost: CopyCost::default(),
            disk: DiskSide::default(),
            now: Time(0),
            host_memory: None,
            epoch: None,
            last_epoch: None,
            arrivals: 0,
            pending_leave: Vec::new(),
            leave_after_step: Vec::new(),
            unregistered: VecDeque::new(),
            ended: Vec::new(),
            kv_feed: KvFeed::default(),
            drain: None,
            counters: ReplicaCounters::default(),
            policy,
            limits,
            max_admission_bytes: MAX_ADMISSION_BYTES,
        })
    }

    /// Applies one event. Returns false only for a result that does not fit its step, and for a step said to have raised
    /// that cannot have: the driver then replaces the worker.
    #[must_use]
    pub fn on_event(&mut self, now: Time, event: Event, out: &mut Actions) -> bool {
        self.now = now;
        match event {
            Event::Submit(submission) => self.submit(*submission, out),
            Event::Abort(key) => self.abort(key, out),
            Event::Recall(key) => self.recall(key, out),
            Event::KvAsk { front, from } => self.kv_feed.ask(front, from, &mut self.blocks),
            Event::FrontGone(front) => self.front_gone(front, out),
            Event::StepDone(result) => return self.complete(&result, out),
            Event::FewerBlocks(total_blocks) => return self.fewer_blocks(total_blocks),
            Event::WorkerUp { epoch, host_memory, disk_files } => self.worker_up(epoch, host_memory, disk_files),
            Event::DiskDone(report) => self.disk_done(&report),
            Event::WorkerDown => self.worker_down(out),
            Event::StepsLost { raised, bad_host_blocks } => return self.steps_lost(raised, &bad_host_blocks, out),
            Event::Drain { deadline, max_saving } => self.drain(deadline, max_saving, out),
            Event::Tick => {
                self.expire_fetches(now);
                self.expire(now, out);
                self.expire_saving();
            }
        }
        true
    }

    fn submit(&mut self, submission: Submission, out: &mut Actions) {
        let key = submission.key;
        if let Err(refusal) = self.admissible(&submission) {
            out.give_back.push((key, refusal.into()));
            return;
        }
        // A newer attempt replaces an older one that the front has given up already.
        if let Some(location) = self.places.get(&request_key(key)).copied() {
            drop(self.withdraw(location));
        }
        let block_tokens = self.limits.block_tokens;
        let hashes = self.blocks.hasher().chain(&submission.namespace, &submission.context, block_tokens);
        self.arrivals += 1;
        if let Some(deadline) = submission.deadline {
            self.deadlines.insert((deadline, key.front, key.request));
        }
        let record = Box::new(Record::new(submission, self.arrivals, hashes, &*self.policy));
        if record.output_tokens(record.submission.context.len()) >= record.submission.sampling.max_tokens {
            self.conclude(&record, FinishReason::Length, out);
            return;
        }
        self.wait_again(record);
    }

    fn admissible(&self, submission: &Submission) -> Result<(), Refusal> {
        let sampling = &submission.sampling;
        if self.drain.is_some() {
            return Err(Refusal::Draining);
        }
        if submission.prompt_tokens == 0 || submission.context.len() < submission.prompt_tokens as usize {
            return Err(Refusal::EmptyPrompt);
        }
        let limit = u64::from(self.limits.max_sequence_tokens);
        let needed = submission.max_total_tokens().max(submission.context.len() as u64);
        if needed > limit {
            return Err(Refusal::TooLong { needed, limit });
        }
        if sampling.check(self.limits.vocabulary).is_err() {
            return Err(Refusal::BadSampling);
        }
        if let Some(&given) = submission.context.iter().find(|&&token| token >= self.limits.vocabulary) {
            let limit = u64::from(self.limits.vocabulary);
            return Err(Refusal::UnknownToken { given: u64::from(given), limit });
        }
        let known = self.places.get(&request_key(submission.key));
        if known.is_some_and(|location| location.attempt >= submission.key.attempt) {
            return Err(Refusal::Duplicate);
        }
        if self.queue.len() >= self.limits.max_waiting_sequences as usize {
            return Err(Refusal::QueueFull {
                queued: self.queue.len() as u64,
                limit: u64::from(self.limits.max_waiting_sequences),
                unit: QueueUnit::Requests,
                retry_after: Duration::from_millis(100),
            });
        }
        Ok(())
    }

    fn abort(&mut self, key: SequenceKey, out: &mut Actions) {
        match self.places.get(&request_key(key)).copied() {
            Some(location) if same_attempt(location.attempt, key.attempt) => {
                self.end(location, FinishReason::Aborted, out);
            }
            _ => self.counters.unknown_orders += 1,
        }
    }

    fn recall(&mut self, key: SequenceKey, out: &mut Actions) {
        match self.places.get(&request_key(key)).copied() {
            Some(location) if same_attempt(location.attempt, key.attempt) => {
                if let At::Queue(place) = location.at {
                    let record = self.queue.remove(place).expect("its place was looked up");
                    self.forget(&record);
                    out.give_back.push((key, GiveBack { refusal: None, suspect: record.suspect }));
                }
            }
            _ => self.counters.unknown_orders += 1,
        }
    }

    fn front_gone(&mut self, front: FrontId, out: &mut Actions) {
        // Its number may pass to another front before the driver delivers, and requests of two fronts share their numbers.
        out.forget(front);
        self.kv_feed.forget(front, &mut self.blocks);
        let waiting: Vec<RequestId> =
            self.queue.iter().map(Record::key).filter(|key| key.front == front).map(|key| key.request).collect();
        let running = self.sequences.occupied().map(|slot| self.sequences.record(slot).key());
        let running: Vec<RequestId> = running.filter(|key| key.front == front).map(|key| key.request).collect();
        for request in waiting.into_iter().chain(running) {
            let location = self.places[&(front, request)];
            drop(self.withdraw(location));
        }
    }

    fn drain(&mut self, deadline: Time, max_saving: Duration, out: &mut Actions) {
        self.begin_drain(deadline, max_saving);
        let waiting: Vec<Place> = self.queue.iter().map(|record| (record.order, record.arrival)).collect();
        for place in waiting {
            let record = self.queue.remove(place).expect("its place was just listed");
            self.forget(&record);
            out.give_back.push((record.key(), GiveBack { refusal: Some(Refusal::Draining), suspect: record.suspect }));
        }
    }

    fn expire(&mut self, now: Time, out: &mut Actions) {
        while let Some(&(deadline, front, request)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            let location = self.places[&(front, request)];
            self.end(location, FinishReason::Deadline, out);
        }
    }

    /// Ends an attempt wherever it is, with a terminal output.
    fn end(&mut self, location: Location, reason: FinishReason, out: &mut Actions) {
        match location.at {
            At::Slot(slot) => self.finish(slot, reason, out),
            At::Queue(place) => {
                let record = self.queue.remove(place).expect("its place was looked up");
                self.conclude(&record, reason, out);
            }
        }
    }

    /// Ends an attempt wherever it is, without a word.
    fn withdraw(&mut self, location: Location) -> Box<Record> {
        let record = match location.at {
            At::Slot(slot) => {
                if matches!(self.sequences.hot[slot.index()].phase, Phase::Prefill | Phase::Decode) {
                    self.stop_running(slot);
                    self.pending_leave.push(slot);
                }
                if !Planted::AbortLeaksBlocks.is_here() {
                    self.release_blocks(slot);
                }
                self.sequences.vacate(slot)
            }
            At::Queue(place) => self.queue.remove(place).expect("its place was looked up"),
        };
        self.forget(&record);
        record
    }

    pub(crate) fn forget(&mut self, record: &Record) {
        let key = record.key();
        self.places.remove(&request_key(key));
        if let Some(deadline) = record.submission.deadline
            && !Planted::KeepsDeadlineOfTheEnded.is_here()
        {
            self.deadlines.remove(&(deadline, key.front, key.request));
        }
    }

    /// Puts a record into the queue, new or once more.
    pub(crate) fn wait_again(&mut self, record: Box<Record>) {
        let key = record.key();
        let place = self.queue.push(record);
        self.places.insert(request_key(key), Location { attempt: key.attempt, at: At::Queue(place) });
    }

    /// Back to the queue with all its tokens; the slot is free.
    pub(crate) fn requeue(&mut self, slot: Slot) {
        let mut record = self.sequences.vacate(slot);
        if Planted::PreemptionForgetsAToken.is_here() && record.output_tokens(record.submission.context.len()) > 1 {
            record.submission.context.pop();
        }
        self.wait_again(record);
    }

    /// No rows of this sequence will be planned any more.
    pub(crate) fn stop_running(&mut self, slot: Slot) {
        self.running.remove(&self.running_key(slot));
        let next_position = self.next_position(slot);
        let group = self.groups.get_mut(self.sequences.cold[slot.index()].group);
        match self.sequences.hot[slot.index()].phase {
            Phase::Prefill => {
                let planned = self.sequences.cold[slot.index()].planned_tokens;
                self.prefill_backlog -= self.sequences.contexts[slot.index()].len() as u64 - u64::from(planned);
                group.prefilling.retain(|&other| other != slot);
            }
            Phase::Decode => {
                group.decoding_tokens -= u64::from(next_position);
                group.wheel.remove(slot, &mut self.sequences.cold);
                group.decoding -= 1;
            }
            phase => unreachable!("a sequence in phase {phase:?} is not running"),
        }
    }

    pub(crate) fn running_key(&self, slot: Slot) -> (OrderKey, u64, Slot) {
        let record = self.sequences.record(slot);
        (record.order, record.arrival, slot)
    }

    /// Makes the sequence's full blocks findable, then gives all of them back.
    pub(crate) fn release_blocks(&mut self, slot: Slot) {
        self.register_full_blocks(slot);
        self.give_up_restores(slot);
        let table = std::mem::take(&mut self.sequences.cold[slot.index()].table);
        self.blocks.release(&table);
    }

    /// Work that nobody waits for, done while a step runs: hashes of the blocks that became full. At most `max_blocks`
    /// sequences are looked at; returns whether there is more.
    pub fn housekeeping(&mut self, max_sequences: usize) -> bool {
        for _ in 0..max_sequences {
            let Some((slot, step)) = self.unregistered.pop_front() else { return false };
            let hot = &self.sequences.hot[slot.index()];
            if matches!(hot.phase, Phase::Prefill | Phase::Decode | Phase::LastRow) && hot.admitted_step <= step {
                self.register_full_blocks(slot);
            }
        }
        !self.unregistered.is_empty()
    }

    fn register_full_blocks(&mut self, slot: Slot) {
        let index = slot.index();
        let block_tokens = self.limits.block_tokens as usize;
        let context = &self.sequences.contexts[index];
        let cold = &mut self.sequences.cold[index];
        // In decode every token but the last has its KV; in prefill the completed chunks tell.
        let computed = (cold.computed_tokens as usize).max(match self.sequences.hot[index].phase {
            Phase::Prefill => 0,
            _ if cold.planned_tokens as usize > cold.computed_tokens as usize => 0,
            _ => context.len() - 1,
        });
        let full = (computed / block_tokens).min(cold.table.len());
        let Some(record) = cold.record.as_mut() else { return };
        for block in cold.registered_blocks as usize..full {
            let ids: &[Token] = &context[block * block_tokens..(block + 1) * block_tokens];
            let namespace = &record.submission.namespace;
            if record.hashes.len() == block {
                let hash = self.blocks.hasher().block(namespace, record.hashes.last(), ids);
                record.hashes.push(hash);
            }
            let hash = record.hashes[block];
            let (index, id) = (block as u32, cold.table[block]);
            cold.content = Some(self.blocks.register(index, id, namespace, cold.content, &hash, ids));
            cold.registered_blocks = block as u32 + 1;
        }
    }
}
