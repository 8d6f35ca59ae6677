//! How long answers usually are: an exponential average over the last ~16, in fixed point. The best guess for how many
//! tokens a request will produce, since `max_tokens` is mostly far above. O(1).

const FRACTION_BITS: u32 = 8;
const WEIGHT_SHIFT: u32 = 4;
/// Before the first answer.
const DEFAULT_TOKENS: u64 = 128;

/// See the file's header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UsualOutput {
    average: u64,
}

impl UsualOutput {
    pub(crate) fn new() -> Self {
        Self { average: DEFAULT_TOKENS << FRACTION_BITS }
    }

    /// An answer of this many tokens came to its own end.
    pub(crate) fn observe(&mut self, tokens: u32) {
        let sample = u64::from(tokens) << FRACTION_BITS;
        self.average = self.average - (self.average >> WEIGHT_SHIFT) + (sample >> WEIGHT_SHIFT);
    }

    /// Tokens to expect when at most `limit` may come: at least one.
    pub(crate) fn expect(self, limit: u32) -> u32 {
        ((self.average >> FRACTION_BITS).max(1)).min(u64::from(limit)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::UsualOutput;

    #[test]
    fn the_expectation_follows_the_answers_and_keeps_the_limit() {
        let mut usual = UsualOutput::new();
        assert_eq!((usual.expect(1_000), usual.expect(16)), (128, 16));
        for _ in 0..200 {
            usual.observe(10);
        }
        assert!((9..=11).contains(&usual.expect(1_000)));
        for _ in 0..200 {
            usual.observe(0);
        }
        assert_eq!(usual.expect(1_000), 1);
    }
}
