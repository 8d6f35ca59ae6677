//! What an orderly end does for the next process: contents that only the device and the host hold go to the disk, what was
//! used latest first and no child before its parent, as far as the disk has room. What is of the device goes through places
//! of the host whose own contents were written first, so nothing is lost on the way. O(blocks of all tiers) to begin and to
//! count, O(1) per block. Knows neither who copies nor how long there is.

use super::BlockStore;
use super::transfers::MAX_WRITES;
use crate::prefix::{Content, ContentId};
use llmscale_types::{BlockCopy, BlockId, CopyDirection, Delta, DiskBlockId, HostBlockId, Planted};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::VecDeque;

/// Where a content lies, on the lowest tier that has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Device(BlockId),
    Host(HostBlockId),
    Disk(DiskBlockId),
}

/// A content, and what comes before it.
#[derive(Clone, Copy, Debug)]
struct Held {
    parent: Option<ContentId>,
    place: Place,
}

/// See the file's header.
#[derive(Debug, Default)]
pub(super) struct Saves {
    /// What is to be written, in order. An entry counts if its place still holds it.
    due: VecDeque<(ContentId, Place)>,
    /// Contents that could be found when it began.
    whole: Option<u64>,
}

impl Saves {
    pub(super) fn has_begun(&self) -> bool {
        self.whole.is_some()
    }
}

impl BlockStore {
    /// Begins to save. No transfer may be under way and no step in flight.
    pub fn begin_saves(&mut self) {
        assert_eq!(self.transfers_under_way(), 0, "a transfer is under way while it is decided what is saved");
        let held = self.held_by_name();
        let mut order = self.by_worth(&held);
        self.saves.whole = Some(order.len() as u64);
        order.truncate(self.disk.total() as usize);
        for &(_, place) in order.iter().rev() {
            if let Place::Disk(disk) = place
                && !Planted::SavesOverWhatItKeeps.is_here()
            {
                self.disk.touch(disk);
            }
        }
        // Places of the host that contents of the device go through give up what they hold: that is written first.
        let passed: FxHashSet<HostBlockId> = self.host.oldest().take(self.most_saves() as usize).collect();
        let is_passed = |place: &Place| matches!(place, Place::Host(host) if passed.contains(host));
        order.retain(|(_, place)| !matches!(place, Place::Disk(_)));
        let (first, then): (Vec<_>, Vec<_>) = order.into_iter().partition(|(_, place)| is_passed(place));
        self.saves.due = first.into_iter().chain(then).collect();
        self.transfers.refused = false;
    }

    /// Has as many of the next contents saved as may be under way.
    pub fn plan_saves(&mut self) {
        while self.transfers.writes < self.most_saves() && self.copies.len() < Delta::MAX_COPIES {
            let Some((id, place)) = self.saves.due.pop_front() else { return };
            if !self.save(id, place) {
                self.saves.due.push_front((id, place));
                return;
            }
        }
    }

    /// Whether nothing is left to save, or under way.
    pub fn has_saved(&self) -> bool {
        let ended = self.transfers_under_way() == 0 || Planted::EndsBeforeItHasSaved.is_here();
        self.saves.due.is_empty() && ended
    }

    /// Contents that could be found when saving began, or can be now if it did not, and that the next process will not find.
    pub fn unsaved(&self) -> u64 {
        let whole = self.saves.whole.unwrap_or_else(|| self.whole_contents().len() as u64);
        let mut on_disk: FxHashMap<ContentId, Held> = FxHashMap::default();
        self.note_disk(&mut on_disk);
        let mut seen = FxHashMap::default();
        let kept = on_disk.keys().filter(|&&id| whole_chain(&on_disk, &mut seen, id, |_| {})).count();
        whole.saturating_sub(kept as u64)
    }

    /// The device's memory is gone, and with it what was to be saved of it.
    pub fn forget_saves(&mut self) {
        self.saves = Saves::default();
    }

    /// Contents that can be found from the beginning of their chain on, on whatever tiers. O(blocks).
    pub fn whole_contents(&self) -> Vec<ContentId> {
        self.by_worth(&self.held_by_name()).into_iter().map(|(id, _)| id).collect()
    }

    /// Half of the host at most is pinned by what goes through it.
    fn most_saves(&self) -> u32 {
        MAX_WRITES.min(self.host.total() / 2).max(1)
    }

    /// False if every place that it could go to is pinned.
    fn save(&mut self, id: ContentId, place: Place) -> bool {
        let host = match place {
            Place::Disk(_) => unreachable!("what is on the disk is not saved again"),
            Place::Host(host) => self.host.held(host).filter(|(content, _)| content.id == id).map(|_| host),
            Place::Device(block) => {
                let Some((content, ids)) = self.prefix.reachable(block).filter(|(content, _)| content.id == id) else {
                    return true;
                };
                let (content, ids) = (content.clone(), ids.to_vec());
                let tag = content.tag();
                let Some((host, lost)) = self.host.take_in(content, &ids) else { return false };
                self.copies.push(BlockCopy { direction: CopyDirection::Offload, block, host, tag });
                self.counters.offloaded_blocks += 1;
                self.say_lost(lost);
                Some(host)
            }
        };
        // What its place holds no more was given up for something else.
        host.is_none_or(|host| self.begin_write(host))
    }

    /// Every content that can be found on some tier, by name.
    fn held_by_name(&self) -> FxHashMap<ContentId, Held> {
        let mut held = FxHashMap::default();
        for (block, content) in self.prefix.reachable_blocks() {
            note(&mut held, content, Place::Device(block));
        }
        for (block, content) in self.host.prefix.reachable_blocks() {
            note(&mut held, content, Place::Host(HostBlockId(block.0)));
        }
        self.note_disk(&mut held);
        held
    }

    fn note_disk(&self, held: &mut FxHashMap<ContentId, Held>) {
        for (block, content) in self.disk.prefix.reachable_blocks() {
            note(held, content, Place::Disk(DiskBlockId(block.0)));
        }
    }

    /// Contents whose chain is whole: what was used latest on the device first, then on the host, then what is on the disk
    /// alone; and before each content what it builds on.
    fn by_worth(&self, held: &FxHashMap<ContentId, Held>) -> Vec<(ContentId, Place)> {
        let mut order = Vec::with_capacity(held.len());
        let mut seen = FxHashMap::default();
        let device = self.pool.youngest().filter_map(|block| self.prefix.reachable(block));
        let device = device.map(|(content, _)| content.id);
        let host = self.host.youngest().filter_map(|host| self.host.held(host)).map(|(content, _)| content.id);
        let mut others: Vec<ContentId> = held.keys().copied().collect();
        others.sort_unstable_by(|one, other| other.cmp(one));
        for id in device.chain(host).chain(others) {
            whole_chain(held, &mut seen, id, |id| order.push((id, held[&id].place)));
        }
        order
    }
}

/// A copy on a lower tier counts if it has the same parent: it could not be found behind another one.
fn note(held: &mut FxHashMap<ContentId, Held>, content: &Content, place: Place) {
    let known = held.entry(content.id).or_insert(Held { parent: content.parent, place });
    if known.parent == content.parent {
        known.place = place;
    }
}

/// Whether a content and all that it builds on are held. Hands those to `list` that were not asked for before, parents first.
fn whole_chain(
    held: &FxHashMap<ContentId, Held>,
    seen: &mut FxHashMap<ContentId, bool>,
    id: ContentId,
    mut list: impl FnMut(ContentId),
) -> bool {
    let (mut chain, mut next) = (Vec::new(), Some(id));
    let whole = loop {
        let Some(id) = next else { break true };
        if let Some(&known) = seen.get(&id) {
            break known;
        }
        let Some(one) = held.get(&id) else { break false };
        chain.push(id);
        next = one.parent;
    };
    for &id in chain.iter().rev() {
        seen.insert(id, whole);
        if whole {
            list(id);
        }
    }
    whole
}
