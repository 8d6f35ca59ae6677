//! Processes and connections of a simulation as they come and go, and the faults that make them. Each draw comes from the
//! simulation's generator, so that a seed always breaks the same things at the same moments.

use super::Simulation;
use crate::faults::Fault;
use crate::front_host::{FrontHost, Presence};
use crate::happening::Happening;
use crate::left_disk::LeftDisk;
use crate::node::NodeProcess;
use crate::worker::{Condition, Lapse, WorkerProcess};
use llmscale_types::{Duration, NodeId};
use llmscale_wire::NodeState;

/// Blocks that a bit flips in at a time: of one alone, nobody asks for in hundreds of worlds.
const FLIPS: usize = 16;

impl Simulation {
    pub(super) fn link_up(&mut self, front: usize, place: usize) {
        let Some(process) = &self.nodes[place] else { return };
        if !self.around.network.is_up(front, place) && self.fronts[front].presence != Presence::Down {
            let (node, incarnation) = (process.node, self.fronts[front].incarnation);
            self.around.network.connect((front, incarnation), place, node);
            self.around.note("link up", [front as u64, place as u64, node.0, 0]);
            self.around.agenda.after(Duration(0), Happening::Look { front, regular: false });
        }
    }

    pub(super) fn break_link(&mut self, front: usize, place: usize) -> bool {
        let broken = self.around.network.disconnect(front, place);
        if broken {
            self.around.note("link down", [front as u64, place as u64, 0, 0]);
            self.around.agenda.after(Duration(0), Happening::Look { front, regular: false });
            let wait = self.around.random.span(1_000, 300_000);
            self.around.agenda.after(wait, Happening::LinkUp { front, place });
        }
        broken
    }

    pub(super) fn start_node(&mut self, place: usize) {
        self.started_nodes += 1;
        let node = NodeId(self.started_nodes);
        if self.started_nodes > self.nodes.len() as u64 {
            self.around.coverage.reach("node_restarted");
        }
        self.around.note("node starts", [place as u64, node.0, 0, 0]);
        self.nodes[place] = Some(NodeProcess::start(place, node, &mut self.around));
        if self.around.mix.has(Fault::NodeDrain) && self.around.random.chance(200) {
            // Before it has run its first step.
            let wait = self.around.random.span(1_000, 250_000);
            self.around.agenda.after(wait, Happening::NodeDrain { place, node });
        }
        for front in 0..self.fronts.len() {
            let wait = self.around.random.span(1_000, 100_000);
            self.around.agenda.after(wait, Happening::LinkUp { front, place });
        }
    }

    pub(super) fn stop_node(&mut self, place: usize) {
        self.count_replica(place);
        if let Some(process) = self.nodes[place].take() {
            process.leave_disk(&mut self.around);
            if self.around.mix.has(Fault::DiskLost) && self.around.random.chance(300) {
                self.around.reach("disk_lost", [place as u64, 0, 0, 0]);
                let book = self.around.disks[place].take().map(|left| left.book).unwrap_or_default();
                self.around.disks[place] = Some(LeftDisk { book, ..LeftDisk::new(self.around.new_disk()) });
            }
        }
        for front in 0..self.fronts.len() {
            self.break_link(front, place);
        }
        let wait = self.around.random.span(10_000, 400_000);
        self.around.agenda.after(wait, Happening::NodeStart { place });
    }

    pub(super) fn resume_front(&mut self, front: usize) {
        if self.fronts[front].presence == Presence::Paused {
            self.fronts[front].resume(&mut self.around);
            self.catch_up(front);
        }
    }

    pub(super) fn start_front(&mut self, front: usize) {
        if self.fronts[front].presence == Presence::Down {
            let incarnation = self.fronts[front].incarnation + 1;
            self.around.note("front starts", [front as u64, incarnation, 0, 0]);
            self.fronts[front] = FrontHost::start(front, incarnation, &mut self.around);
            for place in 0..self.nodes.len() {
                self.link_up(front, place);
            }
            self.catch_up(front);
        }
    }

    /// What clients did while the process was not there.
    fn catch_up(&mut self, front: usize) {
        for happening in std::mem::take(&mut self.deferred[front]) {
            self.carry_out(happening);
        }
    }

    /// The connections of a front process that has ended break.
    pub(super) fn front_gone(&mut self, front: usize) {
        for place in 0..self.nodes.len() {
            self.break_link(front, place);
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        let Some(&(_, mean)) = self.around.mix.faults.iter().find(|(on, _)| *on == fault) else { return };
        let wait = self.around.random.span(0, 2 * mean.0);
        self.around.agenda.after(wait, Happening::Fault(fault));
        let place = self.around.random.below(self.nodes.len() as u64) as usize;
        let front = self.around.random.below(self.fronts.len() as u64) as usize;
        let numbers = [place as u64, front as u64, 0, 0];
        match fault {
            Fault::ConnectionLoss => {
                if self.break_link(front, place) {
                    self.around.reach("connection_lost", numbers);
                }
            }
            Fault::FrontPause => self.pause_front(front),
            Fault::FrontRestart => self.stop_front(front),
            _ => self.fault_at(fault, place),
        }
    }

    /// Replaces the process whose turn it is, once the others are well, and plans the next turn.
    pub(super) fn upgrade(&mut self, turn: usize) {
        if self.healing {
            return;
        }
        let is_well = |node: &Option<NodeProcess>| node.as_ref().is_some_and(|node| node.state == NodeState::Ready);
        if !self.nodes.iter().all(is_well) {
            return self.around.agenda.after(Duration::from_millis(50), Happening::Upgrade { turn });
        }
        if turn < self.nodes.len() {
            self.fault_at(Fault::NodeDrain, turn);
        } else if turn < self.nodes.len() + self.fronts.len() {
            self.stop_front(turn - self.nodes.len());
        } else {
            return self.around.reach("upgrade_done", [turn as u64, 0, 0, 0]);
        }
        let wait = self.around.random.span(50_000, 500_000);
        self.around.agenda.after(wait, Happening::Upgrade { turn: turn + 1 });
    }

    fn pause_front(&mut self, front: usize) {
        if self.fronts[front].presence == Presence::Running {
            self.around.reach("front_paused", [front as u64, 0, 0, 0]);
            self.fronts[front].presence = Presence::Paused;
            let wait = self.around.mix.max_front_silence + self.around.random.span(300_000, 800_000);
            self.around.agenda.after(wait, Happening::FrontResume { front });
        }
    }

    fn stop_front(&mut self, front: usize) {
        if self.fronts[front].presence != Presence::Running {
            return;
        }
        let polite = self.around.random.chance(500);
        self.around.reach("front_stopped", [front as u64, u64::from(polite), 0, 0]);
        self.around.coverage.add("front_stopped_with_goodbye", u64::from(polite));
        self.check();
        self.fronts[front].stop(polite, &mut self.around);
        self.count_front(front);
        // A goodbye gets through: the socket lingers until it has.
        let linger = if polite { self.around.mix.max_delay } else { Duration(0) };
        self.around.agenda.after(linger, Happening::FrontGone { front });
        let wait = linger + self.around.random.span(1_000, 200_000);
        self.around.agenda.after(wait, Happening::FrontStart { front });
    }

    pub(super) fn fault_at(&mut self, fault: Fault, place: usize) {
        let Some(process) = &mut self.nodes[place] else { return };
        let (around, node) = (&mut self.around, process.node);
        let numbers = [place as u64, node.0, 0, 0];
        match fault {
            Fault::WorkerCrash => {
                if process.kill_worker(around, true) {
                    around.reach("worker_crashed", numbers);
                }
            }
            Fault::WorkerHang => {
                if let Some(worker) = process.worker.as_mut().filter(|worker| worker.takes_steps()) {
                    worker.condition = Condition::Hung;
                }
            }
            Fault::WorkerLosesSteps => {
                let lapse = if around.random.chance(500) { Lapse::DropsDelta } else { Lapse::LosesMirror };
                process.let_lapse(lapse);
            }
            Fault::StepRaises => process.let_lapse(Lapse::Raises),
            Fault::WorkerSlow => {
                let until = around.now() + around.random.span(100_000, 500_000);
                if let Some(worker) = &mut process.worker {
                    worker.slow_until = until;
                    around.reach("worker_slow", numbers);
                }
            }
            Fault::NodeCrash => {
                around.reach("node_crashed", numbers);
                self.stop_node(place);
            }
            Fault::NodePause => {
                if !process.paused {
                    around.reach("node_paused", numbers);
                    process.paused = true;
                    let wait = around.mix.max_node_silence + around.random.span(50_000, 900_000);
                    around.agenda.after(wait, Happening::NodeResume { place, node });
                }
            }
            Fault::NodeErrs => {
                process.err_until(around.now() + around.random.span(50_000, 400_000));
                around.reach("node_erred", numbers);
            }
            Fault::NodeDrain => {
                around.note("node is drained", numbers);
                process.drain(around);
                // Operators drain what is failing: what then comes back from the worker has to be finished all the same.
                if around.random.chance(300) {
                    process.kill_worker(around, true);
                }
            }
            Fault::HostBitFlips => {
                let block = around.random.below(64) as usize;
                let flips = |worker: &mut WorkerProcess| (0..FLIPS).filter(|_| worker.flip_host_bit(block)).count() > 0;
                if process.worker.as_mut().is_some_and(flips) {
                    around.reach("host_bit_flipped", numbers);
                }
            }
            Fault::DiskBitFlips => {
                let block = around.random.below(80) as usize;
                let flips = |worker: &mut WorkerProcess| (0..FLIPS).filter(|_| worker.flip_disk_bit(block)).count() > 0;
                if process.worker.as_mut().is_some_and(flips) {
                    around.reach("disk_bit_flipped", numbers);
                }
            }
            Fault::DiskFull => {
                let full = around.random.chance(500);
                if let Some(worker) = process.worker.as_mut() {
                    worker.fill_disk(full);
                    around.coverage.add("disk_full", u64::from(full));
                }
            }
            Fault::DiskLost
            | Fault::HostMemoryLost
            | Fault::LateResult
            | Fault::ConnectionLoss
            | Fault::FrontPause
            | Fault::FrontRestart => {}
        }
    }

    /// Adds the counts of a node process that ends.
    pub(super) fn count_replica(&mut self, place: usize) {
        let Some(process) = &self.nodes[place] else { return };
        let (counters, cache) = (process.replica.counters(), process.replica.cache_counters());
        for (name, count) in [
            ("replica_poisoned", counters.poisoned),
            ("replica_paced_steps", counters.paced_steps),
            ("replica_preemptions", counters.preemptions),
            ("replica_stale_results", counters.stale_results),
            ("replica_steps_lost", counters.steps_lost),
            ("replica_discarded_rows", counters.discarded_rows),
            ("replica_unknown_orders", counters.unknown_orders),
            ("replica_prefix_hits", cache.hit_tokens),
            ("replica_offloaded", cache.offloaded_blocks),
            ("replica_restored", cache.restored_blocks),
            ("replica_bad_host_blocks", cache.bad_host_blocks),
            ("replica_disk_written", cache.disk_written_blocks),
            ("replica_disk_read", cache.disk_read_blocks),
            ("replica_bad_disk_blocks", cache.bad_disk_blocks),
            ("replica_failed_disk_writes", cache.failed_disk_writes),
            ("replica_late_fetches", counters.late_fetches),
        ] {
            self.around.coverage.add(name, count);
        }
    }

    /// Adds the counts of a front process that ends.
    pub(super) fn count_front(&mut self, front: usize) {
        let host = &self.fronts[front];
        self.requests += host.ledger.len() as u64;
        self.tokens += host.ledger.tokens;
        self.first_tokens.extend(&host.ledger.first_tokens);
        let (counters, health) = (host.front.counters(), host.front.status(self.around.now()).health);
        for (name, count) in [
            ("front_expired", counters.expired),
            ("front_ejections", health.ejections),
            ("front_failed_probes", health.failed_probes),
            ("front_spared", health.spared),
            ("front_gaps", counters.gaps),
            ("front_given_back", counters.given_back),
            ("front_hedge_wins", counters.hedge_wins),
            ("front_hedges", counters.hedges),
            ("front_late", counters.late),
            ("front_lost_attempts", counters.lost_attempts),
            ("front_moved", counters.moved),
            ("front_numerics_changes", counters.numerics_changes),
            ("front_recalls", counters.recalls),
            ("front_retries", counters.retries),
            ("front_repeated_retries", counters.repeated_retries),
            ("front_retries_delayed", counters.retries_delayed),
            ("front_silences", counters.silences),
            ("front_slow_readers", counters.slow_readers),
            ("front_stale_frames", counters.stale_frames),
            ("front_stale_rows", counters.stale_rows),
        ] {
            self.around.coverage.add(name, count);
        }
    }
}
