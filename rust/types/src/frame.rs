//! How large the largest frames between processes can become, in bytes, so that no process ever makes one that a link
//! would refuse: what a node may be configured to is bounded here, and what a delta carries is counted against it. Counts
//! assume the widest form of every number, so they hold whatever the ids are. O(1); knows the sizes of values on the wire
//! and nothing else of the codec, whose own tests hold its frames against these counts.

use crate::limits::EngineLimits;
use crate::plan::Delta;
use crate::request::Sampling;

/// Longest frame that a link carries.
pub const MAX_FRAME_BYTES: u64 = 16 << 20;
/// Most bytes that the admissions of one delta take together, unless it has only one. The rest of a frame is for what
/// leaves, grows and is computed.
pub const MAX_ADMISSION_BYTES: u64 = 14 << 20;

/// A number of at most 32 bits, a float, or the head of an array, at its widest.
const VALUE_BYTES: u64 = 5;
/// A number of 64 bits at its widest.
const LONG_BYTES: u64 = 9;
/// A copy between tiers: the array's head and the direction in a byte each, two blocks, a tag.
const COPY_BYTES: u64 = 2 + 2 * VALUE_BYTES + LONG_BYTES;
/// What every frame has besides its columns: envelope, incarnations, steps, heads of arrays.
const ENVELOPE_BYTES: u64 = 128;

/// Most bytes of a request's sampling parameters.
const fn sampling_bytes(biases: usize, stop_tokens: usize) -> u64 {
    15 * VALUE_BYTES + LONG_BYTES + biases as u64 * 3 * VALUE_BYTES + stop_tokens as u64 * VALUE_BYTES
}

const MAX_SAMPLING_BYTES: u64 = sampling_bytes(Sampling::MAX_LOGIT_BIAS, Sampling::MAX_STOP_TOKENS);
/// Log probabilities of one row: its number, the chosen one, the best ones with their ids.
const MAX_LOGPROB_BYTES: u64 = 4 * VALUE_BYTES + Sampling::MAX_LOGPROBS as u64 * 3 * VALUE_BYTES;

const fn admission_bytes_of(context_tokens: u64, blocks: u64, sampling_bytes: u64) -> u64 {
    (context_tokens + blocks) * VALUE_BYTES + 7 * VALUE_BYTES + sampling_bytes
}

/// Most bytes that an admission takes in a delta.
pub fn admission_bytes(context_tokens: u32, blocks: u32, sampling: &Sampling) -> u64 {
    let sampling = sampling_bytes(sampling.logit_bias.len(), sampling.stop_tokens.len());
    admission_bytes_of(u64::from(context_tokens), u64::from(blocks), sampling)
}

// What the bounds of `EngineLimits` allow fits: proven when this is compiled.
const _: () = {
    let rows = EngineLimits::MAX_ROWS_IN_FLIGHT as u64;
    let ends = rows + EngineLimits::MAX_WAITING_SEQUENCES as u64;
    let tokens = EngineLimits::MAX_SEQUENCE_TOKENS as u64;
    let blocks = EngineLimits::MAX_SEQUENCE_BLOCKS as u64;
    // Any sequence can be admitted alone.
    assert!(admission_bytes_of(tokens, blocks, MAX_SAMPLING_BYTES) <= MAX_ADMISSION_BYTES);
    // A delta: every slot leaves, enters, grows and has a chunk; and blocks are copied.
    let copies = Delta::MAX_COPIES as u64 * COPY_BYTES;
    assert!(ENVELOPE_BYTES + MAX_ADMISSION_BYTES + rows * 7 * VALUE_BYTES + copies <= MAX_FRAME_BYTES);
    // A submission of the longest context.
    assert!(ENVELOPE_BYTES + tokens * VALUE_BYTES + MAX_SAMPLING_BYTES <= MAX_FRAME_BYTES);
    // A step's result, and the outputs of all steps in flight at once with all ends, every row with log probabilities.
    assert!(ENVELOPE_BYTES + rows * (2 * VALUE_BYTES + MAX_LOGPROB_BYTES) <= MAX_FRAME_BYTES);
    let row = LONG_BYTES + 3 * VALUE_BYTES + MAX_LOGPROB_BYTES;
    assert!(ENVELOPE_BYTES + rows * row + ends * (LONG_BYTES + 5 * VALUE_BYTES) <= MAX_FRAME_BYTES);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_and_bias_of_an_admission_counts() {
        let plain = Sampling::default();
        let bare = admission_bytes(1, 1, &plain);
        assert_eq!(admission_bytes(101, 1, &plain) - bare, 500);
        assert_eq!(admission_bytes(1, 11, &plain) - bare, 50);
        let chatty = Sampling { logit_bias: vec![(1, 1.0); 4], stop_tokens: vec![1; 3], ..Sampling::default() };
        assert_eq!(admission_bytes(1, 1, &chatty) - bare, 4 * 15 + 3 * 5);
    }
}
