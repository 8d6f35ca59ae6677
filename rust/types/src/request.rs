//! What a replica is asked to run: ids, sampling, limits. The same record starts a request and continues it elsewhere:
//! a continuation is a submission whose context already holds emitted tokens. Knows nothing of text.

use crate::error::LimitError;
use crate::ids::{SequenceKey, Token};
use crate::time::Time;
use serde::{Deserialize, Serialize};

/// Latency class of a request, most urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub enum Class {
    /// Somebody watches the tokens arrive.
    Interactive,
    /// An ordinary call.
    #[default]
    Standard,
    /// Throughput matters, latency does not.
    Batch,
    /// Runs on idle tokens.
    Background,
}

impl Class {
    /// All classes, most urgent first.
    pub const ALL: [Self; 4] = [Self::Interactive, Self::Standard, Self::Batch, Self::Background];
}

/// How the next token is chosen. Floats are data for the sampler: the core decides nothing by them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f32,
    /// Keep the k most likely; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches p; 1 keeps all.
    pub top_p: f32,
    /// Keep what has at least this share of the best probability; 0 keeps all.
    pub min_p: f32,
    /// Divides (or multiplies) the logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens that were emitted; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per emission; 0 is off.
    pub frequency_penalty: f32,
    /// Key of the counter-based generator. The front draws one where the client named none.
    pub seed: u64,
    /// Which of the request's choices this is; the second half of the generator's key.
    pub choice: u32,
    /// Return the chosen token's log probability and those of this many best tokens.
    pub logprobs: Option<u32>,
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(Token, f32)>,
    /// End after this many output tokens, those of earlier attempts included.
    pub max_tokens: u32,
    /// Suppress the end-of-sequence and stop tokens before this many output tokens.
    pub min_tokens: u32,
    /// End when one of these is drawn.
    pub stop_tokens: Vec<Token>,
    /// Do not end at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            choice: 0,
            logprobs: None,
            logit_bias: Vec::new(),
            max_tokens: 16,
            min_tokens: 0,
            stop_tokens: Vec::new(),
            ignore_eos: false,
        }
    }
}

impl Sampling {
    /// Most ids a logit bias may name (`OpenAI` itself allows 300).
    pub const MAX_LOGIT_BIAS: usize = 1_024;
    /// Most stop tokens of one request.
    pub const MAX_STOP_TOKENS: usize = 64;
    /// Most top log probabilities per token (`OpenAI` itself allows 20).
    pub const MAX_LOGPROBS: u32 = 20;

    /// Checks every field against its bound, so that no later stage needs to.
    pub fn check(&self, vocabulary: u32) -> Result<(), LimitError> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -10.0, 10.0),
            ("frequency_penalty", self.frequency_penalty, -10.0, 10.0),
        ];
        for (field, value, low, high) in ranges {
            // NaN fails the comparison, so it is refused like any other value outside.
            if !(low..=high).contains(&value) {
                return Err(LimitError::outside(field, f64::from(value), f64::from(low), f64::from(high)));
            }
        }
        LimitError::at_most("logit_bias", self.logit_bias.len() as u64, Self::MAX_LOGIT_BIAS as u64)?;
        LimitError::at_most("stop_token_ids", self.stop_tokens.len() as u64, Self::MAX_STOP_TOKENS as u64)?;
        LimitError::at_most("logprobs", u64::from(self.logprobs.unwrap_or(0)), u64::from(Self::MAX_LOGPROBS))?;
        LimitError::at_least("max_tokens", u64::from(self.max_tokens), 1)?;
        LimitError::at_most("min_tokens", u64::from(self.min_tokens), u64::from(self.max_tokens))?;
        for &(token, bias) in &self.logit_bias {
            LimitError::at_most("logit_bias token", u64::from(token), u64::from(vocabulary.saturating_sub(1)))?;
            if !(-1_000.0..=1_000.0).contains(&bias) {
                return Err(LimitError::outside("logit_bias", f64::from(bias), -1_000.0, 1_000.0));
            }
        }
        for &token in &self.stop_tokens {
            LimitError::at_most("stop_token_ids", u64::from(token), u64::from(vocabulary.saturating_sub(1)))?;
        }
        Ok(())
    }
}

/// A continuation record as a replica sees it: everything that it takes to run a sequence from any position.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Submission {
    /// Names this try.
    pub key: SequenceKey,
    /// Salt of the tenant's cache keys: blocks are shared only between sequences of one namespace
    /// (tenant, model, revision, adapter).
    pub namespace: [u8; 32],
    /// Latency class.
    pub class: Class,
    /// Prompt ids followed by the ids that earlier attempts emitted.
    pub context: Vec<Token>,
    /// How many ids of the context are prompt.
    pub prompt_tokens: u32,
    /// How to choose tokens and when to end.
    pub sampling: Sampling,
    /// When the request expires, on the receiver's clock.
    pub deadline: Option<Time>,
    /// A worker died or raised while computing it, and it has made no progress since: it runs alone until it does.
    pub suspect: bool,
}

impl Submission {
    /// Output tokens that the context already holds.
    pub fn emitted_tokens(&self) -> u32 {
        self.context.len() as u32 - self.prompt_tokens
    }

    /// The longest that the sequence can become, in tokens.
    pub fn max_total_tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.sampling.max_tokens)
    }
}
