//! Whether a front must take a request: the bounds of the model, then those of the queue, counted from scratch.

use crate::book::{Book, Place};
use crate::fake::VOCABULARY;
use llmscale_front::{NewRequest, SubmitError};
use llmscale_types::error::QueueUnit;
use llmscale_types::{Refusal, Time};

impl Book {
    /// Whether the front must take this, and how it must refuse it.
    pub(crate) fn admission(&self, now: Time, new: &NewRequest) -> Result<(), SubmitError> {
        if self.known.is_empty() {
            return Err(SubmitError::Unavailable { model: new.model.clone() });
        }
        if !self.known.contains_key(new.model.as_str()) {
            return Err(SubmitError::UnknownModel { model: new.model.clone() });
        }
        if self.given_up.contains(new.model.as_str()) {
            return Err(SubmitError::Unavailable { model: new.model.clone() });
        }
        if new.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt.into());
        }
        if let Some(&given) = new.prompt.iter().find(|&&token| token >= VOCABULARY) {
            return Err(Refusal::UnknownToken { given: u64::from(given), limit: u64::from(VOCABULARY) }.into());
        }
        let needed = new.prompt.len() as u64 + u64::from(new.sampling.max_tokens);
        if needed > self.max_sequence_tokens {
            return Err(Refusal::TooLong { needed, limit: self.max_sequence_tokens }.into());
        }
        let limits = &self.options.limits;
        let waiting = || self.entries.iter().filter(|entry| entry.place == Place::Waiting);
        let queued = waiting().count() as u64;
        let tokens: u64 = waiting().map(|entry| entry.context.len() as u64).sum();
        let live = self.entries.len() as u64;
        let full = |queued, limit, unit| {
            let retry_after = llmscale_types::Duration(0);
            Err(Refusal::QueueFull { queued, limit, unit, retry_after }.into())
        };
        if live >= u64::from(limits.max_live_requests) {
            return full(live, u64::from(limits.max_live_requests), QueueUnit::LiveRequests);
        }
        // What waits for others keeps it from no replica that has nothing to do.
        if self.idle_replicas(now).any(|replica| self.models[replica] == new.model) {
            return Ok(());
        }
        if queued >= u64::from(limits.max_queued_requests) {
            return full(queued, u64::from(limits.max_queued_requests), QueueUnit::Requests);
        }
        if queued > 0 && tokens + new.prompt.len() as u64 > limits.max_queued_tokens {
            return full(tokens, limits.max_queued_tokens, QueueUnit::Tokens);
        }
        Ok(())
    }
}
