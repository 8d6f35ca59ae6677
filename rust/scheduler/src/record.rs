//! A sequence's record: everything about it that survives preemption and the death of a worker. It moves between the
//! waiting queue and a slot and is never copied. Knows nothing of blocks or steps.

use crate::policy::{Facts, OrderKey, Policy};
use crate::queue::Place;
use llmscale_blocks::BlockHash;
use llmscale_types::{SequenceKey, Submission};

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Record {
    /// The submission; its context grows with every emitted token (while running, the context lives in the slot's row).
    pub(crate) submission: Submission,
    /// Order of arrival on this replica, kept over preemptions.
    pub(crate) arrival: u64,
    /// Where it stands among what waits and runs.
    pub(crate) order: OrderKey,
    /// Chain hashes of the leading full blocks of the context, as far as they were made.
    pub(crate) hashes: Vec<BlockHash>,
    /// Prompt tokens found in the prefix cache at first admission.
    pub(crate) cached_tokens: Option<u32>,
    /// The worker died while computing it and it has made no progress since: it runs alone until it does.
    pub(crate) suspect: bool,
}

impl Record {
    pub(crate) fn new(submission: Submission, arrival: u64, hashes: Vec<BlockHash>, policy: &dyn Policy) -> Self {
        let facts = Facts {
            class: submission.class,
            arrival,
            uncomputed_tokens: submission.context.len() as u32,
            deadline: submission.deadline,
        };
        let order = policy.key(&facts);
        let suspect = submission.suspect;
        Self { submission, arrival, order, hashes, cached_tokens: None, suspect }
    }

    /// Where it waits, whenever it does.
    pub(crate) fn place(&self) -> Place {
        (self.order, self.arrival)
    }

    pub(crate) fn key(&self) -> SequenceKey {
        self.submission.key
    }

    /// Output tokens known, those of earlier attempts included, given the context's length.
    pub(crate) fn output_tokens(&self, context_tokens: usize) -> u32 {
        context_tokens as u32 - self.submission.prompt_tokens
    }
}
