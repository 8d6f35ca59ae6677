//! The bounded table of replicas, the pools that they form with the order of their loads, and what they hold of prompts.
//! Replicas that are down stay listed, so that they are seen and their speed is remembered, until a newcomer needs the
//! place. Looking at one is O(1), changing one O(log replicas).

use crate::ejection::Court;
use crate::index::PrefixIndex;
use crate::member::{Load, Member, ModelKey, Offer, PoolId, ReplicaState};
use crate::ranking::Ranking;
use llmscale_types::{PrefixKey, ReplicaId, Time};
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

/// More replicas than this front serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FleetFull {
    /// The bound.
    pub max_replicas: u32,
}

/// All replicas of one front.
#[derive(Debug)]
pub struct Fleet {
    members: Vec<Member>,
    /// Where each is, in the order of their numbers.
    places: BTreeMap<ReplicaId, u32>,
    /// The same, for look-ups only.
    place_of: FxHashMap<ReplicaId, u32>,
    pools: Vec<ModelKey>,
    /// By pool number.
    rankings: Vec<Ranking>,
    prefixes: Option<PrefixIndex>,
    pub(crate) court: Court,
    max_replicas: u32,
}

/// A replica that is being changed. Its place among the others follows when this is dropped.
#[derive(Debug)]
pub struct MemberMut<'a> {
    fleet: &'a mut Fleet,
    place: u32,
}

impl Deref for MemberMut<'_> {
    type Target = Member;

    fn deref(&self) -> &Member {
        &self.fleet.members[self.place as usize]
    }
}

impl DerefMut for MemberMut<'_> {
    fn deref_mut(&mut self) -> &mut Member {
        &mut self.fleet.members[self.place as usize]
    }
}

impl Drop for MemberMut<'_> {
    fn drop(&mut self) {
        self.fleet.rank(self.place);
    }
}

impl Fleet {
    /// An empty fleet of at most `max_replicas`, which nobody tells what replicas hold.
    pub fn new(max_replicas: u32) -> Self {
        Self {
            members: Vec::new(),
            places: BTreeMap::new(),
            place_of: FxHashMap::default(),
            pools: Vec::new(),
            rankings: Vec::new(),
            prefixes: None,
            court: Court::default(),
            max_replicas,
        }
    }

    /// An empty fleet with an index of what replicas hold.
    pub fn with_prefixes(max_replicas: u32, prefixes: PrefixIndex) -> Self {
        Self { prefixes: Some(prefixes), ..Self::new(max_replicas) }
    }

    /// What replicas hold; `None` if nobody tells.
    pub fn prefixes(&self) -> Option<&PrefixIndex> {
        self.prefixes.as_ref()
    }

    /// What replicas hold, to change.
    pub fn prefixes_mut(&mut self) -> Option<&mut PrefixIndex> {
        self.prefixes.as_mut()
    }

    /// A prompt of these prefixes is on its way to a replica. Returns how many of its tokens are said to be cached there; it
    /// counts as holding all of them from now on.
    pub fn dispatch(&mut self, now: Time, id: ReplicaId, prefix: &[PrefixKey]) -> u32 {
        let Some(prefixes) = self.prefixes.as_mut().filter(|_| !prefix.is_empty()) else { return 0 };
        let cached_keys = prefixes.dispatch(now, id, prefix);
        cached_keys.saturating_mul(prefixes.tokens_per_key())
    }

    /// A replica is connected. An earlier incarnation must have left.
    pub fn join(&mut self, id: ReplicaId, offer: Offer) -> Result<PoolId, FleetFull> {
        let full = FleetFull { max_replicas: self.max_replicas };
        let place = match self.place_of.get(&id) {
            Some(&place) => place,
            None if self.members.len() < self.max_replicas as usize => self.members.len() as u32,
            None => self.oldest_gone().ok_or(full)?,
        };
        let pool = self.pool_of(&offer.model).ok_or(full)?;
        match self.members.get_mut(place as usize) {
            Some(member) if member.id == id => {
                assert_eq!(member.state, None, "the last incarnation has left");
                member.rejoin(pool, offer);
            }
            Some(gone) => {
                self.places.remove(&gone.id);
                self.place_of.remove(&gone.id);
                *gone = Member::new(id, pool, offer);
            }
            None => self.members.push(Member::new(id, pool, offer)),
        }
        self.places.insert(id, place);
        self.place_of.insert(id, place);
        if let Some(prefixes) = &mut self.prefixes {
            prefixes.join(id);
        }
        self.rank(place);
        Ok(pool)
    }

    /// The place of the lowest replica that is down.
    fn oldest_gone(&self) -> Option<u32> {
        self.places.values().copied().find(|&place| self.members[place as usize].state.is_none())
    }

    /// A replica is gone. Its attempts must have been taken back.
    pub fn leave(&mut self, id: ReplicaId) {
        if let Some(mut member) = self.get_mut(id) {
            assert_eq!(member.load, Load::default(), "attempts are taken back first");
            member.state = None;
            member.report = None;
            member.refused_until = None;
            member.pause();
        }
        if let Some(prefixes) = &mut self.prefixes {
            prefixes.leave(id);
        }
    }

    /// Moves a replica to where its load belongs. It leaves its pool's ranking before it changes pools, as it is not ready
    /// in between.
    fn rank(&mut self, place: u32) {
        let member = &self.members[place as usize];
        let pool = member.pool;
        let ranking = &mut self.rankings[pool.0 as usize];
        let ready = ranking.count();
        if member.state == Some(ReplicaState::Ready) {
            ranking.set(member.id, member.last_known_work_ns());
        } else {
            ranking.remove(member.id);
        }
        if ranking.count() != ready {
            self.keep_half(pool);
        }
    }

    /// The ready replicas of a pool.
    pub(crate) fn ranking(&self, pool: PoolId) -> &Ranking {
        &self.rankings[pool.0 as usize]
    }

    /// The number of a pool, new if nobody ran this model before. `None` when there are too many: pools are few, and one
    /// per replica place is far more than any deployment keeps.
    fn pool_of(&mut self, model: &ModelKey) -> Option<PoolId> {
        if let Some(place) = self.pools.iter().position(|known| known == model) {
            return Some(PoolId(place as u32));
        }
        if self.pools.len() >= self.max_replicas as usize * 4 {
            return None;
        }
        self.pools.push(model.clone());
        self.rankings.push(Ranking::default());
        Some(PoolId(self.pools.len() as u32 - 1))
    }

    /// One replica.
    pub fn get(&self, id: ReplicaId) -> Option<&Member> {
        self.place_of.get(&id).map(|&place| &self.members[place as usize])
    }

    /// One replica, to change.
    pub fn get_mut(&mut self, id: ReplicaId) -> Option<MemberMut<'_>> {
        let place = *self.place_of.get(&id)?;
        Some(MemberMut { fleet: self, place })
    }

    /// All replicas in the order of their numbers.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.places.values().map(|&place| &self.members[place as usize])
    }

    /// The replicas of one pool in the order of their numbers.
    pub fn pool_members(&self, pool: PoolId) -> impl Iterator<Item = &Member> {
        self.members().filter(move |member| member.pool == pool)
    }

    /// What a pool runs.
    pub fn model(&self, pool: PoolId) -> &ModelKey {
        &self.pools[pool.0 as usize]
    }

    /// How many pools there have been; their numbers are below.
    pub fn pool_count(&self) -> u32 {
        self.pools.len() as u32
    }

    /// The pool that serves a name: one with a replica that is ready, else connected, else known; the newest of equals,
    /// so that a new revision takes over as soon as it can.
    pub fn serving(&self, served_name: &str) -> Option<PoolId> {
        (0..self.pool_count())
            .map(PoolId)
            .filter(|&pool| self.model(pool).served_name() == served_name)
            .max_by_key(|&pool| (self.best_state(pool), pool))
    }

    /// 2 with a ready replica, 1 with a connected one, 0 with none.
    fn best_state(&self, pool: PoolId) -> u8 {
        self.pool_members(pool)
            .map(|member| match member.state {
                Some(ReplicaState::Ready) => 2,
                Some(ReplicaState::Starting | ReplicaState::Recovering | ReplicaState::Draining) => 1,
                None => 0,
            })
            .max()
            .unwrap_or(0)
    }

    /// The longest sequence, up to a limit, that a replica of a pool takes which is there and stays: 0 if each takes longer
    /// ones. O(replicas).
    pub fn widest(&self, pool: PoolId, limit: u64) -> u64 {
        let stays = |state: ReplicaState| state != ReplicaState::Draining;
        let there = self.pool_members(pool).filter(|member| member.state.is_some_and(stays));
        let lengths = there.map(|member| u64::from(member.limits.max_sequence_tokens));
        lengths.filter(|&length| length <= limit).max().unwrap_or(0)
    }

    /// Whether a pool has a replica to wait for: one that is ready, or loads its model for the first time, which may take
    /// minutes, or drains, which its node does not do for long and may do to be started again. Not one whose worker died:
    /// the next one is there within a second, or, where each dies as it starts, never.
    pub fn has_prospect(&self, pool: PoolId) -> bool {
        let waited_for = |state| state != ReplicaState::Recovering;
        self.pool_members(pool).any(|member| member.state.is_some_and(waited_for))
    }

    /// Whether a pool has a connected replica.
    pub fn is_alive(&self, pool: PoolId) -> bool {
        self.best_state(pool) > 0
    }
}
