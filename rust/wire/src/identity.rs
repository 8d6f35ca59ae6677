//! Whom a front talks to, and who it meant: the model with its numerics, and the bounds of the replica that runs it. Plain
//! data, linear in names and end tokens; knows nothing of conversations.

use crate::field::{open_record, record};
use llmscale_types::{EngineLimits, Token};

/// Which model a peer means.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ModelRef {
    /// Its name.
    pub name: String,
    /// Which state of it; `None` takes any.
    pub revision: Option<String>,
    /// The adapter on top; `None` is the plain model.
    pub adapter: Option<String>,
}

/// Exactly what a node computes with: two nodes of one identity give the same tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModelIdentity {
    /// Its name.
    pub name: String,
    /// Which state of it.
    pub revision: String,
    /// The adapter on top, if there is one.
    pub adapter: Option<String>,
    /// Digest of the weights.
    pub weights_digest: [u8; 32],
    /// Digest of tokenizer and template.
    pub tokenizer_digest: [u8; 32],
    /// Kernels, dispatch level, dtype, quantization and parallel degrees in one string.
    pub numerics: String,
}

/// What a front must know of a replica's bounds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeLimits {
    /// Size of the vocabulary.
    pub vocabulary: u32,
    /// Longest sequence, prompt and output together.
    pub max_sequence_tokens: u32,
    /// Most sequences that run at once.
    pub max_sequences: u32,
    /// Most sequences that wait on the node.
    pub max_waiting_sequences: u32,
    /// KV blocks.
    pub total_blocks: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Ids that end a sequence.
    pub eos_tokens: Vec<Token>,
}

impl From<&EngineLimits> for NodeLimits {
    fn from(limits: &EngineLimits) -> Self {
        Self {
            vocabulary: limits.vocabulary,
            max_sequence_tokens: limits.max_sequence_tokens,
            max_sequences: limits.max_sequences,
            max_waiting_sequences: limits.max_waiting_sequences,
            total_blocks: limits.total_blocks,
            block_tokens: limits.block_tokens,
            eos_tokens: limits.eos_tokens.clone(),
        }
    }
}

record!(ModelRef { name: String, revision: Option<String>, adapter: Option<String> });
open_record!(ModelIdentity {
    name: String,
    revision: String,
    adapter: Option<String>,
    weights_digest: [u8; 32],
    tokenizer_digest: [u8; 32],
    numerics: String,
});
open_record!(NodeLimits {
    vocabulary: u32,
    max_sequence_tokens: u32,
    max_sequences: u32,
    max_waiting_sequences: u32,
    total_blocks: u32,
    block_tokens: u32,
    eos_tokens: Vec<Token>,
});
