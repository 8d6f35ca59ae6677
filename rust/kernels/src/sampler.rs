//! Samples one token per row of a batch of logits.
//! A row goes through penalties, bias, masks, temperature, min-p, top-k and top-p (the order and meaning of Hugging Face
//! and vLLM), then an exponential race with counter-based noise picks the token: the result depends on the row's logits,
//! parameters, seed, choice and position alone, not on the batch, the threads or the instruction level, in every bit.
//! Nothing is sorted: thresholds come from block maxima, a partial selection and a histogram, and blocks that cannot
//! win the race are skipped exactly. O(vocabulary) per row, about two reads of the row. Knows nothing of requests,
//! stop tokens or text.
#![expect(unsafe_code, reason = "disjoint results of one array are written on several threads")]

mod adjust;
mod filter;
mod logprobs;
pub mod philox;
mod race;
mod row;
mod scan;

pub use philox::{Purpose, random_word};

use crate::dispatch::Level;
use crate::element::Element;
use crate::error::KernelError;
use crate::pool::Pool;
use crate::shared_output::SharedOutput;
use core::fmt;
use row::RowKernel;

/// Token ids that share a block: one maximum, one decision to skip, four vectors of noise.
pub(crate) const BLOCK_TOKENS: usize = 64;

/// Temperatures below this are greedy, as in vLLM: the softmax would be one-hot but for exact ties.
pub const MIN_TEMPERATURE: f32 = 1e-5;

/// Logits of a batch: row `r` is `values[r * row_stride..][..vocabulary]`.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a, T> {
    /// The array.
    pub values: &'a [T],
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Elements from one row to the next, at least `vocabulary`.
    pub row_stride: usize,
}

/// How one row is sampled.
#[derive(Clone, Copy, Debug)]
pub struct SamplerRow<'a> {
    /// 0 (or anything below [`MIN_TEMPERATURE`]) picks the most likely token, the lowest id among equals.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens and those equal to the last of them; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest most likely tokens whose probabilities reach this sum (of what `top_k` left, renormalised);
    /// among equals the lower id is taken first; 1 keeps all. At least one token stays.
    pub top_p: f32,
    /// Keep tokens at least this times as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of generated tokens.
    pub presence_penalty: f32,
    /// Subtracted from logits of generated tokens, once per occurrence.
    pub frequency_penalty: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// Which of a request's parallel choices this is.
    pub choice: u32,
    /// Absolute position of the token to sample, the prompt included.
    pub position: u32,
    /// Report the chosen token's log probability and this many most likely tokens.
    pub logprobs: Option<u32>,
    /// Tokens that must not be sampled now (minimum length: end tokens).
    pub suppressed: &'a [u32],
    /// Added to single logits.
    pub logit_bias: &'a [(u32, f32)],
    /// The only tokens allowed, as bits by id (grammar); `vocabulary / 32` words, rounded up.
    pub allowed: Option<&'a [u32]>,
    /// Distinct tokens of the prompt in ascending order.
    pub prompt_tokens: &'a [u32],
    /// Distinct generated tokens in ascending order, with how often each occurred.
    pub generated_counts: &'a [(u32, u32)],
}

impl Default for SamplerRow<'_> {
    /// Plain sampling at temperature 1.
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
            position: 0,
            logprobs: None,
            suppressed: &[],
            logit_bias: &[],
            allowed: None,
            prompt_tokens: &[],
            generated_counts: &[],
        }
    }
}

/// Why one row has no token. Other rows of the batch are not affected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowError {
    /// The logits hold a NaN or plus infinity: the model has broken down on this row.
    NotFinite {
        /// The first such token.
        token: u32,
    },
    /// Every token is suppressed, masked or minus infinity.
    NoCandidate,
}

impl fmt::Display for RowError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFinite { token } => {
                write!(formatter, "The logit of token {token} is not a number or infinite. End the sequence.")
            }
            Self::NoCandidate => formatter.write_str(
                "Every token is suppressed, masked or minus infinity. Relax the mask or the suppressed tokens.",
            ),
        }
    }
}

impl std::error::Error for RowError {}

/// Log probabilities of the model's own distribution: the softmax of the logits as given, before any parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowLogprobs {
    /// Of the sampled token.
    pub chosen: f32,
    /// The most likely tokens in descending order, the lower id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// What became of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledRow {
    /// The token, or why there is none.
    pub token: Result<u32, RowError>,
    /// Present where asked for and where there is a token.
    pub logprobs: Option<RowLogprobs>,
}

/// Samples every row; `logits` must hold `rows.len()` rows.
///
/// # Errors
/// A parameter outside its range, a token id outside the vocabulary, or a length that does not fit; no row has been
/// sampled then. Trouble with the numbers of one row is that row's own [`RowError`].
pub fn sample<T: Element>(
    pool: &Pool,
    level: Level,
    logits: &Logits<'_, T>,
    rows: &[SamplerRow<'_>],
) -> Result<Vec<SampledRow>, KernelError> {
    validate(logits, rows)?;
    let mut sampled = vec![SampledRow { token: Err(RowError::NoCandidate), logprobs: None }; rows.len()];
    let output = SharedOutput::new(&mut sampled);
    pool.parallel_for(rows.len(), |index| {
        let values = &logits.values[index * logits.row_stride..][..logits.vocabulary];
        let result = row::with_scratch(|scratch| level.run(RowKernel { logits: values, row: &rows[index], scratch }));
        // SAFETY: every row is one chunk.
        let target = unsafe { output.part(index, 1) };
        target[0] = result;
    })?;
    Ok(sampled)
}

fn validate<T>(logits: &Logits<'_, T>, rows: &[SamplerRow<'_>]) -> Result<(), KernelError> {
    let vocabulary = logits.vocabulary;
    if vocabulary == 0 || vocabulary > i32::MAX as usize {
        let given = vocabulary as i64;
        return Err(KernelError::Unsupported { argument: "vocabulary", given, rule: "from 1 to 2^31 - 1" });
    }
    if logits.row_stride < vocabulary {
        let given = logits.row_stride as i64;
        return Err(KernelError::Unsupported { argument: "row_stride", given, rule: "at least the vocabulary" });
    }
    let required = rows.len().checked_sub(1).map_or(0, |last| last * logits.row_stride + vocabulary);
    if logits.values.len() < required {
        let given = logits.values.len();
        return Err(KernelError::Length { argument: "logits", required, given });
    }
    rows.iter().enumerate().try_for_each(|(index, row)| row.validate(index, vocabulary))
}

impl SamplerRow<'_> {
    fn validate(&self, row: usize, vocabulary: usize) -> Result<(), KernelError> {
        let finite = "a finite number";
        for (parameter, given, accepted, rule) in [
            ("temperature", self.temperature, self.temperature >= 0.0, "0 or a positive finite number"),
            ("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "from 0 to 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "a positive finite number"),
            ("presence_penalty", self.presence_penalty, true, finite),
            ("frequency_penalty", self.frequency_penalty, true, finite),
        ] {
            if !(accepted && given.is_finite()) {
                return Err(KernelError::SamplingParameter { row, parameter, given, rule });
            }
        }
        if let Some(&(_, given)) = self.logit_bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY) {
            let rule = "a finite number or minus infinity";
            return Err(KernelError::SamplingParameter { row, parameter: "logit_bias", given, rule });
        }
        if let Some(allowed) = self.allowed {
            crate::error::require_length("allowed", vocabulary.div_ceil(32), allowed.len())?;
        }
        require_tokens("suppressed", self.suppressed.iter().copied(), vocabulary, false)?;
        require_tokens("logit_bias", self.logit_bias.iter().map(|entry| entry.0), vocabulary, false)?;
        require_tokens("prompt_tokens", self.prompt_tokens.iter().copied(), vocabulary, true)?;
        require_tokens("generated_counts", self.generated_counts.iter().map(|entry| entry.0), vocabulary, true)
    }
}

fn require_tokens(
    argument: &'static str,
    tokens: impl Iterator<Item = u32>,
    vocabulary: usize,
    ascending: bool,
) -> Result<(), KernelError> {
    let mut previous = None;
    for (position, token) in tokens.enumerate() {
        if token as usize >= vocabulary {
            let (value, limit) = (i64::from(token), vocabulary as i64);
            return Err(KernelError::OutOfRange { argument, position, value, limit });
        }
        if ascending && previous.is_some_and(|previous| previous >= token) {
            let rule = "token ids in ascending order without repetition";
            return Err(KernelError::Unsupported { argument, given: i64::from(token), rule });
        }
        previous = Some(token);
    }
    Ok(())
}
