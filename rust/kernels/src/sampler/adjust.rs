//! Changes single logits before temperature: penalties, bias, suppressed tokens, grammar mask, in this order.
//! O(entries), plus O(vocabulary / 32) for a mask; each token is penalised once, however many lists name it.
//! Works on a copy of the row, which exists only for rows that need it.

use super::SamplerRow;

impl SamplerRow<'_> {
    /// Whether any logit differs from the model's.
    pub(super) fn changes_logits(&self) -> bool {
        self.has_repetition_penalty()
            || self.has_count_penalty()
            || !self.logit_bias.is_empty()
            || !self.suppressed.is_empty()
            || self.allowed.is_some()
    }

    fn has_repetition_penalty(&self) -> bool {
        self.repetition_penalty.to_bits() != 1.0_f32.to_bits()
            && !(self.prompt_tokens.is_empty() && self.generated_counts.is_empty())
    }

    fn has_count_penalty(&self) -> bool {
        (self.presence_penalty != 0.0 || self.frequency_penalty != 0.0) && !self.generated_counts.is_empty()
    }

    /// Applies everything to a row of logits. Token ids were checked against the vocabulary.
    pub(super) fn change_logits(&self, logits: &mut [f32]) {
        if self.has_repetition_penalty() {
            self.penalise_repetition(logits);
        }
        if self.has_count_penalty() {
            for &(token, count) in self.generated_counts.iter().filter(|&&(_, count)| count > 0) {
                // Two roundings in this order at every level: the compiler does not fuse them.
                logits[token as usize] -= self.frequency_penalty * count as f32;
                logits[token as usize] -= self.presence_penalty;
            }
        }
        for &(token, bias) in self.logit_bias {
            logits[token as usize] += bias;
        }
        for &token in self.suppressed {
            logits[token as usize] = f32::NEG_INFINITY;
        }
        if let Some(allowed) = self.allowed {
            for (logits, &word) in logits.chunks_mut(32).zip(allowed) {
                let mut forbidden = !word;
                if forbidden == u32::MAX {
                    logits.fill(f32::NEG_INFINITY);
                    continue;
                }
                while forbidden != 0 {
                    let bit = forbidden.trailing_zeros() as usize;
                    forbidden &= forbidden - 1;
                    if let Some(logit) = logits.get_mut(bit) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }

    /// Walks the two ascending lists together, so that a token in both is penalised once.
    fn penalise_repetition(&self, logits: &mut [f32]) {
        let mut penalise = |token: u32| {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
        };
        let mut generated =
            self.generated_counts.iter().filter(|&&(_, count)| count > 0).map(|&(token, _)| token).peekable();
        for &token in self.prompt_tokens {
            while let Some(earlier) = generated.next_if(|&other| other < token) {
                penalise(earlier);
            }
            generated.next_if_eq(&token);
            penalise(token);
        }
        generated.for_each(penalise);
    }
}
