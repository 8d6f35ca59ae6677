//! The block store against memories that really hold something: each block of each tier remembers the namespace and all ids
//! up to its end, copies move them, and whatever is found must be what was asked for.

use super::*;
use crate::disk::{DiskRecord, IndexChange};
use llmscale_types::{DiskBlockId, DiskDirection, DiskReport, DiskTransfer, Epoch};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

mod disk;
mod names;
mod saves;
mod size;

const TOKENS: u32 = 4;

/// What a block truly holds: the namespace and every id from the start.
type Truth = Option<(u8, Vec<Token>)>;

/// A store, and the memories that a worker would have.
struct World {
    store: BlockStore,
    device: Vec<Truth>,
    host: Vec<Truth>,
    disk: Vec<Truth>,
    /// What the rank's disk thread has not done.
    queue: VecDeque<DiskTransfer>,
    /// What is written beside the files.
    index: BTreeMap<DiskBlockId, DiskRecord>,
    incarnation: u64,
    live: Vec<Vec<BlockId>>,
}

impl World {
    fn new(blocks: u32, host_blocks: u32, bits: u32) -> Self {
        Self::with_disk(blocks, host_blocks, 0, bits)
    }

    fn with_disk(blocks: u32, host_blocks: u32, disk_blocks: u32, bits: u32) -> Self {
        let store = BlockStore::new(blocks, TOKENS, ChainHasher::truncated([7; 32], bits));
        let mut store = store.with_host_blocks(host_blocks).with_disk_blocks(disk_blocks);
        store.allow_offloads(u32::MAX);
        Self {
            store,
            device: vec![None; blocks as usize],
            host: vec![None; host_blocks as usize],
            disk: vec![None; disk_blocks as usize],
            queue: VecDeque::new(),
            index: BTreeMap::new(),
            incarnation: 0,
            live: Vec::new(),
        }
    }

    /// The process is another one: it finds the disk, the records beside it, and nothing else.
    fn restart(&mut self) {
        self.note();
        let records = self.index.iter().map(|(&disk, record)| (disk, record.clone())).collect();
        let bits = self.store.hasher.kept_bits();
        let (blocks, hosts) = (self.store.total(), self.store.host_blocks());
        let next = Self::with_disk(blocks, hosts, self.disk.len() as u32, bits);
        let (disk, index, incarnation) =
            (std::mem::take(&mut self.disk), std::mem::take(&mut self.index), self.incarnation);
        *self = Self { disk, index, incarnation, ..next };
        self.store.recall_disk(records);
        self.note();
    }

    fn note(&mut self) {
        for change in self.store.take_index_changes() {
            match change {
                IndexChange::Put(disk, record) => drop(self.index.insert(disk, *record)),
                IndexChange::Drop(disk) => drop(self.index.remove(&disk)),
                IndexChange::Restart(incarnation) => {
                    self.index.clear();
                    self.incarnation = incarnation;
                }
            }
        }
    }

    /// The disk thread makes this many transfers and says so. `works` says whether writes do.
    fn transfer(&mut self, most: usize, works: bool) {
        let mut failed = Vec::new();
        let mut through = 0;
        for transfer in self.queue.drain(..most.min(self.queue.len())) {
            through = transfer.number;
            let (host, disk) = (&mut self.host[transfer.host.index()], &mut self.disk[transfer.disk.index()]);
            match transfer.direction {
                DiskDirection::Write if !works => failed.push(transfer.number),
                DiskDirection::Write => disk.clone_from(host),
                DiskDirection::Read => host.clone_from(disk),
            }
        }
        let epoch = Epoch(1);
        let report = DiskReport { epoch, through, failed, refused: !works, read_blocks: 0, read_ns: 0, waits: 0 };
        self.store.end_transfers(&report);
        self.note();
    }

    fn copy(&mut self) -> Vec<BlockCopy> {
        let copies = self.store.take_copies();
        for copy in &copies {
            // A rank waits for its disk thread before it touches a place that a transfer is about.
            while self.queue.iter().any(|transfer| transfer.host == copy.host) {
                let transfer = self.queue.pop_front().expect("there is one");
                let (host, disk) = (&mut self.host[transfer.host.index()], &mut self.disk[transfer.disk.index()]);
                match transfer.direction {
                    DiskDirection::Write => disk.clone_from(host),
                    DiskDirection::Read => host.clone_from(disk),
                }
            }
            match copy.direction {
                CopyDirection::Offload => self.host[copy.host.index()] = self.device[copy.block.index()].clone(),
                CopyDirection::Restore => self.device[copy.block.index()] = self.host[copy.host.index()].clone(),
            }
        }
        self.queue.extend(self.store.take_transfers());
        copies
    }

    /// Computes a sequence from nothing or from a cached prefix, registers its full blocks. Returns its table and how many
    /// blocks were found, or nothing if the pool has no room.
    fn fill(&mut self, space: u8, ids: &[Token]) -> Option<(Vec<BlockId>, usize)> {
        let namespace = [space; 32];
        let hashes = self.store.hasher().clone().chain(&namespace, ids, TOKENS);
        let hit = self.store.find_prefix(&namespace, &hashes, ids);
        self.store.take_prefix(&hit.blocks);
        let on_host = hit.blocks.iter().filter(|found| matches!(found, Found::Host(_))).count();
        let needed = on_host + hashes.len() - hit.blocks.len();
        if (self.store.free() as usize) < needed {
            for found in hit.blocks {
                match found {
                    Found::Device(block) => self.store.release(&[block]),
                    Found::Host(host) => self.store.give_up_restore(host),
                }
            }
            return None;
        }
        let mut table = Vec::new();
        for &found in &hit.blocks {
            table.push(match found {
                Found::Device(block) => block,
                Found::Host(host) => {
                    let block = self.store.allocate().expect("it was counted");
                    self.store.restore(host, block);
                    block
                }
            });
        }
        while table.len() < hashes.len() {
            table.push(self.store.allocate().expect("it was counted"));
        }
        self.copy();
        let mut parent = None;
        for (index, block_ids) in ids.chunks_exact(TOKENS as usize).enumerate() {
            let truth = Some((space, ids[..(index + 1) * TOKENS as usize].to_vec()));
            if index < hit.blocks.len() {
                assert_eq!(self.device[table[index].index()], truth, "block {index} of what was found");
            } else {
                self.device[table[index].index()] = truth;
            }
            parent =
                Some(self.store.register(index as u32, table[index], &namespace, parent, &hashes[index], block_ids));
        }
        Some((table, hit.blocks.len()))
    }

    fn check(&self) {
        let held = |block| self.live.iter().flatten().filter(|&&held| held == block).count() as u32;
        self.store.check(held, |_| 0);
    }
}

fn found(world: &mut World, ids: &[Token]) -> (usize, usize) {
    let hashes = world.store.hasher().clone().chain(&[1; 32], ids, TOKENS);
    let hit = world.store.find_prefix(&[1; 32], &hashes, ids);
    (hit.blocks.len(), hit.leading_device_blocks)
}

const EIGHT: [Token; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

#[test]
fn a_prefix_is_shared_between_sequences_of_one_namespace() {
    let mut world = World::new(16, 0, 256);
    let (first, _) = world.fill(1, &EIGHT).unwrap();
    let (second, found) = world.fill(1, &[1, 2, 3, 4, 9, 9, 9, 9]).unwrap();
    assert_eq!((found, first[0] == second[0], first[1] == second[1]), (1, true, false));
}

#[test]
fn a_namespace_never_sees_the_blocks_of_another() {
    let mut world = World::new(16, 4, 256);
    world.fill(1, &[1, 2, 3, 4]).unwrap();
    assert_eq!(world.fill(2, &[1, 2, 3, 4]).unwrap().1, 0);
}

#[test]
fn released_contents_are_found_until_their_block_is_reused() {
    let mut world = World::new(2, 0, 256);
    let (table, _) = world.fill(1, &EIGHT).unwrap();
    world.store.release(&table);
    let hashes = world.store.hasher().clone().chain(&[1; 32], &EIGHT, TOKENS);
    assert_eq!(world.store.probe(&[1; 32], &hashes, &EIGHT), (2, 2));
    world.store.allocate().unwrap();
    // The child went first: its parent is still of use alone, the other way round it would not be.
    assert_eq!(world.store.probe(&[1; 32], &hashes, &EIGHT), (1, 1));
    assert_eq!(world.store.counters().evicted_blocks, 1);
}

#[test]
fn what_the_device_has_no_room_for_is_found_on_the_host() {
    let mut world = World::new(2, 2, 256);
    let (table, _) = world.fill(1, &EIGHT).unwrap();
    world.store.release(&table);
    let (other, _) = world.fill(1, &[9, 9, 9, 9, 8, 8, 8, 8]).unwrap();
    assert_eq!(world.store.counters().offloaded_blocks, 2);
    assert_eq!(found(&mut world, &EIGHT), (2, 0));
    world.store.release(&other);
    let (_, found) = world.fill(1, &EIGHT).unwrap();
    assert_eq!((found, world.store.counters().restored_blocks), (2, 2));
}

#[test]
fn a_content_that_is_on_the_host_already_is_not_copied_out_again() {
    let mut world = World::new(1, 4, 256);
    for _ in 0..3 {
        for ids in [[1, 1, 1, 1], [2, 2, 2, 2]] {
            let (table, _) = world.fill(1, &ids).unwrap();
            world.store.release(&table);
        }
    }
    assert_eq!((world.store.counters().offloaded_blocks, world.store.counters().restored_blocks), (2, 4));
}

#[test]
fn no_more_is_copied_out_than_the_step_may() {
    let mut world = World::new(4, 4, 256);
    let (table, _) = world.fill(1, &EIGHT).unwrap();
    world.store.release(&table);
    world.store.allow_offloads(1);
    for _ in 0..4 {
        world.store.allocate().unwrap();
    }
    assert_eq!(world.copy().len(), 1);
}

#[test]
fn blocks_of_a_lost_step_and_bad_ones_are_found_no_longer_and_their_tokens_computed() {
    let mut world = World::new(2, 2, 256);
    let (table, _) = world.fill(1, &EIGHT).unwrap();
    world.store.release(&table);
    world.store.allocate().unwrap();
    world.store.allocate().unwrap();
    let copies = world.copy();
    assert_eq!(found(&mut world, &EIGHT).0, 2);
    world.store.forget_host_blocks([copies[0].host]);
    assert_eq!(found(&mut world, &EIGHT).0, 1, "the child went out first");
    world.store.host_blocks_are_bad(&[copies[1].host, HostBlockId(99)]);
    assert_eq!(found(&mut world, &EIGHT).0, 0);
}

#[test]
#[should_panic(expected = "pinned while its content is lost")]
fn a_pinned_block_cannot_be_lost() {
    let mut world = World::new(1, 1, 256);
    let (table, _) = world.fill(1, &[1, 1, 1, 1]).unwrap();
    world.store.release(&table);
    world.store.allocate().unwrap();
    let host = world.copy()[0].host;
    world.store.take_prefix(&[Found::Host(host)]);
    world.store.host_blocks_are_bad(&[host]);
}

/// Keys that fronts believe in, by the changes that they were told.
fn told(store: &mut BlockStore, known: &mut BTreeSet<PrefixKey>) {
    for event in store.take_changes() {
        match event {
            KvEvent::Stored(keys) => known.extend(keys),
            KvEvent::Removed(keys) => known.retain(|key| !keys.contains(key)),
            KvEvent::Cleared => known.clear(),
        }
    }
}

#[derive(Clone, Debug)]
enum Turn {
    Fill { space: u8, ids: Vec<Token>, release: bool },
    ReleaseOldest,
    DeviceLost,
    HostLost,
    Bad(u32),
    ReadAhead { space: u8, ids: Vec<Token> },
    Write(u32),
    Transfer { most: usize, works: bool },
    BadOnDisk(u32),
    DiskLost,
    Restart,
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        12 => (0_u8..3, prop::collection::vec(0_u32..3, 0..17), any::<bool>())
            .prop_map(|(space, ids, release)| Turn::Fill { space, ids, release }),
        4 => Just(Turn::ReleaseOldest),
        1 => Just(Turn::DeviceLost),
        1 => Just(Turn::HostLost),
        2 => (0_u32..8).prop_map(Turn::Bad),
        4 => (0_u8..3, prop::collection::vec(0_u32..3, 0..17)).prop_map(|(space, ids)| Turn::ReadAhead { space, ids }),
        8 => (0_u32..4).prop_map(Turn::Write),
        6 => (0_usize..6, prop::bool::weighted(0.8)).prop_map(|(most, works)| Turn::Transfer { most, works }),
        1 => (0_u32..8).prop_map(Turn::BadOnDisk),
        1 => Just(Turn::DiskLost),
        1 => Just(Turn::Restart),
    ]
}

impl World {
    fn check_held(&self) {
        let held = |block| self.live.iter().flatten().filter(|&&held| held == block).count() as u32;
        let taken = |block| if self.store.pool.references(block) > 0 { held(block).max(1) } else { 0 };
        self.store.check(taken, |_| 0);
    }

    /// The worker gave its steps up, or it is dead: what was on its way is void.
    fn void(&mut self) {
        self.store.void_transfers();
    }

    fn take_turn(&mut self, turn: Turn) {
        match turn {
            Turn::Fill { space, ids, release } => {
                if let Some((table, _)) = self.fill(space, &ids) {
                    if release { self.store.release(&table) } else { self.live.push(table) }
                }
            }
            Turn::ReleaseOldest => {
                if !self.live.is_empty() {
                    let table = self.live.remove(0);
                    self.store.release(&table);
                }
            }
            Turn::DeviceLost => {
                self.live.clear();
                self.void();
                self.queue.clear();
                self.store.reset();
                self.device.fill(None);
            }
            Turn::HostLost => {
                self.void();
                self.queue.clear();
                self.store.clear_host();
                self.host.fill(None);
            }
            Turn::Bad(host) => {
                self.void();
                self.store.host_blocks_are_bad(&[HostBlockId(host)]);
                if let Some(truth) = self.host.get_mut(host as usize) {
                    *truth = None;
                }
            }
            Turn::ReadAhead { space, ids } => drop(self.read_ahead(space, &ids)),
            Turn::Write(most) => {
                self.store.begin_writes(most);
                self.copy();
            }
            Turn::Transfer { most, works } => self.transfer(most, works),
            Turn::BadOnDisk(disk) => {
                // The rank sees it by the block's header when it is read.
                if let Some(truth) = self.disk.get_mut(disk as usize) {
                    *truth = None;
                    let lost = self.store.disk.held(DiskBlockId(disk)).is_some();
                    if lost && !self.queue.iter().any(|transfer| transfer.disk.0 == disk) {
                        let lost = self.store.disk.forget(DiskBlockId(disk));
                        self.store.say_lost(lost);
                        self.index.remove(&DiskBlockId(disk));
                    }
                }
            }
            Turn::DiskLost => {
                self.void();
                self.queue.clear();
                self.disk.fill(None);
                self.store.restart_disk(self.incarnation + 1);
                self.note();
            }
            Turn::Restart => self.restart(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// With two bits of hash nearly every lookup collides; a hit must still hold exactly the asker's ids and namespace, on
    /// whatever tier it was found and however often it was copied.
    #[test]
    fn forced_hash_collisions_cost_misses_and_never_content(
        bits in 1_u32..9,
        blocks in 4_u32..24,
        host_blocks in 0_u32..8,
        disk_blocks in 0_u32..12,
        turns in prop::collection::vec(turn(), 1..60),
    ) {
        let disk_blocks = if host_blocks == 0 { 0 } else { disk_blocks };
        let mut world = World::with_disk(blocks, host_blocks, disk_blocks, bits);
        for turn in turns {
            world.take_turn(turn);
            world.note();
            world.check();
        }
    }

    /// Whoever follows the changes knows exactly the names that can be found, whichever tier they are on.
    #[test]
    fn changes_tell_what_can_be_found_on_any_tier(
        blocks in 4_u32..24,
        host_blocks in 0_u32..8,
        disk_blocks in 0_u32..12,
        turns in prop::collection::vec(turn(), 1..60),
    ) {
        let disk_blocks = if host_blocks == 0 { 0 } else { disk_blocks };
        let mut world = World::with_disk(blocks, host_blocks, disk_blocks, 256);
        world.store.name_prefixes_every(TOKENS);
        world.store.want_changes(true);
        let mut known = BTreeSet::new();
        for turn in turns {
            match turn {
                // Another process tells its own changes.
                Turn::Restart => continue,
                turn => world.take_turn(turn),
            }
            told(&mut world.store, &mut known);
            let names: BTreeSet<PrefixKey> = world.store.named().collect();
            prop_assert_eq!(&known, &names);
        }
    }
}
