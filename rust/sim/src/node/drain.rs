//! A simulated node that is to end: how long it may take, and what it has to answer for when it has. Nothing is left out of
//! what is cached but what is counted. O(contents) per round while it drains. Decides nothing.

use super::{Command, NodeProcess};
use crate::around::Around;
use crate::left_disk::Saved;
use llmscale_types::Duration;
use llmscale_wire::NodeState;

impl NodeProcess {
    /// An operator wants the node emptied.
    pub(crate) fn drain(&mut self, around: &mut Around) {
        // Often too short for everything, sometimes for anything.
        let spans = [0, 20_000, 300_000, 5_000_000].map(Duration);
        let mut draw = || spans[around.added_below(4) as usize];
        let (max_saving, max_drain) = (draw(), draw().max(draw()));
        self.commands.push_back(Command::Drain { max_drain, max_saving });
        self.wake(around, Duration(0));
    }

    /// Nothing runs any more after an order to drain.
    pub(crate) fn is_drained(&self) -> bool {
        self.state == NodeState::Draining && self.replica.drained().is_some()
    }

    /// Until it is decided what a drain saves, everything that can be found is what it has to answer for.
    pub(super) fn note_whole(&mut self) {
        if self.drain_ordered && self.replica.drained().is_none() && !self.replica.is_saving() {
            self.whole = self.replica.whole_contents();
        }
    }

    /// What a drain has come to. One that was not cut short leaves nothing out that the disk has room for.
    pub(super) fn saved(&mut self, around: &mut Around) -> Option<Saved> {
        let drained = self.replica.drained()?;
        let disk_blocks = self.replica.limits().disk_blocks;
        if disk_blocks == 0 {
            return Some(Saved::default());
        }
        around.coverage.add("drain_saved_blocks", drained.saved_blocks);
        around.coverage.add("drain_cut_short", u64::from(drained.cut_short));
        around.coverage.add("drain_left_blocks", drained.unsaved_blocks);
        if self.whole.is_empty() {
            // Its worker died, and with it what was counted.
            self.whole = self.replica.whole_contents();
        }
        let whole = std::mem::take(&mut self.whole);
        let most = (whole.len() as u64).saturating_sub(u64::from(disk_blocks));
        let failed = self.replica.cache_counters().failed_disk_writes;
        let left = drained.unsaved_blocks;
        assert!(
            drained.cut_short || failed > 0 || left <= most,
            "a drain left {left} of {} blocks on a disk of {disk_blocks}",
            whole.len()
        );
        Some(Saved { whole, unsaved: left })
    }
}
