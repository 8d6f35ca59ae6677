//! Errors as data: what was asked for, which limit it met, what to do. Each variant has a stable label.

use crate::time::Duration;
use serde::{Deserialize, Serialize};

/// A value outside its bounds.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum LimitError {
    /// Too large.
    #[error("{field} is {given}, the limit is {limit}; lower it")]
    TooLarge {
        /// Which field.
        field: &'static str,
        /// What was given.
        given: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Too small.
    #[error("{field} is {given}, the least is {limit}; raise it")]
    TooSmall {
        /// Which field.
        field: &'static str,
        /// What was given.
        given: u64,
        /// What is needed.
        limit: u64,
    },
    /// Outside a range of numbers, or not a number.
    #[error("{field} is {given}, it must be from {low} to {high}")]
    Outside {
        /// Which field.
        field: &'static str,
        /// What was given.
        given: f64,
        /// Lower bound.
        low: f64,
        /// Upper bound.
        high: f64,
    },
    /// Of the wrong kind.
    #[error("{field} is {given}, it must be {expected}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What was given.
        given: u64,
        /// What is expected.
        expected: &'static str,
    },
}

impl LimitError {
    /// `given <= limit`.
    pub fn at_most(field: &'static str, given: u64, limit: u64) -> Result<(), Self> {
        if given > limit { Err(Self::TooLarge { field, given, limit }) } else { Ok(()) }
    }

    /// `given >= limit`.
    pub fn at_least(field: &'static str, given: u64, limit: u64) -> Result<(), Self> {
        if given < limit { Err(Self::TooSmall { field, given, limit }) } else { Ok(()) }
    }

    /// A number outside its range.
    pub fn outside(field: &'static str, given: f64, low: f64, high: f64) -> Self {
        Self::Outside { field, given, low, high }
    }

    /// A number of the wrong kind.
    pub fn invalid(field: &'static str, given: u32, expected: &'static str) -> Self {
        Self::Invalid { field, given: u64::from(given), expected }
    }
}

/// Why a front or a replica does not take a request. Nothing was started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The waiting queue is full.
    #[error(
        "the queue holds {queued} of at most {limit} {unit}; retry after {} ms",
        retry_after.0.div_ceil(1000)
    )]
    QueueFull {
        /// What waits now.
        queued: u64,
        /// What may wait.
        limit: u64,
        /// What is counted.
        unit: QueueUnit,
        /// Predicted time until there is room.
        retry_after: Duration,
    },
    /// Prompt and output together are longer than a sequence may be.
    #[error(
        "This model's maximum context length is {limit} tokens (max_sequence_tokens, the server's --max-model-len), \
         the request needs {needed}; shorten the prompt or lower max_tokens"
    )]
    TooLong {
        /// What it would need.
        needed: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A prompt without tokens.
    #[error("the prompt has no tokens, at least 1 is needed")]
    EmptyPrompt,
    /// An id that the model does not have.
    #[error("token id {given} is outside the vocabulary of {limit}")]
    UnknownToken {
        /// The id.
        given: u64,
        /// Size of the vocabulary.
        limit: u64,
    },
    /// A field of the sampling parameters is outside its bounds; the front checks first, so this is a broken peer.
    #[error("the sampling parameters are outside their bounds")]
    BadSampling,
    /// The same key is running already.
    #[error("this attempt is running already")]
    Duplicate,
    /// The process is going down and hands its work back.
    #[error("the node is draining and takes no new requests")]
    Draining,
}

/// What a queue counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum QueueUnit {
    /// Waiting requests.
    Requests,
    /// Waiting tokens.
    Tokens,
    /// Live requests, waiting and running.
    LiveRequests,
}

impl std::fmt::Display for QueueUnit {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::LiveRequests => "live requests",
        })
    }
}

impl Refusal {
    /// The stable label used in metrics and error codes.
    pub fn label(&self) -> &'static str {
        match self {
            Self::QueueFull { .. } => "queue_full",
            Self::TooLong { .. } => "request_too_long",
            Self::EmptyPrompt => "empty_prompt",
            Self::UnknownToken { .. } => "unknown_token",
            Self::BadSampling => "bad_sampling",
            Self::Duplicate => "duplicate_attempt",
            Self::Draining => "draining",
        }
    }
}
