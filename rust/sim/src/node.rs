//! A simulated node process: the production replica in a copy of the live driver's loop (receive, complete, execute,
//! deliver), with frames from the simulated network, a simulated worker and a supervisor that replaces dead ones. One
//! round costs what the frames in it cost. Knows nothing of what tokens ought to be.

mod answer;
mod deliver;
mod disk;
mod drain;
mod worker_life;

use crate::around::Around;
use crate::disk_memory::{DiskBook, DiskMemory};
use crate::faults::Fault;
use crate::happening::{Happening, WorkerTurn};
use crate::host_memory::HostMemory;
use crate::left_disk::LeftDisk;
use crate::network::Peer;
use crate::peers::{PROBE, Peers};
use crate::versions;
use crate::worker::{Condition, Ending, Lapse, WorkerProcess, open};
use llmscale_blocks::ContentId;
use llmscale_scheduler::{Actions, Event, FirstComeFirstServed, Pace, Replica};
use llmscale_types::{
    Attempt, Class, Duration, Epoch, HostBlockId, NodeId, RequestId, Sampling, SequenceKey, StepId, StepResult,
    Submission, Time,
};
use llmscale_wire::{Failed, FromWorker, NodeState, VersionRange};
use std::collections::VecDeque;

/// How often fronts are told how the node is doing.
const STATUS_INTERVAL: Duration = Duration::from_millis(250);
/// Fronts that are served at once; more than one per front, as lost connections keep their number for a while.
const MAX_FRONTS: u32 = 16;

/// A step that the worker has been sent.
#[derive(Debug)]
struct Sent {
    step: StepId,
    at: Time,
}

/// An order to the node's thread.
#[derive(Clone, Copy, Debug)]
enum Command {
    Worker(Epoch, WorkerTurn),
    Drain { max_drain: Duration, max_saving: Duration },
}

/// How far a node process has come since it started.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Grown {
    /// It has had no worker, so it knows not how it will compute and welcomes nobody.
    Bare,
    /// A worker was ready.
    HadWorker,
    /// A first step has run.
    HasRun,
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct NodeProcess {
    pub(crate) place: usize,
    pub(crate) node: NodeId,
    pub(crate) replica: Replica,
    pub(crate) worker: Option<WorkerProcess>,
    /// It stands still.
    pub(crate) paused: bool,
    pub(crate) state: NodeState,
    /// What this process speaks.
    spoken: VersionRange,
    peers: Peers,
    inbox: VecDeque<(Peer, Vec<u8>)>,
    commands: VecDeque<Command>,
    drain_ordered: bool,
    epoch: Epoch,
    /// The latest worker from which it took what it ran before it was dead.
    given_up: Option<Epoch>,
    worker_restarts: u32,
    heard: Vec<FromWorker>,
    results: Vec<StepResult>,
    sent: VecDeque<Sent>,
    /// Steps that had been completed when this worker gave up its steps for the last time.
    last_reset: Option<u64>,
    /// It refuses and loses things until then.
    errs_until: Time,
    grown: Grown,
    next_status: Time,
    next_caches: Time,
    next_round: Option<Time>,
    /// The host tier's memory while no worker has it.
    host: Option<HostMemory>,
    /// And its disk, with what is kept beside it.
    disk: Option<DiskMemory>,
    book: DiskBook,
    /// While it drains: contents that can be found, until it is decided what is saved.
    whole: Vec<ContentId>,
    out: Actions,
}

/// Keys the names of prefixes in the whole simulated fleet.
pub(crate) const SECRET: [u8; 32] = [7; 32];

impl NodeProcess {
    /// A process that has just started, and so has its first worker.
    pub(crate) fn start(place: usize, node: NodeId, around: &mut Around) -> Self {
        let replica = Replica::new(around.mix.engine.clone(), SECRET, Box::new(FirstComeFirstServed));
        let mut replica = replica
            .expect("a mix draws sizes that fit together")
            .with_max_admission_bytes(around.mix.max_admission_bytes)
            .with_pace(Pace::of(around.mix.step_target));
        let left = around.disks[place].take();
        let LeftDisk { disk, book, saved } = left.unwrap_or_else(|| LeftDisk::new(around.new_disk()));
        // Prompts are short here, so every block has a name.
        replica.name_prefixes_every(around.mix.engine.block_tokens);
        let records = book.records();
        around.coverage.add("disk_recalled", records.len() as u64);
        let replica = replica.with_disk(book.incarnation, records);
        saved.check(&replica);
        let mut process = Self {
            place,
            node,
            replica,
            worker: None,
            paused: false,
            state: NodeState::Starting,
            spoken: versions::spoken_by_a_new_process(around),
            peers: Peers::new(MAX_FRONTS, around.mix.max_front_silence),
            inbox: VecDeque::new(),
            commands: VecDeque::new(),
            drain_ordered: false,
            epoch: Epoch(0),
            given_up: None,
            worker_restarts: 0,
            heard: Vec::new(),
            results: Vec::new(),
            sent: VecDeque::new(),
            last_reset: None,
            errs_until: Time(0),
            grown: Grown::Bare,
            next_status: around.now(),
            next_caches: around.now(),
            next_round: None,
            host: Some(HostMemory::new(around.mix.engine.host_blocks, 1)),
            disk: Some(disk),
            book,
            whole: Vec::new(),
            out: Actions::default(),
        };
        process.plan_worker(around, Epoch(1), WorkerTurn::Started, Duration(1_000));
        process.wake(around, Duration(0));
        process
    }

    /// A frame has arrived.
    pub(crate) fn hear(&mut self, peer: Peer, bytes: Vec<u8>, around: &mut Around) {
        self.inbox.push_back((peer, bytes));
        let wait = around.random.span(1, 200);
        self.wake(around, wait);
    }

    /// A result of a dead worker comes through after all.
    pub(crate) fn hear_late_result(&mut self, frame: &[u8], around: &mut Around) {
        self.heard.push(open(frame, &around.codec));
        self.wake(around, Duration(0));
    }

    /// Something happens to the worker. `Started` and `Buried` are the supervisor's; the node learns of them in its next
    /// round, and of a worker that is ready or has a result as well.
    pub(crate) fn worker_turn(&mut self, epoch: Epoch, turn: WorkerTurn, around: &mut Around) {
        match turn {
            WorkerTurn::StepDone => self.step_done(epoch, around),
            WorkerTurn::TransferDone => self.transfer_done(epoch, around),
            WorkerTurn::Buried => {
                self.commands.push_back(Command::Worker(epoch, turn));
                let wait = around.random.span(5_000, 100_000);
                self.plan_worker(around, epoch.next(), WorkerTurn::Started, wait);
            }
            WorkerTurn::Started | WorkerTurn::Ready => {
                self.commands.push_back(Command::Worker(epoch, turn));
            }
        }
        self.wake(around, Duration(20));
    }

    /// Something goes wrong in the worker, which lives on.
    pub(crate) fn let_lapse(&mut self, lapse: Lapse) {
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.takes_steps()) {
            worker.lapse = Some(lapse);
        }
    }

    /// It loses tokens on their way out and refuses what it should take, until then.
    pub(crate) fn err_until(&mut self, until: Time) {
        self.errs_until = until;
    }

    fn step_done(&mut self, epoch: Epoch, around: &mut Around) {
        let Some(worker) = self.worker.as_mut().filter(|worker| worker.epoch == epoch && worker.alive) else { return };
        if worker.condition == Condition::Hung {
            return;
        }
        let (ending, next) = worker.finish(around);
        if matches!(ending, Ending::Said(_)) {
            self.begin_transfer(epoch, around);
        }
        match ending {
            Ending::Said(frame) => {
                let message = open(&frame, &around.codec);
                let is_result = matches!(message, FromWorker::Result(_));
                self.heard.push(message);
                if let Some(span) = next {
                    self.plan_worker(around, epoch, WorkerTurn::StepDone, span);
                }
                if is_result && around.mix.has(Fault::LateResult) && around.random.chance(30) {
                    let wait = around.random.span(50_000, 800_000);
                    let late = Happening::LateResult { place: self.place, node: self.node, bytes: frame };
                    around.agenda.after(wait, late);
                }
            }
            Ending::PassedOver => {
                if let Some(span) = next {
                    self.plan_worker(around, epoch, WorkerTurn::StepDone, span);
                }
            }
            Ending::Died => {
                around.reach("worker_deadly_token", [self.place as u64, self.node.0, epoch.0, 0]);
                self.kill_worker(around, false);
            }
        }
    }

    fn plan_worker(&self, around: &mut Around, epoch: Epoch, turn: WorkerTurn, wait: Duration) {
        around.agenda.after(wait, Happening::Worker { place: self.place, node: self.node, epoch, turn });
    }

    /// Plans a round unless there is an earlier one.
    pub(crate) fn wake(&mut self, around: &mut Around, wait: Duration) {
        let at = around.now() + wait;
        if !self.paused && self.next_round.is_none_or(|next| at < next) {
            self.next_round = Some(at);
            around.agenda.at(at, Happening::Round { place: self.place, node: self.node });
        }
    }

    /// The whole engine, once, if this is the round that is due.
    pub(crate) fn round(&mut self, around: &mut Around) {
        if self.paused || self.next_round != Some(around.now()) {
            return;
        }
        self.next_round = None;
        self.give_up_failed_worker(around);
        self.obey(around);
        self.read_fronts(around);
        self.read_worker(around);
        self.watch_time(around);
        self.complete(around.now());
        self.note_whole();
        self.execute(around);
        self.deliver(around);
        self.book.note(self.replica.take_index_changes());
        let gives_up = self.worker.as_ref().is_some_and(|worker| worker.failed && self.given_up != Some(worker.epoch));
        let busy = self.replica.housekeeping(8) || gives_up;
        let deadline = self.replica.next_deadline().unwrap_or(self.next_status).min(self.next_status);
        let wait = if busy { Duration(10) } else { deadline.since(around.now()).max(Duration(1)) };
        self.wake(around, wait);
    }

    /// Goes on after a pause.
    pub(crate) fn resume(&mut self, around: &mut Around) {
        self.paused = false;
        self.next_round = None;
        self.wake(around, Duration(0));
    }

    /// It takes work, and nothing of any request is left in it. One that was told to drain has to end instead.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.state == NodeState::Ready && self.replica.is_idle() && !self.drain_ordered
    }

    fn event(&mut self, now: Time, event: Event) {
        assert!(self.replica.on_event(now, event, &mut self.out), "a result does not fit its step");
    }

    fn obey(&mut self, around: &mut Around) {
        let now = around.now();
        while let Some(command) = self.commands.pop_front() {
            match command {
                Command::Drain { max_drain, max_saving } => {
                    self.drain_ordered = true;
                    self.state = NodeState::Draining;
                    self.event(now, Event::Drain { deadline: now + max_drain, max_saving });
                    self.next_status = now;
                }
                Command::Worker(epoch, WorkerTurn::Started) => self.take_worker(epoch, around),
                Command::Worker(epoch, WorkerTurn::Ready) => self.worker_ready(epoch, now),
                Command::Worker(epoch, WorkerTurn::Buried) => self.bury_worker(epoch, around),
                Command::Worker(_, WorkerTurn::StepDone | WorkerTurn::TransferDone) => {
                    unreachable!("a worker says so itself")
                }
            }
        }
    }

    fn watch_time(&mut self, around: &mut Around) {
        let now = around.now();
        self.event(now, Event::Tick);
        if self.results.is_empty() && self.sent.front().is_some_and(|sent| now.since(sent.at) > around.mix.max_step) {
            around.reach("worker_hung", [self.place as u64, self.node.0, self.epoch.0, 0]);
            self.fail_worker(around, true);
        }
        for front in self.peers.silent(now) {
            around.reach("front_silent_for_node", [self.place as u64, u64::from(front.0), 0, 0]);
            self.event(now, Event::FrontGone(front));
        }
    }

    fn read_worker(&mut self, around: &mut Around) {
        for message in std::mem::take(&mut self.heard) {
            match message {
                FromWorker::Result(result) => self.results.push(result),
                FromWorker::Disk(report) => self.event(around.now(), Event::DiskDone(report)),
                FromWorker::NeedSnapshot(need) => self.reset_worker(None, need.bad_host_blocks, around),
                FromWorker::Failed(Failed { step: Some(step), .. }) => {
                    self.reset_worker(Some(step), Vec::new(), around);
                }
                other => panic!("a simulated worker says {other:?}"),
            }
        }
    }

    /// The worker gave up its steps in flight and lives. Twice without a step between means that it never will do one,
    /// unless host blocks were bad: those are not asked for again.
    fn reset_worker(&mut self, raised: Option<StepId>, bad_host_blocks: Vec<HostBlockId>, around: &mut Around) {
        let now = around.now();
        // What it finished before counts.
        self.complete(now);
        let Some(worker) = self.worker.as_ref().filter(|worker| !worker.failed) else { return };
        let ordinary = worker.failed_ordinarily || raised.is_none();
        let steps = self.replica.counters().steps;
        if bad_host_blocks.is_empty() && self.last_reset.replace(steps) == Some(steps) {
            around.reach("worker_condemned", [self.place as u64, self.node.0, self.epoch.0, 0]);
            return self.fail_worker(around, ordinary);
        }
        if raised.is_some() {
            around.deaths.push((self.place, ordinary));
        }
        self.sent.clear();
        self.event(now, Event::StepsLost { raised, bad_host_blocks });
    }

    fn complete(&mut self, now: Time) {
        for result in std::mem::take(&mut self.results) {
            if self.sent.pop_front_if(|sent| sent.step == result.step).is_some() {
                self.sent.front_mut().into_iter().for_each(|next| next.at = next.at.max(now));
            }
            self.event(now, Event::StepDone(result));
        }
    }

    fn execute(&mut self, around: &mut Around) {
        while self.worker.as_ref().is_some_and(WorkerProcess::takes_steps) && self.replica.plan(&mut self.out) {
            let delta = self.out.execute.take().expect("a planned step has a delta");
            self.sent.push_back(Sent { step: delta.step, at: around.now() });
            let worker = self.worker.as_mut().expect("it was just looked at");
            let epoch = worker.epoch;
            if let Some(span) = worker.receive(delta, around) {
                self.plan_worker(around, epoch, WorkerTurn::StepDone, span);
            }
        }
    }
}

/// The node's own first request: one token in, one token out, so that "ready" means that a step has run.
fn probe(epoch: Epoch) -> Submission {
    Submission {
        key: SequenceKey { front: PROBE, request: RequestId(epoch.0), attempt: Attempt(1) },
        namespace: [0; 32],
        class: Class::Interactive,
        context: vec![0],
        prompt_tokens: 1,
        sampling: Sampling { temperature: 0.0, max_tokens: 1, ignore_eos: true, ..Sampling::default() },
        deadline: None,
        suspect: false,
    }
}
