//! What comes back from the host tier, and how much goes there. An admission's prefix may lie on both tiers; blocks on the
//! host are copied back in the place of the prefill that they save, a part per step like any other work, unless computing
//! them is cheaper. A decision costs a few predictions. Knows nothing of who copies.

use crate::budget::Budget;
use crate::replica::Replica;
use llmscale_blocks::PrefixHit;
use llmscale_cost::{CopyCost, CostModel};
use llmscale_types::{Chunk, Delta, EngineLimits, Planted, Slot, StepId};

/// Where copies do not seem to pay, the first eviction after so many steps is one all the same: they may have become
/// cheaper, or have been measured during a stall.
const STEPS_PER_TRIAL: u64 = 64;

/// What copying and computing cost at the moment.
pub(crate) struct CopyPrices<'a> {
    pub(crate) cost: &'a CostModel,
    pub(crate) copies: &'a CopyCost,
    pub(crate) limits: &'a EngineLimits,
}

impl CopyPrices<'_> {
    /// Time that computing so many more tokens of prompts adds to a step.
    pub(crate) fn prefill_ns(&self, tokens: u32) -> u64 {
        self.cost.predict_prefill(tokens).saturating_sub(self.cost.predict_prefill(0))
    }

    /// Computing one block, as a part of a full step.
    pub(crate) fn block_ns(&self) -> u64 {
        let step_tokens = u64::from(self.limits.max_step_tokens);
        self.prefill_ns(self.limits.max_step_tokens) * u64::from(self.limits.block_tokens) / step_tokens
    }

    /// Cuts what was found on the host off if computing it is cheaper than copying it.
    pub(crate) fn cut(&self, hit: &mut PrefixHit) {
        let behind = (hit.blocks.len() - hit.leading_device_blocks) as u32;
        // What was never copied has no price yet: that it was kept or read for this says that it pays.
        let known = behind > 0 && self.copies.is_known();
        if known && self.copies.predict(behind) >= self.prefill_ns(behind * self.limits.block_tokens) {
            hit.blocks.truncate(hit.leading_device_blocks);
        }
    }

    /// How many blocks a step may copy out: none if they are cheaper to compute than to copy out and back, and no more than
    /// take as long as the largest prefill of a step. What copies cost is found out by one now and then.
    fn offloads(&self, step: StepId) -> u32 {
        if self.limits.host_blocks == 0 {
            return 0;
        }
        if !self.copies.is_known() || self.copies.predict(2) >= self.block_ns() {
            return u32::from(!self.copies.is_settled() || step.0.is_multiple_of(STEPS_PER_TRIAL));
        }
        self.copies.blocks_within(self.prefill_ns(self.limits.max_step_tokens))
    }

    /// How much of a step's token budget a restored block takes.
    fn restore_tokens(&self) -> u32 {
        let block_tokens = u64::from(self.limits.block_tokens);
        let share = self.copies.predict(1).saturating_mul(block_tokens) / self.block_ns().max(1);
        share.clamp(1, block_tokens) as u32
    }
}

impl Replica {
    pub(crate) fn copy_prices(&self) -> CopyPrices<'_> {
        CopyPrices { cost: &self.cost, copies: &self.copy_cost, limits: &self.limits }
    }

    /// Before a step is planned: how much it may copy out.
    pub(crate) fn allow_offloads(&mut self) {
        let offloads = self.copy_prices().offloads(self.step);
        self.blocks.allow_offloads(offloads);
    }

    /// Has the next blocks of a prefilling sequence copied back, as far as the budget lasts: they take as many tokens of it,
    /// `most` at most, as are computed in the same time. If there are more of them, they take all of it.
    pub(crate) fn plan_restores(&mut self, slot: Slot, most: u32, budget: &mut Budget) {
        let restore_tokens = self.copy_prices().restore_tokens();
        let block_tokens = self.limits.block_tokens;
        let cold = &mut self.sequences.cold[slot.index()];
        if cold.restores.is_empty() {
            return;
        }
        let (start, mut spent) = (cold.planned_tokens, 0);
        let fitting = budget.fitting(&self.cost, 0, most);
        while spent < fitting && self.blocks.copies() < Delta::MAX_COPIES {
            let Some((place, host)) = cold.restores.pop_front() else { break };
            self.blocks.restore(host, cold.table[place as usize]);
            spent += restore_tokens;
        }
        // Blocks between those that are restored were on the device all along.
        let reached = cold.restores.front().map_or(cold.found_blocks, |&(place, _)| place);
        cold.planned_tokens = reached * block_tokens;
        let tokens = cold.planned_tokens - start;
        if Planted::SharesBeforeItIsRestored.is_here() {
            cold.computed_tokens = cold.planned_tokens;
        }
        self.prefill_backlog -= u64::from(tokens);
        if tokens > 0 {
            self.restored.push(Chunk { slot, start_tokens: start, tokens });
        }
        budget.take(&self.cost, 0, spent.min(fitting));
        if self.is_restoring(slot) {
            budget.exhaust();
        }
    }

    /// Whether blocks of a sequence are still to be copied back.
    pub(crate) fn is_restoring(&self, slot: Slot) -> bool {
        !self.sequences.cold[slot.index()].restores.is_empty()
    }

    /// What was not copied back by now is not.
    pub(crate) fn give_up_restores(&mut self, slot: Slot) {
        for (_, host) in std::mem::take(&mut self.sequences.cold[slot.index()].restores) {
            self.blocks.give_up_restore(host);
        }
    }
}

#[cfg(test)]
mod tests;
