//! Times choices of a replica among many, or plays conversations through caches. Started by `python -m bench router`, which
//! says what the figures mean.
//!
//! Usage: `NAME REPLICAS KEYS PROMPTS SEED`, where NAME is ours, kv-index or dynamo; or
//! `conversations REPLICAS BLOCKS TOKEN_NS`, with lines `arrival_us tokens block block ...` on standard input.

#[path = "../../../../rust/fleet/tests/caches/mod.rs"]
mod caches;
#[path = "../../../../rust/fleet/tests/common/mod.rs"]
#[allow(dead_code, unreachable_pub)]
mod common;
#[cfg(feature = "dynamo")]
mod dynamo;
mod measure;
mod ours;
#[cfg(feature = "kv-index")]
mod smg;
mod workload;

use caches::{Prompt, Sizes, percentile_99, run};
use llmscale_fleet::{LeastWork, Policy, PredictedSeconds};
use measure::tell;
use std::io::BufRead;
use workload::Workload;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse::<u64>().ok()).expect("see the usage");
    let workload = || Workload { replicas: number(1) as u32, keys: number(2), seed: number(4) };
    match arguments.first().map(String::as_str) {
        Some("ours") => ours::run(workload(), number(3)),
        #[cfg(feature = "kv-index")]
        Some("kv-index") => smg::run(workload(), number(3)),
        #[cfg(feature = "dynamo")]
        Some("dynamo") => dynamo::run(workload(), number(3)),
        Some("conversations") => play(Sizes {
            replicas: number(1) as u32,
            max_blocks: number(2) as usize,
            block_tokens: 512,
            token_ns: number(3),
        }),
        other => panic!("{other:?} is not built in; see the usage"),
    }
}

fn play(sizes: Sizes) {
    let prompts: Vec<Prompt> = std::io::stdin().lock().lines().map(|line| prompt(&line.expect("text"))).collect();
    let policies: [(&str, &dyn Policy); 2] = [("by load alone", &LeastWork), ("predicted seconds", &PredictedSeconds)];
    for (name, policy) in policies {
        let outcome = run(policy, sizes, &prompts);
        let mean = outcome.computed_tokens.iter().sum::<u64>() as f64 / f64::from(sizes.replicas);
        let most = outcome.computed_tokens.iter().max().copied().unwrap_or(0) as f64;
        tell(&format!("{name}/hit"), "share", outcome.cached_tokens as f64 / outcome.prompt_tokens as f64);
        tell(&format!("{name}/queue with own p99"), "s", percentile_99(&outcome.done_us) as f64 / 1e6);
        tell(&format!("{name}/queue ahead p99"), "s", percentile_99(&outcome.ahead_us) as f64 / 1e6);
        tell(&format!("{name}/busiest to mean"), "ratio", most / mean);
    }
}

fn prompt(line: &str) -> Prompt {
    let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().expect("numbers"));
    let mut next = || numbers.next().expect("an arrival and a length");
    let (arrived_us, tokens) = (next(), next());
    Prompt { arrived_us, tokens, blocks: numbers.collect() }
}
