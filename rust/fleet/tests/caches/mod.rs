//! A fleet of which only two things are modelled: each replica keeps the last `max_blocks` blocks that its prompts used, and
//! computes what it does not find at a fixed speed, one prompt after the other, no decoding. Baselines published for
//! Mooncake's conversation trace use the same model. The choice is the policy's; the fleet and its index are told at once.

use llmscale_cost::StepShape;
use llmscale_fleet::{Fleet, IndexOptions, KvEvent, Load, Need, Policy, PoolId, PrefixIndex, PrefixKey};
use llmscale_types::{Duration, ReplicaId, RequestId, StepId, Time};
use std::collections::{BTreeMap, HashMap};

/// One prompt: its blocks as chained ids.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    pub(crate) arrived_us: u64,
    pub(crate) tokens: u64,
    pub(crate) blocks: Vec<u64>,
}

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) replicas: u32,
    pub(crate) max_blocks: usize,
    pub(crate) block_tokens: u32,
    /// Speed of one replica, as the time of a token.
    pub(crate) token_ns: u64,
}

/// What came out.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    /// Per prompt, the work on the chosen replica ahead of it, and with its own.
    pub(crate) ahead_us: Vec<u64>,
    pub(crate) done_us: Vec<u64>,
    /// Computed tokens per replica.
    pub(crate) computed_tokens: Vec<u64>,
}

/// The value that a hundredth of the values exceed.
pub(crate) fn percentile_99(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() * 99 / 100]
}

/// Blocks by last use, children before their parents.
#[derive(Default)]
struct Cache {
    stamps: HashMap<u64, u64>,
    oldest: BTreeMap<u64, u64>,
    clock: u64,
}

impl Cache {
    fn held(&self, blocks: &[u64]) -> u64 {
        blocks.iter().take_while(|block| self.stamps.contains_key(block)).count() as u64
    }

    /// Uses some blocks; returns those that are new and those that had to go.
    fn touch(&mut self, blocks: &[u64], max_blocks: usize) -> (Vec<u64>, Vec<u64>) {
        let mut stored = Vec::new();
        for &block in blocks.iter().rev() {
            self.clock += 1;
            match self.stamps.insert(block, self.clock) {
                Some(stamp) => _ = self.oldest.remove(&stamp),
                None => stored.push(block),
            }
            self.oldest.insert(self.clock, block);
        }
        let mut removed = Vec::new();
        while self.stamps.len() > max_blocks {
            let (_, block) = self.oldest.pop_first().expect("each block has a stamp");
            self.stamps.remove(&block);
            removed.push(block);
        }
        (stored, removed)
    }
}

struct Model {
    fleet: Fleet,
    pool: PoolId,
    sizes: Sizes,
    caches: Vec<Cache>,
    batches: Vec<u64>,
    busy_until_us: Vec<u64>,
}

/// A key that is as uniform as a hash.
fn key(block: u64) -> PrefixKey {
    let mixed = (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    PrefixKey((mixed ^ (mixed >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93))
}

/// Sends the prompts, in order of arrival, where the policy says.
pub(crate) fn run(policy: &dyn Policy, sizes: Sizes, prompts: &[Prompt]) -> Outcome {
    let mut model = Model::new(sizes);
    let mut outcome = Outcome {
        prompt_tokens: 0,
        cached_tokens: 0,
        ahead_us: Vec::new(),
        done_us: Vec::new(),
        computed_tokens: vec![0; sizes.replicas as usize],
    };
    for (number, prompt) in prompts.iter().enumerate() {
        model.send(policy, number as u64, prompt, &mut outcome);
    }
    outcome
}

impl Model {
    fn new(sizes: Sizes) -> Self {
        let options = IndexOptions { tokens_per_key: sizes.block_tokens, ..IndexOptions::default() };
        let index = PrefixIndex::new(options).expect("the sizes fit together");
        let (mut fleet, pool) = crate::common::filled(Fleet::with_prefixes(sizes.replicas, index), sizes.replicas);
        for replica in 0..sizes.replicas {
            let mut now = 0;
            for step in 0..64 {
                let tokens = 256 * (1 + step % 16);
                let shape = StepShape { prefill_tokens: tokens as u32, ..StepShape::default() };
                now += tokens * sizes.token_ns / 1_000;
                let mut member = fleet.get_mut(ReplicaId(replica)).expect("it joined");
                member.observe(StepId(step), Time(now), shape);
                member.limits.max_sequence_tokens = u32::MAX;
            }
        }
        let replicas = sizes.replicas as usize;
        let caches = (0..replicas).map(|_| Cache::default()).collect();
        Self { fleet, pool, sizes, caches, batches: vec![0; replicas], busy_until_us: vec![0; replicas] }
    }

    fn send(&mut self, policy: &dyn Policy, number: u64, prompt: &Prompt, outcome: &mut Outcome) {
        let now = prompt.arrived_us;
        for replica in 0..self.sizes.replicas {
            let ahead_us = self.busy_until_us[replica as usize].saturating_sub(now);
            let mut member = self.fleet.get_mut(ReplicaId(replica)).expect("it joined");
            member.load = Load { unstarted_tokens: ahead_us * 1_000 / self.sizes.token_ns, ..Load::default() };
        }
        let need = Need {
            request: RequestId(number),
            pool: self.pool,
            total_tokens: prompt.tokens,
            context_tokens: prompt.tokens,
            output_tokens: 0,
            prefix: prompt.blocks.iter().copied().map(key).collect(),
            numerics: None,
            look_ahead: Duration(u64::MAX / 2_000),
            now: Time(now),
        };
        let replica = policy.choose(&self.fleet, &need).expect("every replica takes everything");
        let place = replica.0 as usize;
        let block_tokens = u64::from(self.sizes.block_tokens);
        let cached = (self.caches[place].held(&prompt.blocks) * block_tokens).min(prompt.tokens);
        let computed = prompt.tokens - cached;
        let start = self.busy_until_us[place].max(now);
        self.busy_until_us[place] = start + computed * self.sizes.token_ns / 1_000;
        outcome.prompt_tokens += prompt.tokens;
        outcome.cached_tokens += cached;
        outcome.computed_tokens[place] += computed;
        outcome.ahead_us.push(start - now);
        outcome.done_us.push(self.busy_until_us[place] - now);
        let (stored, removed) = self.caches[place].touch(&prompt.blocks, self.sizes.max_blocks);
        let keys = |blocks: Vec<u64>| blocks.into_iter().map(key).collect();
        let events = [KvEvent::Stored(keys(stored)), KvEvent::Removed(keys(removed))];
        let index = self.fleet.prefixes_mut().expect("it has an index");
        index.apply(Time(now), replica, self.batches[place], &events);
        self.batches[place] += 1;
    }
}
