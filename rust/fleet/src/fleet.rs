//! The bounded table of replicas and the pools that they form. Replicas that are down stay listed, so that they are seen
//! and their speed is remembered, until a newcomer needs the place. Look-ups are O(log replicas).

use crate::member::{Load, Member, ModelKey, Offer, PoolId, ReplicaState};
use llmscale_types::ReplicaId;
use std::collections::BTreeMap;

/// More replicas than this front serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FleetFull {
    /// The bound.
    pub max_replicas: u32,
}

/// All replicas of one front.
#[derive(Debug)]
pub struct Fleet {
    members: BTreeMap<ReplicaId, Member>,
    pools: Vec<ModelKey>,
    max_replicas: u32,
}

impl Fleet {
    /// An empty fleet of at most `max_replicas`.
    pub fn new(max_replicas: u32) -> Self {
        Self { members: BTreeMap::new(), pools: Vec::new(), max_replicas }
    }

    /// A replica is connected. An earlier incarnation must have left.
    pub fn join(&mut self, id: ReplicaId, offer: Offer) -> Result<PoolId, FleetFull> {
        let full = FleetFull { max_replicas: self.max_replicas };
        if !self.members.contains_key(&id) && self.members.len() >= self.max_replicas as usize {
            let gone = self.members.values().find(|member| member.state.is_none()).map(|member| member.id);
            self.members.remove(&gone.ok_or(full)?);
        }
        let pool = self.pool_of(&offer.model).ok_or(full)?;
        match self.members.get_mut(&id) {
            Some(member) => {
                assert_eq!(member.state, None, "the last incarnation has left");
                member.rejoin(pool, offer);
            }
            None => drop(self.members.insert(id, Member::new(id, pool, offer))),
        }
        Ok(pool)
    }

    /// A replica is gone. Its attempts must have been taken back.
    pub fn leave(&mut self, id: ReplicaId) {
        if let Some(member) = self.members.get_mut(&id) {
            assert_eq!(member.load, Load::default(), "attempts are taken back first");
            member.state = None;
            member.report = None;
            member.refused_until = None;
            member.pause();
        }
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
        Some(PoolId(self.pools.len() as u32 - 1))
    }

    /// One replica.
    pub fn get(&self, id: ReplicaId) -> Option<&Member> {
        self.members.get(&id)
    }

    /// One replica, to change.
    pub fn get_mut(&mut self, id: ReplicaId) -> Option<&mut Member> {
        self.members.get_mut(&id)
    }

    /// All replicas in the order of their numbers.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// The replicas of one pool in the order of their numbers.
    pub fn pool_members(&self, pool: PoolId) -> impl Iterator<Item = &Member> {
        self.members.values().filter(move |member| member.pool == pool)
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

    /// Whether a pool has a connected replica.
    pub fn is_alive(&self, pool: PoolId) -> bool {
        self.best_state(pool) > 0
    }
}
