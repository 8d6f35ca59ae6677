//! A model as plain data: what its spec says, and where every tensor lies. Made by whoever read the config and the headers
//! of its files; nothing here opens a file. A weight may be several tensors, stacked along their outputs.

use crate::fp8::Fp8Scales;
use crate::source::Stack;
use crate::turned::{Packing, TurnedPart};
use llmscale_kernels::kv_format::KvFormat;

/// How a projection's weight is held while it is served.
#[derive(Debug)]
pub enum WeightSource {
    /// `[outputs, inputs]`, in the format of the activations.
    Dense(Stack),
    /// A dense weight, rounded to eight bits with a scale per output while it is read.
    MadeBytes(Stack),
    /// Signed codes `[outputs, inputs]`, and `[outputs, 1]` scales (or `[1]` for each tensor of the stack).
    StoredBytes {
        /// Codes.
        codes: Stack,
        /// Scales.
        scales: Stack,
    },
    /// A dense weight, rounded to four bits with a scale per output and `group` inputs while it is read.
    MadeNibbles {
        /// The weight.
        stack: Stack,
        /// Inputs that share a scale; they divide the inputs.
        group: usize,
        /// Without zero points: all are 8.
        symmetric: bool,
    },
    /// Codes of four bits `[outputs, inputs / 8]`, eight to a word, the first in the lowest bits.
    StoredNibbles {
        /// Codes.
        codes: Stack,
        /// `[outputs, groups]`.
        scales: Stack,
        /// `[outputs / 8, groups]`, eight outputs to a word; none where all are 8.
        zeros: Option<Stack>,
        /// Inputs of the weight.
        inputs: usize,
        /// Inputs that share a scale.
        group: usize,
    },
    /// Codes of four bits that are stored inputs first.
    TurnedNibbles {
        /// Tensors, one below the other.
        parts: Vec<TurnedPart>,
        /// How they are packed.
        packing: Packing,
        /// Inputs of the weight.
        inputs: usize,
        /// Inputs that share a scale.
        group: usize,
    },
    /// Codes of e4m3, which become dense.
    Fp8 {
        /// `[outputs, inputs]`.
        codes: Stack,
        /// Of each tensor of them.
        scales: Vec<Stack>,
        /// What shares one.
        kind: Fp8Scales,
    },
}

impl WeightSource {
    /// Outputs and inputs of the weight.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense(stack)
            | Self::MadeBytes(stack)
            | Self::StoredBytes { codes: stack, .. }
            | Self::MadeNibbles { stack, .. }
            | Self::Fp8 { codes: stack, .. } => (stack.rows(), stack.columns()),
            Self::StoredNibbles { codes, inputs, .. } => (codes.rows(), *inputs),
            Self::TurnedNibbles { parts, inputs, .. } => (parts.iter().map(TurnedPart::outputs).sum(), *inputs),
        }
    }
}

/// `y = x W^T + b`.
#[derive(Debug)]
pub struct LinearDescription {
    /// W.
    pub weight: WeightSource,
    /// b, where there is one.
    pub bias: Option<Stack>,
}

/// An RMS norm.
#[derive(Debug)]
pub struct NormDescription {
    /// One factor per element.
    pub weight: Stack,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Frequencies of a rotary embedding, in radians per position.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeDescription {
    /// `head_dim / 2` of them.
    pub frequencies: Vec<f32>,
}

/// Grouped-query attention of one layer.
#[derive(Debug)]
pub struct AttentionDescription {
    /// Query heads, a multiple of the key-value heads.
    pub query_heads: usize,
    /// Norms of each query head and each key head, where there are any.
    pub head_norms: Option<(NormDescription, NormDescription)>,
    /// Rows attend to so many latest tokens, themselves included.
    pub window_tokens: Option<u32>,
    /// The rotation.
    pub rope: RopeDescription,
    /// Queries, keys and values, in this order.
    pub qkv: LinearDescription,
    /// Back to the stream.
    pub output: LinearDescription,
}

/// One layer.
#[derive(Debug)]
pub struct BlockDescription {
    /// Before attention.
    pub attention_norm: NormDescription,
    /// Attention.
    pub attention: AttentionDescription,
    /// Before the gated MLP.
    pub mlp_norm: NormDescription,
    /// Gate and up, in this order.
    pub gate_up: LinearDescription,
    /// Back to the stream.
    pub down: LinearDescription,
}

/// What all layers share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Ids.
    pub vocabulary: usize,
    /// Layers.
    pub layers: usize,
    /// Key-value heads of every layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// The largest step, and the memory for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramLimits {
    /// Token rows of a step.
    pub max_step_tokens: usize,
    /// Rows of a step that sample.
    pub max_samples: usize,
    /// Positions of a sequence.
    pub max_sequence_tokens: usize,
    /// KV blocks.
    pub blocks: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// What keys and values are stored as.
    pub kv_format: KvFormat,
}
