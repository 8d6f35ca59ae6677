//! What knowing the caches is worth, on conversations of our own: all begin with one system prompt, most come back a few
//! times, a few are long, and they arrive in bursts. Same shape as Mooncake's trace, which `bench router --trace` plays.

mod caches;
#[allow(dead_code, reason = "the model brings its own needs and loads")]
mod common;

use caches::{Outcome, Prompt, Sizes, percentile_99, run};
use llmscale_fleet::{LeastWork, Policy, PredictedSeconds};

const SIZES: Sizes = Sizes { replicas: 16, max_blocks: 400, block_tokens: 512, token_ns: 400_000 };

/// A generator of our own, so that the prompts are the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Two thousand prompts, ten every 3 s: a third starts a conversation, the rest continues a recent one.
fn prompts() -> Vec<Prompt> {
    let mut random = Random(7);
    let mut conversations: Vec<Vec<u64>> = Vec::new();
    let mut next_block = 1;
    let mut grow = |blocks: &mut Vec<u64>, count: u64| {
        blocks.extend(next_block..next_block + count);
        next_block += count;
    };
    (0..2_000)
        .map(|number| {
            let blocks = if number < 20 || random.below(3) == 0 {
                let mut blocks = vec![0];
                let long = random.below(20) == 0;
                grow(&mut blocks, if long { 40 + random.below(60) } else { 1 + random.below(20) });
                conversations.push(blocks.clone());
                blocks
            } else {
                let recent = conversations.len() as u64;
                let back = 1 + random.below(recent.min(120));
                let conversation = &mut conversations[(recent - back) as usize];
                grow(conversation, 1 + random.below(4));
                conversation.clone()
            };
            let tokens = blocks.len() as u64 * 512 - random.below(500);
            Prompt { arrived_us: number / 10 * 3_000_000, tokens, blocks }
        })
        .collect()
}

fn played(policy: &dyn Policy) -> Outcome {
    run(policy, SIZES, &prompts())
}

fn hit_per_mille(outcome: &Outcome) -> u64 {
    outcome.cached_tokens * 1_000 / outcome.prompt_tokens
}

#[test]
fn conversations_find_several_times_as_much_in_caches_as_by_load_alone_and_wait_less() {
    let (blind, informed) = (played(&LeastWork), played(&PredictedSeconds));
    let (blind_wait, wait) = (percentile_99(&blind.done_us), percentile_99(&informed.done_us));
    assert!(
        hit_per_mille(&informed) > 3 * hit_per_mille(&blind),
        "{} {}",
        hit_per_mille(&informed),
        hit_per_mille(&blind)
    );
    assert!(wait < blind_wait, "{wait} us against {blind_wait} us");
}

#[test]
fn a_system_prompt_that_all_share_does_not_unbalance_the_fleet() {
    let informed = played(&PredictedSeconds);
    let mean = informed.computed_tokens.iter().sum::<u64>() / 16;
    let most = informed.computed_tokens.iter().max().copied();
    assert!(most < Some(mean * 3 / 2), "{:?}", informed.computed_tokens);
}

#[test]
fn the_same_prompts_are_placed_the_same_way() {
    assert_eq!(played(&PredictedSeconds).done_us, played(&PredictedSeconds).done_us);
}
