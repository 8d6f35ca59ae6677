//! What contents and prefixes are called when an older copy outlives a newer one of the same hash, case by case.

use super::disk::{eight, fill_and_write};
use super::*;

#[test]
fn a_shared_block_behind_one_whose_name_the_host_lost_is_found_under_the_new_name() {
    let mut world = World::new(3, 1, 256);
    let hashes = world.store.hasher().clone().chain(&[1; 32], &EIGHT, TOKENS);
    // Two sequences compute the same first block side by side; the second one goes on.
    let (first, copy, child) = (world.store.allocate(), world.store.allocate(), world.store.allocate());
    let (first, copy, child) = (first.unwrap(), copy.unwrap(), child.unwrap());
    let parent = world.store.register(0, first, &[1; 32], None, &hashes[0], &EIGHT[..4]);
    assert_eq!(world.store.register(0, copy, &[1; 32], None, &hashes[0], &EIGHT[..4]), parent);
    let name = world.store.register(1, child, &[1; 32], Some(parent), &hashes[1], &EIGHT[4..]);
    world.store.release(&[first]);
    let evicted = world.store.allocate().unwrap();
    let hosts: Vec<HostBlockId> = world.store.take_copies().iter().map(|copy| copy.host).collect();
    let hit = world.store.find_prefix(&[1; 32], &hashes, &EIGHT);
    assert_eq!(hit.blocks, [Found::Host(hosts[0]), Found::Device(child)]);
    world.store.take_prefix(&hit.blocks);
    world.store.restore(hosts[0], evicted);
    world.store.forget_host_blocks(hosts);
    let renamed = world.store.register(0, evicted, &[1; 32], None, &hashes[0], &EIGHT[..4]);
    assert_ne!(renamed, parent);
    assert!(world.store.register(1, child, &[1; 32], Some(renamed), &hashes[1], &EIGHT[4..]) > name.max(renamed));
    assert_eq!(found(&mut world, &EIGHT), (2, 2));
}

#[test]
fn a_name_that_gave_way_while_its_older_copy_was_being_written_or_read_is_told_again() {
    let mut world = World::with_disk(2, 4, 16, 256);
    world.store.name_prefixes_every(TOKENS);
    fill_and_write(&mut world, 1, 6);
    let ids = eight(1);
    let run = world.disk_run(1, &ids);
    assert_eq!(run.len(), 2);
    let (places, _) = world.store.begin_reads(&run);
    world.copy();
    // Another copy of the same hash comes to the disk and is bad: the name goes with it.
    let (content, held) = world.store.disk.held(run[1]).map(|(content, ids)| (content.clone(), ids.to_vec())).unwrap();
    let (newer, lost) = world.store.disk.reserve().unwrap();
    assert_eq!(lost, None, "the disk has room");
    let renamed = Content { id: ContentId::new(99_999).unwrap(), ..content.clone() };
    world.store.disk.hold(newer, renamed, &held);
    world.store.disk.unpin(newer);
    let lost = world.store.disk.forget(newer);
    let mut known: BTreeSet<PrefixKey> = world.store.named().chain(content.name()).collect();
    world.store.want_changes(true);
    world.store.say_lost(lost);
    told(&mut world.store, &mut known);
    assert!(!known.contains(&content.name().unwrap()));
    world.transfer(usize::MAX, true);
    world.store.unpin_read(&places);
    told(&mut world.store, &mut known);
    assert_eq!(known, world.store.named().collect::<BTreeSet<PrefixKey>>());
    assert!(known.contains(&content.name().unwrap()));
}
