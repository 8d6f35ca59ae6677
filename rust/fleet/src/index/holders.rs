//! Sets of replicas in 20 bits: one slot number, or the number of a set that all prefixes with the same holders share.
//! Prefixes along a conversation have equal holders, so sets are few; each is kept once, sorted, with a count of its uses.
//! Adding or removing a holder is O(holders), finding one O(log holders). Knows nothing of prefixes or of what a slot is.

use super::segment::VALUE_BITS;
use rustc_hash::FxHashMap;
use std::sync::Arc;

/// A replica in the index, as long as it keeps what it holds.
pub(super) type SlotId = u16;

const FIRST_SET: u32 = 1 << 16;
/// The last number is that of an entry that is not there.
const MAX_SETS: usize = (1 << VALUE_BITS) - FIRST_SET as usize - 1;
/// Memory of one set beside its members: counts of the shared slice, its place in the list, its place in the map, which is
/// at least 7/16 full.
const SET_BYTES: usize = 16 + size_of::<Option<Set>>() * 2 + (size_of::<(Arc<[SlotId]>, u32)>() + 1) * 16 / 7;

/// One slot or one set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Value(u32);

impl Value {
    /// A single holder.
    pub(super) fn one(slot: SlotId) -> Self {
        Self(u32::from(slot))
    }

    pub(super) fn bits(self) -> u32 {
        self.0
    }

    pub(super) fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    fn set(self) -> Option<usize> {
        self.0.checked_sub(FIRST_SET).map(|set| set as usize)
    }
}

/// Who holds a prefix, by slot, in order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holders<'a> {
    /// One.
    One(SlotId),
    /// Two or more, in order, or none.
    Many(&'a [SlotId]),
}

impl Holders<'_> {
    /// No one.
    pub(super) const NOBODY: Self = Self::Many(&[]);

    /// How many.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Many(slots) => slots.len(),
        }
    }

    /// The one at a place below `count`.
    pub(super) fn at(&self, place: usize) -> SlotId {
        match self {
            Self::One(slot) => *slot,
            Self::Many(slots) => slots[place],
        }
    }

    /// Whether a slot is among them.
    pub(super) fn contains(&self, slot: SlotId) -> bool {
        match self {
            Self::One(one) => *one == slot,
            Self::Many(slots) => slots.binary_search(&slot).is_ok(),
        }
    }

    /// All, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = SlotId> {
        (0..self.count()).map(|place| self.at(place))
    }
}

#[derive(Debug)]
struct Set {
    members: Arc<[SlotId]>,
    uses: u32,
}

/// A set, and the one that it became when a slot was added or taken away. Keys that follow each other in a prompt have
/// equal holders, so the next key mostly takes the same step, and a thousand members are neither copied nor hashed for it.
#[derive(Clone, Copy, Debug)]
struct Step {
    from: Value,
    slot: SlotId,
    to: Value,
}

/// All sets of two or more.
#[derive(Debug, Default)]
pub(super) struct HolderSets {
    sets: Vec<Option<Set>>,
    free: Vec<u32>,
    by_members: FxHashMap<Arc<[SlotId]>, u32>,
    bytes: usize,
    /// The last steps up and down, while both of their sets are there.
    grown: Option<Step>,
    shrunk: Option<Step>,
}

/// All sets, and the memory that they may take together.
#[derive(Debug)]
pub(super) struct BoundedSets<'a> {
    pub(super) sets: &'a mut HolderSets,
    pub(super) max_bytes: usize,
}

impl BoundedSets<'_> {
    fn room_bytes(&self) -> usize {
        self.max_bytes.saturating_sub(self.sets.bytes())
    }

    /// `HolderSets::with` in the room that is left.
    pub(super) fn with(&mut self, value: Value, slot: SlotId) -> Option<Value> {
        self.sets.with(value, slot, self.room_bytes())
    }

    /// `HolderSets::without` in the room that is left.
    pub(super) fn without(&mut self, value: Value, slot: SlotId) -> Option<Value> {
        self.sets.without(value, slot, self.room_bytes())
    }
}

impl HolderSets {
    /// Memory of all sets. At most twice what is in use when many have gone.
    pub(super) fn bytes(&self) -> usize {
        self.bytes + (self.sets.len() - self.by_members.len()) * (SET_BYTES - 16)
    }

    /// Who a value stands for.
    pub(super) fn holders(&self, value: Value) -> Holders<'_> {
        match value.set() {
            None => Holders::One(value.0 as SlotId),
            Some(set) => Holders::Many(&self.sets[set].as_ref().expect("a value's set is there").members),
        }
    }

    /// The value with one more holder, if it is not among them; `None` when that would be a new set and there is no room.
    /// The old value is used up.
    pub(super) fn with(&mut self, value: Value, slot: SlotId, room_bytes: usize) -> Option<Value> {
        if let Some(step) = self.grown.filter(|step| (step.from, step.slot) == (value, slot)) {
            return Some(self.again(step));
        }
        // Most of what is stored again is held already, and a set may have a thousand members.
        if self.holders(value).contains(slot) {
            return Some(value);
        }
        let mut members: Vec<SlotId> = self.holders(value).iter().collect();
        members.insert(members.partition_point(|&member| member < slot), slot);
        let larger = self.acquire(members, room_bytes)?;
        self.grown = Some(Step { from: value, slot, to: larger });
        self.release(value);
        Some(larger)
    }

    /// The value without one of its holders, as with `retain`.
    pub(super) fn without(&mut self, value: Value, slot: SlotId, room_bytes: usize) -> Option<Value> {
        if let Some(step) = self.shrunk.filter(|step| (step.from, step.slot) == (value, slot)) {
            return Some(self.again(step));
        }
        if value == Value::one(slot) {
            return None;
        }
        if !self.holders(value).contains(slot) {
            return Some(value);
        }
        let members: Vec<SlotId> = self.holders(value).iter().filter(|&held| held != slot).collect();
        let first = members[0];
        let rest = self.acquire(members, room_bytes);
        // A first holder that remains alone for want of room is no step to take again.
        self.shrunk = rest.map(|to| Step { from: value, slot, to });
        self.release(value);
        Some(rest.unwrap_or(Value::one(first)))
    }

    /// One more prefix takes a step that the last one took.
    fn again(&mut self, step: Step) -> Value {
        if let Some(set) = step.to.set() {
            self.sets[set].as_mut().expect("a step is forgotten with its sets").uses += 1;
        }
        self.release(step.from);
        step.to
    }

    /// The value of those that may stay; `None` if nobody does. If the rest would be a new set and there is no room, its
    /// first holder alone remains: the index is a hint. The old value is used up.
    pub(super) fn retain(&mut self, value: Value, room_bytes: usize, stays: impl Fn(SlotId) -> bool) -> Option<Value> {
        let members: Vec<SlotId> = self.holders(value).iter().filter(|&slot| stays(slot)).collect();
        if members.len() == self.holders(value).count() {
            return Some(value);
        }
        let first = members.first().copied();
        let rest = first.map(|first| self.acquire(members, room_bytes).unwrap_or(Value::one(first)));
        self.release(value);
        rest
    }

    fn acquire(&mut self, members: Vec<SlotId>, room_bytes: usize) -> Option<Value> {
        if let [slot] = members[..] {
            return Some(Value::one(slot));
        }
        if let Some(&set) = self.by_members.get(&members[..]) {
            self.sets[set as usize].as_mut().expect("a listed set is there").uses += 1;
            return Some(Value(FIRST_SET + set));
        }
        let bytes = SET_BYTES + size_of_val(&members[..]);
        if bytes > room_bytes || (self.free.is_empty() && self.sets.len() >= MAX_SETS) {
            return None;
        }
        let members: Arc<[SlotId]> = members.into();
        let set = self.free.pop().unwrap_or_else(|| {
            self.sets.push(None);
            self.sets.len() as u32 - 1
        });
        self.sets[set as usize] = Some(Set { members: Arc::clone(&members), uses: 1 });
        self.by_members.insert(members, set);
        self.bytes += bytes;
        Some(Value(FIRST_SET + set))
    }

    /// One prefix less has this value.
    pub(super) fn release(&mut self, value: Value) {
        let Some(number) = value.set() else {
            return;
        };
        let set = self.sets[number].as_mut().expect("a value's set is there");
        set.uses -= 1;
        if set.uses == 0 {
            let set = self.sets[number].take().expect("it was just used");
            self.by_members.remove(&set.members);
            self.bytes -= SET_BYTES + size_of_val(&*set.members);
            self.free.push(number as u32);
            // The number may come to stand for others.
            self.grown = self.grown.filter(|step| step.from != value && step.to != value);
            self.shrunk = self.shrunk.filter(|step| step.from != value && step.to != value);
        }
    }

    /// Asserts that the counts are those of the values given, that each set is kept once, and in order.
    pub(super) fn check(&self, values: impl Iterator<Item = Value>) {
        let mut uses = vec![0_u32; self.sets.len()];
        for number in values.filter_map(Value::set) {
            uses[number] += 1;
        }
        for (number, set) in self.sets.iter().enumerate() {
            assert_eq!(set.as_ref().map_or(0, |set| set.uses), uses[number], "uses of set {number}");
            if let Some(set) = set {
                assert!(set.members.len() >= 2 && set.members.is_sorted_by(|a, b| a < b), "{set:?}");
                assert_eq!(self.by_members.get(&set.members).copied(), Some(number as u32), "{set:?}");
            }
        }
        assert_eq!(self.by_members.len() + self.free.len(), self.sets.len(), "every number is used or free");
    }
}
