//! What others may see of a replica: how full it is, what has happened, what it costs. O(1) but where it is said. Changes
//! nothing.

use crate::event::{ReplicaCounters, ReplicaLoad};
use crate::record::Record;
use crate::replica::Replica;
use llmscale_blocks::{CacheCounters, ContentId, IndexChange};
use llmscale_cost::CostModel;
use llmscale_types::{EngineLimits, FrontId, GroupId, Time};

impl Replica {
    /// How full the replica is.
    pub fn load(&self) -> ReplicaLoad {
        ReplicaLoad {
            waiting: self.queue.len() as u32,
            waiting_tokens: self.queue.tokens(),
            running: self.sequences.running(),
            prefill_backlog_tokens: self.prefill_backlog,
            free_blocks: self.blocks.free(),
            total_blocks: self.blocks.total(),
            steps_in_flight: self.flights.len() as u32,
        }
    }

    /// What has happened since the start.
    pub fn counters(&self) -> ReplicaCounters {
        self.counters
    }

    /// How often prefixes were found.
    pub fn cache_counters(&self) -> CacheCounters {
        self.blocks.counters()
    }

    /// Sequences of a group that take a row in every decoding step of it.
    pub fn decoding(&self, group: GroupId) -> u32 {
        self.groups.get(group).decoding
    }

    /// What steps cost here, as far as they have told.
    pub fn cost(&self) -> &CostModel {
        &self.cost
    }

    /// Predicted time until everything that waits has started.
    pub fn predicted_backlog_ns(&self) -> u64 {
        let tokens = self.queue.tokens() + self.prefill_backlog;
        if tokens == 0 {
            return 0;
        }
        let prefilling: usize = self.groups.iter().map(|group| group.prefilling.len()).sum();
        let prompts = self.queue.len() + prefilling;
        let prefill_ns = self.cost.predict_prompts(tokens.min(u64::from(u32::MAX)) as u32, prompts as u32);
        prefill_ns.saturating_add(self.decoding_beside_ns(prefill_ns))
    }

    /// What has to be changed in the records of the disk tier, in order.
    pub fn take_index_changes(&mut self) -> Vec<IndexChange> {
        self.blocks.take_index_changes()
    }

    /// The bounds it runs under.
    pub fn limits(&self) -> &EngineLimits {
        &self.limits
    }

    /// When the next deadline passes, for whoever sleeps.
    pub fn next_deadline(&self) -> Option<Time> {
        let deadline = self.deadlines.first().map(|entry| entry.0);
        [deadline, self.next_fetch_deadline(), self.saving_deadline()].into_iter().flatten().min()
    }

    /// Contents that can be found on whatever tiers. O(blocks), for tests and the simulator.
    pub fn whole_contents(&self) -> Vec<ContentId> {
        self.blocks.whole_contents()
    }

    /// Nothing waits, runs or is in flight.
    pub fn is_idle(&self) -> bool {
        self.queue.len() == 0 && self.sequences.running() == 0 && self.flights.is_empty()
    }

    /// Attempts of one front, waiting and running. O(everything), for tests and the simulator.
    pub fn attempts_of(&self, front: FrontId) -> usize {
        let running = self.sequences.occupied().map(|slot| self.sequences.record(slot).key());
        self.queue.iter().map(Record::key).chain(running).filter(|key| key.front == front).count()
    }
}
