//! Goal: streams beside prompts wait for as long as the pace says, and prompts are computed all the same. Method: a worker
//! whose steps take a time that is known, with noise and stalls, in virtual time.

use crate::world::{World, limits, prefill_pairs, prefill_tokens};
use llmscale_scheduler::Pace;
use llmscale_types::{Class, Delta, Duration, EngineLimits, Token};
use proptest::prelude::*;

const TARGET_NS: u64 = 4_000_000;
const STREAMS: u32 = 8;
/// What a step of all streams takes at least.
const DECODE_NS: u64 = 500_000 + STREAMS as u64 * 100_000;

fn long_limits(groups: u32) -> EngineLimits {
    EngineLimits { max_sequence_tokens: 600, groups, ..limits(2_000, 16, 256, groups.max(2)) }
}

/// Half a millisecond a step, 0.1 a decoding row, 40 us a token and 100 ns a token that it attends to; up to a tenth more,
/// and every 61st step ten times as much.
fn step_ns(delta: &Delta, decodes: u32) -> u64 {
    let exact = 500_000 + 100_000 * u64::from(decodes) + 40_000 * prefill_tokens(delta) + 100 * prefill_pairs(delta);
    let noise = delta.step.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 57;
    let stalled = if stalls(delta) { 10 } else { 1 };
    stalled * exact * (1_280 + noise) / 1_280
}

fn stalls(delta: &Delta) -> bool {
    delta.step.0.is_multiple_of(61)
}

fn prompt(seed: u32, tokens: u32) -> Vec<Token> {
    (0..tokens).map(|at| 4 + (seed * 31 + at * (7 + seed % 5)) % 45).collect()
}

/// What was seen of the steps.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Times of steps with decoding rows that did not stall, shortest first.
    gaps: Vec<u64>,
    /// Chunks in those steps that end no context.
    chunks: Vec<u32>,
    /// Times of steps with nothing but prefill that did not stall.
    alone: Vec<u64>,
    steps_of_prompts: u64,
    paced_steps: u64,
}

/// Streams run all the time, and a prompt of 500 tokens comes every 40 steps.
fn run(pace: Pace, groups: u32) -> Seen {
    let mut world = World::new(long_limits(groups)).with_pace(pace);
    world.step_ns = step_ns;
    let (mut seen, mut asked) = (Seen::default(), 0);
    // A prompt that nobody waits for.
    world.submit(0, prompt(99, 550), 2, Class::Standard);
    for turn in 0..1_500_u32 {
        let load = world.replica.load();
        if turn > 20 && load.running + load.waiting < STREAMS {
            asked += 1;
            world.submit(0, prompt(asked, 5), 60, Class::Standard);
        }
        if turn > 200 && turn.is_multiple_of(40) {
            asked += 1;
            world.submit(1, prompt(asked, 500), 2, Class::Standard);
        }
        while world.plan() {}
        let Some(delta) = world.sent.front().cloned() else { continue };
        let decodes = world.decodes_of(&delta);
        let (time, tokens) = (step_ns(&delta, decodes), prefill_tokens(&delta));
        seen.steps_of_prompts += u64::from(tokens > 0);
        match (stalls(&delta), decodes > 0) {
            (false, false) => seen.alone.push(time),
            // What a step takes is known after a few of them.
            (false, true) if turn > 150 => {
                seen.gaps.push(time);
                let inner =
                    delta.chunks.iter().filter(|chunk| ![5, 500].contains(&(chunk.start_tokens + chunk.tokens)));
                seen.chunks.extend(inner.map(|chunk| chunk.tokens));
            }
            (true, _) | (false, true) => {}
        }
        world.complete();
    }
    world.finish_all();
    seen.paced_steps = world.replica.counters().paced_steps;
    seen.gaps.sort_unstable();
    seen
}

fn longest(seen: &Seen) -> u64 {
    *seen.gaps.last().expect("there were steps")
}

#[test]
fn streams_wait_for_prompts_as_long_as_the_pace_says() {
    let (paced, free) = (run(Pace::of(Duration(TARGET_NS / 1_000)), 1), run(Pace::NONE, 1));
    let bound = DECODE_NS + TARGET_NS;
    assert!(longest(&free) > 2 * bound, "{} ns are no gap", longest(&free));
    // More than that for noise, and for predictions that were made after a stall.
    let [most, longest] = [paced.gaps[paced.gaps.len() * 99 / 100], longest(&paced)];
    assert!(most * 4 <= bound * 5 && longest * 2 <= bound * 3, "{most} and {longest} ns, the bound is {bound}");
    assert_eq!(free.paced_steps, 0);
    assert!(paced.paced_steps > 50, "{}", paced.paced_steps);
}

#[test]
fn chunks_fill_the_time_that_they_have() {
    let paced = run(Pace::of(Duration(TARGET_NS / 1_000)), 1);
    // As many as are computed in 4 ms: 44 at the end of a prompt, 90 at its start.
    let tokens = paced.chunks.iter().sum::<u32>() / paced.chunks.len() as u32;
    assert!((45..90).contains(&tokens), "{tokens} of {:?}", paced.chunks);
    let alone = paced.alone.iter().max().expect("nobody waited at first");
    assert!((2 * TARGET_NS..6 * TARGET_NS).contains(alone), "{alone} ns where nobody waits");
}

#[test]
fn a_prompt_gets_a_block_per_step_however_short_the_time_is() {
    let paced = run(Pace::of(Duration(1)), 1);
    assert!(paced.chunks.iter().all(|&tokens| tokens >= 4), "{:?}", paced.chunks);
    let free = run(Pace::NONE, 1);
    assert!(paced.steps_of_prompts > 3 * free.steps_of_prompts);
}

#[test]
fn streams_of_other_stages_wait_no_longer() {
    let (paced, free) = (run(Pace::of(Duration(TARGET_NS / 1_000)), 2), run(Pace::NONE, 2));
    let bound = DECODE_NS + TARGET_NS;
    assert!(longest(&paced) * 2 <= bound * 3, "{} ns", longest(&paced));
    assert!(longest(&free) > 2 * bound, "{} ns are no gap", longest(&free));
}

#[test]
fn equal_times_are_paced_equally() {
    assert_eq!(run(Pace::of(Duration(2_000)), 1), run(Pace::of(Duration(2_000)), 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Where a chunk is cut there is time left, too short for its next tokens and long enough for the start of another
    /// prompt: a node ended when that was taken.
    #[test]
    fn prompts_that_come_together_are_computed_one_after_the_other(
        target_us in 200_u64..8_000,
        groups in 1_u32..3,
        bursts in prop::collection::vec(prop::collection::vec((1_u32..500, 1_u32..20), 1..8), 10..40),
    ) {
        let mut world = World::new(long_limits(groups)).with_pace(Pace::of(Duration(target_us)));
        world.step_ns = step_ns;
        for (seed, burst) in bursts.into_iter().enumerate() {
            for (tokens, outputs) in burst {
                world.submit(0, prompt(seed as u32, tokens), outputs, Class::Standard);
            }
            for _ in 0..20 {
                while world.plan() {}
                world.complete();
            }
        }
        world.finish_all();
    }
}
