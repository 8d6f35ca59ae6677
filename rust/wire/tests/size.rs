//! How many bytes the frames of a steady state take, and that the largest ones that an engine's limits allow fit a frame.

mod common;

use common::admission;
use llmscale_types::frame::{MAX_ADMISSION_BYTES, admission_bytes};
use llmscale_types::{
    Admission, Attempt, BlockCopy, BlockId, Chunk, Class, CopyDirection, Delta, DiskBlockId, DiskDirection,
    DiskTransfer, EngineLimits, Epoch, FinishReason, Finished, HostBlockId, NodeId, Outputs, RequestId, Sampling, Slot,
    StepId, StepResult, Token, TokenLogprobs,
};
use llmscale_wire::{CodecLimits, FromNode, FromWorker, NodeOutputs, Submit, ToNode, ToWorker, encode};
use proptest::prelude::*;

/// The widest ids there are.
const ID: u32 = u32::MAX;
const ROWS: usize = EngineLimits::MAX_ROWS_IN_FLIGHT as usize;

fn steady_delta(first_block: u32) -> Delta {
    let mut delta = Delta::new(Epoch(3), StepId(1_000_001), StepId(1_000_000));
    delta.decodes = true;
    // Of 1,024 sequences with blocks of 32 tokens, 32 cross into a new block in every step.
    delta.append_slots = (0..32).map(|row| Slot(row * 32 + 31)).collect();
    delta.append_blocks = (0..32).map(|row| BlockId(first_block + row * 977)).collect();
    delta
}

#[test]
fn a_steady_decoding_step_of_1024_sequences_takes_less_than_300_bytes() {
    let limits = CodecLimits::default();
    let small_pool = encode(&ToWorker::Step(steady_delta(1_000)), &limits).expect("within bounds").len();
    let large_pool = encode(&ToWorker::Step(steady_delta(100_000)), &limits).expect("within bounds").len();
    assert_eq!((small_pool, large_pool), (208, 272));
}

#[test]
fn the_outputs_of_1024_sequences_take_about_13_bytes_per_token() {
    let rows = 0..1_024_u32;
    let outputs = Outputs {
        step: StepId(1_000_000),
        requests: rows.clone().map(|row| RequestId(5_000_000 + u64::from(row))).collect(),
        attempts: rows.clone().map(|_| Attempt(1)).collect(),
        indexes: rows.clone().map(|row| 300 + row).collect(),
        tokens: rows.map(|row| 1_000 + row * 100).collect(),
        ..Outputs::default()
    };
    let frame = FromNode::Outputs(NodeOutputs { node: NodeId(u64::MAX), epoch: Epoch(3), outputs });
    let bytes = encode(&frame, &CodecLimits::default()).expect("within bounds").len();
    assert!(bytes < 1_024 * 13, "{bytes} bytes");
}

fn chatty() -> Sampling {
    Sampling {
        top_k: ID,
        seed: u64::MAX,
        choice: ID,
        logprobs: Some(Sampling::MAX_LOGPROBS),
        logit_bias: vec![(ID, 1.0); Sampling::MAX_LOGIT_BIAS],
        max_tokens: ID,
        min_tokens: ID,
        stop_tokens: vec![ID; Sampling::MAX_STOP_TOKENS],
        ..Sampling::default()
    }
}

fn widest_logprobs() -> TokenLogprobs {
    TokenLogprobs { chosen: -1.0, top: vec![(ID, -1.0); Sampling::MAX_LOGPROBS as usize] }
}

fn widest_admission(context_tokens: u32, blocks: u32) -> Admission {
    Admission {
        slot: Slot(ID),
        context: vec![ID; context_tokens as usize],
        prompt_tokens: context_tokens,
        computed_tokens: context_tokens - 1,
        blocks: vec![BlockId(ID); blocks as usize],
        sampling: chatty(),
    }
}

/// A delta in which every slot that may exist leaves, grows and has a chunk.
fn busy_delta(admit: Vec<Admission>) -> Delta {
    let mut delta = Delta::new(Epoch(u64::MAX), StepId(u64::MAX), StepId(u64::MAX));
    delta.leave = vec![Slot(ID); ROWS];
    delta.append_slots = vec![Slot(ID); ROWS];
    delta.append_blocks = vec![BlockId(ID); ROWS];
    delta.chunks = vec![Chunk { slot: Slot(ID), start_tokens: 1 << 20, tokens: 1 << 20 }; ROWS];
    let (direction, block, host) = (CopyDirection::Restore, BlockId(ID), HostBlockId(ID));
    delta.copies = vec![BlockCopy { direction, block, host, tag: u64::MAX }; Delta::MAX_COPIES];
    let (number, direction, disk) = (u64::MAX, DiskDirection::Read, DiskBlockId(ID));
    delta.transfers = vec![DiskTransfer { number, direction, host, disk, tag: u64::MAX }; Delta::MAX_TRANSFERS];
    delta.admit = admit;
    delta
}

#[test]
fn the_largest_deltas_that_the_limits_allow_fit_a_frame() {
    let limits = CodecLimits::default();
    let longest = widest_admission(EngineLimits::MAX_SEQUENCE_TOKENS, EngineLimits::MAX_SEQUENCE_BLOCKS);
    let alone = encode(&ToWorker::Step(busy_delta(vec![longest])), &limits).expect("the longest sequence alone");
    assert!(alone.len() > 13 << 20, "{} bytes are not the worst case", alone.len());
    let each = widest_admission(30_000, 1_000);
    let count = MAX_ADMISSION_BYTES / admission_bytes(30_000, 1_000, &each.sampling);
    let many = encode(&ToWorker::Step(busy_delta(vec![each; count as usize])), &limits).expect("many long sequences");
    assert!(many.len() > 14 << 20, "{} bytes are not the worst case", many.len());
}

#[test]
fn the_longest_submission_that_the_limits_allow_fits_a_frame() {
    let context: Vec<Token> = vec![ID; EngineLimits::MAX_SEQUENCE_TOKENS as usize];
    let submit = Submit {
        request: RequestId(u64::MAX),
        attempt: Attempt(ID),
        namespace: [255; 32],
        class: Class::Background,
        prompt_tokens: context.len() as u32,
        context,
        sampling: chatty(),
        remaining: Some(llmscale_types::Duration(u64::MAX)),
        suspect: false,
    };
    assert!(encode(&ToNode::Submit(submit), &CodecLimits::default()).is_ok());
}

#[test]
fn the_largest_results_and_outputs_that_the_limits_allow_fit_a_frame() {
    let limits = CodecLimits::default();
    let result = StepResult {
        epoch: Epoch(u64::MAX),
        step: StepId(u64::MAX),
        slots: vec![Slot(ID); ROWS],
        tokens: vec![ID; ROWS],
        logprobs: vec![(Slot(ID), widest_logprobs()); ROWS],
        errors: Vec::new(),
        elapsed_ns: u64::MAX,
        waited_ns: u64::MAX,
        copied_ns: u64::MAX,
    };
    assert!(encode(&FromWorker::Result(result), &limits).is_ok());
    let end = Finished {
        request: RequestId(u64::MAX),
        attempt: Attempt(ID),
        reason: FinishReason::Length,
        output_tokens: ID,
    };
    let outputs = Outputs {
        step: StepId(u64::MAX),
        requests: vec![RequestId(u64::MAX); ROWS],
        attempts: vec![Attempt(ID); ROWS],
        indexes: vec![ID; ROWS],
        tokens: vec![ID; ROWS],
        logprobs: (0..ROWS as u32).map(|row| (row, widest_logprobs())).collect(),
        cached: (0..ROWS as u32).map(|row| (row, ID)).collect(),
        finished: vec![end; ROWS + EngineLimits::MAX_WAITING_SEQUENCES as usize],
    };
    let frame = FromNode::Outputs(NodeOutputs { node: NodeId(u64::MAX), epoch: Epoch(u64::MAX), outputs });
    let bytes = encode(&frame, &limits).expect("all results at once").len();
    assert!(bytes > 10 << 20, "{bytes} bytes are not the worst case");
}

proptest! {
    #[test]
    fn no_admission_takes_more_than_it_is_counted_for(admission in admission()) {
        let delta = |admit| ToWorker::Step(Delta { admit, ..Delta::new(Epoch(1), StepId(2), StepId(1)) });
        let limits = CodecLimits::default();
        let counted =
            admission_bytes(admission.context.len() as u32, admission.blocks.len() as u32, &admission.sampling);
        let with = encode(&delta(vec![admission]), &limits).expect("within bounds").len();
        let without = encode(&delta(Vec::new()), &limits).expect("within bounds").len();
        prop_assert!((with - without) as u64 <= counted);
    }
}
