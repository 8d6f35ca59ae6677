//! What the ranks of a group say of their disks, as one word: a transfer has ended when it has at every rank, and has failed
//! if it did at any. O(ranks) per report, and O(log n) per failure of those that not all have come to. Knows nothing of
//! what is transferred.

use llmscale_types::DiskReport;
use std::collections::BTreeSet;

/// See the file's header.
#[derive(Debug)]
pub(crate) struct RankTransfers {
    /// By rank: up to which number its transfers have ended.
    through: Vec<u64>,
    /// Failures that were not told yet.
    failed: BTreeSet<u64>,
    /// Up to which number everything was told.
    told: u64,
    refused: bool,
    read_blocks: u32,
    read_ns: u64,
    waits: u32,
}

impl RankTransfers {
    pub(crate) fn new(ranks: usize) -> Self {
        let through = vec![0; ranks];
        Self { through, failed: BTreeSet::new(), told: 0, refused: false, read_blocks: 0, read_ns: 0, waits: 0 }
    }

    /// Takes a rank's report. Returns the group's, if there is anything to tell. Times are those of one rank, the leader.
    pub(crate) fn join(&mut self, rank: usize, leads: bool, report: DiskReport) -> Option<DiskReport> {
        self.through[rank] = self.through[rank].max(report.through);
        self.failed.extend(report.failed);
        self.refused |= report.refused;
        self.waits = self.waits.saturating_add(report.waits);
        if leads {
            self.read_blocks = self.read_blocks.saturating_add(report.read_blocks);
            self.read_ns = self.read_ns.saturating_add(report.read_ns);
        }
        let through = self.through.iter().copied().min().unwrap_or(0);
        if through <= self.told {
            return None;
        }
        self.told = through;
        let later = self.failed.split_off(&(through + 1));
        let failed = std::mem::replace(&mut self.failed, later).into_iter().collect();
        Some(DiskReport {
            epoch: report.epoch,
            through,
            failed,
            refused: std::mem::take(&mut self.refused),
            read_blocks: std::mem::take(&mut self.read_blocks),
            read_ns: std::mem::take(&mut self.read_ns),
            waits: std::mem::take(&mut self.waits),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_types::Epoch;

    fn report(through: u64, failed: &[u64]) -> DiskReport {
        let failed = failed.to_vec();
        DiskReport { epoch: Epoch(1), through, failed, refused: false, read_blocks: 1, read_ns: 5, waits: 1 }
    }

    #[test]
    fn a_transfer_has_ended_when_it_has_everywhere_and_failed_if_it_did_anywhere() {
        let mut group = RankTransfers::new(2);
        assert_eq!(group.join(0, true, report(5, &[2, 5])), None, "the other has not come to any");
        let first = group.join(1, false, report(3, &[3])).unwrap();
        assert_eq!((first.through, first.failed, first.read_blocks, first.waits), (3, vec![2, 3], 1, 2));
        assert_eq!(group.join(0, true, report(7, &[])), None);
        let second = group.join(1, false, report(7, &[])).unwrap();
        assert_eq!((second.through, second.failed, second.read_ns), (7, vec![5], 5));
    }
}
