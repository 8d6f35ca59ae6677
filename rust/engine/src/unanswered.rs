//! Steps that a worker was given and has not answered, the oldest first. A device computes one while the mirror holds the
//! next already, so who samples in a step and what its answer takes is kept here, and not asked of the mirror. The time of
//! a step counts from when the one before it was answered: until then the device was busy with that. O(rows) per step.
//! Knows no device; who may leave a step open says the worker.

use crate::drawn::SampledStep;
use llmscale_scheduler::Mirror;
use llmscale_types::StepResult;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// One of them.
#[derive(Debug)]
struct Open {
    sampled: SampledStep,
    received: Instant,
    /// What its copies between tiers take.
    copied: Duration,
}

/// See the file's header.
#[derive(Debug, Default)]
pub struct Unanswered {
    open: VecDeque<Open>,
    answered: Option<Instant>,
}

impl Unanswered {
    /// The mirror holds a step that was received now.
    pub fn begin(&mut self, mirror: &Mirror, received: Instant) {
        self.open.push_back(Open { sampled: SampledStep::of(mirror), received, copied: Duration::ZERO });
    }

    /// What the copies of the step that was received last take.
    pub fn set_copied(&mut self, took: Duration) {
        if let Some(newest) = self.open.back_mut() {
            newest.copied = took;
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// The step that is to be answered next.
    pub fn oldest(&self) -> Option<&SampledStep> {
        self.open.front().map(|open| &open.sampled)
    }

    /// Takes that step, and fills in what it and its copies took until now.
    pub fn answer(&mut self, result: &mut StepResult, now: Instant) {
        let Some(open) = self.open.pop_front() else { return };
        let begun = self.answered.map_or(open.received, |answered| answered.max(open.received));
        self.answered = Some(now);
        result.elapsed_ns = now.saturating_duration_since(begun).as_nanos() as u64;
        result.copied_ns = (open.copied.as_nanos() as u64).min(result.elapsed_ns);
    }

    /// Nobody waits for an answer to any of them.
    pub fn clear(&mut self) {
        self.open.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_types::{EngineLimits, Epoch, StepId};

    fn mirror() -> Mirror {
        let limits = EngineLimits {
            block_tokens: 4,
            total_blocks: 8,
            host_blocks: 0,
            disk_blocks: 0,
            max_sequences: 2,
            max_step_tokens: 8,
            max_sequence_tokens: 8,
            max_waiting_sequences: 2,
            max_steps_in_flight: 2,
            groups: 1,
            eos_tokens: vec![2],
            vocabulary: 50,
        };
        Mirror::new(&limits, Epoch(1))
    }

    fn result() -> StepResult {
        StepResult {
            epoch: Epoch(1),
            step: StepId(1),
            slots: Vec::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            errors: Vec::new(),
            elapsed_ns: 0,
            waited_ns: 0,
            copied_ns: 0,
        }
    }

    #[test]
    fn a_step_that_was_received_early_takes_from_the_answer_before_it_and_a_late_one_from_its_arrival() {
        let (mirror, start) = (mirror(), Instant::now());
        let at = |us: u64| start + Duration::from_micros(us);
        let mut steps = Unanswered::default();
        steps.begin(&mirror, at(0));
        steps.set_copied(Duration::from_micros(3));
        steps.begin(&mirror, at(2));
        steps.set_copied(Duration::from_secs(1));
        let mut answers = Vec::new();
        for now in [10, 25] {
            let mut answer = result();
            steps.answer(&mut answer, at(now));
            answers.push((answer.elapsed_ns, answer.copied_ns));
        }
        steps.begin(&mirror, at(100));
        let mut late = result();
        steps.answer(&mut late, at(104));
        assert_eq!(answers, [(10_000, 3_000), (15_000, 15_000)], "copies are never more than all");
        assert_eq!(late.elapsed_ns, 4_000);
        assert!(steps.is_empty());
    }
}
