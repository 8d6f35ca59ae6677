//! What goes to the disk and comes back, case by case, in the world of the tests above.

use super::*;

impl World {
    /// What continues the chain on the disk.
    pub(super) fn disk_run(&self, space: u8, ids: &[Token]) -> Vec<DiskBlockId> {
        let hashes = self.store.hasher().clone().chain(&[space; 32], ids, TOKENS);
        self.store.disk_run(&[space; 32], &hashes, ids)
    }

    /// Has what continues the chain on the disk read, and waits for it.
    pub(super) fn read_ahead(&mut self, space: u8, ids: &[Token]) -> usize {
        let run = self.disk_run(space, ids);
        let (places, last) = self.store.begin_reads(&run);
        self.copy();
        while self.store.is_under_way(last) {
            self.transfer(1, true);
        }
        self.store.unpin_read(&places);
        places.len()
    }
}

/// Fills conversations of two blocks one after the other, and writes what the host will give up next.
pub(super) fn fill_and_write(world: &mut World, first: Token, conversations: u32) {
    for conversation in 0..conversations {
        let (table, _) = world.fill(1, &eight(first + conversation)).unwrap();
        world.store.release(&table);
        world.store.begin_writes(u32::MAX);
        world.copy();
        world.transfer(usize::MAX, true);
        world.check();
    }
}

pub(super) fn eight(conversation: Token) -> Vec<Token> {
    (0..8).map(|at| conversation * 10 + at).collect()
}

#[test]
fn what_the_host_has_no_room_for_was_written_before_and_is_read_into_the_host_again() {
    let mut world = World::with_disk(2, 4, 16, 256);
    fill_and_write(&mut world, 1, 6);
    assert!(world.store.counters().disk_written_blocks >= 4, "{:?}", world.store.counters());
    assert_eq!(found(&mut world, &eight(1)).0, 0, "neither the device nor the host has it any more");
    assert_eq!(world.read_ahead(1, &eight(1)), 2);
    assert_eq!(found(&mut world, &eight(1)), (2, 0));
    assert_eq!(world.fill(1, &eight(1)).unwrap().1, 2);
    assert_eq!(world.store.counters().disk_read_blocks, 2);
    world.check_held();
}

#[test]
fn a_block_can_be_found_when_its_transfer_has_ended_and_not_before() {
    let mut world = World::with_disk(2, 4, 16, 256);
    fill_and_write(&mut world, 1, 6);
    let ids = eight(1);
    let run = world.disk_run(1, &ids);
    let (places, last) = world.store.begin_reads(&run);
    world.copy();
    world.transfer(1, true);
    assert!(world.store.is_under_way(last));
    assert_eq!(found(&mut world, &ids).0, 1);
    // Somebody else who wants the same waits for the same reads.
    let (others, same) = world.store.begin_reads(&run[1..]);
    assert_eq!((others, same), (places[1..].to_vec(), last));
    world.transfer(1, true);
    assert_eq!((world.store.is_under_way(last), found(&mut world, &ids).0), (false, 2));
    world.store.unpin_read(&places);
    world.store.unpin_read(&places[1..]);
    world.check_held();
}

#[test]
fn what_is_written_ahead_leaves_no_place_of_the_host_empty() {
    let mut world = World::with_disk(2, 64, 256, 256);
    fill_and_write(&mut world, 1, 60);
    let full = world.store.host.oldest().all(|host| world.store.host.held(host).is_some());
    assert!(full, "118 blocks left the device, and the host has room for 64");
    assert_eq!(found(&mut world, &eight(1)).0, 0, "the oldest has given way");
    // 64 blocks are the last 32 conversations but for the one on the device.
    assert_eq!(found(&mut world, &eight(28)), (2, 0));
    assert_eq!(found(&mut world, &eight(27)).0, 0);
}

#[test]
fn a_disk_smaller_than_what_is_written_ahead_comes_to_rest() {
    let mut world = World::with_disk(2, 64, 4, 256);
    fill_and_write(&mut world, 1, 60);
    let mut written = 0;
    for round in 0..50 {
        world.store.begin_writes(u32::MAX);
        world.copy();
        world.transfer(usize::MAX, true);
        if round == 10 {
            written = world.store.counters().disk_written_blocks;
        }
    }
    assert_eq!(world.store.counters().disk_written_blocks, written, "nothing new came");
    assert!(!world.store.has_writes_due());
}

#[test]
fn a_write_that_failed_and_a_block_that_cannot_be_read_are_misses() {
    let mut world = World::with_disk(2, 4, 16, 256);
    fill_and_write(&mut world, 1, 6);
    let written = world.store.counters().disk_written_blocks;
    let (table, _) = world.fill(1, &eight(8)).unwrap();
    world.store.release(&table);
    world.store.begin_writes(u32::MAX);
    world.copy();
    world.transfer(usize::MAX, false);
    let counters = world.store.counters();
    assert!(world.store.disk_refuses() && counters.failed_disk_writes > 0);
    assert_eq!(counters.disk_written_blocks, written);
    let ids = eight(1);
    let run = world.disk_run(1, &ids);
    let (places, last) = world.store.begin_reads(&run);
    let report = DiskReport {
        epoch: Epoch(1),
        through: last,
        failed: vec![last],
        refused: false,
        read_blocks: 1,
        read_ns: 9,
        waits: 1,
    };
    world.store.end_transfers(&report);
    world.store.take_transfers();
    world.store.unpin_read(&places);
    assert_eq!((world.store.counters().bad_disk_blocks, found(&mut world, &ids).0), (1, 1));
    assert_eq!(world.disk_run(1, &ids), [], "it is asked for no more");
    world.check_held();
}

#[test]
fn transfers_that_nobody_answers_for_any_more_leave_nothing_behind() {
    let mut world = World::with_disk(2, 4, 16, 256);
    fill_and_write(&mut world, 1, 6);
    let ids = eight(1);
    let run = world.disk_run(1, &ids);
    let (places, last) = world.store.begin_reads(&run);
    world.store.begin_writes(1);
    world.store.unpin_read(&places);
    world.store.void_transfers();
    assert!(!world.store.is_under_way(last) && world.store.take_transfers().is_empty());
    world.check_held();
    let report = DiskReport {
        epoch: Epoch(1),
        through: last,
        failed: vec![],
        refused: false,
        read_blocks: 1,
        read_ns: 9,
        waits: 0,
    };
    world.store.end_transfers(&report);
    assert_eq!((found(&mut world, &ids).0, world.read_ahead(1, &ids)), (0, 2), "the disk still has it");
}

#[test]
fn another_process_finds_what_the_disk_holds_and_believes_no_record_that_its_key_does_not_vouch_for() {
    let mut world = World::with_disk(2, 4, 16, 256);
    fill_and_write(&mut world, 1, 6);
    world.restart();
    assert_eq!((world.read_ahead(1, &eight(1)), world.fill(1, &eight(1)).unwrap().1), (2, 2));
    // Another's ids under a hash that was right for its own, and a child whose parent is not there.
    let forged = world.index.iter_mut().find(|(_, record)| record.parent.is_none()).unwrap().1;
    forged.ids = [3, 3, 3, 3].into();
    let (orphan, id) = (forged.id, forged.ids.to_vec());
    world.restart();
    assert_eq!(world.read_ahead(1, &id), 0);
    assert!(world.index.values().all(|record| record.parent != Some(orphan) && record.id != orphan), "they are gone");
    world.check_held();
}

#[test]
fn names_of_contents_are_never_used_again_though_a_process_forgot_them() {
    let mut world = World::with_disk(2, 4, 16, 256);
    fill_and_write(&mut world, 1, 6);
    let last = world.index.values().map(|record| record.id).max().unwrap();
    world.restart();
    let (table, _) = world.fill(1, &eight(20)).unwrap();
    assert!(world.store.prefix.content(table[0]).unwrap().id > last);
}
