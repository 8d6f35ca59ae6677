//! How many bytes the frames of a steady state take.

use llmscale_types::{Attempt, BlockId, Delta, Epoch, NodeId, Outputs, RequestId, Slot, StepId};
use llmscale_wire::{CodecLimits, FromNode, NodeOutputs, ToWorker, encode};

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
    assert_eq!((small_pool, large_pool), (205, 269));
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
