//! Which replica holds which prefix, as far as their events have told: the routing index of one front. `table` holds keys
//! and holders, `slots` the numbers of replicas, `feed` judges whether events are missing, `speculation` what was sent and
//! not confirmed, `search` answers for a prompt. All of it is a hint with bounded memory: what it forgets or gets wrong
//! costs a prefill, and never a token. O(1) per key and event while few replicas share a prefix; see
//! `docs/adr/0009-the-routing-index.md`.

mod feed;
mod holders;
mod search;
mod segment;
mod slots;
mod speculation;
mod table;

pub use feed::Taken;
pub use search::{Level, Levels};

use feed::Feed;
use holders::SlotId;
use llmscale_types::{Duration, KvEvent, LimitError, PrefixKey, ReplicaId, Time};
use rustc_hash::FxHashMap;
use slots::Slots;
use speculation::Speculation;
use table::{Held, Table};

/// Segments that a change sweeps when numbers wait for it: a whole round is done within some ten thousand changes.
const SWEEP_SEGMENTS: usize = 2;
/// Keys whose places are brought near together.
const NEAR_KEYS: usize = 16;
const LEAST_BYTES: usize = 1 << 20;

/// Settings of an index.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IndexOptions {
    /// Most memory of keys, holders and what is unconfirmed.
    pub max_bytes: usize,
    /// Tokens that one key stands for.
    pub tokens_per_key: u32,
    /// Most prefixes that are unconfirmed at a time.
    pub max_pending_keys: u32,
    /// How long a prefix counts as held after a prompt was sent, unless an event confirms it.
    pub max_pending: Duration,
    /// How long an answer about missing events may take before they are asked for again.
    pub ask_again_after: Duration,
}

impl Default for IndexOptions {
    fn default() -> Self {
        Self {
            max_bytes: 128 << 20,
            tokens_per_key: PrefixKey::TOKENS,
            max_pending_keys: 65_536,
            max_pending: Duration::from_millis(30_000),
            ask_again_after: Duration::from_millis(1_000),
        }
    }
}

impl IndexOptions {
    /// Checks that the sizes fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        LimitError::at_least("tokens_per_key", u64::from(self.tokens_per_key), 1)?;
        LimitError::at_least("max_pending_keys", u64::from(self.max_pending_keys), 1)?;
        LimitError::at_most("max_pending_keys", u64::from(self.max_pending_keys), Speculation::MAX_PENDING)?;
        LimitError::at_least("max_bytes", self.max_bytes as u64, (self.pending_bytes() + LEAST_BYTES) as u64)
    }

    fn pending_bytes(&self) -> usize {
        self.max_pending_keys as usize * Speculation::MAX_BYTES
    }
}

/// Counts since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IndexCounters {
    /// Keys that were forgotten because memory was used up.
    pub evicted_keys: u64,
    /// Holders that were not recorded because memory was used up.
    pub untold_holders: u64,
    /// Gaps in the events of a replica.
    pub gaps: u64,
}

/// The index.
#[derive(Debug)]
pub struct PrefixIndex {
    options: IndexOptions,
    table: Table,
    slots: Slots,
    /// For look-ups only.
    feeds: FxHashMap<ReplicaId, Feed>,
    speculation: Speculation,
    swept_segments: u64,
    counters: IndexCounters,
}

impl PrefixIndex {
    /// An index that knows nothing.
    pub fn new(options: IndexOptions) -> Result<Self, LimitError> {
        options.check()?;
        Ok(Self {
            table: Table::new(options.max_bytes - options.pending_bytes()),
            slots: Slots::default(),
            feeds: FxHashMap::default(),
            speculation: Speculation::new(options.max_pending_keys),
            swept_segments: 0,
            counters: IndexCounters::default(),
            options,
        })
    }

    /// Tokens that one key stands for.
    pub fn tokens_per_key(&self) -> u32 {
        self.options.tokens_per_key
    }

    /// A new incarnation of a replica, which holds nothing that we know of. Its events are expected from number 0 on; if the
    /// first is a later one, what came before is asked for.
    pub fn join(&mut self, replica: ReplicaId) {
        self.leave(replica);
        self.number(replica);
        self.feeds.insert(replica, Feed::default());
    }

    /// A replica is gone, with all that it holds.
    pub fn leave(&mut self, replica: ReplicaId) {
        self.feeds.remove(&replica);
        self.forget(replica);
    }

    fn forget(&mut self, replica: ReplicaId) {
        if let Some(slot) = self.slots.retire(replica, self.swept_segments) {
            self.speculation.forget(&mut self.table.sets_mut(), slot);
        }
    }

    /// A number for a replica. All 65,536 being used up means that more replicas came and went than a sweep keeps up with;
    /// the sweep is then finished at once. A fleet with more replicas than numbers does without the last ones' prefixes.
    fn number(&mut self, replica: ReplicaId) -> Option<SlotId> {
        self.slots.give(replica).or_else(|| {
            self.sweep(self.table.segments());
            self.slots.give(replica)
        })
    }

    /// Takes a batch of events. An unknown replica's are dropped: its connection has ended.
    pub fn apply(&mut self, now: Time, replica: ReplicaId, number: u64, events: &[KvEvent]) -> Taken {
        let Some(feed) = self.feeds.get_mut(&replica) else {
            return Taken::Unknown;
        };
        let taken = feed.take(now, number, self.options.ask_again_after);
        match taken {
            Taken::Applied => events.iter().for_each(|event| self.apply_event(replica, event)),
            Taken::Ask { .. } => self.counters.gaps += 1,
            Taken::Old | Taken::Waiting | Taken::Unknown => {}
        }
        self.sweep(SWEEP_SEGMENTS);
        taken
    }

    fn apply_event(&mut self, replica: ReplicaId, event: &KvEvent) {
        let Some(slot) = self.slots.of(replica) else {
            return;
        };
        match event {
            KvEvent::Stored(keys) => self.change_each(keys, |index, key| {
                index.settle(slot, key);
                index.hold(slot, key);
            }),
            KvEvent::Removed(keys) => self.change_each(keys, |index, key| {
                index.settle(slot, key);
                index.table.release(key, slot);
            }),
            KvEvent::Cleared => {
                self.forget(replica);
                self.number(replica);
            }
        }
    }

    fn change_each(&mut self, keys: &[PrefixKey], change: impl Fn(&mut Self, PrefixKey)) {
        for some in keys.chunks(NEAR_KEYS) {
            self.table.approach(some);
            for &key in some {
                change(self, key);
            }
        }
    }

    /// Takes a snapshot: all that a replica holds after the batch of a number.
    pub fn apply_snapshot(&mut self, replica: ReplicaId, number: u64, keys: &[PrefixKey]) -> Taken {
        let Some(feed) = self.feeds.get_mut(&replica) else {
            return Taken::Unknown;
        };
        let taken = feed.take_snapshot(number);
        if taken == Taken::Applied {
            self.forget(replica);
            if let Some(slot) = self.number(replica) {
                self.change_each(keys, |index, key| index.hold(slot, key));
            }
        }
        self.sweep(SWEEP_SEGMENTS);
        taken
    }

    /// A prompt is on its way to a replica, which will hold its prefixes: they count as held until an event says so, or until
    /// that took too long. Returns how many of them it counted as holding before.
    pub fn dispatch(&mut self, now: Time, replica: ReplicaId, prompt: &[PrefixKey]) -> u32 {
        self.expire(now);
        let known = self.levels(prompt).held_by(replica).map_or(0, Level::keys);
        if let Some(slot) = self.slots.of(replica) {
            let until = now + self.options.max_pending;
            // Only what it holds already can have been told, and only that is looked up, key by key: the table is in no cache
            // of the processor. If its prefix has a hole, what comes behind may be held twice, which only counts it twice.
            let (held, new) = prompt.split_at(known as usize);
            for some in held.chunks(NEAR_KEYS) {
                self.table.approach(some);
                for &key in some {
                    if !self.table.touch(key, slot) {
                        self.expect(slot, key, until);
                    }
                }
            }
            for some in new.chunks(NEAR_KEYS) {
                self.speculation.approach(slot, some);
                for &key in some {
                    self.expect(slot, key, until);
                }
            }
        }
        self.sweep(SWEEP_SEGMENTS);
        known
    }

    fn expect(&mut self, slot: SlotId, key: PrefixKey, until: Time) {
        let told = self.speculation.add(&mut self.table.sets_mut(), slot, key, until);
        self.counters.untold_holders += u64::from(!told);
    }

    /// Forgets what was not confirmed in time.
    pub fn expire(&mut self, now: Time) {
        self.speculation.expire(&mut self.table.sets_mut(), now);
    }

    fn settle(&mut self, slot: SlotId, key: PrefixKey) {
        self.speculation.settle(&mut self.table.sets_mut(), slot, key);
    }

    fn hold(&mut self, slot: SlotId, key: PrefixKey) {
        let held = self.table.hold(key, slot);
        self.counters.untold_holders += u64::from(held == Held::Untold);
    }

    /// Forgets holders that have left, in as many segments, if there may be any.
    pub fn sweep(&mut self, segments: usize) {
        for _ in 0..segments {
            if !self.slots.wait_for_sweep() {
                return;
            }
            let segment = (self.swept_segments % self.table.segments() as u64) as usize;
            self.table.sweep(segment, |slot| self.slots.owner(slot).is_some());
            self.swept_segments += 1;
            self.slots.swept(self.swept_segments, self.table.segments());
        }
    }

    /// How many prefixes somebody was told to hold, those included whose holders have just left.
    pub fn keys(&self) -> usize {
        self.table.keys()
    }

    /// How many prefixes count as held because they were sent, each once for every replica.
    pub fn pending_keys(&self) -> usize {
        self.speculation.pending()
    }

    /// Memory in use.
    pub fn bytes(&self) -> usize {
        self.table.bytes() + self.speculation.bytes() + self.slots.bytes() + self.feeds.capacity() * 32
    }

    /// Counts since the start.
    pub fn counters(&self) -> IndexCounters {
        IndexCounters { evicted_keys: self.table.evicted(), ..self.counters }
    }

    /// Asserts what holds between events. O(keys).
    pub fn check(&self) {
        self.table.check(self.speculation.values());
        self.slots.check();
        self.speculation.check(self.table.sets());
        assert!(self.speculation.bytes() <= self.options.pending_bytes().max(1 << 12), "bytes of what is unconfirmed");
    }
}
