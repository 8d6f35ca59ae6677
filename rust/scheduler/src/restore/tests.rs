//! When a copy pays, by prices that are known.

use super::*;
use llmscale_blocks::Found;
use llmscale_cost::StepShape;
use llmscale_types::{BlockId, HostBlockId};

/// What a token of a prompt costs in these tests.
const TOKEN_NS: u64 = 50_000;
const BLOCK_NS: u64 = 4 * TOKEN_NS;

fn limits(host_blocks: u32) -> EngineLimits {
    EngineLimits {
        block_tokens: 4,
        total_blocks: 64,
        host_blocks,
        disk_blocks: 0,
        max_sequences: 8,
        max_step_tokens: 64,
        max_sequence_tokens: 40,
        max_waiting_sequences: 64,
        max_steps_in_flight: 2,
        groups: 1,
        eos_tokens: Vec::new(),
        vocabulary: 50,
    }
}

fn computing() -> CostModel {
    let mut cost = CostModel::new();
    for tokens in [1, 8, 64, 16, 32, 64, 2, 4].repeat(8) {
        let shape = StepShape { prefill_tokens: tokens, ..StepShape::default() };
        cost.observe(shape, 20_000 + TOKEN_NS * u64::from(tokens));
    }
    cost
}

/// What a replica knows.
struct Known {
    cost: CostModel,
    copies: CopyCost,
    limits: EngineLimits,
}

impl Known {
    /// Copies take `copy_ns` per block, or were never made.
    fn new(copy_ns: Option<u64>, host_blocks: u32) -> Self {
        let mut copies = CopyCost::default();
        if let Some(copy_ns) = copy_ns {
            (0..3).for_each(|_| copies.observe(1, copy_ns));
        }
        Self { cost: computing(), copies, limits: limits(host_blocks) }
    }

    fn prices(&self) -> CopyPrices<'_> {
        CopyPrices { cost: &self.cost, copies: &self.copies, limits: &self.limits }
    }

    fn offloads(&self, step: u64) -> u32 {
        self.prices().offloads(StepId(step))
    }
}

fn hit() -> PrefixHit {
    let blocks = vec![Found::Device(BlockId(1)), Found::Host(HostBlockId(0)), Found::Host(HostBlockId(1))];
    PrefixHit { blocks, leading_device_blocks: 1, content: None }
}

fn kept(copy_ns: u64) -> usize {
    let mut hit = hit();
    Known::new(Some(copy_ns), 8).prices().cut(&mut hit);
    hit.blocks.len()
}

#[test]
fn what_is_cheaper_to_compute_is_not_copied_back() {
    assert_eq!(kept(BLOCK_NS / 10), 3);
    assert_eq!(kept(BLOCK_NS / 2), 3);
    assert_eq!(kept(BLOCK_NS * 2), 1, "what is on the device is shared at any price");
}

#[test]
fn the_first_copy_is_a_trial_and_dear_ones_are_tried_again_now_and_then() {
    assert_eq!(Known::new(None, 8).offloads(1), 1, "nothing is known");
    // Out and back takes longer than computing.
    let dear = Known::new(Some(BLOCK_NS), 8);
    let steps: Vec<u64> = (1..=200).filter(|&step| dear.offloads(step) > 0).collect();
    assert_eq!(steps, [64, 128, 192]);
}

#[test]
fn a_first_copy_that_stalled_does_not_keep_the_tier_out_of_use() {
    let mut copies = CopyCost::default();
    copies.observe(1, BLOCK_NS * 20);
    let mut known = Known { copies, ..Known::new(None, 8) };
    assert_eq!(known.offloads(1), 1, "one dear copy is no price");
    known.copies.observe(1, BLOCK_NS / 10);
    assert!(known.offloads(2) > 1);
}

#[test]
fn a_step_copies_no_longer_than_its_largest_prefill_takes() {
    let copy_ns = BLOCK_NS / 10;
    let offloads = Known::new(Some(copy_ns), 8).offloads(1);
    let most = 64 * TOKEN_NS / copy_ns;
    assert!(u64::from(offloads).abs_diff(most) <= most / 20, "{offloads} blocks, {most} take as long");
}

#[test]
fn without_a_host_tier_nothing_is_copied_out() {
    assert_eq!(Known::new(None, 0).offloads(64), 0);
    assert_eq!(Known::new(Some(1), 0).offloads(64), 0);
}

#[test]
fn a_restored_block_takes_its_share_of_a_steps_tokens() {
    let tokens = |copy_ns| Known::new(Some(copy_ns), 8).prices().restore_tokens();
    assert_eq!(tokens(BLOCK_NS / 100), 1, "a step does not copy without end");
    assert_eq!(tokens(BLOCK_NS / 2 + BLOCK_NS / 20), 2);
    assert_eq!(tokens(BLOCK_NS * 9), 4, "and a block never takes more than its tokens");
}
