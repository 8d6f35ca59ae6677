//! Dynamo's radix tree (the crate dynamo-kv-router).

use crate::measure::{resident_bytes, tell, time_each};
use crate::workload::{Workload, mix};
use dynamo_kv_router::RadixTree;
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData, KvCacheStoredBlockData,
    LocalBlockHash, RouterEvent,
};
use std::time::Instant;

/// Tells the figures that can be compared.
pub fn run(workload: Workload, prompts: u64) {
    let before = resident_bytes();
    let mut tree = RadixTree::new();
    let mut stored = 0_u64;
    let mut nanoseconds = 0;
    for conversation in 0..workload.conversations() {
        let chain = workload.chain(conversation);
        for replica in workload.holders(conversation) {
            let blocks = chain.iter().map(|&key| KvCacheStoredBlockData {
                block_hash: ExternalSequenceBlockHash(mix(key)),
                tokens_hash: LocalBlockHash(key),
                mm_extra_info: None,
            });
            let data = KvCacheStoreData { parent_hash: None, start_position: None, blocks: blocks.collect() };
            let event = KvCacheEvent { event_id: conversation, data: KvCacheEventData::Stored(data), dp_rank: 0 };
            let event = RouterEvent::new(u64::from(replica), event);
            let started = Instant::now();
            tree.apply_event(event).expect("a chain from the root is taken");
            nanoseconds += started.elapsed().as_nanos();
            stored += 64;
        }
    }
    tell("events/stored keys", "1/s", stored as f64 / (nanoseconds as f64 / 1e9));
    let held = workload.conversations() * 56 + 800;
    tell("memory/resident", "bytes/key", (resident_bytes() - before) as f64 / held as f64);
    let prompts: Vec<Vec<LocalBlockHash>> =
        workload.prompts(prompts).into_iter().map(|prompt| prompt.into_iter().map(LocalBlockHash).collect()).collect();
    // The tree takes its prompt by value; copying 64 words is part of asking it.
    time_each("lookup", &prompts, |prompt| tree.find_matches(prompt.clone(), false).scores.len());
}
