//! What a replica tells a front: one frame per front per step, in columns.

use crate::ids::{Attempt, RequestId, StepId, Token};
use serde::{Deserialize, Serialize};

/// Why a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum FinishReason {
    /// A stop or end-of-sequence token was drawn (it is the last token of the output).
    Stop,
    /// `max_tokens` or the model's length was reached.
    Length,
    /// The front asked for it.
    Aborted,
    /// Its deadline passed.
    Deadline,
    /// The worker died twice while computing it.
    Poisoned,
    /// The model returned a logit that is not a number.
    NotANumber,
    /// Every token was suppressed.
    NothingToSample,
}

impl FinishReason {
    /// The stable label used in metrics and error codes.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Aborted => "aborted",
            Self::Deadline => "deadline_exceeded",
            Self::Poisoned => "request_poisoned",
            Self::NotANumber => "not_a_number",
            Self::NothingToSample => "nothing_to_sample",
        }
    }
}

/// Log probabilities of one sampled token under the raw model distribution.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// Of the token that was drawn.
    pub chosen: f32,
    /// The best tokens with theirs, best first.
    pub top: Vec<(Token, f32)>,
}

/// The end of one attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finished {
    /// The request.
    pub request: RequestId,
    /// The try.
    pub attempt: Attempt,
    /// Why.
    pub reason: FinishReason,
    /// Output tokens in all, earlier attempts included: what the front must hold by now.
    pub output_tokens: u32,
}

/// Tokens of one step for one front. The four columns are parallel; `index` is the token's position in the request's
/// output, so that a receiver sees a gap or a repetition at once.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Outputs {
    /// The step that made them.
    pub step: StepId,
    /// Which request.
    pub requests: Vec<RequestId>,
    /// Which try.
    pub attempts: Vec<Attempt>,
    /// Position in the request's output.
    pub indexes: Vec<u32>,
    /// The token.
    pub tokens: Vec<Token>,
    /// Log probabilities: (row of the columns, values).
    pub logprobs: Vec<(u32, TokenLogprobs)>,
    /// Prompt tokens that were found in the prefix cache, if any: (row of an answer's first token, their number). With
    /// the first token, because the end may be the client's.
    pub cached: Vec<(u32, u32)>,
    /// Attempts that ended in this step, after their tokens above.
    pub finished: Vec<Finished>,
}

impl Outputs {
    /// Nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.finished.is_empty()
    }

    /// Empties the columns and keeps their memory.
    pub fn clear(&mut self) {
        self.requests.clear();
        self.attempts.clear();
        self.indexes.clear();
        self.tokens.clear();
        self.logprobs.clear();
        self.cached.clear();
        self.finished.clear();
    }
}
