//! Who will hold a prefix because a prompt was sent there, before the replica says so. Such a holder lasts until an event
//! confirms it or its time is over, whichever is first; the oldest give way when there are too many. It is kept apart from
//! the table of what was told, which is in no cache of the processor and hence four times slower to change. A ring keeps the keys in
//! the order in which they were sent, with one entry for each prompt; a flat table names the newest place of each in the
//! ring, so that what was confirmed or sent again is passed over when its old place comes up. O(1) per prefix, in memory
//! that is taken once. Knows nothing of what was told.

use super::holders::{BoundedSets, HolderSets, SlotId, Value};
use super::segment::{Segment, TAG_BITS, VALUE_BITS};
use llmscale_types::{PrefixKey, Time};
use std::collections::VecDeque;

/// Places of the ring that the table tells apart; the last value means that there is none.
const PLACES: u64 = (1 << VALUE_BITS) - 1;

/// Keys that one prompt has added, up to a position of the ring.
#[derive(Clone, Copy, Debug)]
struct Prompt {
    until: Time,
    end: u64,
    slot: SlotId,
}

/// Holders that nobody has confirmed.
#[derive(Debug)]
pub(super) struct Speculation {
    /// Who will hold a prefix.
    holders: Segment,
    /// The newest place in the ring of each pair of a slot and a prefix.
    places: Segment,
    /// By position, also those that were confirmed or sent again since.
    ring: Box<[PrefixKey]>,
    /// Positions in use, counted from the start of time.
    first: u64,
    end: u64,
    /// Oldest first; each has a key in the ring.
    prompts: VecDeque<Prompt>,
}

impl Speculation {
    /// Most that may be unconfirmed at a time.
    pub(super) const MAX_PENDING: u64 = PLACES - 1;
    /// Most memory per pending prefix: its place in the ring, two words in each table, and a prompt of its own in a list that
    /// may be half empty. Sets of holders are the table's.
    pub(super) const MAX_BYTES: usize = size_of::<PrefixKey>() + 4 * size_of::<u64>() + 2 * size_of::<Prompt>();

    /// At most `max_pending` of them, which is at most `MAX_PENDING` and not 0.
    pub(super) fn new(max_pending: u32) -> Self {
        let span = 2 * max_pending as usize;
        Self {
            holders: Segment::with_span(span),
            places: Segment::with_span(span),
            ring: vec![PrefixKey(0); max_pending as usize].into_boxed_slice(),
            first: 0,
            end: 0,
            prompts: VecDeque::new(),
        }
    }

    /// How many pairs of a slot and a prefix are unconfirmed.
    pub(super) fn pending(&self) -> usize {
        self.places.entries()
    }

    /// Who will hold a prefix.
    pub(super) fn get(&self, key: PrefixKey) -> Option<Value> {
        self.holders.get(tag_of_key(key))
    }

    /// Brings near, all at once, what `add` will change for these keys, and what the oldest do that give way for them.
    pub(super) fn approach(&self, slot: SlotId, keys: &[PrefixKey]) {
        let words = |slot, key| self.holders.first_word(tag_of_key(key)) ^ self.places.first_word(tag(slot, key));
        let added = keys.iter().fold(0, |sum, &key| sum ^ words(slot, key));
        let free = self.ring.len() as u64 - (self.end - self.first);
        let oldest = self.prompts.front().map_or(0, |prompt| {
            let end = prompt.end.min(self.first + (keys.len() as u64).saturating_sub(free));
            (self.first..end).fold(0, |sum, at| sum ^ words(prompt.slot, self.ring[self.in_ring(at)]))
        });
        std::hint::black_box(added ^ oldest);
    }

    /// A prefix was sent to a slot, or once more. `false` if a new set of holders had no room.
    pub(super) fn add(&mut self, sets: &mut BoundedSets<'_>, slot: SlotId, key: PrefixKey, until: Time) -> bool {
        if self.end - self.first == self.ring.len() as u64 {
            self.pop(sets);
        }
        if !self.hold(sets, slot, key) {
            return false;
        }
        let at = self.end;
        self.end += 1;
        let in_ring = self.in_ring(at);
        self.ring[in_ring] = key;
        put(&mut self.places, tag(slot, key), place(at));
        match self.prompts.back_mut() {
            Some(last) if last.slot == slot && last.until == until => last.end = self.end,
            _ => self.prompts.push_back(Prompt { until, end: self.end, slot }),
        }
        true
    }

    fn hold(&mut self, sets: &mut BoundedSets<'_>, slot: SlotId, key: PrefixKey) -> bool {
        let tag = tag_of_key(key);
        let Ok(at) = self.holders.find(tag) else {
            put(&mut self.holders, tag, Value::one(slot));
            return true;
        };
        let held = sets.with(self.holders.value_at(at), slot);
        if let Some(value) = held {
            self.holders.replace(at, value);
        }
        held.is_some()
    }

    fn release(&mut self, sets: &mut BoundedSets<'_>, slot: SlotId, key: PrefixKey) {
        // It may be gone: a set that lost a member and found no room as a smaller one has kept only one of the others.
        if let Ok(at) = self.holders.find(tag_of_key(key)) {
            match sets.without(self.holders.value_at(at), slot) {
                Some(rest) => self.holders.replace(at, rest),
                None => self.holders.remove_at(at),
            }
        }
    }

    /// An event spoke of it.
    pub(super) fn settle(&mut self, sets: &mut BoundedSets<'_>, slot: SlotId, key: PrefixKey) {
        if let Ok(at) = self.places.find(tag(slot, key)) {
            self.places.remove_at(at);
            self.release(sets, slot, key);
        }
    }

    /// Nothing is expected of this slot any more.
    pub(super) fn forget(&mut self, sets: &mut BoundedSets<'_>, slot: SlotId) {
        let mut begin = self.first;
        for number in 0..self.prompts.len() {
            let prompt = self.prompts[number];
            if prompt.slot == slot {
                (begin..prompt.end).for_each(|at| self.settle(sets, slot, self.ring[self.in_ring(at)]));
            }
            begin = prompt.end;
        }
    }

    /// Forgets holders whose time is over.
    pub(super) fn expire(&mut self, sets: &mut BoundedSets<'_>, now: Time) {
        while self.prompts.front().is_some_and(|prompt| prompt.until <= now) {
            self.pop(sets);
        }
    }

    /// Forgets the oldest holder, unless it was confirmed or sent again.
    fn pop(&mut self, sets: &mut BoundedSets<'_>) {
        let Prompt { end, slot, .. } = *self.prompts.front().expect("every key in the ring is a prompt's");
        let key = self.ring[self.in_ring(self.first)];
        if let Ok(found) = self.places.find(tag(slot, key))
            && self.places.value_at(found) == place(self.first)
        {
            self.places.remove_at(found);
            self.release(sets, slot, key);
        }
        self.first += 1;
        if self.first == end {
            self.prompts.pop_front();
        }
    }

    fn in_ring(&self, at: u64) -> usize {
        (at % self.ring.len() as u64) as usize
    }

    /// Memory.
    pub(super) fn bytes(&self) -> usize {
        let words = self.holders.bytes() + self.places.bytes();
        words + size_of_val(&*self.ring) + self.prompts.capacity() * size_of::<Prompt>()
    }

    /// The sets that are in use.
    pub(super) fn values(&self) -> impl Iterator<Item = Value> {
        self.holders.iter().map(|(_, value)| value)
    }

    /// Asserts that whatever is pending will be looked at, and that nothing else is held.
    pub(super) fn check(&self, sets: &HolderSets) {
        self.holders.check();
        self.places.check();
        assert!(self.end - self.first <= self.ring.len() as u64, "{} are in the ring", self.end - self.first);
        assert_eq!(self.prompts.back().map_or(self.first, |last| last.end), self.end, "each key is a prompt's");
        let mut begin = self.first;
        let mut live = 0;
        for prompt in &self.prompts {
            assert!(begin < prompt.end, "each prompt has a key");
            for at in begin..prompt.end {
                let key = self.ring[self.in_ring(at)];
                live += usize::from(self.places.get(tag(prompt.slot, key)) == Some(place(at)));
            }
            begin = prompt.end;
        }
        assert_eq!(live, self.pending(), "each unconfirmed holder is in the ring");
        let held: usize = self.values().map(|value| sets.holders(value).count()).sum();
        assert!(held <= live, "nobody else is a holder");
    }
}

fn place(at: u64) -> Value {
    Value::from_bits((at % PLACES) as u32)
}

fn put(segment: &mut Segment, tag: u64, value: Value) {
    match segment.find(tag) {
        Ok(at) => segment.replace(at, value),
        Err(at) => {
            if !segment.insert_at(at, tag, value) {
                // Half of its words are free, so only tags that fall together by the dozen get here.
                segment.grow_and_insert(tag, value);
            }
        }
    }
}

/// Mixed once more: a segment of the whole table relies on all upper bits.
fn tag_of_key(key: PrefixKey) -> u64 {
    key.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - TAG_BITS)
}

/// Two pairs of a full table have the same once in ten billion times; one of them is then forgotten too early.
fn tag(slot: SlotId, key: PrefixKey) -> u64 {
    tag_of_key(PrefixKey(key.0 ^ (u64::from(slot) + 1).wrapping_mul(0xd6e8_feb8_6659_fd93)))
}
