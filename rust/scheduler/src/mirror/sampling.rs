//! What the sampler needs to know about one slot: the request's parameters, and counts of ids where a penalty reads them.
//! Recording a token is O(log distinct ids) with a penalty and nothing without. Knows no steps or buffers.

use llmscale_types::{Admission, Sampling, Token};

/// What the sampler needs to know about a slot.
#[derive(Debug, Default)]
pub struct SlotSampling {
    /// The request's parameters.
    pub sampling: Sampling,
    /// How many ids of the context are prompt.
    pub prompt_tokens: u32,
    /// Prompt ids, sorted and unique; kept only where the repetition penalty needs them.
    pub prompt_set: Vec<Token>,
    /// Emitted ids with their counts, sorted; kept only where a penalty needs them.
    pub emitted_counts: Vec<(Token, u32)>,
}

impl SlotSampling {
    pub(super) fn new(admission: &Admission) -> Self {
        let sampling = admission.sampling.clone();
        let (prompt, emitted) = admission.context.split_at(admission.prompt_tokens as usize);
        let mut state = Self { sampling, prompt_tokens: admission.prompt_tokens, ..Self::default() };
        if state.penalizes_prompt() {
            state.prompt_set = prompt.to_vec();
            state.prompt_set.sort_unstable();
            state.prompt_set.dedup();
        }
        for &token in emitted {
            state.count(token);
        }
        state
    }

    fn penalizes_prompt(&self) -> bool {
        self.sampling.repetition_penalty.to_bits() != 1.0_f32.to_bits()
    }

    /// Whether which ids were emitted changes how the next one is sampled.
    pub(super) fn counts_ids(&self) -> bool {
        let off = |value: f32| value.to_bits() << 1 == 0;
        self.penalizes_prompt() || !off(self.sampling.presence_penalty) || !off(self.sampling.frequency_penalty)
    }

    pub(super) fn count(&mut self, token: Token) {
        if self.counts_ids() {
            match self.emitted_counts.binary_search_by_key(&token, |entry| entry.0) {
                Ok(at) => self.emitted_counts[at].1 += 1,
                Err(at) => self.emitted_counts.insert(at, (token, 1)),
            }
        }
    }
}
