//! One replica with its worker, the steps between them and what the fronts have seen; every token and every end is held
//! against the model as it comes.

use llmscale_scheduler::{Actions, Event, FirstComeFirstServed, GiveBack, Mirror, Pace, Replica};
use llmscale_sim::{DiskBook, DiskMemory, HashWorker, HostMemory, StepFailure, hash_token};
use llmscale_types::frame::{MAX_ADMISSION_BYTES, admission_bytes};
use llmscale_types::{
    Admission, Attempt, Class, Delta, Duration, EngineLimits, Epoch, FinishReason, FrontId, GroupId, RequestId,
    Sampling, SequenceKey, StepId, Submission, Time, Token,
};
use std::collections::{BTreeMap, VecDeque};

const EOS: Token = 3;

/// Sizes of a small replica.
pub(crate) fn limits(total_blocks: u32, max_sequences: u32, max_step_tokens: u32, steps: u32) -> EngineLimits {
    EngineLimits {
        block_tokens: 4,
        total_blocks,
        host_blocks: 0,
        disk_blocks: 0,
        max_sequences,
        max_step_tokens: max_step_tokens.max(max_sequences),
        max_sequence_tokens: 40,
        max_waiting_sequences: 64,
        max_steps_in_flight: steps,
        groups: 1,
        eos_tokens: vec![EOS],
        vocabulary: 50,
    }
}

/// Tokens that a step prefills.
pub(crate) fn prefill_tokens(delta: &Delta) -> u64 {
    delta.chunks.iter().map(|chunk| u64::from(chunk.tokens)).sum()
}

/// What its tokens attend to, token by token.
pub(crate) fn prefill_pairs(delta: &Delta) -> u64 {
    let positions = delta.chunks.iter().flat_map(|chunk| chunk.start_tokens..chunk.start_tokens + chunk.tokens);
    positions.map(|position| u64::from(position) + 1).sum()
}

/// One attempt as its front knows it.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) submission: Submission,
    pub(crate) emitted: Vec<Token>,
    /// Prompt tokens that were found cached, as it was told.
    pub(crate) cached: Option<u32>,
    pub(crate) ended: Option<FinishReason>,
}

/// The first stage of a pipeline, ahead of the one that samples: it expands a step when it is planned, and learns what
/// earlier steps sampled only when the step at hand needs it.
struct FirstStage {
    mirror: Mirror,
    /// What it fed into the model, by step.
    fed: BTreeMap<StepId, Vec<i32>>,
    /// What was sampled and not asked for yet.
    sampled: VecDeque<Vec<Token>>,
}

impl FirstStage {
    fn new(limits: &EngineLimits, epoch: Epoch) -> Self {
        Self { mirror: Mirror::new(limits, epoch), fed: BTreeMap::new(), sampled: VecDeque::new() }
    }

    fn expand(&mut self, delta: &Delta) {
        if delta.is_snapshot() {
            self.sampled.clear();
        }
        let counts = self.mirror.expand(delta).expect("it sees every step");
        while let Some(rows) = self.mirror.awaited_samples() {
            let tokens = self.sampled.pop_front().expect("a group's step is planned when the one before is complete");
            assert_eq!(tokens.len(), rows);
            self.mirror.record(&tokens.into_iter().map(Some).collect::<Vec<_>>());
        }
        self.fed.insert(delta.step, self.mirror.buffers().token_ids[..counts.rows as usize].to_vec());
    }
}

/// See the file's header.
pub(crate) struct World {
    deadly: Option<Token>,
    max_admission_bytes: u64,
    /// How often the worker has lost something that it may yet find out.
    losses: u32,
    /// How many bits have flipped in the host's memory that it may yet find out.
    flips: u32,
    host: Option<HostMemory>,
    disk: Option<DiskMemory>,
    /// What is kept beside the disk.
    book: DiskBook,
    /// How often something was done to the disk, or to what goes there, that may be found out yet.
    pub(crate) disk_harms: u32,
    /// What the workers to come take for a copied block. A token that is computed takes 40,000.
    pub(crate) copy_ns: u64,
    /// What a worker takes for a step with so many decoding rows, its copies apart.
    pub(crate) step_ns: fn(&Delta, u32) -> u64,
    /// Decoding rows of the steps in flight.
    decodes: BTreeMap<StepId, u32>,
    pace: Pace,
    pub(crate) replica: Replica,
    worker: Option<HashWorker>,
    first_stage: FirstStage,
    epoch: Epoch,
    pub(crate) sent: VecDeque<Delta>,
    pub(crate) wanted: BTreeMap<SequenceKey, Wanted>,
    pub(crate) given_back: Vec<(Submission, GiveBack)>,
    requests: u64,
    /// Steps were given up, and transfers with them that may be made all the same.
    gave_up: bool,
    pub(crate) out: Actions,
}

impl World {
    pub(crate) fn new(limits: EngineLimits) -> Self {
        Self::with_deadly_token(limits, None)
    }

    pub(crate) fn with_deadly_token(limits: EngineLimits, deadly: Option<Token>) -> Self {
        let first_stage = FirstStage::new(&limits, Epoch(0));
        let (host_blocks, disk_blocks) = (limits.host_blocks, limits.disk_blocks);
        let replica = Replica::new(limits, [9; 32], Box::new(FirstComeFirstServed)).unwrap();
        let mut world = Self {
            deadly,
            max_admission_bytes: MAX_ADMISSION_BYTES,
            losses: 0,
            flips: 0,
            host: Some(HostMemory::new(host_blocks, 1)),
            disk: Some(DiskMemory::new(disk_blocks, 1)),
            book: DiskBook::default(),
            disk_harms: 0,
            copy_ns: 2_000,
            step_ns: |delta, _| 1_000 + 40_000 * prefill_tokens(delta),
            decodes: BTreeMap::new(),
            pace: Pace::NONE,
            replica,
            worker: None,
            first_stage,
            epoch: Epoch(0),
            sent: VecDeque::new(),
            wanted: BTreeMap::new(),
            given_back: Vec::new(),
            requests: 0,
            gave_up: false,
            out: Actions::default(),
        };
        world.restart();
        world
    }

    /// Whether the step at hand is computed to its end.
    pub(crate) fn answer(&mut self, raises: bool) -> bool {
        let Some(delta) = self.sent.pop_front() else { return false };
        let leads = self.leads();
        let worker = self.worker.as_mut().expect("steps are sent to a live worker");
        let decodes = self.decodes.remove(&delta.step).expect("it was planned");
        let outcome = worker.run(&delta, (self.step_ns)(&delta, decodes));
        match outcome {
            Ok(_) if raises => {
                worker.lose_mirror();
                self.sent.clear();
                self.event(Event::StepsLost { raised: Some(delta.step), bad_host_blocks: Vec::new() });
            }
            Ok(result) => {
                if leads {
                    assert_eq!(
                        self.first_stage.fed.remove(&delta.step).as_deref(),
                        Some(worker.fed()),
                        "step {}",
                        delta.step
                    );
                    if !result.tokens.is_empty() {
                        self.first_stage.sampled.push_back(result.tokens.clone());
                    }
                }
                self.event(Event::StepDone(result));
            }
            Err(StepFailure::Poison) => self.crash(),
            Err(StepFailure::Gap(_)) => {
                assert!(self.losses > 0, "the worker lost the order of steps by itself");
                self.losses -= 1;
                // What is in flight behind it is passed over.
                assert!(self.sent.iter().all(|delta| self.worker.as_ref().unwrap().passes_over(delta)));
                self.sent.clear();
                self.event(Event::StepsLost { raised: None, bad_host_blocks: Vec::new() });
            }
            Err(StepFailure::BadHostBlocks(bad_host_blocks)) => {
                assert!(self.flips > 0, "the host's memory does not hold what it should");
                self.flips -= bad_host_blocks.len() as u32;
                self.sent.clear();
                self.event(Event::StepsLost { raised: None, bad_host_blocks });
            }
        }
        true
    }

    /// The worker forgets what runs, or never gets a step.
    pub(crate) fn lose(&mut self, mirror: bool) {
        if mirror {
            self.worker.as_mut().expect("it lives").lose_mirror();
            self.losses += 1;
        } else if self.sent.len() > 1 {
            self.sent.remove(self.sent.len() - 2);
            self.losses += 1;
        }
    }

    /// A bit flips in the host's memory.
    pub(crate) fn flip(&mut self, place: usize) {
        let flipped = u32::from(self.worker.as_mut().expect("it lives").host_mut().flip(place));
        self.flips += flipped;
        self.disk_harms += flipped;
    }

    /// A bit flips on the disk.
    pub(crate) fn flip_disk(&mut self, place: usize) {
        self.disk_harms += u32::from(self.worker.as_mut().expect("it lives").disk_mut().flip(place));
    }

    /// Transfers to and from the disk end, and the replica hears of it.
    pub(crate) fn transfer(&mut self, most: usize) -> bool {
        let worker = self.worker.as_mut().expect("it lives");
        for _ in 0..most {
            worker.end_transfer();
        }
        let report = worker.disk_mut().report(self.epoch, 1_000);
        let ended = report.is_some();
        if let Some(report) = report {
            assert!(report.waits == 0 || self.gave_up, "copies waited for the disk though nothing was given up");
            self.event(Event::DiskDone(report));
            let bad = self.replica.cache_counters().bad_disk_blocks;
            assert!(bad == 0 || self.disk_harms > 0, "{bad} blocks were read that nobody had written");
        }
        ended
    }

    /// The node is another process, when nothing runs: it finds the disk and what is kept beside it. Its device has room
    /// for so many blocks, or for all that are planned.
    pub(crate) fn restart_node(&mut self, total_blocks: Option<u32>) {
        self.finish_all();
        let limits = self.replica.limits().clone();
        let worker = self.worker.take().expect("there is always one");
        let (_, disk, torn) = worker.leave(None);
        self.disk_harms += u32::from(torn);
        self.book.cut(usize::MAX);
        let replica = Replica::new(limits.clone(), [9; 32], Box::new(FirstComeFirstServed)).unwrap();
        let replica = replica.with_max_admission_bytes(self.max_admission_bytes).with_pace(self.pace);
        self.replica = replica.with_disk(self.book.incarnation, self.book.records());
        if let Some(total) = total_blocks {
            assert!(self.replica.on_event(Time(0), Event::FewerBlocks(total), &mut self.out), "{total} blocks");
        }
        (self.host, self.disk) = (Some(HostMemory::new(limits.host_blocks, 1)), Some(disk));
        self.sent.clear();
        self.restart();
    }

    /// The node is to end, and saves for so long.
    pub(crate) fn drain(&mut self, max_saving: Duration) {
        let deadline = Time(60_000_000);
        self.event(Event::Drain { deadline, max_saving });
    }

    /// The host's memory is another one from the next worker on.
    pub(crate) fn lose_host(&mut self) {
        self.crash_with(|host| HostMemory::new(host.blocks(), host.incarnation() + 1));
    }

    /// As if frames were this small.
    pub(crate) fn with_max_admission_bytes(mut self, bytes: u64) -> Self {
        self.max_admission_bytes = bytes;
        self.replica = self.replica.with_max_admission_bytes(bytes);
        self
    }

    /// Prefill is bounded in time.
    pub(crate) fn with_pace(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self.replica = self.replica.with_pace(pace);
        self
    }

    fn restart(&mut self) {
        self.epoch = self.epoch.next();
        let host = self.host.take().expect("the worker before left it");
        let host_memory = host.incarnation();
        let disk = self.disk.take().expect("the worker before left it");
        let disk_files = disk.incarnation();
        let worker = HashWorker::new(self.replica.limits(), self.epoch).killed_by(self.deadly);
        self.worker = Some(worker.with_host(host, self.copy_ns).with_disk(disk));
        self.first_stage = FirstStage::new(self.replica.limits(), self.epoch);
        self.event(Event::WorkerUp { epoch: self.epoch, host_memory, disk_files });
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.gave_up |= matches!(event, Event::StepsLost { .. });
        assert!(self.replica.on_event(Time(0), event, &mut self.out), "a result fits its step");
        self.collect();
    }

    /// Checks every token against the model and every ending against its rules.
    fn collect(&mut self) {
        let vocabulary = self.replica.limits().vocabulary;
        for (front, outputs) in self.out.outputs.iter().enumerate() {
            for row in 0..outputs.requests.len() {
                let key = SequenceKey {
                    front: FrontId(front as u32),
                    request: outputs.requests[row],
                    attempt: outputs.attempts[row],
                };
                let wanted = self.wanted.get_mut(&key).expect("outputs belong to a submission");
                assert_eq!(wanted.ended, None, "a token after the end of {key:?}");
                let submission = &wanted.submission;
                assert_eq!(outputs.indexes[row] as usize, submission.emitted_tokens() as usize + wanted.emitted.len());
                let ids: Vec<Token> = submission.context.iter().chain(&wanted.emitted).copied().collect();
                let sampling = &submission.sampling;
                assert_eq!(outputs.tokens[row], hash_token(&ids, sampling.seed, sampling.choice, vocabulary));
                wanted.emitted.push(outputs.tokens[row]);
            }
            for &(row, cached) in &outputs.cached {
                let (request, attempt) = (outputs.requests[row as usize], outputs.attempts[row as usize]);
                let wanted = self.wanted.get_mut(&SequenceKey { front: FrontId(front as u32), request, attempt });
                let wanted = wanted.expect("a row belongs to a submission");
                assert_eq!(outputs.indexes[row as usize], 0, "told with an answer's first token");
                assert!((1..=wanted.submission.prompt_tokens).contains(&cached));
                assert_eq!(wanted.cached.replace(cached), None, "told once");
            }
            for finished in &outputs.finished {
                let key =
                    SequenceKey { front: FrontId(front as u32), request: finished.request, attempt: finished.attempt };
                let wanted = self.wanted.get_mut(&key).expect("an ending belongs to a submission");
                assert_eq!(wanted.ended.replace(finished.reason), None, "a second end of {key:?}");
                let output = wanted.submission.emitted_tokens() as usize + wanted.emitted.len();
                assert_eq!(finished.output_tokens as usize, output);
                let stopped = wanted.emitted.last().is_some_and(|&token| token == EOS);
                match finished.reason {
                    FinishReason::Stop => assert!(stopped),
                    FinishReason::Length => assert_eq!(output, wanted.submission.sampling.max_tokens as usize),
                    FinishReason::Aborted | FinishReason::Poisoned => {}
                    other => panic!("an unexpected end: {other:?}"),
                }
            }
        }
        for &(key, reason) in &self.out.give_back {
            let wanted = self.wanted.remove(&key).expect("given back once");
            self.given_back.push((wanted.submission, reason));
        }
        self.out.clear();
        self.book.note(self.replica.take_index_changes());
        self.replica.check();
    }

    /// Takes an attempt that was given back elsewhere.
    pub(crate) fn take_over(&mut self, submission: Submission) {
        let wanted = Wanted { submission: submission.clone(), emitted: Vec::new(), cached: None, ended: None };
        self.wanted.insert(submission.key, wanted);
        self.event(Event::Submit(Box::new(submission)));
    }

    pub(crate) fn submit(&mut self, front: u32, prompt: Vec<Token>, max_tokens: u32, class: Class) {
        self.requests += 1;
        let key = SequenceKey { front: FrontId(front), request: RequestId(self.requests), attempt: Attempt(1) };
        let sampling = Sampling { seed: u64::from(front), max_tokens, ..Sampling::default() };
        let prompt_tokens = prompt.len() as u32;
        let submission = Submission {
            key,
            namespace: [1; 32],
            class,
            context: prompt,
            prompt_tokens,
            sampling,
            deadline: None,
            suspect: false,
        };
        self.take_over(submission);
    }

    pub(crate) fn plan(&mut self) -> bool {
        // Upper bounds: some of them may have had their last row.
        let before: Vec<u32> =
            (0..self.replica.limits().groups).map(|group| self.replica.decoding(GroupId(group))).collect();
        let planned = self.replica.plan(&mut self.out);
        if let Some(delta) = self.out.execute.take() {
            let bytes = |admission: &Admission| {
                admission_bytes(admission.context.len() as u32, admission.blocks.len() as u32, &admission.sampling)
            };
            let total: u64 = delta.admit.iter().map(bytes).sum();
            assert!(total <= self.max_admission_bytes || delta.admit.len() == 1, "{total} bytes are admitted at once");
            if self.leads() {
                self.first_stage.expand(&delta);
            }
            let decoding = if delta.decodes { before[delta.group.index()] } else { 0 };
            self.decodes.insert(delta.step, decoding);
            self.sent.push_back(delta);
        }
        self.collect();
        planned
    }

    /// Decoding rows of a step in flight.
    pub(crate) fn decodes_of(&self, delta: &Delta) -> u32 {
        self.decodes[&delta.step]
    }

    /// Whether there is a pipeline.
    fn leads(&self) -> bool {
        self.replica.limits().groups > 1
    }

    pub(crate) fn complete(&mut self) -> bool {
        self.answer(false)
    }

    pub(crate) fn crash(&mut self) {
        self.crash_with(|host| host);
    }

    fn crash_with(&mut self, between: impl FnOnce(HostMemory) -> HostMemory) {
        let at_work = self.sent.front().cloned();
        self.sent.clear();
        let worker = self.worker.take().expect("there is always one");
        let (host, disk, torn) = worker.leave(at_work.as_ref());
        self.disk_harms += u32::from(torn);
        (self.host, self.disk) = (Some(between(host)), Some(disk));
        self.event(Event::WorkerDown);
        self.restart();
    }

    pub(crate) fn finish_all(&mut self) {
        for _ in 0..20_000 {
            let planned = self.plan();
            let completed = self.complete();
            let ended = self.transfer(1);
            self.replica.housekeeping(4);
            if !planned && !completed && !ended {
                break;
            }
        }
        assert!(self.replica.is_idle(), "everything ends: {:?}", self.replica.load());
        let load = self.replica.load();
        assert_eq!(load.free_blocks, load.total_blocks, "all blocks are free after the last request");
        for (key, wanted) in &self.wanted {
            assert!(wanted.ended.is_some(), "{key:?} never ended");
        }
    }
}
