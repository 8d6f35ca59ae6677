//! What a step is made of, as far as its time depends on it. Three counts, each bounded so that sums of their products
//! stay within 128 bits. Knows nothing of which sequences they belong to.

/// The size of one step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepShape {
    /// Sequences that decode one token.
    pub decodes: u32,
    /// Prompt (or recomputed) tokens that go through the model.
    pub prefill_tokens: u32,
    /// KV tokens that attention reads: the lengths of all sequences in the step, added up.
    pub context_tokens: u64,
}

impl StepShape {
    const MAX_ROWS: u32 = 1 << 24;
    const MAX_CONTEXT_TOKENS: u64 = 1 << 36;

    /// One for the step itself, then the counts. Sizes beyond any real step predict like the largest.
    pub(crate) fn features(self) -> [u64; 4] {
        [
            1,
            u64::from(self.decodes.min(Self::MAX_ROWS)),
            u64::from(self.prefill_tokens.min(Self::MAX_ROWS)),
            self.context_tokens.min(Self::MAX_CONTEXT_TOKENS),
        ]
    }
}
