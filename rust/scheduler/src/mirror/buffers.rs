//! The flat int32 buffers of a step, which an executor wraps once. Their lengths are capacities and never change, so that
//! pointers into them stay valid as long as the mirror lives. Knows nothing of who writes them.

use llmscale_types::EngineLimits;

/// How much of the buffers the current step uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepCounts {
    /// Token rows.
    pub rows: u32,
    /// Sequences with rows.
    pub sequences: u32,
    /// Of these, sequences with one decode row; they come first.
    pub decodes: u32,
    /// Rows that sample.
    pub samples: u32,
    /// Blocks to copy between tiers.
    pub copies: u32,
    /// Blocks to move between the host tier and the disk.
    pub transfers: u32,
}

/// See the file's header.
#[derive(Debug)]
pub struct Buffers {
    /// `[rows]` ids.
    pub token_ids: Box<[i32]>,
    /// `[rows]` absolute positions.
    pub positions: Box<[i32]>,
    /// `[rows]` where the row's KV goes: block times block size plus offset.
    pub slot_mapping: Box<[i32]>,
    /// `[sequences + 1]` first row of each sequence.
    pub query_start: Box<[i32]>,
    /// `[sequences]` KV tokens, this step's included.
    pub sequence_lengths: Box<[i32]>,
    /// `[sequences]` where the sequence's table starts in `block_tables`.
    pub table_offsets: Box<[i32]>,
    /// `[slots][max blocks per sequence]` tables, kept from step to step.
    pub block_tables: Box<[i32]>,
    /// `[samples]` rows that sample.
    pub sample_rows: Box<[i32]>,
}

impl Buffers {
    pub(super) fn new(limits: &EngineLimits, max_blocks: usize) -> Self {
        let buffer = |entries: usize| vec![0_i32; entries].into_boxed_slice();
        let (rows, sequences) = (limits.max_step_tokens as usize, limits.max_sequences as usize);
        Self {
            token_ids: buffer(rows),
            positions: buffer(rows),
            slot_mapping: buffer(rows),
            query_start: buffer(sequences + 1),
            sequence_lengths: buffer(sequences),
            table_offsets: buffer(sequences),
            block_tables: buffer(sequences * max_blocks),
            sample_rows: buffer(sequences),
        }
    }
}
