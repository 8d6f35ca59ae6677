//! All prefixes of a fleet with their holders, in at most a given memory. The first bits of a key choose one of many small
//! segments, the next 43 name it there, so growing moves a few hundred words at a time and never the whole table. When
//! memory is used up, a new key takes the place of one in its own segment (second chance in order of the keys; keys fall
//! into segments at random, so this is the fleet's order too); a holder that would need a new set is not recorded.
//! About ten bytes per key; O(1) per look-up, O(holders) per change. Knows nothing of replicas, events or time.

use super::holders::{BoundedSets, HolderSets, Holders, SlotId, Value};
use super::segment::{Segment, TAG_BITS};
use llmscale_types::PrefixKey;

/// Keys in a segment when memory is used up: the header of 24 bytes is small against them, and moving them takes a microsecond.
const SEGMENT_KEYS: usize = 512;
const MAX_SEGMENT_BITS: u32 = 64 - TAG_BITS;

/// What became of a holder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Held {
    /// It was recorded already.
    Known,
    /// It is recorded now.
    New,
    /// There was no room.
    Untold,
}

/// Keys and who holds them.
#[derive(Debug)]
pub(super) struct Table {
    segments: Vec<Segment>,
    segment_bits: u32,
    sets: HolderSets,
    segment_bytes: usize,
    max_bytes: usize,
    keys: usize,
    evicted: u64,
}

impl Table {
    /// An empty table of at most `max_bytes`.
    pub(super) fn new(max_bytes: usize) -> Self {
        let segment_bits = (max_bytes / (10 * SEGMENT_KEYS)).max(1).ilog2().min(MAX_SEGMENT_BITS);
        let segments = vec![Segment::default(); 1 << segment_bits];
        let segment_bytes = size_of_val(&segments[..]);
        Self { segments, segment_bits, sets: HolderSets::default(), segment_bytes, max_bytes, keys: 0, evicted: 0 }
    }

    /// Memory in use.
    pub(super) fn bytes(&self) -> usize {
        self.segment_bytes + self.sets.bytes()
    }

    fn room_bytes(&self) -> usize {
        self.max_bytes.saturating_sub(self.bytes())
    }

    /// How many keys there are.
    pub(super) fn keys(&self) -> usize {
        self.keys
    }

    /// Keys that gave their place to others.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// How many segments there are; `sweep` takes a number below.
    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }

    fn place(&self, key: PrefixKey) -> (usize, u64) {
        // Shifted twice, because a shift by 64 is none.
        let segment = (key.0 >> 1) >> (63 - self.segment_bits);
        (segment as usize, (key.0 << self.segment_bits) >> (64 - TAG_BITS))
    }

    /// Values of some keys. All are begun before one is finished, so that they wait for memory together: a table of ten
    /// million keys is in no cache, and eight look-ups one after the other would take eight times as long.
    pub(super) fn get_all<const N: usize>(&self, keys: [PrefixKey; N]) -> [Option<Value>; N] {
        let places = keys.map(|key| self.place(key));
        let first = places.map(|(segment, tag)| self.segments[segment].first_word(tag));
        std::hint::black_box(first);
        places.map(|(segment, tag)| self.segments[segment].get(tag))
    }

    /// Brings the places of some keys near, all at once, before they are changed one by one: twice as many events per second.
    pub(super) fn approach(&self, keys: &[PrefixKey]) {
        let words =
            keys.iter().map(|&key| self.place(key)).map(|(segment, tag)| self.segments[segment].first_word(tag));
        std::hint::black_box(words.fold(0, |sum, word| sum ^ word));
    }

    /// Marks a key as used. Whether a slot is among its holders.
    pub(super) fn touch(&mut self, key: PrefixKey, slot: SlotId) -> bool {
        let (segment, tag) = self.place(key);
        let segment = &mut self.segments[segment];
        segment.find(tag).is_ok_and(|at| {
            let value = segment.value_at(at);
            segment.replace(at, value);
            self.sets.holders(value).contains(slot)
        })
    }

    /// The sets of holders, for others to use in the memory that segments leave.
    pub(super) fn sets_mut(&mut self) -> BoundedSets<'_> {
        BoundedSets { max_bytes: self.max_bytes - self.segment_bytes, sets: &mut self.sets }
    }

    /// The sets of holders.
    pub(super) fn sets(&self) -> &HolderSets {
        &self.sets
    }

    /// Who a value stands for.
    pub(super) fn holders(&self, value: Value) -> Holders<'_> {
        self.sets.holders(value)
    }

    /// Records a holder, and marks the key as used.
    pub(super) fn hold(&mut self, key: PrefixKey, slot: SlotId) -> Held {
        let room_bytes = self.room_bytes();
        let (segment, tag) = self.place(key);
        let Ok(at) = self.segments[segment].find(tag) else {
            return self.add(segment, tag, Value::one(slot));
        };
        let value = self.segments[segment].value_at(at);
        let (value, held) = match self.sets.with(value, slot, room_bytes) {
            Some(same) if same == value => (value, Held::Known),
            Some(larger) => (larger, Held::New),
            None => (value, Held::Untold),
        };
        self.segments[segment].replace(at, value);
        held
    }

    fn add(&mut self, segment: usize, tag: u64, value: Value) -> Held {
        loop {
            let room_bytes = self.room_bytes();
            let share = &mut self.segments[segment];
            let at = share.find(tag).expect_err("only what is not there is added");
            if share.insert_at(at, tag, value) {
                break;
            }
            if share.growth_bytes() <= room_bytes {
                let before = share.bytes();
                share.grow();
                self.segment_bytes += share.bytes() - before;
            } else if let Some(evicted) = share.evict() {
                self.sets.release(evicted);
                self.keys -= 1;
                self.evicted += 1;
            } else {
                return Held::Untold;
            }
        }
        self.keys += 1;
        Held::New
    }

    /// Forgets a holder.
    pub(super) fn release(&mut self, key: PrefixKey, slot: SlotId) {
        let room_bytes = self.room_bytes();
        let (segment, tag) = self.place(key);
        let Ok(at) = self.segments[segment].find(tag) else {
            return;
        };
        let value = self.segments[segment].value_at(at);
        let rest = self.sets.without(value, slot, room_bytes);
        self.settle(segment, at, value, rest);
        self.shrink(segment);
    }

    fn retain(&mut self, segment: usize, tag: u64, stays: impl Fn(SlotId) -> bool) {
        let room_bytes = self.room_bytes();
        if let Ok(at) = self.segments[segment].find(tag) {
            let value = self.segments[segment].value_at(at);
            let rest = self.sets.retain(value, room_bytes, stays);
            self.settle(segment, at, value, rest);
        }
    }

    /// Writes down who is left of a key's holders, and forgets the key if nobody is.
    fn settle(&mut self, segment: usize, at: usize, before: Value, rest: Option<Value>) {
        match rest {
            Some(same) if same == before => {}
            Some(rest) => self.segments[segment].replace(at, rest),
            None => {
                self.segments[segment].remove_at(at);
                self.keys -= 1;
            }
        }
    }

    fn shrink(&mut self, segment: usize) {
        let before = self.segments[segment].bytes();
        if self.segments[segment].shrink() {
            self.segment_bytes = self.segment_bytes + self.segments[segment].bytes() - before;
        }
    }

    /// Forgets every holder of one segment that may not stay.
    pub(super) fn sweep(&mut self, segment: usize, stays: impl Fn(SlotId) -> bool) {
        let touched = |(_, value): &(u64, Value)| self.holders(*value).iter().any(|slot| !stays(slot));
        let tags: Vec<u64> = self.segments[segment].iter().filter(touched).map(|(tag, _)| tag).collect();
        for tag in tags {
            self.retain(segment, tag, &stays);
        }
        self.shrink(segment);
    }

    /// Asserts what holds between changes, given the sets that others use.
    pub(super) fn check(&self, others: impl Iterator<Item = Value>) {
        self.segments.iter().for_each(Segment::check);
        self.sets.check(self.segments.iter().flat_map(Segment::iter).map(|(_, value)| value).chain(others));
        let words: usize = self.segments.iter().map(Segment::bytes).sum();
        assert_eq!(self.segment_bytes, size_of_val(&self.segments[..]) + words, "bytes of segments");
        assert_eq!(self.keys, self.segments.iter().map(Segment::entries).sum::<usize>(), "keys are counted");
        assert!(self.bytes() <= self.max_bytes, "{} bytes of at most {}", self.bytes(), self.max_bytes);
    }
}
