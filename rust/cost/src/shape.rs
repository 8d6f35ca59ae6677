//! What a step is made of, as far as its time depends on it. Four counts, each bounded so that sums of their products
//! stay within 128 bits. Knows nothing of which sequences they belong to.

/// The size of one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepShape {
    /// Sequences that decode one token.
    pub decodes: u32,
    /// Prompt (or recomputed) tokens that go through the model.
    pub prefill_tokens: u32,
    /// KV tokens that the decoding sequences' attention reads: their lengths, added up.
    pub context_tokens: u64,
    /// Pairs of a prefilled token and a token that it attends to.
    pub prefill_pairs: u64,
}

impl StepShape {
    const MAX_ROWS: u32 = 1 << 24;
    const MAX_CONTEXT_TOKENS: u64 = 1 << 36;
    const MAX_PREFILL_PAIRS: u64 = 1 << 44;

    /// A step that computes `tokens` tokens of one context behind its first `start_tokens`, and nothing else.
    pub fn prefill(start_tokens: u32, tokens: u32) -> Self {
        let prefill_pairs = Self::pairs(start_tokens, tokens);
        Self { prefill_tokens: tokens, prefill_pairs, ..Self::default() }
    }

    /// Pairs of `tokens` tokens behind the first `start_tokens` of a context: each attends to all before it and to itself.
    pub fn pairs(start_tokens: u32, tokens: u32) -> u64 {
        let (start, tokens) = (u64::from(start_tokens), u64::from(tokens));
        (tokens * start).saturating_add(tokens * (tokens + 1) / 2)
    }

    /// Another chunk in the same step.
    pub fn add_prefill(&mut self, start_tokens: u32, tokens: u32) {
        self.prefill_tokens = self.prefill_tokens.saturating_add(tokens);
        self.prefill_pairs = self.prefill_pairs.saturating_add(Self::pairs(start_tokens, tokens));
    }

    /// One for the step itself, then the counts. Sizes beyond any real step predict like the largest.
    pub(crate) fn features(self) -> [u64; 5] {
        [
            1,
            u64::from(self.decodes.min(Self::MAX_ROWS)),
            u64::from(self.prefill_tokens.min(Self::MAX_ROWS)),
            self.context_tokens.min(Self::MAX_CONTEXT_TOKENS),
            self.prefill_pairs.min(Self::MAX_PREFILL_PAIRS),
        ]
    }
}
