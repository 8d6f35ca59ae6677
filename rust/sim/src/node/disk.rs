//! A simulated node's disk: when its worker's transfers end, and what the node process leaves of it. A copy of what a live
//! worker says and of what a file system keeps; O(1) per transfer. Decides nothing.

use super::NodeProcess;
use crate::around::Around;
use crate::happening::WorkerTurn;
use crate::left_disk::LeftDisk;
use crate::worker::open;
use llmscale_types::Epoch;

impl NodeProcess {
    pub(super) fn transfer_done(&mut self, epoch: Epoch, around: &mut Around) {
        let Some(worker) = self.worker.as_mut().filter(|worker| worker.epoch == epoch && worker.alive) else { return };
        if let Some(frame) = worker.end_transfer(around) {
            self.heard.push(open(&frame, &around.codec));
        }
        self.begin_transfer(epoch, around);
    }

    pub(super) fn begin_transfer(&mut self, epoch: Epoch, around: &mut Around) {
        if let Some(span) = self.worker.as_mut().and_then(|worker| worker.begin_transfer(around)) {
            self.plan_worker(around, epoch, WorkerTurn::TransferDone, span);
        }
    }

    /// What outlives the process: its disk, and what of the last changes was written beside it. An orderly end writes all.
    pub(crate) fn leave_disk(mut self, around: &mut Around) {
        let saved = self.saved(around);
        let mut disk = self.disk.take();
        if let Some(worker) = self.worker.take() {
            let (_, left, torn) = worker.leave();
            around.coverage.add("disk_torn", u64::from(torn));
            disk = Some(left);
        }
        let written = around.added_below(4) as usize;
        let lost = self.book.cut(if saved.is_some() { usize::MAX } else { written });
        around.coverage.add("disk_records_lost", lost as u64);
        let mut disk = disk.expect("the worker has it, or the node");
        disk.full = false;
        around.disks[self.place] = Some(LeftDisk { disk, book: self.book, saved: saved.unwrap_or_default() });
    }
}
