//! What waits for readers: tokens and ends, merged per request until taken. The front bounds how much a request may have
//! unread, so this is bounded too. O(1) per delivery.

use llmscale_front::{Delivery, EndReason, SoFar, Usage};
use llmscale_types::{RequestId, Token, TokenLogprobs};
use rustc_hash::FxHashMap;

/// What is new of one request.
#[derive(Clone, PartialEq, Debug)]
pub struct Arrival {
    /// Which.
    pub request: RequestId,
    /// Position of the first token in its output.
    pub index: u32,
    /// What else is known by now.
    pub so_far: SoFar,
    /// Tokens in order.
    pub tokens: Vec<Token>,
    /// Log probabilities, one per token, for requests that asked.
    pub logprobs: Vec<TokenLogprobs>,
    /// How it ended and with how many output tokens in all, if it has.
    pub end: Option<(EndReason, u32)>,
}

/// See the file's header.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    waiting: Vec<Arrival>,
    places: FxHashMap<RequestId, usize>,
}

impl Arrivals {
    pub(super) fn tokens(&mut self, delivery: &Delivery<'_>) {
        let arrival = self.of(delivery.request, delivery.index, delivery.so_far);
        arrival.tokens.extend_from_slice(delivery.tokens);
        arrival.logprobs.extend(delivery.logprobs.iter().map(|(_, values)| values.clone()));
    }

    pub(super) fn end(&mut self, request: RequestId, reason: EndReason, usage: Usage, restarts: u32) {
        let so_far = SoFar { cached_tokens: usage.cached_tokens, restarts };
        self.of(request, usage.output_tokens, so_far).end = Some((reason, usage.output_tokens));
    }

    pub(super) fn take(&mut self) -> Vec<Arrival> {
        self.places.clear();
        std::mem::take(&mut self.waiting)
    }

    fn of(&mut self, request: RequestId, index: u32, so_far: SoFar) -> &mut Arrival {
        let place = *self.places.entry(request).or_insert_with(|| {
            self.waiting.push(Arrival { request, index, so_far, tokens: Vec::new(), logprobs: Vec::new(), end: None });
            self.waiting.len() - 1
        });
        let arrival = &mut self.waiting[place];
        arrival.so_far = so_far;
        arrival
    }
}
