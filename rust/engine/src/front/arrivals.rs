//! What waits for readers: tokens and ends, merged per request until taken. The front bounds how much a request may have
//! unread, so this is bounded too. O(1) per delivery.

use llmscale_front::{Delivery, EndReason, Usage};
use llmscale_types::{RequestId, Token, TokenLogprobs};
use rustc_hash::FxHashMap;

/// What is new of one request.
#[derive(Clone, PartialEq, Debug)]
pub struct Arrival {
    /// Which.
    pub request: RequestId,
    /// Position of the first token in its output.
    pub index: u32,
    /// Tokens in order.
    pub tokens: Vec<Token>,
    /// Log probabilities, one per token, for requests that asked.
    pub logprobs: Vec<TokenLogprobs>,
    /// How it ended, if it has.
    pub end: Option<(EndReason, Usage, u32)>,
}

/// See the file's header.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    waiting: Vec<Arrival>,
    places: FxHashMap<RequestId, usize>,
}

impl Arrivals {
    pub(super) fn tokens(&mut self, delivery: &Delivery<'_>) {
        let arrival = self.of(delivery.request, delivery.index);
        arrival.tokens.extend_from_slice(delivery.tokens);
        arrival.logprobs.extend(delivery.logprobs.iter().map(|(_, values)| values.clone()));
    }

    pub(super) fn end(&mut self, request: RequestId, reason: EndReason, usage: Usage, restarts: u32) {
        self.of(request, usage.output_tokens).end = Some((reason, usage, restarts));
    }

    pub(super) fn take(&mut self) -> Vec<Arrival> {
        self.places.clear();
        std::mem::take(&mut self.waiting)
    }

    fn of(&mut self, request: RequestId, index: u32) -> &mut Arrival {
        let place = *self.places.entry(request).or_insert_with(|| {
            self.waiting.push(Arrival { request, index, tokens: Vec::new(), logprobs: Vec::new(), end: None });
            self.waiting.len() - 1
        });
        &mut self.waiting[place]
    }
}
