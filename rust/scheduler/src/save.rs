//! The end of a drain: when nothing runs any more, what is cached on the device and the host goes to the disk for the next
//! process, in steps without rows, for a bounded time. A drain without a disk tier, without a worker, or of what is computed
//! faster than it is read back, saves nothing. O(1) per event beside what the block store does. Knows neither which contents
//! are worth most nor who writes them.

use crate::replica::Replica;
use llmscale_types::{Duration, Time};

/// An order to drain, as far as it has come.
#[derive(Debug)]
pub(crate) struct Drain {
    /// Nothing is saved any more from then on.
    deadline: Time,
    max_saving: Duration,
    /// The same, once it is known when saving began.
    until: Option<Time>,
    stage: Stage,
    /// Blocks that had been written before.
    written_before: u64,
    unsaved_blocks: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Something runs, or is under way.
    Waiting,
    Saving,
    /// It was given up.
    CutShort,
    Done,
}

/// What a drain has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drained {
    /// Blocks that it wrote.
    pub saved_blocks: u64,
    /// Blocks whose content the next process will not find.
    pub unsaved_blocks: u64,
    /// It was given up before everything was written that the disk has room for.
    pub cut_short: bool,
}

impl Replica {
    /// Saves until `deadline`, and for `max_saving` at most.
    pub(crate) fn begin_drain(&mut self, deadline: Time, max_saving: Duration) {
        if self.drain.is_some() {
            return;
        }
        let stage = if self.limits.disk_blocks == 0 { Stage::Done } else { Stage::Waiting };
        let written_before = self.blocks.counters().disk_written_blocks;
        self.drain = Some(Drain { deadline, max_saving, until: None, stage, written_before, unsaved_blocks: 0 });
    }

    /// What the drain has come to, when nothing runs any more and nothing is left to save.
    pub fn drained(&self) -> Option<Drained> {
        let drain = self.drain.as_ref().filter(|_| self.nothing_runs())?;
        let cut_short = match drain.stage {
            Stage::Waiting | Stage::Saving => return None,
            Stage::CutShort => true,
            Stage::Done => false,
        };
        let written = self.blocks.counters().disk_written_blocks;
        let (saved_blocks, unsaved_blocks) = (written - drain.written_before, drain.unsaved_blocks);
        Some(Drained { saved_blocks, unsaved_blocks, cut_short })
    }

    /// Whether it has been decided what is saved.
    pub fn is_saving(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| drain.stage == Stage::Saving)
    }

    /// Whether the drain waits for the disk.
    pub(crate) fn drain_waits(&self) -> bool {
        self.saving_deadline().is_some() && self.blocks.transfers_under_way() > 0
    }

    /// When saving is given up, if that is all that the drain waits for: what still runs may be cached yet, and is counted.
    pub(crate) fn saving_deadline(&self) -> Option<Time> {
        let drain = self.drain.as_ref().filter(|drain| matches!(drain.stage, Stage::Waiting | Stage::Saving))?;
        self.nothing_runs().then(|| drain.until.unwrap_or(drain.deadline))
    }

    /// Time has passed: what was to be saved is given up if it is over, or if there is no worker to do it.
    pub(crate) fn expire_saving(&mut self) {
        if self.saving_deadline().is_some_and(|until| until <= self.now || self.epoch.is_none()) {
            self.end_saving(Stage::CutShort);
        }
    }

    /// The worker is dead, and with it most of what was to be saved.
    pub(crate) fn give_up_saving(&mut self) {
        self.blocks.forget_saves();
        if self.is_saving() {
            self.end_saving(Stage::CutShort);
        }
    }

    /// Steps are lost: what they were to save is looked for anew.
    pub(crate) fn save_again(&mut self) {
        if let Some(drain) = self.drain.as_mut().filter(|drain| drain.stage == Stage::Saving) {
            drain.stage = Stage::Waiting;
        }
    }

    /// What the next step saves, while a drain has nothing else to do.
    pub(crate) fn plan_saves(&mut self) {
        if !self.begin_saving() {
            return;
        }
        if self.blocks.disk_refuses() {
            return self.end_saving(Stage::CutShort);
        }
        self.blocks.plan_saves();
        if self.blocks.has_saved() {
            self.end_saving(Stage::Done);
        }
    }

    /// Whether something may be saved now. The first time, with nothing in flight, it is decided what.
    fn begin_saving(&mut self) -> bool {
        if self.is_saving() {
            return true;
        }
        let Some(deadline) = self.saving_deadline().filter(|_| self.flights.is_empty()) else { return false };
        self.settle_fetches();
        if self.blocks.transfers_under_way() > 0 {
            return false;
        }
        if !self.writing_pays() || deadline <= self.now {
            self.end_saving(Stage::CutShort);
            return false;
        }
        self.blocks.begin_saves();
        let now = self.now;
        let drain = self.drain.as_mut().expect("it has a deadline");
        drain.until.get_or_insert(deadline.min(now + drain.max_saving));
        drain.stage = Stage::Saving;
        true
    }

    fn end_saving(&mut self, stage: Stage) {
        if self.saving_deadline().is_none() {
            return;
        }
        let unsaved_blocks = self.blocks.unsaved();
        let drain = self.drain.as_mut().expect("it has a deadline");
        (drain.stage, drain.unsaved_blocks) = (stage, unsaved_blocks);
    }

    /// Whether no sequence is here.
    fn nothing_runs(&self) -> bool {
        self.queue.len() == 0 && self.sequences.running() == 0
    }
}
