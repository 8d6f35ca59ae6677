//! A simulated worker process: the hash model behind the worker half of the wire protocol, one step at a time, in the
//! order in which they were sent. Its results go through the real codec. Knows nothing of nodes or fronts.

use crate::around::Around;
use crate::hash_worker::{HashWorker, WorkerDeath};
use llmscale_types::{Delta, Duration, EngineLimits, Epoch, StepResult, Time, Token};
use llmscale_wire::{CodecLimits, FromWorker, ToWorker, decode, encode};
use std::collections::VecDeque;

/// How a worker that lives is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Condition {
    /// It loads the model.
    Loading,
    /// It computes what it is sent.
    Ready,
    /// It never finishes the step that it is at.
    Hung,
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct WorkerProcess {
    pub(crate) epoch: Epoch,
    pub(crate) condition: Condition,
    /// It lives; a dead one is buried a little later.
    pub(crate) alive: bool,
    /// It died by an ordinary fault, not by what it computed.
    pub(crate) died_ordinarily: bool,
    /// The node has condemned it.
    pub(crate) failed: bool,
    /// It is slow until then.
    pub(crate) slow_until: Time,
    model: HashWorker,
    steps: VecDeque<Delta>,
}

impl WorkerProcess {
    pub(crate) fn new(limits: &EngineLimits, epoch: Epoch, deadly: Option<Token>) -> Self {
        Self {
            epoch,
            condition: Condition::Loading,
            alive: true,
            died_ordinarily: false,
            failed: false,
            slow_until: Time(0),
            model: HashWorker::new(limits, epoch).killed_by(deadly),
            steps: VecDeque::new(),
        }
    }

    /// It has loaded the model.
    pub(crate) fn be_ready(&mut self) {
        if self.condition == Condition::Loading {
            self.condition = Condition::Ready;
        }
    }

    /// The node sends it steps: from outside, a hung worker looks like any other.
    pub(crate) fn takes_steps(&self) -> bool {
        self.condition != Condition::Loading && !self.failed
    }

    /// Takes a step. Returns how long it computes, if it was idle.
    pub(crate) fn receive(&mut self, delta: Delta, around: &mut Around) -> Option<Duration> {
        let frame = encode(&ToWorker::Step(delta), &around.codec).expect("a delta is within the codec's limits");
        let Ok(ToWorker::Step(delta)) = decode(&frame, &around.codec) else { panic!("a step arrives as a step") };
        self.steps.push_back(delta);
        (self.steps.len() == 1).then(|| self.step_time(around))
    }

    /// Finishes the oldest step. Returns the frame with its result, and how long the next one computes.
    pub(crate) fn finish(&mut self, around: &mut Around) -> Result<(Vec<u8>, Option<Duration>), WorkerDeath> {
        let delta = self.steps.pop_front().expect("a worker finishes what it was sent");
        let result = self.model.run(&delta, 500_000)?;
        let frame = encode(&FromWorker::Result(result), &around.codec).expect("a result is within the codec's limits");
        let next = (!self.steps.is_empty()).then(|| self.step_time(around));
        Ok((frame, next))
    }

    fn step_time(&self, around: &mut Around) -> Duration {
        let delta = self.steps.front().expect("it was just looked at");
        let tokens: u32 = delta.chunks.iter().map(|chunk| chunk.tokens).sum();
        let slow = if around.now() < self.slow_until { 20 } else { 1 };
        Duration((around.random.between(500, 3_000) + u64::from(tokens) * 40) * slow)
    }
}

/// The result in a worker's frame.
pub(crate) fn open_result(frame: &[u8], codec: &CodecLimits) -> StepResult {
    match decode(frame, codec) {
        Ok(FromWorker::Result(result)) => result,
        other => panic!("a result arrives as a result, not as {other:?}"),
    }
}
