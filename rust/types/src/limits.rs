//! Every bound of an engine and of a front, in one place, checked once when the process starts.

use crate::error::LimitError;
use crate::ids::Token;
use crate::time::Duration;
use serde::{Deserialize, Serialize};

/// Bounds and sizes of one replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EngineLimits {
    /// Tokens per KV block.
    pub block_tokens: u32,
    /// KV blocks of the replica.
    pub total_blocks: u32,
    /// Most sequences that run at once.
    pub max_sequences: u32,
    /// Most tokens computed in one step, decodes and prefill chunks together.
    pub max_step_tokens: u32,
    /// Longest sequence, prompt and output together.
    pub max_sequence_tokens: u32,
    /// Most sequences that wait on this replica.
    pub max_waiting_sequences: u32,
    /// Most steps that are planned and not yet completed.
    pub max_steps_in_flight: u32,
    /// Ids that end a sequence unless it ignores them.
    pub eos_tokens: Vec<Token>,
    /// Size of the vocabulary.
    pub vocabulary: u32,
}

impl EngineLimits {
    /// Checks that the sizes fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        if !self.block_tokens.is_power_of_two() {
            return Err(LimitError::invalid("block_tokens", self.block_tokens, "a power of two, such as 32"));
        }
        LimitError::at_most("block_tokens", u64::from(self.block_tokens), 1_024)?;
        LimitError::at_least("max_sequences", u64::from(self.max_sequences), 1)?;
        LimitError::at_most("max_sequences", u64::from(self.max_sequences), 65_536)?;
        LimitError::at_least("max_step_tokens", u64::from(self.max_step_tokens), u64::from(self.max_sequences))?;
        LimitError::at_least("max_sequence_tokens", u64::from(self.max_sequence_tokens), 2)?;
        LimitError::at_most("max_sequence_tokens", u64::from(self.max_sequence_tokens), 1 << 24)?;
        LimitError::at_least("max_waiting_sequences", u64::from(self.max_waiting_sequences), 1)?;
        LimitError::at_least("max_steps_in_flight", u64::from(self.max_steps_in_flight), 1)?;
        LimitError::at_most("max_steps_in_flight", u64::from(self.max_steps_in_flight), 64)?;
        LimitError::at_least("vocabulary", u64::from(self.vocabulary), 1)?;
        LimitError::at_most("eos_tokens", self.eos_tokens.len() as u64, 64)?;
        // The longest sequence must fit alone, or it could be admitted and never finish.
        let blocks = self.max_sequence_tokens.div_ceil(self.block_tokens);
        LimitError::at_least("total_blocks", u64::from(self.total_blocks), u64::from(blocks))
    }

    /// Blocks that hold this many tokens.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }
}

/// Bounds of one front.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FrontLimits {
    /// Most requests that wait for a replica.
    pub max_queued_requests: u32,
    /// Most prompt tokens that wait for a replica.
    pub max_queued_tokens: u64,
    /// Most requests that are alive, queued and running together.
    pub max_live_requests: u32,
    /// A replica gets only what it can start within this much predicted work.
    pub look_ahead: Duration,
    /// Most attempts at one request before it ends with an error.
    pub max_attempts: u32,
    /// How long a detached request keeps running without a reader.
    pub max_detached: Duration,
    /// Most outputs kept for one request whose reader has fallen behind, in tokens.
    pub max_unread_tokens: u32,
}

impl Default for FrontLimits {
    fn default() -> Self {
        Self {
            max_queued_requests: 2_048,
            max_queued_tokens: 4_000_000,
            max_live_requests: 4_096,
            look_ahead: Duration::from_millis(250),
            max_attempts: 8,
            max_detached: Duration::from_millis(60_000),
            max_unread_tokens: 65_536,
        }
    }
}

impl FrontLimits {
    /// Checks that the sizes fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        LimitError::at_least("max_queued_requests", u64::from(self.max_queued_requests), 1)?;
        LimitError::at_least("max_queued_tokens", self.max_queued_tokens, 1)?;
        LimitError::at_least("max_live_requests", u64::from(self.max_live_requests), 1)?;
        LimitError::at_least("max_attempts", u64::from(self.max_attempts), 1)?;
        LimitError::at_least("max_unread_tokens", u64::from(self.max_unread_tokens), 1)
    }
}
