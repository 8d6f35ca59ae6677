//! What a node process leaves at its place: its disk, what is kept beside it, and what it said of it if its end was orderly.
//! The next process there is held to that: every content that could be found is found again, or was counted as not saved.
//! O(contents) per start. Decides nothing.

use crate::disk_memory::{DiskBook, DiskMemory};
use llmscale_blocks::ContentId;
use llmscale_scheduler::Replica;
use std::collections::BTreeSet;

/// See the file's header.
#[derive(Debug)]
pub(crate) struct LeftDisk {
    pub(crate) disk: DiskMemory,
    pub(crate) book: DiskBook,
    pub(crate) saved: Saved,
}

impl LeftDisk {
    /// A new disk, of which nobody has said anything.
    pub(crate) fn new(disk: DiskMemory) -> Self {
        Self { disk, book: DiskBook::default(), saved: Saved::default() }
    }
}

/// What a drain has come to; nothing for an end without one.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    /// Contents that could be found when it was decided what is saved.
    pub(crate) whole: Vec<ContentId>,
    /// How many of them it says that the next process will not find.
    pub(crate) unsaved: u64,
}

impl Saved {
    /// The next process has started with what the disk and the book hold.
    pub(crate) fn check(&self, replica: &Replica) {
        let found: BTreeSet<ContentId> = replica.whole_contents().into_iter().collect();
        let missing = self.whole.iter().filter(|&id| !found.contains(id)).count() as u64;
        let (whole, unsaved) = (self.whole.len(), self.unsaved);
        assert!(missing <= unsaved, "{missing} of {whole} blocks are gone, the drain had counted {unsaved}");
    }
}
