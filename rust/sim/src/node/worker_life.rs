//! How workers of a simulated node come and go: started and buried by a supervisor, condemned by the node, killed by faults.
//! A copy of what the live node does about it; decides nothing that the live one does not.

use super::{Grown, NodeProcess, probe};
use crate::around::Around;
use crate::faults::Fault;
use crate::happening::WorkerTurn;
use crate::host_memory::HostMemory;
use crate::worker::WorkerProcess;
use llmscale_scheduler::Event;
use llmscale_types::{Duration, Epoch, Time};
use llmscale_wire::NodeState;

impl NodeProcess {
    /// The worker process dies, by an ordinary fault or by what it computed. The supervisor sees it a little later.
    pub(crate) fn kill_worker(&mut self, around: &mut Around, ordinary: bool) -> bool {
        let Some(worker) = self.worker.as_mut().filter(|worker| worker.alive) else { return false };
        worker.alive = false;
        worker.failed_ordinarily = ordinary;
        let (epoch, failed) = (worker.epoch, worker.failed);
        let mut wait = around.random.span(500, 20_000);
        if failed && around.added_below(4) == 0 {
            // As one that the kernel holds.
            around.reach("worker_lingered", [self.place as u64, self.node.0, epoch.0, 0]);
            wait = Duration(2_000_000);
        }
        self.plan_worker(around, epoch, WorkerTurn::Buried, wait);
        true
    }

    pub(super) fn take_worker(&mut self, epoch: Epoch, around: &mut Around) {
        assert!(epoch > self.epoch, "epoch {epoch} comes after {}", self.epoch);
        self.epoch = epoch;
        let mut host = self.host.take().expect("the worker before left it");
        if around.mix.has(Fault::HostMemoryLost) && around.random.chance(400) {
            around.reach("host_memory_lost", [self.place as u64, self.node.0, epoch.0, 0]);
            host = HostMemory::new(around.mix.engine.host_blocks, host.incarnation() + 1);
        }
        let disk = self.disk.take().expect("the worker before left it");
        self.worker = Some(WorkerProcess::new(epoch, host, disk, around));
        let loading = around.random.span(5_000, 200_000);
        self.plan_worker(around, epoch, WorkerTurn::Ready, loading);
    }

    pub(super) fn worker_ready(&mut self, epoch: Epoch, now: Time) {
        let Some(worker) = self.worker.as_mut().filter(|worker| worker.epoch == epoch && worker.alive) else { return };
        worker.be_ready();
        let (host_memory, disk_files) = (worker.host_memory(), worker.disk_files());
        self.last_reset = None;
        self.grown = self.grown.max(Grown::HadWorker);
        self.event(now, Event::WorkerUp { epoch, host_memory, disk_files });
        if self.grown < Grown::HasRun {
            self.event(now, Event::Submit(Box::new(probe(epoch))));
        } else if self.state == NodeState::Recovering {
            self.state = NodeState::Ready;
        }
        self.next_status = now;
    }

    pub(super) fn bury_worker(&mut self, epoch: Epoch, around: &mut Around) {
        let now = around.now();
        let Some(worker) = self.worker.as_ref().filter(|worker| worker.epoch == epoch) else { return };
        if self.given_up != Some(epoch) {
            // Counted when the node learns of it: steps that were planned until then were sent to a dead worker.
            around.deaths.push((self.place, worker.failed_ordinarily));
        }
        // Steps that it had finished are no reason to suspect anybody.
        self.read_worker(around);
        self.complete(now);
        let (host, disk, torn) = self.worker.take().expect("it was just looked at").leave();
        around.coverage.add("disk_torn", u64::from(torn));
        (self.host, self.disk) = (Some(host), Some(disk));
        self.worker_restarts += 1;
        self.lose_worker(now);
    }

    /// What a failed worker ran does not wait for its death.
    pub(super) fn give_up_failed_worker(&mut self, around: &mut Around) {
        let Some(worker) = self.worker.as_ref().filter(|worker| worker.failed) else { return };
        if self.given_up.replace(worker.epoch) == Some(worker.epoch) {
            return;
        }
        around.deaths.push((self.place, worker.failed_ordinarily));
        self.lose_worker(around.now());
    }

    /// Changes nothing the second time.
    fn lose_worker(&mut self, now: Time) {
        self.sent.clear();
        if self.state == NodeState::Ready {
            self.state = NodeState::Recovering;
        }
        self.event(now, Event::WorkerDown);
        self.whole.clear();
        self.next_status = now;
    }

    /// The worker is of no use any more; the supervisor ends it.
    pub(super) fn fail_worker(&mut self, around: &mut Around, ordinary: bool) {
        if let Some(worker) = self.worker.as_mut().filter(|worker| !worker.failed) {
            worker.failed = true;
            self.kill_worker(around, ordinary);
        }
    }
}
