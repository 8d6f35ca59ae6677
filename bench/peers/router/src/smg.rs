//! SMG's chain index (the crate kv-index).

use crate::measure::{resident_bytes, tell, time_each};
use crate::workload::{Workload, mix};
use kv_index::{ChainBlockMap, ChainIndex, ContentHash, SequenceHash, StoredBlock};
use std::time::Instant;

/// Tells the figures that can be compared.
pub fn run(workload: Workload, prompts: u64) {
    let before = resident_bytes();
    let index = ChainIndex::with_max_workers(workload.replicas as usize);
    let mut workers: Vec<(u32, ChainBlockMap)> = (0..workload.replicas)
        .map(|replica| {
            (index.intern_worker(&format!("worker-{replica}")).expect("there is room"), ChainBlockMap::new())
        })
        .collect();
    let mut stored = 0_u64;
    let mut nanoseconds = 0;
    for conversation in 0..workload.conversations() {
        let blocks: Vec<StoredBlock> = workload
            .chain(conversation)
            .into_iter()
            .map(|key| StoredBlock { seq_hash: SequenceHash(mix(key)), content_hash: ContentHash(key) })
            .collect();
        for replica in workload.holders(conversation) {
            let (worker, map) = &mut workers[replica as usize];
            let started = Instant::now();
            index.apply_stored(*worker, &blocks, None, map).expect("a chain from the root is taken");
            nanoseconds += started.elapsed().as_nanos();
            stored += 64;
        }
    }
    tell("events/stored keys", "1/s", stored as f64 / (nanoseconds as f64 / 1e9));
    let held = workload.conversations() * 56 + 800;
    tell("memory/resident", "bytes/key", (resident_bytes() - before) as f64 / held as f64);
    let prompts: Vec<Vec<ContentHash>> =
        workload.prompts(prompts).into_iter().map(|prompt| prompt.into_iter().map(ContentHash).collect()).collect();
    time_each("lookup", &prompts, |prompt| index.find_matches(prompt, false).scores.len());
}
