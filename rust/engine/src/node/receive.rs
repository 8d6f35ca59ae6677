//! The first verb: waits for sockets, orders and time, and turns what arrived into events. Each source is drained up to a
//! bound per round, so that a flood from one peer delays nobody for longer than that.

use super::{Command, Node, Worker};
use crate::fronts::PROBE;
use crate::report::NodeEvent;
use llmscale_net::link::LinkError;
use llmscale_scheduler::Event;
use llmscale_types::{Attempt, Class, Epoch, HostBlockId, RequestId, Sampling, SequenceKey, StepId, Submission};
use llmscale_wire::{Failed, FromWorker, NeedSnapshot, NodeState, Ready, ToWorker, decode, encode};

/// Frames taken from one source per round.
pub(super) const MAX_FRAMES_PER_ROUND: usize = 256;
/// What a front that does not read can hold up a node that ends.
const MAX_LINGER: std::time::Duration = std::time::Duration::from_secs(1);

impl Node {
    /// Returns false when the thread is to end.
    pub(super) fn receive(&mut self) -> bool {
        self.give_up_failed_worker();
        self.wait();
        while let Ok(command) = self.commands.try_recv() {
            if !self.obey(command) {
                return false;
            }
        }
        self.read_fronts();
        self.read_worker();
        self.watch_time();
        true
    }

    /// Sleeps until something arrives; while a step could be planned or housekeeping is left, it only looks.
    fn wait(&mut self) {
        let busy = self.replica.housekeeping(8);
        let now = self.clock.now();
        let deadline = self.replica.next_deadline().unwrap_or(self.next_status).min(self.next_status);
        let patience = if busy { 0 } else { deadline.since(now).0 };
        let mut handles = vec![self.server.poll_handle()];
        handles.extend(self.worker.iter().flat_map(|worker| worker.link.poll_handles()));
        if let Err(error) = self.poller.wait(&handles, Some(patience)) {
            panic!("waiting for sockets failed: {error}");
        }
    }

    pub(super) fn event(&mut self, event: Event) -> bool {
        self.replica.on_event(self.clock.now(), event, &mut self.out)
    }

    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Stop => {
                self.say_goodbye();
                return false;
            }
            Command::Drain { max_drain, max_saving } => {
                self.state = NodeState::Draining;
                self.event(Event::Drain { deadline: self.clock.now() + max_drain, max_saving });
                self.next_status = self.clock.now();
            }
            Command::WorkerStarted { epoch, link, mut configure } => {
                self.epoch = epoch;
                if self.knows_numerics {
                    // What the first one had is all that any later one is asked for: memory may be free that was not.
                    configure.limits.total_blocks = self.config.limits.total_blocks;
                }
                let order = encode(&ToWorker::Configure(*configure), &self.codec);
                let order = order.expect("a configuration is within the codec's limits");
                self.worker = Some(Worker {
                    epoch,
                    link,
                    started: self.clock.now(),
                    configure: Some(order),
                    pid: None,
                    failed: false,
                    given_up: false,
                    steps_at_reset: None,
                });
            }
            Command::WorkerDied(epoch) => self.bury_worker(epoch),
        }
        true
    }

    fn say_goodbye(&mut self) {
        if let Some(worker) = &mut self.worker
            && let Ok(frame) = encode(&ToWorker::Stop, &self.codec)
            && worker.link.send(frame).is_err()
        {
            self.dropped_frames += 1;
        }
        // The last tokens of a drain may have been sent a moment ago.
        if let Err(error) = self.server.linger(MAX_LINGER) {
            panic!("setting how long a socket lingers failed: {error}");
        }
    }

    fn bury_worker(&mut self, epoch: Epoch) {
        if self.worker.as_ref().is_none_or(|worker| worker.epoch != epoch) {
            return;
        }
        // What it said before it died counts: a result left unread would make suspects of innocent sequences.
        self.read_worker();
        self.complete();
        self.worker = None;
        self.worker_restarts += 1;
        self.lose_worker();
    }

    /// A process may take long to die, one that the kernel holds for ever: what it ran does not wait for that. In the round
    /// after it failed, because it may fail in the middle of telling what the replica has done.
    fn give_up_failed_worker(&mut self) {
        let failed = self.worker.as_mut().filter(|worker| worker.failed);
        if failed.is_some_and(|worker| !std::mem::replace(&mut worker.given_up, true)) {
            self.lose_worker();
        }
    }

    /// What ran goes back to the queue and fronts hear that nothing runs. Changes nothing the second time.
    fn lose_worker(&mut self) {
        self.sent.clear();
        if self.state == NodeState::Ready {
            self.state = NodeState::Recovering;
        }
        self.event(Event::WorkerDown);
        self.next_status = self.clock.now();
    }

    fn read_worker(&mut self) {
        self.hear_frames();
        // After the frames, because a worker attaches by one: asked before them, the configuration waited for the next
        // status report, a quarter of a second of every stream's pause.
        let attached = self.worker.as_mut().filter(|worker| worker.link.is_attached());
        if let Some(order) = attached.and_then(|worker| worker.configure.take()) {
            self.send_to_worker(order);
        }
    }

    fn hear_frames(&mut self) {
        for _ in 0..MAX_FRAMES_PER_ROUND {
            let Some(worker) = &mut self.worker else { return };
            let epoch = worker.epoch;
            match worker.link.receive() {
                Ok(None) => return,
                Ok(Some(_)) if worker.failed => {}
                Ok(Some(frame)) => match decode::<FromWorker>(&frame, &self.codec) {
                    Ok(message) => self.hear_worker(epoch, message),
                    Err(error) => self.fail_worker(epoch, format!("it sent a frame that cannot be read: {error}")),
                },
                // A link that is down says so for ever; the process's death is reported by whoever started it.
                Err(LinkError::Down) => return self.fail_worker(epoch, "its link is down".to_owned()),
                Err(error) => return self.fail_worker(epoch, format!("its link broke: {error}")),
            }
        }
    }

    fn hear_worker(&mut self, epoch: Epoch, message: FromWorker) {
        match message {
            FromWorker::Ready(ready) => self.worker_ready(epoch, ready),
            FromWorker::Result(result) => self.results.push(result),
            FromWorker::Disk(report) => {
                self.event(Event::DiskDone(report));
            }
            FromWorker::NeedSnapshot(NeedSnapshot { step, bad_host_blocks, .. }) => {
                let why = match bad_host_blocks.len() {
                    0 => format!("it lost the order of steps at step {step}"),
                    bad => format!("{bad} host blocks of step {step} are bad"),
                };
                self.reset_worker(epoch, None, bad_host_blocks, why);
            }
            FromWorker::Failed(Failed { step: Some(step), message, .. }) => {
                self.reset_worker(epoch, Some(step), Vec::new(), format!("step {step} raised: {message}"));
            }
            FromWorker::Failed(failed) => self.fail_worker(epoch, failed.message),
        }
    }

    /// The worker gave up its steps in flight and lives: what runs is told anew, which costs no new process. Twice without
    /// a step between means that it never will do one, unless host blocks were bad: those are not asked for again.
    fn reset_worker(
        &mut self,
        epoch: Epoch,
        raised: Option<StepId>,
        bad_host_blocks: Vec<HostBlockId>,
        message: String,
    ) {
        // What it finished before counts.
        self.complete();
        let Some(worker) = self.worker.as_mut().filter(|worker| !worker.failed) else { return };
        let steps = self.replica.counters().steps;
        if bad_host_blocks.is_empty() && worker.steps_at_reset.replace(steps) == Some(steps) {
            return self.fail_worker(epoch, format!("{message}; it did not do a step since the last time"));
        }
        self.sent.clear();
        if self.event(Event::StepsLost { raised, bad_host_blocks }) {
            self.board.notify(NodeEvent::WorkerReset { epoch, message });
        } else {
            self.fail_worker(epoch, format!("{message}; that is not the step that it was at"));
        }
    }

    fn worker_ready(&mut self, epoch: Epoch, ready: Ready) {
        let Ready { pid, loading_ns, total_blocks, numerics, host_memory, disk_files, .. } = ready;
        if self.worker.as_ref().is_some_and(|worker| worker.pid.is_some()) {
            return self.fail_worker(epoch, "it said twice that it is ready".to_owned());
        }
        if self.knows_numerics && numerics != self.config.model.numerics {
            let before = &self.config.model.numerics;
            return self.fail_worker(epoch, format!("it computes as {numerics}, the ones before as {before}"));
        }
        let planned = self.config.limits.total_blocks;
        if total_blocks != planned {
            // Only the first may have fewer: tables of later ones name the blocks that it had.
            if self.knows_numerics || !self.event(Event::FewerBlocks(total_blocks)) {
                return self.fail_worker(epoch, format!("it has {total_blocks} blocks, {planned} were planned"));
            }
            self.config.limits.total_blocks = total_blocks;
        }
        self.config.model.numerics = numerics;
        self.knows_numerics = true;
        for (peer, hello) in std::mem::take(&mut self.early) {
            self.greet(peer, &hello, self.clock.now());
        }
        if let Some(worker) = &mut self.worker {
            worker.pid = Some(pid);
        }
        self.event(Event::WorkerUp { epoch, host_memory, disk_files });
        self.board.notify(NodeEvent::WorkerReady { epoch, pid, loading_ns });
        if !self.has_run {
            self.event(Event::Submit(Box::new(probe(epoch))));
        } else if self.state == NodeState::Recovering {
            self.state = NodeState::Ready;
        }
        self.next_status = self.clock.now();
    }

    /// The worker is of no use any more; the next round takes from it what it runs. Its process is ended by whoever
    /// started it, who then reports its death.
    pub(super) fn fail_worker(&mut self, epoch: Epoch, message: String) {
        if let Some(worker) = &mut self.worker
            && !worker.failed
        {
            worker.failed = true;
            self.board.notify(NodeEvent::WorkerFailed { epoch, message });
        }
    }

    /// A rank that cannot connect may live: nobody reports its death, and the others wait for it.
    fn watch_attachment(&mut self) {
        let Some(worker) = self.worker.as_ref().filter(|worker| worker.configure.is_some()) else { return };
        if self.clock.now().since(worker.started) > self.config.max_attach {
            let missing: Vec<String> = worker.link.missing().iter().map(|rank| format!("rank {rank}")).collect();
            let (epoch, seconds) = (worker.epoch, self.config.max_attach.0 / 1_000_000);
            let message = format!("{} did not connect to the engine within {seconds} s", missing.join(", "));
            self.fail_worker(epoch, message);
        }
    }

    fn watch_time(&mut self) {
        let now = self.clock.now();
        self.event(Event::Tick);
        // A result that was just read says that the worker is well, however long this thread had to wait for it.
        if let (Some(sent), Some(worker)) = (self.sent.front(), &self.worker)
            && self.results.is_empty()
            && now.since(sent.at) > self.config.max_step
        {
            let (epoch, step) = (worker.epoch, sent.step);
            let limit = self.config.max_step.0 / 1_000;
            self.fail_worker(epoch, format!("step {step} takes longer than {limit} ms (max_step)"));
        }
        self.watch_attachment();
        for front in self.fronts.silent(now) {
            self.event(Event::FrontGone(front));
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
