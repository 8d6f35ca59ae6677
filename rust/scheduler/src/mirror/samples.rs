//! What steps have sampled, told to the mirror when it is known: that may be after it has expanded the next step, whose
//! rows read these ids. A pipeline's first stage waits for them, a device takes them from its own memory meanwhile.
//! O(rows) per step. Knows nothing of how a token is drawn.

use super::Mirror;
use llmscale_types::{GroupId, Slot, StepId, Token};

/// Who samples in a step.
#[derive(Debug)]
pub(super) struct Samples {
    pub(super) step: StepId,
    pub(super) group: GroupId,
    pub(super) slots: Vec<Slot>,
}

impl Mirror {
    /// How many rows sampled in the oldest step that is not recorded.
    pub fn oldest_samples(&self) -> Option<usize> {
        self.unrecorded.front().map(|samples| samples.slots.len())
    }

    /// How many rows sampled in the oldest step that is not recorded, if that one or one behind it is an earlier step of
    /// this step's group: the group's decode rows hold no ids until it is recorded, and what no later step of the group
    /// asks for would pile up.
    pub fn awaited_samples(&self) -> Option<usize> {
        let of_group = |samples: &Samples| samples.group == self.group && samples.step < self.step;
        if self.unrecorded.iter().any(of_group) { self.oldest_samples() } else { None }
    }

    /// Whether this is the oldest step that is not recorded.
    pub fn awaits(&self, step: StepId) -> bool {
        self.unrecorded.front().is_some_and(|samples| samples.step == step)
    }

    /// Whether a device can compute this step before anybody has told what the step in front of it samples: every sequence
    /// has rows in both, so that no other can be blamed if either raises, and nothing but ids of decode rows depends on
    /// what is sampled there. A penalty, which counts ids, is more than that.
    pub fn follows_on(&self) -> bool {
        let decodes = &self.sample_slots[..self.counts.decodes as usize];
        let counts_ids = |slot: &Slot| self.rows[slot.index()].as_ref().is_some_and(|row| row.sampling.counts_ids());
        self.counts.rows > 0 && self.newcomers == 0 && !decodes.iter().any(counts_ids)
    }

    /// For each decode row the row of the step in front that samples its id, as long as that is not recorded.
    pub fn drawn_rows(&self) -> Vec<Option<u32>> {
        let decodes = &self.sample_slots[..self.counts.decodes as usize];
        let of_group = |samples: &&Samples| samples.group == self.group && samples.step < self.step;
        let Some(before) = self.unrecorded.iter().rev().find(of_group) else { return vec![None; decodes.len()] };
        let mut places = vec![None; self.rows.len()];
        for (place, slot) in before.slots.iter().enumerate() {
            places[slot.index()] = Some(place as u32);
        }
        let is_same = |slot: Slot| self.rows[slot.index()].as_ref().is_some_and(|row| row.admitted <= before.step);
        decodes.iter().map(|&slot| places[slot.index()].filter(|_| is_same(slot))).collect()
    }

    /// Tells the mirror what the oldest step without samples has sampled, in the order of its rows; rows that failed have
    /// no token. Sequences that decode in the current step read it there.
    pub fn record(&mut self, tokens: &[Option<Token>]) {
        let Some(samples) = self.unrecorded.pop_front() else {
            assert!(tokens.is_empty(), "all steps are recorded");
            return;
        };
        assert_eq!(tokens.len(), samples.slots.len(), "one result per sampling row");
        for (&slot, token) in samples.slots.iter().zip(tokens) {
            let (Some(token), Some(row)) = (*token, self.rows[slot.index()].as_mut()) else { continue };
            if row.admitted > samples.step {
                continue;
            }
            self.last_token[slot.index()] = token;
            row.sampling.count(token);
            if samples.step < self.step && self.counts.decodes > 0 && row.group == self.group {
                // A group's decode rows come first, one each, in the order of its list.
                if let Some(index) = row.decode_index {
                    self.buffers.token_ids[index as usize] = token as i32;
                }
            }
        }
    }

    /// On a rank that never learns what is sampled, because it neither embeds nor samples.
    pub fn pass_over_samples(&mut self) {
        self.unrecorded.clear();
    }
}
