//! What a simulated node tells its fronts: one frame of outputs each, attempts handed back, and every so often how it is
//! doing. Asserts on the way out that the incarnations in its frames never go back.

use super::{Grown, NodeProcess, STATUS_INTERVAL};
use crate::around::Around;
use crate::peers::PROBE;
use llmscale_scheduler::{Event, GiveBack, KvWord};
use llmscale_types::{Duration, FinishReason, FrontId, Outputs, Refusal};
use llmscale_wire::{self as wire, FromNode, KvChanges, KvSnapshot, NodeOutputs, NodeState, Status};

/// How often fronts hear of changes in the prefix cache while steps run.
const CACHES_INTERVAL: Duration = Duration::from_millis(20);
/// Of a thousand frames about the cache, this many are lost.
const LOST_CACHES: u64 = 100;

impl NodeProcess {
    pub(super) fn deliver(&mut self, around: &mut Around) {
        self.deliver_outputs(around);
        self.deliver_returns(around);
        self.deliver_caches(around);
        self.deliver_status(around);
        self.out.clear();
    }

    fn deliver_outputs(&mut self, around: &mut Around) {
        let now = around.now();
        for index in 0..self.out.outputs.len() {
            if self.out.outputs[index].is_empty() {
                continue;
            }
            let front = FrontId(index as u32);
            let mut outputs = std::mem::take(&mut self.out.outputs[index]);
            if front == PROBE {
                let ran = outputs.finished.iter().any(|finished| finished.reason == FinishReason::Length);
                if ran && self.grown < Grown::HasRun {
                    self.grown = Grown::HasRun;
                    // An order to drain may have come before the first step was done.
                    if self.state == NodeState::Starting {
                        self.state = NodeState::Ready;
                    }
                    self.next_status = now;
                }
                continue;
            }
            self.lose_a_row(&mut outputs, around);
            let (rows, ends) = (outputs.requests.len() as u64, outputs.finished.len() as u64);
            let frame = FromNode::Outputs(NodeOutputs { node: self.node, epoch: self.epoch, outputs });
            around.note("node sends outputs", [self.place as u64, index as u64, rows, ends]);
            self.hand_over(front, &frame, around);
        }
    }

    /// What a node that errs does to a frame now and then.
    fn lose_a_row(&self, outputs: &mut Outputs, around: &mut Around) {
        let rows = outputs.requests.len() as u64;
        if around.now() >= self.errs_until || rows == 0 || !around.random.chance(150) {
            return;
        }
        assert!(outputs.logprobs.is_empty(), "they name rows, and nobody asks for them here");
        let row = around.random.below(rows) as usize;
        outputs.requests.remove(row);
        outputs.attempts.remove(row);
        outputs.indexes.remove(row);
        outputs.tokens.remove(row);
        outputs.cached.retain_mut(|(named, _)| {
            let lost = *named as usize == row;
            *named -= u32::from(*named as usize > row);
            !lost
        });
        around.reach("node_lost_a_row", [self.place as u64, self.node.0, rows, row as u64]);
    }

    fn hand_over(&mut self, front: FrontId, frame: &FromNode, around: &mut Around) {
        if !self.tell(front, frame, around) {
            // It is gone: its next connection starts over and is told everything.
            self.event(around.now(), Event::FrontGone(front));
        }
    }

    fn deliver_returns(&mut self, around: &mut Around) {
        for (key, GiveBack { refusal, suspect }) in std::mem::take(&mut self.out.give_back) {
            if suspect {
                around.coverage.reach("suspect_given_back");
            }
            if matches!(refusal, Some(Refusal::QueueFull { .. })) {
                around.coverage.reach("replica_queue_full");
            }
            let give_back = wire::GiveBack {
                node: self.node,
                epoch: self.epoch,
                request: key.request,
                attempt: key.attempt,
                refusal,
                suspect,
            };
            around.note("node gives back", [self.place as u64, u64::from(key.front.0), key.request.0, 0]);
            if key.front != PROBE {
                self.hand_over(key.front, &FromNode::GiveBack(give_back), around);
            }
        }
    }

    fn deliver_caches(&mut self, around: &mut Around) {
        let now = around.now();
        if now < self.next_caches && !self.sent.is_empty() {
            return;
        }
        self.next_caches = now + CACHES_INTERVAL;
        self.replica.tell_caches(&mut self.out);
        let (node, epoch) = (self.node, self.epoch);
        for (front, word) in std::mem::take(&mut self.out.kv) {
            let frame = match word {
                KvWord::Changes { number, events } => {
                    around.coverage.reach("caches_changed");
                    FromNode::KvChanges(KvChanges::depart(node, epoch, number, &events))
                }
                KvWord::Snapshot { number, keys } => {
                    around.coverage.add("caches_told_at_once", u64::from(!keys.is_empty()));
                    FromNode::KvSnapshot(KvSnapshot { node, epoch, number, keys })
                }
            };
            // A front that reads slowly has no room for more, and such frames are then dropped.
            if around.random.chance(LOST_CACHES) {
                around.coverage.reach("caches_lost");
            } else {
                self.tell(front, &frame, around);
            }
        }
    }

    fn deliver_status(&mut self, around: &mut Around) {
        let now = around.now();
        if now < self.next_status {
            return;
        }
        self.next_status = now + STATUS_INTERVAL;
        let status = self.status();
        for front in self.peers.all() {
            self.tell(front, &FromNode::Status(status), around);
        }
    }

    pub(super) fn status(&self) -> Status {
        let (load, counters, cache) = (self.replica.load(), self.replica.counters(), self.replica.cache_counters());
        Status {
            node: self.node,
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
            worker_pid: None,
            step_ns: 0,
            stage_wait_ns: 0,
            kv_changes: self.replica.kv_changes(),
            disk_written_blocks: cache.disk_written_blocks,
            disk_read_blocks: cache.disk_read_blocks,
            bad_disk_blocks: cache.bad_disk_blocks,
            failed_disk_writes: cache.failed_disk_writes,
            disk_waits: cache.disk_waits,
            lost_disk_records: 0,
            predicted_step_ns: counters.predicted_step_ns,
            step_error_ns: counters.step_error_ns,
            paced_steps: counters.paced_steps,
        }
    }
}
