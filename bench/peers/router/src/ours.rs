//! llmscale's index and choice.

use crate::common;
use crate::measure::{resident_bytes, tell, time_each};
use crate::workload::{Workload, mix};
use llmscale_fleet::{
    Fleet, IndexOptions, KvEvent, LeastWork, Load, Need, Policy, PredictedSeconds, PrefixIndex, PrefixKey,
};
use llmscale_types::{Duration, ReplicaId, RequestId, Time};
use std::sync::Arc;
use std::time::Instant;

fn keys(numbers: &[u64]) -> Vec<PrefixKey> {
    numbers.iter().copied().map(PrefixKey).collect()
}

/// Tells all figures.
pub fn run(workload: Workload, prompts: u64) {
    let options = IndexOptions { max_bytes: 256 << 20, max_pending_keys: 1 << 16, ..IndexOptions::default() };
    let before = resident_bytes();
    let index = PrefixIndex::new(options).expect("the sizes fit together");
    let (mut fleet, pool) = common::filled(Fleet::with_prefixes(workload.replicas, index), workload.replicas);
    fill(&mut fleet, workload);
    let index = fleet.prefixes().expect("it has an index");
    let held = index.keys() as f64;
    tell("keys", "keys", held);
    tell("memory/counted", "bytes/key", index.bytes() as f64 / held);
    tell("memory/resident", "bytes/key", (resident_bytes() - before) as f64 / held);
    for replica in 0..workload.replicas {
        let mut member = fleet.get_mut(ReplicaId(replica)).expect("it joined");
        let drawn = mix(u64::from(replica));
        let sequences = (drawn % 8) as u32;
        member.limits.max_sequences = 256;
        member.limits.max_sequence_tokens = 1 << 20;
        member.load = Load {
            sequences,
            unstarted_sequences: sequences.min(1),
            unstarted_tokens: drawn % 4_000,
            output_tokens: u64::from(sequences) * 200,
        };
    }
    let prompts: Vec<Need> =
        workload.prompts(prompts).iter().zip(1..).map(|(prompt, number)| need(prompt, number, pool)).collect();
    time_each("lookup", &prompts, |prompt| {
        let levels = fleet.prefixes().expect("it has an index").levels(&prompt.prefix);
        levels.iter().next().map(|level| (level.keys(), level.count()))
    });
    time_each("choice", &prompts, |prompt| PredictedSeconds.choose(&fleet, prompt));
    time_each("choice by load alone", &prompts[..prompts.len().min(2_000)], |prompt| LeastWork.choose(&fleet, prompt));
    time_each("choice and dispatch", &prompts, |prompt| send(&mut fleet, prompt));
}

fn need(prompt: &[u64], number: u64, pool: llmscale_fleet::PoolId) -> Need {
    Need {
        request: RequestId(number),
        pool,
        total_tokens: 8_500,
        context_tokens: 64 * 128 + 60,
        output_tokens: 200,
        prefix: keys(prompt).into(),
        numerics: None,
        look_ahead: Duration::from_millis(250),
        now: Time(1_000_000 + number),
    }
}

/// A choice with all that follows it in the books: the load there, the prefixes as held until confirmed, and an earlier
/// request that has ended.
fn send(fleet: &mut Fleet, prompt: &Need) -> Option<ReplicaId> {
    let chosen = PredictedSeconds.choose(fleet, prompt)?;
    {
        let mut member = fleet.get_mut(chosen).expect("it was chosen");
        member.load.sequences = (member.load.sequences + 1) % 16;
        member.load.unstarted_tokens = (member.load.unstarted_tokens + 500) % 4_000;
    }
    let prefix = Arc::clone(&prompt.prefix);
    fleet.prefixes_mut().expect("it has an index").dispatch(prompt.now, chosen, &prefix);
    Some(chosen)
}

fn fill(fleet: &mut Fleet, workload: Workload) {
    let index = fleet.prefixes_mut().expect("it has an index");
    let mut batches = vec![0; workload.replicas as usize];
    let mut stored = 0_u64;
    let mut nanoseconds = 0;
    for conversation in 0..workload.conversations() {
        let events = [KvEvent::Stored(keys(&workload.chain(conversation)))];
        for replica in workload.holders(conversation) {
            let number = &mut batches[replica as usize];
            let started = Instant::now();
            index.apply(Time(0), ReplicaId(replica), *number, &events);
            nanoseconds += started.elapsed().as_nanos();
            *number += 1;
            stored += 64;
        }
    }
    tell("events/stored keys", "1/s", stored as f64 / (nanoseconds as f64 / 1e9));
}
