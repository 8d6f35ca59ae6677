//! Tokens on their way to readers: columns, one set per frame, so that a frame of N tokens costs three growing vectors
//! and not N small ones. Tokens of one request that follow each other in a frame are one delivery.

use llmscale_types::{RequestId, Token, TokenLogprobs};

/// The tokens that one frame (or one attaching reader) brings.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Deliveries {
    heads: Vec<Head>,
    tokens: Vec<Token>,
    logprobs: Vec<(u32, TokenLogprobs)>,
}

/// Where a delivery starts in the columns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Head {
    request: RequestId,
    index: u32,
    so_far: SoFar,
    first_token: usize,
    first_logprobs: usize,
}

/// What else is known of a request when its tokens are delivered: its end may be the client's, who is not told then.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SoFar {
    /// Prompt tokens that were found in a prefix cache.
    pub cached_tokens: u32,
    /// Lost attempts and worker restarts that the stream survived.
    pub restarts: u32,
}

/// Tokens of one request.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Delivery<'a> {
    /// Whose.
    pub request: RequestId,
    /// Position of the first token in the request's output.
    pub index: u32,
    /// What else is known.
    pub so_far: SoFar,
    /// The tokens.
    pub tokens: &'a [Token],
    /// Log probabilities of those that have them, with positions in the request's output.
    pub logprobs: &'a [(u32, TokenLogprobs)],
}

impl Deliveries {
    /// Room for a frame of this many tokens.
    pub(crate) fn with_capacity(rows: usize) -> Self {
        Self { heads: Vec::with_capacity(rows), tokens: Vec::with_capacity(rows), logprobs: Vec::new() }
    }

    /// Adds one token at this position of a request's output.
    pub(crate) fn push(
        &mut self,
        request: RequestId,
        so_far: SoFar,
        index: u32,
        token: Token,
        logprobs: Option<TokenLogprobs>,
    ) {
        if self.heads.last().is_none_or(|head| head.request != request) {
            let (first_token, first_logprobs) = (self.tokens.len(), self.logprobs.len());
            self.heads.push(Head { request, index, so_far, first_token, first_logprobs });
        }
        self.tokens.push(token);
        self.logprobs.extend(logprobs.map(|logprobs| (index, logprobs)));
    }

    /// Whether there is nothing to deliver.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// The deliveries in the order in which they were made.
    pub fn iter(&self) -> impl Iterator<Item = Delivery<'_>> {
        let ends = self.heads.iter().skip(1).map(|head| (head.first_token, head.first_logprobs));
        let ends = ends.chain(std::iter::once((self.tokens.len(), self.logprobs.len())));
        self.heads.iter().zip(ends).map(|(head, (token_end, logprobs_end))| Delivery {
            request: head.request,
            index: head.index,
            so_far: head.so_far,
            tokens: &self.tokens[head.first_token..token_end],
            logprobs: &self.logprobs[head.first_logprobs..logprobs_end],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Deliveries, SoFar};
    use llmscale_types::{RequestId, TokenLogprobs};

    #[test]
    fn tokens_of_one_request_that_follow_each_other_are_one_delivery() {
        let logprobs = TokenLogprobs { chosen: -1.0, top: Vec::new() };
        let (plain, found) = (SoFar::default(), SoFar { cached_tokens: 16, restarts: 1 });
        let mut batch = Deliveries::with_capacity(4);
        batch.push(RequestId(1), plain, 5, 50, None);
        batch.push(RequestId(2), found, 0, 60, None);
        batch.push(RequestId(2), found, 1, 61, Some(logprobs.clone()));
        batch.push(RequestId(3), plain, 9, 70, None);
        let seen: Vec<_> =
            batch.iter().map(|delivery| (delivery.request.0, delivery.index, delivery.tokens.to_vec())).collect();
        assert_eq!(seen, [(1, 5, vec![50]), (2, 0, vec![60, 61]), (3, 9, vec![70])]);
        let seen: Vec<_> = batch.iter().map(|delivery| delivery.logprobs.to_vec()).collect();
        assert_eq!(seen, [vec![], vec![(1, logprobs)], vec![]]);
        assert_eq!(batch.iter().map(|delivery| delivery.so_far).collect::<Vec<_>>(), [plain, found, plain]);
    }

    #[test]
    fn nothing_is_delivered_from_an_empty_batch() {
        assert_eq!(Deliveries::default().iter().count(), 0);
    }
}
