//! What an orderly end saves, and what the next process finds of it.

use super::disk::{eight, fill_and_write};
use super::*;

impl World {
    /// Nothing runs any more: everything is saved that may be, so many transfers at a time.
    fn save(&mut self, at_a_time: usize) {
        let live = std::mem::take(&mut self.live);
        for table in live {
            self.store.release(&table);
        }
        while self.store.transfers_under_way() > 0 {
            self.copy();
            self.transfer(usize::MAX, true);
        }
        self.store.begin_saves();
        while !self.store.has_saved() {
            self.store.plan_saves();
            self.copy();
            self.transfer(at_a_time, true);
            self.check();
        }
    }

    fn whole(&self) -> BTreeSet<ContentId> {
        self.store.whole_contents().into_iter().collect()
    }
}

/// Two conversations that only the device has, and four that the host or the disk has.
fn three_tiers(disk_blocks: u32) -> World {
    let mut world = World::with_disk(4, 4, disk_blocks, 256);
    fill_and_write(&mut world, 1, 6);
    world
}

#[test]
fn what_only_the_device_and_the_host_held_is_found_by_the_next_process() {
    let mut world = three_tiers(16);
    let before = world.whole();
    assert_eq!(before.len(), 12, "six conversations of two blocks");
    world.save(3);
    assert_eq!((world.store.unsaved(), world.whole()), (0, before.clone()));
    world.restart();
    assert_eq!(world.whole(), before);
    for conversation in 1..7 {
        assert_eq!(world.read_ahead(1, &eight(conversation)), 2);
        let (table, found) = world.fill(1, &eight(conversation)).unwrap();
        assert_eq!(found, 2);
        world.store.release(&table);
    }
}

#[test]
fn a_disk_that_is_too_small_keeps_what_was_used_latest_and_no_child_without_its_parent() {
    let mut world = three_tiers(5);
    let before = world.whole().len() as u64;
    world.save(1);
    assert_eq!(world.store.unsaved(), before - 5);
    world.restart();
    let reads: Vec<usize> = (1..7).map(|conversation| world.disk_run(1, &eight(conversation)).len()).collect();
    assert_eq!(reads, [0, 0, 0, 1, 2, 2]);
}

#[test]
fn what_was_not_written_in_time_is_counted() {
    let mut world = three_tiers(16);
    let before = world.whole().len() as u64;
    world.store.begin_saves();
    world.store.plan_saves();
    world.copy();
    world.transfer(1, true);
    let unsaved = world.store.unsaved();
    world.store.void_transfers();
    world.restart();
    assert_eq!(world.whole().len() as u64, before - unsaved);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever came before: as much is saved as the disk has room for, and exactly that is found.
    #[test]
    fn an_orderly_end_leaves_out_what_the_disk_has_no_room_for_and_nothing_else(
        blocks in 4_u32..24,
        host_blocks in 1_u32..8,
        disk_blocks in 1_u32..24,
        turns in prop::collection::vec(turn(), 1..60),
        at_a_time in 1_usize..9,
    ) {
        let mut world = World::with_disk(blocks, host_blocks, disk_blocks, 256);
        for turn in turns {
            world.take_turn(turn);
        }
        world.store.void_transfers();
        let whole = world.whole();
        world.save(at_a_time);
        let room = (whole.len()).min(disk_blocks as usize);
        prop_assert_eq!(world.store.unsaved() as usize, whole.len() - room);
        world.restart();
        let found = world.whole();
        prop_assert!(found.is_subset(&whole));
        prop_assert_eq!(found.len(), room);
    }
}
