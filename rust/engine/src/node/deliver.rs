//! The fourth verb: one frame of outputs per front, attempts handed back, and every so often how the node is doing.

use super::Node;
use crate::disk_index::DiskIndex;
use crate::fronts::PROBE;
use crate::report::{NodeEvent, NodeReport};
use llmscale_scheduler::{Event, GiveBack, KvWord};
use llmscale_types::{Duration, FinishReason, FrontId};
use llmscale_wire::{self as wire, FromNode, KvChanges, KvSnapshot, NodeOutputs, NodeState, Status};

/// How often fronts hear of changes in the prefix cache while steps run: a tiny model makes 1,000 steps a second.
const CACHES_INTERVAL: Duration = Duration::from_millis(20);

impl Node {
    pub(super) fn deliver(&mut self) {
        self.deliver_outputs();
        self.deliver_returns();
        self.deliver_caches();
        self.deliver_status();
        self.note_disk();
        self.tell_drained();
        self.out.clear();
    }

    /// What the disk holds from now on is written beside it.
    fn note_disk(&mut self) {
        let changes = self.replica.take_index_changes();
        if let Some(index) = &self.disk_index {
            for change in changes {
                index.note(change);
            }
        }
    }

    fn deliver_outputs(&mut self) {
        for index in 0..self.out.outputs.len() {
            if self.out.outputs[index].is_empty() {
                continue;
            }
            let front = FrontId(index as u32);
            let outputs = std::mem::take(&mut self.out.outputs[index]);
            if front == PROBE {
                for finished in outputs.finished {
                    self.probed(finished.reason);
                }
                continue;
            }
            let frame = FromNode::Outputs(NodeOutputs { node: self.config.node, epoch: self.epoch, outputs });
            self.hand_over(front, &frame);
        }
    }

    /// The node's own first request has ended: the replica is ready, or its model is of no use.
    fn probed(&mut self, reason: FinishReason) {
        if self.has_run {
            return;
        }
        match reason {
            FinishReason::Length | FinishReason::Stop => {
                self.has_run = true;
                // A node that was told to drain meanwhile goes on draining.
                if self.state == NodeState::Starting {
                    self.state = NodeState::Ready;
                }
                self.board.notify(NodeEvent::Ready);
                self.next_status = self.clock.now();
            }
            // Nobody would try again: the node would start for ever.
            FinishReason::NotANumber | FinishReason::NothingToSample => {
                let message = format!("its first step ended with {}: the model's weights are broken", reason.label());
                self.fail_worker(self.epoch, message);
            }
            // By a drain, or with its worker, whose successor is probed in turn.
            FinishReason::Aborted | FinishReason::Deadline | FinishReason::Poisoned => {}
        }
    }

    /// Sends what a front must not miss. Returns false if the front is forgotten instead.
    pub(super) fn hand_over(&mut self, front: FrontId, frame: &FromNode) -> bool {
        let sent = self.fronts.send(&mut self.server, front, frame, &self.codec);
        if !sent {
            // It is gone, or so far behind that it can never catch up: it will start over and be told everything.
            self.dropped_frames += 1;
            // Its next frame is answered with "greet first", so it knows that its attempts here are gone.
            self.fronts.forget(front);
            let _ = self.replica.on_event(self.clock.now(), Event::FrontGone(front), &mut self.out);
        }
        sent
    }

    fn deliver_returns(&mut self) {
        for (key, GiveBack { refusal, suspect }) in std::mem::take(&mut self.out.give_back) {
            let give_back = wire::GiveBack {
                node: self.config.node,
                epoch: self.epoch,
                request: key.request,
                attempt: key.attempt,
                refusal,
                suspect,
            };
            // A probe that finds a full queue comes back: an earlier one waits there and does as well.
            if key.front != PROBE {
                self.hand_over(key.front, &FromNode::GiveBack(give_back));
            }
        }
    }

    /// Changes of a while go together. One that is lost on the way is missed with the next and asked for.
    fn deliver_caches(&mut self) {
        let now = self.clock.now();
        if now < self.next_caches && !self.sent.is_empty() {
            return;
        }
        self.next_caches = now + CACHES_INTERVAL;
        self.replica.tell_caches(&mut self.out);
        let (node, epoch) = (self.config.node, self.epoch);
        for (front, word) in std::mem::take(&mut self.out.kv) {
            let frame = match word {
                KvWord::Changes { number, events } => {
                    FromNode::KvChanges(KvChanges::depart(node, epoch, number, &events))
                }
                KvWord::Snapshot { number, keys } => FromNode::KvSnapshot(KvSnapshot { node, epoch, number, keys }),
            };
            self.tell(front, &frame);
        }
    }

    fn deliver_status(&mut self) {
        let now = self.clock.now();
        if now < self.next_status {
            return;
        }
        self.next_status = now + self.config.status_interval;
        let status = self.status();
        for front in self.fronts.all() {
            self.tell(front, &FromNode::Status(status));
        }
        let counters = self.replica.counters();
        self.board.publish(NodeReport {
            status,
            emitted_tokens: counters.emitted_tokens,
            prefill_tokens: counters.prefill_tokens,
            poisoned: counters.poisoned,
            dropped_frames: self.dropped_frames + counters.stale_results,
            fronts: self.fronts.len(),
        });
    }

    fn tell_drained(&mut self) {
        if let Some(drained) = self.replica.drained().filter(|_| !self.told_drained) {
            self.told_drained = true;
            self.board.notify(NodeEvent::Drained(drained));
        }
    }

    pub(super) fn status(&self) -> Status {
        let (load, counters, cache) = (self.replica.load(), self.replica.counters(), self.replica.cache_counters());
        Status {
            node: self.config.node,
            epoch: self.epoch,
            state: self.state,
            running: load.running,
            waiting: load.waiting,
            queued_tokens: load.waiting_tokens,
            predicted_backlog_ns: self.replica.predicted_backlog_ns(),
            free_blocks: load.free_blocks,
            steps: counters.steps,
            preemptions: counters.preemptions,
            prefix_queries: cache.queried_tokens,
            prefix_hits: cache.hit_tokens,
            offloaded_blocks: cache.offloaded_blocks,
            restored_blocks: cache.restored_blocks,
            bad_host_blocks: cache.bad_host_blocks,
            worker_restarts: self.worker_restarts,
            worker_pid: self.worker.as_ref().and_then(|worker| worker.pid),
            step_ns: self.step_ns,
            stage_wait_ns: self.stage_wait_ns,
            kv_changes: self.replica.kv_changes(),
            disk_written_blocks: cache.disk_written_blocks,
            disk_read_blocks: cache.disk_read_blocks,
            bad_disk_blocks: cache.bad_disk_blocks,
            failed_disk_writes: cache.failed_disk_writes,
            disk_waits: cache.disk_waits,
            predicted_step_ns: counters.predicted_step_ns,
            step_error_ns: counters.step_error_ns,
            paced_steps: counters.paced_steps,
            lost_disk_records: self.disk_index.as_ref().map_or(0, DiskIndex::lost_changes),
        }
    }
}
