//! A dead worker is a preemption by recompute: KV memory is gone, every sequence goes back to the queue with its tokens.
//! The sequences of the step that was being computed are suspects: each runs alone until its whole context has gone
//! through the model once more. A suspect that is alone in a second crash is the culprit and ends as poisoned, so one
//! request takes down at most two workers and its neighbours lose only time.

use crate::event::Actions;
use crate::replica::Replica;
use crate::sequences::Phase;
use llmscale_types::{Epoch, FinishReason, Slot};
use std::collections::BTreeSet;

impl Replica {
    /// A fresh worker group with empty memory takes over.
    pub(crate) fn worker_up(&mut self, epoch: Epoch) {
        assert!(self.epoch.is_none(), "a second worker group came up while the first was alive");
        assert!(self.last_epoch.is_none_or(|last| epoch > last), "epoch {epoch} is not newer than the last one");
        self.epoch = Some(epoch);
        self.last_epoch = Some(epoch);
    }

    /// The worker group is dead. Results of its epoch that still arrive are stale.
    pub(crate) fn worker_down(&mut self, out: &mut Actions) {
        if self.epoch.take().is_none() {
            return;
        }
        self.counters.worker_losses += 1;
        let suspects = self.rows_of_oldest_flight();
        self.flights.clear();
        self.wheel.clear();
        self.endings.clear();
        self.prefilling.clear();
        self.running.clear();
        self.pending_leave.clear();
        self.leave_after_step.clear();
        self.unregistered.clear();
        self.blocks.reset();
        (self.round, self.decoding, self.decoding_tokens, self.prefill_backlog) = (0, 0, 0, 0);
        let occupied: Vec<Slot> = self.sequences.occupied().collect();
        for slot in occupied {
            self.sequences.cold[slot.index()].table.clear();
            let mut record = self.sequences.vacate(slot);
            if suspects.contains(&slot) {
                if record.suspect {
                    self.counters.poisoned += 1;
                    self.conclude(&record, FinishReason::Poisoned, out);
                    continue;
                }
                record.suspect = true;
            }
            self.wait_again(record);
        }
    }

    /// Slots with a row in the step that the worker was computing: it works in order, so only the oldest can be it.
    fn rows_of_oldest_flight(&self) -> BTreeSet<Slot> {
        let Some(flight) = self.flights.front() else { return BTreeSet::new() };
        let owns = |slot: Slot| {
            let hot = &self.sequences.hot[slot.index()];
            hot.phase != Phase::Free && hot.admitted_step <= flight.step.0
        };
        let mut slots: BTreeSet<Slot> =
            flight.chunks.iter().map(|chunk| chunk.slot).filter(|&slot| owns(slot)).collect();
        if let Some(round) = flight.decodes {
            for slot in self.sequences.occupied().filter(|&slot| owns(slot)) {
                let phase = self.sequences.hot[slot.index()].phase;
                let joined = self.sequences.cold[slot.index()].joined_round;
                if phase != Phase::Prefill && joined <= round && self.sequences.cold[slot.index()].joined_tokens > 0 {
                    slots.insert(slot);
                }
            }
        }
        slots
    }
}
