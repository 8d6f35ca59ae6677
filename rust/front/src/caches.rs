//! What replicas tell of their prefix caches goes into the fleet's index; what is missing is asked for again. A front that
//! keeps no index asks nobody and is told nothing. O(1) per name.

use crate::event::{FrontAction, ToReplica};
use crate::front::Front;
use llmscale_fleet::Taken;
use llmscale_types::{KvEvent, PrefixKey, ReplicaId, Time};

impl Front {
    pub(crate) fn kv_changes(
        &mut self,
        now: Time,
        replica: ReplicaId,
        number: u64,
        events: &[KvEvent],
        out: &mut Vec<FrontAction>,
    ) {
        let taken = self.fleet.prefixes_mut().map(|prefixes| prefixes.apply(now, replica, number, events));
        ask_if_missing(replica, taken, out);
    }

    /// A report names the last change. A replica that has just come up is asked for all that it holds.
    pub(crate) fn kv_heard_of(&mut self, now: Time, replica: ReplicaId, number: u64, out: &mut Vec<FrontAction>) {
        let taken = self.fleet.prefixes_mut().map(|prefixes| prefixes.hear_of(now, replica, number));
        ask_if_missing(replica, taken, out);
    }

    pub(crate) fn kv_snapshot(&mut self, replica: ReplicaId, number: u64, keys: &[PrefixKey]) {
        if let Some(prefixes) = self.fleet.prefixes_mut() {
            // A snapshot that is older than what is known says nothing new.
            let _ = prefixes.apply_snapshot(replica, number, keys);
        }
    }

    /// Whether a replica is said to hold a prefix; `None` if this front does not look at caches.
    pub fn says_held(&self, replica: ReplicaId, key: PrefixKey) -> Option<bool> {
        self.fleet.prefixes().map(|prefixes| prefixes.levels(&[key]).held_by(replica).is_some())
    }

    /// Tokens per block of the replicas that serve a model, if names of a prompt's prefixes would make a difference: a front
    /// that looks at caches, and more than one replica.
    pub fn block_tokens_for_names(&self, model: &str) -> Option<u32> {
        self.fleet.prefixes()?;
        let pool = self.fleet.serving(model)?;
        let mut alive = self.fleet.pool_members(pool).filter(|member| member.state.is_some());
        let (first, _second) = (alive.next()?, alive.next()?);
        Some(first.limits.block_tokens)
    }
}

fn ask_if_missing(replica: ReplicaId, taken: Option<Taken>, out: &mut Vec<FrontAction>) {
    if let Some(Taken::Ask { from }) = taken {
        out.push(FrontAction::Send { replica, message: ToReplica::KvAsk { from } });
    }
}
