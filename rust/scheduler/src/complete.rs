//! Takes a step's result: one pass over its columns, one line of memory per row, one output column entry per token.
//! A row of a sequence that has ended meanwhile is dropped. Hashing of filled blocks is only noted here and done in
//! `housekeeping`, while the next step runs.

use crate::event::Actions;
use crate::replica::{Flight, Replica};
use crate::sequences::{Hot, Phase};
use llmscale_types::{Attempt, FinishReason, Finished, Planted, RequestId, RowError, Slot, StepResult, Token};

impl Replica {
    /// Applies the result of the oldest step in flight. Returns false if the result does not fit that step: the worker
    /// that sent it cannot be trusted any further and has to be replaced.
    #[must_use]
    pub(crate) fn complete(&mut self, result: &StepResult, out: &mut Actions) -> bool {
        let expected = self.flights.front().map(|flight| flight.step);
        if self.epoch != Some(result.epoch) || expected.is_none_or(|step| result.step < step) {
            self.counters.stale_results += 1;
            return true;
        }
        let samples = self.flights.front().map_or(0, |flight| flight.samples);
        let rows = result.slots.len() + result.errors.len();
        let max_slot = self.sequences.hot.len() as u32;
        let known = |slot: &Slot| slot.0 < max_slot;
        let fits = expected == Some(result.step)
            && rows == samples as usize
            && result.slots.len() == result.tokens.len()
            && result.slots.iter().all(known)
            && result.errors.iter().all(|(slot, _)| known(slot))
            && result.tokens.iter().all(|&token| token < self.limits.vocabulary);
        if !fits {
            return false;
        }
        let flight = self.flights.pop_front().expect("its step was just compared");
        self.counters.steps += 1;
        self.learn_costs(&flight, result);
        self.complete_chunks(&flight);
        // Before rows send preempted ones back to the queue: two suspects that did not fit together would take turns for
        // ever, each a suspect still, and nobody else would get a row.
        self.clear_suspects(&flight);
        self.complete_rows(&flight, result, out);
        for &(slot, error) in &result.errors {
            if self.owns_row(slot, flight.step.0) {
                self.finish(slot, reason_of(error), out);
            }
        }
        self.unregistered.extend(flight.appended.iter().map(|&slot| (slot, flight.step.0)));
        true
    }

    fn learn_costs(&mut self, flight: &Flight, result: &StepResult) {
        self.copy_cost.observe(flight.copies, result.copied_ns);
        if flight.shape.decodes > 0 || flight.shape.prefill_tokens > 0 {
            let computed_ns = result.elapsed_ns.saturating_sub(result.copied_ns);
            self.counters.predicted_step_ns = self.counters.predicted_step_ns.saturating_add(flight.predicted_ns);
            let error_ns = flight.predicted_ns.abs_diff(computed_ns);
            self.counters.step_error_ns = self.counters.step_error_ns.saturating_add(error_ns);
            self.cost.observe(flight.shape, computed_ns);
        }
    }

    /// What was copied back or computed is there now. A sequence's restored part comes before what it computes.
    fn complete_chunks(&mut self, flight: &Flight) {
        for (chunk, computed) in
            flight.restored.iter().map(|part| (part, 0)).chain(flight.chunks.iter().map(|chunk| (chunk, chunk.tokens)))
        {
            let hot = &self.sequences.hot[chunk.slot.index()];
            if hot.phase == Phase::Free || hot.admitted_step > flight.step.0 {
                continue;
            }
            let cold = &mut self.sequences.cold[chunk.slot.index()];
            cold.computed_tokens = chunk.start_tokens + chunk.tokens;
            self.counters.prefill_tokens += u64::from(computed);
            self.unregistered.push_back((chunk.slot, flight.step.0));
        }
    }

    fn complete_rows(&mut self, flight: &Flight, result: &StepResult, out: &mut Actions) {
        let mut ended = std::mem::take(&mut self.ended);
        let mut logprobs = result.logprobs.iter().peekable();
        for (&slot, &token) in result.slots.iter().zip(&result.tokens) {
            let logprob = logprobs.next_if(|(named, _)| *named == slot);
            let hot = &self.sequences.hot[slot.index()];
            let newer = hot.admitted_step > flight.step.0 && !Planted::GivesRowsToTheNextInSlot.is_here();
            if hot.phase == Phase::Free || newer {
                self.counters.discarded_rows += 1;
                continue;
            }
            let context = &mut self.sequences.contexts[slot.index()];
            let (index, length) = (context.len() as u32 - hot.prompt_tokens, context.len() as u32 + 1);
            context.push(token);
            let outputs = out.outputs_of(hot.front);
            if let Some((_, values)) = logprob {
                outputs.logprobs.push((outputs.requests.len() as u32, values.clone()));
            }
            if index == 0
                && let Some(cached @ 1..) = self.sequences.record(slot).cached_tokens
            {
                outputs.cached.push((outputs.requests.len() as u32, cached));
            }
            outputs.requests.push(RequestId(hot.request));
            outputs.attempts.push(Attempt(hot.attempt));
            outputs.indexes.push(index);
            outputs.tokens.push(token);
            if stops(hot, token) || (hot.more_stops && self.is_other_stop(slot, token)) {
                ended.push((slot, FinishReason::Stop));
            } else if length >= hot.limit_tokens + u32::from(Planted::ComputesOneTooMany.is_here()) {
                ended.push((slot, FinishReason::Length));
            } else if hot.phase == Phase::Preempted && length == self.sequences.cold[slot.index()].expected_tokens {
                self.requeue(slot);
            }
        }
        self.counters.emitted_tokens += result.slots.len() as u64;
        for (slot, reason) in ended.drain(..) {
            self.finish(slot, reason, out);
        }
        self.ended = ended;
    }

    /// A suspect whose whole context went through the model has shown that it kills nobody. Only the last chunk proves
    /// that: it may be planned, and the sequence decode, while an earlier one completes.
    fn clear_suspects(&mut self, flight: &Flight) {
        for chunk in &flight.chunks {
            let index = chunk.slot.index();
            let (hot, cold) = (&self.sequences.hot[index], &mut self.sequences.cold[index]);
            let owned = hot.phase != Phase::Free && hot.admitted_step <= flight.step.0;
            if owned && hot.phase != Phase::Prefill && chunk.start_tokens + chunk.tokens == cold.planned_tokens {
                cold.record.as_mut().expect("an occupied slot has a record").suspect = false;
            }
        }
    }

    fn owns_row(&self, slot: Slot, step: u64) -> bool {
        let hot = &self.sequences.hot[slot.index()];
        hot.phase != Phase::Free && hot.admitted_step <= step
    }

    #[cold]
    fn is_other_stop(&self, slot: Slot, token: Token) -> bool {
        let sampling = &self.sequences.record(slot).submission.sampling;
        sampling.stop_tokens.contains(&token) || (!sampling.ignore_eos && self.limits.eos_tokens.contains(&token))
    }

    /// Ends a sequence that holds a slot: blocks free at once, one terminal output.
    pub(crate) fn finish(&mut self, slot: Slot, reason: FinishReason, out: &mut Actions) {
        match self.sequences.hot[slot.index()].phase {
            Phase::Prefill | Phase::Decode => {
                self.stop_running(slot);
                self.pending_leave.push(slot);
            }
            Phase::LastRow | Phase::Preempted => {}
            Phase::Free => unreachable!("slot {slot} is empty"),
        }
        self.release_blocks(slot);
        let record = self.sequences.vacate(slot);
        self.conclude(&record, reason, out);
    }

    /// The one place where an attempt ends: forgotten here, told to its front.
    pub(crate) fn conclude(&mut self, record: &crate::record::Record, reason: FinishReason, out: &mut Actions) {
        let key = record.key();
        self.forget(record);
        out.outputs_of(key.front).finished.push(Finished {
            request: key.request,
            attempt: key.attempt,
            reason,
            output_tokens: record.output_tokens(record.submission.context.len()),
        });
    }
}

fn stops(hot: &Hot, token: Token) -> bool {
    hot.stops[..hot.stop_count as usize].contains(&token)
}

fn reason_of(error: RowError) -> FinishReason {
    match error {
        RowError::NotANumber => FinishReason::NotANumber,
        RowError::NothingToSample => FinishReason::NothingToSample,
    }
}
