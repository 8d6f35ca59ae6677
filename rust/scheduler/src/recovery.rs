//! A dead worker is a preemption by recompute: KV memory is gone, every sequence goes back to the queue with its tokens.
//! So is a living one that gave up its steps, because it lost their order or one of them raised; its memory is whole, so
//! what completed steps have computed is found again in the prefix cache, and the next delta is a snapshot.
//! The sequences of the step that died or raised are suspects: each runs alone until its whole context has gone through
//! the model once more. A suspect that is alone in a second such step is the culprit and ends as poisoned, so one request
//! takes down at most two workers and its neighbours lose only time.

use crate::event::{Actions, request_key};
use crate::replica::{At, Flight, Replica};
use crate::sequences::Phase;
use llmscale_types::{Delta, EngineLimits, Epoch, FinishReason, HostBlockId, Planted, SequenceKey, Slot, StepId};
use std::collections::BTreeSet;

impl Replica {
    /// The first worker has room for fewer blocks than were planned.
    /// Nothing can have been allocated yet. False if they are too few for the longest sequence: then nothing changes.
    #[must_use]
    pub(crate) fn fewer_blocks(&mut self, total_blocks: u32) -> bool {
        assert!(self.last_epoch.is_none(), "a worker has had the blocks that were planned");
        let limits = EngineLimits { total_blocks, ..self.limits.clone() };
        if total_blocks > self.limits.total_blocks || limits.check().is_err() {
            return false;
        }
        self.blocks.shrink(total_blocks);
        self.limits = limits;
        true
    }

    /// A fresh worker group takes over. Its device's memory is empty, its host memory may be the last one's.
    pub(crate) fn worker_up(&mut self, epoch: Epoch, host_memory: u64, disk_files: u64) {
        assert!(self.epoch.is_none(), "a second worker group came up while the first was alive");
        assert!(self.last_epoch.is_none_or(|last| epoch > last), "epoch {epoch} is not newer than the last one");
        if self.host_memory.replace(host_memory) != Some(host_memory) {
            self.blocks.clear_host();
        }
        self.disk_up(disk_files);
        self.epoch = Some(epoch);
        self.last_epoch = Some(epoch);
    }

    /// The worker group is dead. Results of its epoch that still arrive are stale.
    pub(crate) fn worker_down(&mut self, out: &mut Actions) {
        if self.epoch.take().is_none() {
            return;
        }
        self.counters.worker_losses += 1;
        let (suspects, preempted) = (self.rows_at_work(), self.preempted_at_work());
        let occupied: Vec<Slot> = self.sequences.occupied().collect();
        self.void_disk();
        if Planted::KeepsCacheOfDeadWorker.is_here() {
            for &slot in &occupied {
                self.release_blocks(slot);
            }
        } else {
            for &slot in &occupied {
                self.give_up_restores(slot);
                self.sequences.cold[slot.index()].table.clear();
            }
            self.blocks.reset();
        }
        self.take_back(&occupied, &suspects, out);
        self.accuse(&preempted);
        self.give_up_saving();
    }

    /// The worker group gave up its steps in flight and waits for a snapshot. Results of these steps that still arrive
    /// are stale, because step numbers only rise. Returns false if the step that raised is not the one that it was at.
    #[must_use]
    pub(crate) fn steps_lost(
        &mut self,
        raised: Option<StepId>,
        bad_host_blocks: &[HostBlockId],
        out: &mut Actions,
    ) -> bool {
        if self.epoch.is_none() {
            return true;
        }
        let oldest = self.flights.front().map(|flight| flight.step);
        if raised.is_some() && raised != oldest {
            return false;
        }
        self.counters.steps_lost += self.flights.len() as u64;
        let (suspects, preempted) =
            if raised.is_some() { (self.rows_at_work(), self.preempted_at_work()) } else { Default::default() };
        let occupied: Vec<Slot> = self.sequences.occupied().collect();
        for &slot in &occupied {
            // Rows of the lost steps lie behind what counts as computed, so full blocks hold what completed steps wrote.
            self.release_blocks(slot);
        }
        self.void_disk();
        self.take_back(&occupied, &suspects, out);
        self.accuse(&preempted);
        self.blocks.host_blocks_are_bad(bad_host_blocks);
        self.save_again();
        true
    }

    /// Nothing runs any more: every sequence goes back to the queue, unless it is a suspect for the second time.
    fn take_back(&mut self, occupied: &[Slot], suspects: &BTreeSet<Slot>, out: &mut Actions) {
        if !Planted::NewWorkerGetsNoSnapshot.is_here() {
            self.base = Delta::NOTHING;
        }
        for flight in self.flights.drain(..) {
            if !Planted::BelievesInLostCopies.is_here() {
                self.blocks.forget_host_blocks(flight.offloaded);
            }
        }
        self.groups.clear();
        self.running.clear();
        self.pending_leave.clear();
        self.leave_after_step.clear();
        self.unregistered.clear();
        self.prefill_backlog = 0;
        for &slot in occupied {
            let mut record = self.sequences.vacate(slot);
            if suspects.contains(&slot) && !Planted::ForgetsSuspects.is_here() {
                if record.suspect || Planted::ConvictsAtOnce.is_here() {
                    self.counters.poisoned += 1;
                    self.conclude(&record, FinishReason::Poisoned, out);
                    continue;
                }
                record.suspect = true;
            }
            self.wait_again(record);
        }
    }

    /// Slots with a row in a step that the worker was computing: it works in order, so only the oldest can be it, and
    /// every result that it sent before its end has been read. The stages of a pipeline are at work on all steps at once.
    ///
    /// Whether it had begun that step cannot be known: a step that was sent to a worker that had just died looks like one
    /// that killed it, and its innocent sequences run alone once. Only a message at the beginning of a step would tell them
    /// apart, and every step of every worker would pay for it, to save a slower step after some deaths. An innocent
    /// sequence is convicted only if the next worker, too, dies while it is alone in flight. A step that raises is named.
    fn rows_at_work(&self) -> BTreeSet<Slot> {
        let at_work = if self.groups.is_one() { 1 } else { self.flights.len() };
        self.flights.iter().take(at_work).flat_map(|flight| self.rows_of(flight)).collect()
    }

    /// Sequences whose chunks were in those steps and that were preempted since: one killed a worker, was not suspected,
    /// and killed two more.
    fn preempted_at_work(&self) -> Vec<SequenceKey> {
        let at_work = if self.groups.is_one() { 1 } else { self.flights.len() };
        self.flights.iter().take(at_work).flat_map(|flight| flight.preempted.iter().copied()).collect()
    }

    /// Makes suspects of what waits, if it still does.
    fn accuse(&mut self, keys: &[SequenceKey]) {
        if Planted::ForgetsSuspects.is_here() {
            return;
        }
        for &key in keys {
            let Some(location) = self.places.get(&request_key(key)).filter(|location| location.attempt == key.attempt)
            else {
                continue;
            };
            let At::Queue(place) = location.at else { unreachable!("everything was just taken back") };
            let mut record = self.queue.remove(place).expect("its place was looked up");
            record.suspect = true;
            self.wait_again(record);
        }
    }

    fn rows_of(&self, flight: &Flight) -> BTreeSet<Slot> {
        let owns = |slot: Slot| {
            let hot = &self.sequences.hot[slot.index()];
            hot.phase != Phase::Free && hot.admitted_step <= flight.step.0
        };
        let mut slots: BTreeSet<Slot> =
            flight.chunks.iter().map(|chunk| chunk.slot).filter(|&slot| owns(slot)).collect();
        if let Some(round) = flight.decodes {
            for slot in self.sequences.occupied().filter(|&slot| owns(slot)) {
                let phase = self.sequences.hot[slot.index()].phase;
                let cold = &self.sequences.cold[slot.index()];
                let joined = cold.group == flight.group && cold.joined_tokens > 0 && cold.joined_round <= round;
                if phase != Phase::Prefill && joined {
                    slots.insert(slot);
                }
            }
        }
        slots
    }
}
