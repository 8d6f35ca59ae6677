//! The second and third verb: completes the steps whose results arrived, plans the next ones and sends them.

use super::{Node, Sent};
use llmscale_scheduler::Event;
use llmscale_wire::{ToWorker, encode};

impl Node {
    /// Applies results in order; one that does not fit its step condemns the worker.
    pub(super) fn complete(&mut self) {
        for result in std::mem::take(&mut self.results) {
            self.step_ns = self.step_ns.saturating_add(result.elapsed_ns);
            self.stage_wait_ns = self.stage_wait_ns.saturating_add(result.waited_ns);
            if self.sent.pop_front_if(|sent| sent.step == result.step).is_some()
                && let Some(next) = self.sent.front_mut()
            {
                // The worker begins it now: what it waited behind the last one is not its time.
                next.at = next.at.max(self.clock.now());
            }
            let (epoch, step) = (result.epoch, result.step);
            if !self.replica.on_event(self.clock.now(), Event::StepDone(result), &mut self.out) {
                self.fail_worker(epoch, format!("its result of step {step} does not fit the step"));
            }
        }
    }

    /// Plans as many steps as the worker may have in flight, and sends them.
    pub(super) fn execute(&mut self) {
        while self.worker.as_ref().is_some_and(|worker| !worker.failed) && self.replica.plan(&mut self.out) {
            let delta = self.out.execute.take().expect("a planned step has a delta");
            self.sent.push_back(Sent { step: delta.step, at: self.clock.now() });
            let frame = encode(&ToWorker::Step(delta), &self.codec);
            self.send_to_worker(frame.expect("the engine's limits keep deltas within the codec's"));
        }
    }

    pub(super) fn send_to_worker(&mut self, frame: Vec<u8>) {
        let Some(worker) = &mut self.worker else { return };
        let epoch = worker.epoch;
        if let Err(error) = worker.link.send(frame) {
            self.fail_worker(epoch, format!("its link broke: {error}"));
        }
    }
}
