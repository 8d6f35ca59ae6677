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
    /// Blocks of its host tier, which holds what the device has no room for; 0 for none.
    pub host_blocks: u32,
    /// Blocks of its disk tier, which holds what the host tier has no room for; 0 for none.
    pub disk_blocks: u32,
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
    /// Groups that the running set is split into, one per stage of a pipeline. With one, the steps in flight are of the
    /// same sequences; with more, each group has at most one step in flight, and no stage waits for another's samples.
    pub groups: u32,
    /// Ids that end a sequence unless it ignores them.
    pub eos_tokens: Vec<Token>,
    /// Size of the vocabulary.
    pub vocabulary: u32,
}

impl EngineLimits {
    /// Longest sequence that any node may serve: its ids fill two thirds of the largest frame.
    pub const MAX_SEQUENCE_TOKENS: u32 = 2 << 20;
    /// Most blocks of one sequence.
    pub const MAX_SEQUENCE_BLOCKS: u32 = 1 << 19;
    /// Most blocks of a device's pool.
    pub const MAX_TOTAL_BLOCKS: u32 = 1 << 24;
    /// Most blocks of a host tier: their index takes about 230 bytes each.
    pub const MAX_HOST_BLOCKS: u32 = 1 << 24;
    /// Most blocks of a disk tier: their index takes about 230 bytes each.
    pub const MAX_DISK_BLOCKS: u32 = 1 << 24;
    /// Most rows that can be in flight, so that what they give fits one frame though all results arrive at once.
    pub const MAX_ROWS_IN_FLIGHT: u32 = 1 << 15;
    /// Most sequences that any node may keep waiting.
    pub const MAX_WAITING_SEQUENCES: u32 = 1 << 16;

    /// Checks that the sizes fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        if !self.block_tokens.is_power_of_two() {
            return Err(LimitError::invalid("block_tokens", self.block_tokens, "a power of two, such as 32"));
        }
        LimitError::at_most("block_tokens", u64::from(self.block_tokens), 1_024)?;
        LimitError::at_least("max_sequences", u64::from(self.max_sequences), 1)?;
        LimitError::at_least("max_step_tokens", u64::from(self.max_step_tokens), u64::from(self.max_sequences))?;
        LimitError::at_least("max_sequence_tokens", u64::from(self.max_sequence_tokens), 2)?;
        LimitError::at_most(
            "max_sequence_tokens",
            u64::from(self.max_sequence_tokens),
            u64::from(Self::MAX_SEQUENCE_TOKENS),
        )?;
        let blocks = self.blocks_for(self.max_sequence_tokens);
        LimitError::at_most("blocks of the longest sequence", u64::from(blocks), u64::from(Self::MAX_SEQUENCE_BLOCKS))?;
        let waiting = u64::from(self.max_waiting_sequences);
        LimitError::at_least("max_waiting_sequences", waiting, 1)?;
        LimitError::at_most("max_waiting_sequences", waiting, u64::from(Self::MAX_WAITING_SEQUENCES))?;
        LimitError::at_least("max_steps_in_flight", u64::from(self.max_steps_in_flight), 1)?;
        LimitError::at_most("max_steps_in_flight", u64::from(self.max_steps_in_flight), 64)?;
        LimitError::at_most("host_blocks", u64::from(self.host_blocks), u64::from(Self::MAX_HOST_BLOCKS))?;
        LimitError::at_most("disk_blocks", u64::from(self.disk_blocks), u64::from(Self::MAX_DISK_BLOCKS))?;
        if self.disk_blocks > 0 {
            // What comes from the disk comes by the host.
            LimitError::at_least("host_blocks", u64::from(self.host_blocks), 1)?;
        }
        let rows = u64::from(self.max_sequences) * u64::from(self.max_steps_in_flight);
        LimitError::at_least("groups", u64::from(self.groups), 1)?;
        LimitError::at_most("groups", u64::from(self.groups), u64::from(self.max_steps_in_flight))?;
        LimitError::at_most("max_sequences times max_steps_in_flight", rows, u64::from(Self::MAX_ROWS_IN_FLIGHT))?;
        LimitError::at_least("vocabulary", u64::from(self.vocabulary), 1)?;
        LimitError::at_most("eos_tokens", self.eos_tokens.len() as u64, 64)?;
        // The longest sequence must fit alone, or it could be admitted and never finish.
        LimitError::at_least("total_blocks", u64::from(self.total_blocks), u64::from(blocks))?;
        LimitError::at_most("total_blocks", u64::from(self.total_blocks), u64::from(Self::MAX_TOTAL_BLOCKS))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> EngineLimits {
        EngineLimits {
            block_tokens: 32,
            total_blocks: 1 << 16,
            host_blocks: 0,
            disk_blocks: 0,
            max_sequences: 256,
            max_step_tokens: 1 << 16,
            max_sequence_tokens: 1 << 20,
            max_waiting_sequences: 1_024,
            max_steps_in_flight: 2,
            groups: 1,
            eos_tokens: vec![2],
            vocabulary: 32_000,
        }
    }

    #[test]
    fn sizes_whose_frames_could_not_be_sent_are_refused_by_name() {
        let refusal = |change: fn(&mut EngineLimits)| {
            let mut limits = limits();
            change(&mut limits);
            limits.check().expect_err("out of bounds").to_string()
        };
        assert_eq!(limits().check(), Ok(()));
        assert!(refusal(|limits| limits.max_sequence_tokens = 2_097_153).contains("the limit is 2097152; lower it"));
        assert!(refusal(|limits| limits.block_tokens = 1).contains("blocks of the longest sequence is 1048576"));
        assert!(refusal(|limits| limits.max_sequences = 16_385).contains("max_steps_in_flight is 32770"));
        assert!(refusal(|limits| limits.max_waiting_sequences = 65_537).contains("max_waiting_sequences is 65537"));
        assert!(refusal(|limits| limits.host_blocks = (1 << 24) + 1).contains("host_blocks is 16777217, the limit is"));
    }

    #[test]
    fn the_longest_sequence_must_fit_the_pool() {
        let limits = EngineLimits { total_blocks: (1 << 15) - 1, ..limits() };
        assert!(limits.check().expect_err("one block too few").to_string().contains("total_blocks is 32767"));
        let limits = EngineLimits { total_blocks: EngineLimits::MAX_TOTAL_BLOCKS + 1, ..limits };
        assert!(limits.check().expect_err("one block too many").to_string().contains("the limit is 16777216"));
    }
}
