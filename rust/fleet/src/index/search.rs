//! How far along a prompt its prefix is known, and who holds it from where on. Who holds a prefix holds what comes before it,
//! because replicas give up the ends of prefixes first; so holders become fewer along a prompt, and each level (a stretch
//! with equal holders) is found by a jump search that reads eight keys at once: two rounds for a level of a prompt of 64
//! keys, log9(keys) in general. Where a replica did give up a middle first, the answer is a wrong guess and nothing else.

use super::PrefixIndex;
use super::holders::{Holders, SlotId, Value};
use llmscale_types::PrefixKey;
use llmscale_types::ReplicaId;

/// Most levels that are told apart. The first is the conversation itself, the last the system prompt of all tenants.
const MAX_LEVELS: usize = 4;
/// Keys that are read together.
const WIDTH: usize = 8;
/// Values that are remembered for the levels that follow.
const MAX_PROBES: usize = 48;

/// Pairs of values that are looked through for levels. Two pairs may be of the same holders, told of one and sent to another.
const MAX_PAIRS: usize = 2 * MAX_LEVELS;

/// Who was told to hold a prefix, and who will hold it as it was sent there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Found {
    told: Option<Value>,
    sent: Option<Value>,
}

impl Found {
    fn is_nobody(self) -> bool {
        self == Self::default()
    }
}

/// A stretch of a prompt's prefix with equal holders.
#[derive(Clone, Copy, Debug)]
pub struct Level<'a> {
    keys: u32,
    /// Nobody is in both.
    told: Holders<'a>,
    sent: Holders<'a>,
    index: &'a PrefixIndex,
}

impl<'a> Level<'a> {
    /// Up to which key the prompt is held.
    pub fn keys(&self) -> u32 {
        self.keys
    }

    /// How many hold it, those included that have left since.
    pub fn count(&self) -> usize {
        self.told.count() + self.sent.count()
    }

    fn at(&self, place: usize) -> SlotId {
        let told = self.told.count();
        if place < told { self.told.at(place) } else { self.sent.at(place - told) }
    }

    fn contains(&self, slot: SlotId) -> bool {
        self.told.contains(slot) || self.sent.contains(slot)
    }

    fn is_held_as(&self, other: &Self) -> bool {
        self.count() == other.count() && (0..self.count()).all(|place| other.contains(self.at(place)))
    }

    /// The replica at a place below `count`; `None` if it has left.
    pub fn replica(&self, place: usize) -> Option<ReplicaId> {
        self.index.slots.owner(self.at(place))
    }

    /// All that hold it, in the order of the index.
    pub fn replicas(self) -> impl Iterator<Item = ReplicaId> + use<'a> {
        (0..self.count()).filter_map(move |place| self.replica(place))
    }
}

/// The levels of a prompt, deepest first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Levels<'a> {
    levels: [Option<Level<'a>>; MAX_LEVELS],
}

impl<'a> Levels<'a> {
    /// Deepest first.
    pub fn iter(&self) -> impl Iterator<Item = &Level<'a>> {
        self.levels.iter().flatten()
    }

    /// The deepest level that a replica holds.
    pub fn held_by(&self, replica: ReplicaId) -> Option<&Level<'a>> {
        let slot = self.iter().next()?.index.slots.of(replica)?;
        self.iter().find(|level| level.contains(slot))
    }
}

/// The values seen so far.
struct Search<'a> {
    index: &'a PrefixIndex,
    prompt: &'a [PrefixKey],
    probes: [(u32, Found); MAX_PROBES],
    count: usize,
}

impl<'a> Search<'a> {
    fn new(index: &'a PrefixIndex, prompt: &'a [PrefixKey]) -> Self {
        Self { index, prompt, probes: [(0, Found::default()); MAX_PROBES], count: 0 }
    }

    /// The last key before `high` whose value is still of the kind `below`, and its value; `low`, if none after it is.
    fn narrow(&mut self, low: u32, high: u32, below: impl Fn(Found) -> bool) -> (u32, Found) {
        let known = self.probes[..self.count].iter().filter(|(at, _)| (low..high).contains(at));
        let (mut low, mut low_value) = (low, Found::default());
        let mut high = high;
        for &(at, value) in known {
            match below(value) {
                true if at >= low => (low, low_value) = (at, value),
                false if at < high => high = at,
                true | false => {}
            }
        }
        while high.saturating_sub(low) > 1 {
            let span = u64::from(high - low);
            // Whoever holds the first key holds all of the last level: reading it at once saves a round at the end.
            let first = u64::from(self.count == 0);
            let parts = WIDTH as u64 + 1 - first;
            let places: [u32; WIDTH] =
                std::array::from_fn(|at| low + ((span * (at as u64 + 1 - first) / parts) as u32).max(1));
            let keys = places.map(|at| self.prompt[at as usize - 1]);
            let told = self.index.table.get_all(keys);
            let sent = keys.map(|key| self.index.speculation.get(key));
            for (&at, (&told, &sent)) in places.iter().zip(told.iter().zip(&sent)) {
                let value = Found { told: told.filter(|&told| self.index.is_alive(told)), sent };
                self.remember(at, value);
                if !below(value) {
                    high = at;
                    break;
                }
                (low, low_value) = (at, value);
            }
        }
        (low, low_value)
    }

    fn remember(&mut self, at: u32, value: Found) {
        if let Some(place) = self.probes.get_mut(self.count) {
            *place = (at, value);
            self.count += 1;
        }
    }
}

impl PrefixIndex {
    /// Who holds how much of a prompt, of which these are the keys in order.
    pub fn levels(&self, prompt: &[PrefixKey]) -> Levels<'_> {
        let mut levels = Levels::default();
        let mut search = Search::new(self, prompt);
        let (mut keys, mut found) = search.narrow(0, prompt.len() as u32 + 1, |found| !found.is_nobody());
        let mut count = 0;
        for _ in 0..MAX_PAIRS {
            if found.is_nobody() || count == MAX_LEVELS {
                break;
            }
            let holders = |value: Option<Value>| value.map_or(Holders::NOBODY, |value| self.table.holders(value));
            let level = Level { keys, told: holders(found.told), sent: holders(found.sent), index: self };
            let deeper = count.checked_sub(1).and_then(|last| levels.levels[last]);
            if deeper.is_none_or(|deeper| !deeper.is_held_as(&level)) {
                levels.levels[count] = Some(level);
                count += 1;
            }
            (keys, found) = search.narrow(0, keys, |other| other != found);
        }
        levels
    }

    /// Whether a holder has not left.
    fn is_alive(&self, value: Value) -> bool {
        let alive = |slot: SlotId| self.slots.owner(slot).is_some();
        self.table.holders(value).iter().any(alive)
    }
}
