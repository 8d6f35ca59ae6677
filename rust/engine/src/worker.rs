//! The worker's end of the engine's link: receives orders, keeps the mirror, replies with results. One thread owns it.
//! Knows frames and deltas; the model, the device and the sampler belong to whoever drives it.

use llmscale_net::link::{LinkError, WorkerSide};
use llmscale_scheduler::{Mirror, StepCounts};
use llmscale_types::{Delta, DiskReport, EngineLimits, Epoch, HostBlockId, StepId, StepResult};
use llmscale_wire::{
    CodecLimits, Configure, Failed, FailureCode, FromWorker, NeedSnapshot, Ready, ToWorker, WireError, decode, encode,
};

/// What the engine wants.
#[derive(Debug)]
pub enum Order {
    /// Load this model; answer with `ready`.
    Configure(Box<Configure>),
    /// The mirror's buffers hold a step; answer with `reply`.
    Step(StepCounts),
    /// End the process.
    Stop,
}

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The link is broken.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The engine sent something that cannot be read.
    #[error("the engine sent a frame that cannot be read: {0}")]
    Wire(#[from] WireError),
    /// Orders came in an order that makes no sense.
    #[error("{0}")]
    Order(&'static str),
}

/// See the file's header.
pub struct WorkerSession {
    link: Box<dyn WorkerSide>,
    codec: CodecLimits,
    epoch: Epoch,
    configured: Option<Box<Configure>>,
    mirror: Option<Mirror>,
}

impl WorkerSession {
    /// A session over a link that is being connected.
    pub fn new(link: Box<dyn WorkerSide>, epoch: Epoch) -> Self {
        Self { link, codec: CodecLimits::default(), epoch, configured: None, mirror: None }
    }

    /// Waits for the next order, at most this long. A step that was passed over is no order.
    pub fn receive(&mut self, max_wait_us: u64) -> Result<Option<Order>, SessionError> {
        let Some(frame) = self.link.receive(max_wait_us)? else { return Ok(None) };
        match decode::<ToWorker>(&frame, &self.codec)? {
            ToWorker::Stop => Ok(Some(Order::Stop)),
            ToWorker::Configure(configure) => {
                if configure.epoch != self.epoch || self.configured.is_some() {
                    return Err(SessionError::Order("a worker is configured once, for its own epoch"));
                }
                self.configured = Some(Box::new(configure.clone()));
                Ok(Some(Order::Configure(Box::new(configure))))
            }
            ToWorker::Step(delta) => Ok(self.expand(&delta)?.map(Order::Step)),
        }
    }

    /// A step that does not follow is passed over, and so is what comes behind it until the snapshot that is asked for.
    fn expand(&mut self, delta: &Delta) -> Result<Option<StepCounts>, SessionError> {
        let mirror = self.mirror.as_mut().ok_or(SessionError::Order("a step before the worker is ready"))?;
        if mirror.passes_over(delta) {
            return Ok(None);
        }
        let (_, last) = mirror.step();
        match mirror.expand(delta) {
            Ok(counts) => Ok(Some(counts)),
            Err(gap) => {
                let last = (last != Delta::NOTHING).then_some(last);
                let need = NeedSnapshot { epoch: self.epoch, step: gap.step, last, bad_host_blocks: Vec::new() };
                self.send(&FromWorker::NeedSnapshot(need))?;
                Ok(None)
            }
        }
    }

    /// The step that was received last raised. The worker lives, and passes over what was sent behind it until it is told
    /// anew what runs.
    pub fn give_up_step(&mut self, message: &str) -> Result<(), SessionError> {
        let mirror = self.mirror.as_mut().ok_or(SessionError::Order("a step before the worker is ready"))?;
        mirror.lose();
        let (_, step) = mirror.step();
        self.tell_failure(Some(step), FailureCode::Step, message)
    }

    /// Blocks of the host tier do not hold what the step that was received last wants back. The worker lives, and passes
    /// over what was sent behind that step until it is told anew what runs.
    pub fn host_blocks_are_bad(&mut self, bad_host_blocks: Vec<HostBlockId>) -> Result<(), SessionError> {
        let mirror = self.mirror.as_mut().ok_or(SessionError::Order("a step before the worker is ready"))?;
        mirror.lose();
        let (epoch, step) = mirror.step();
        self.send(&FromWorker::NeedSnapshot(NeedSnapshot { epoch, step, last: None, bad_host_blocks }))
    }

    /// The model is loaded: makes the mirror, of as many blocks as the device has room for, and tells the engine.
    pub fn ready(&mut self, ready: Ready) -> Result<(), SessionError> {
        let configure = self.configured.as_ref().ok_or(SessionError::Order("ready before a configuration"))?;
        let limits = EngineLimits { total_blocks: ready.total_blocks, ..configure.limits.clone() };
        self.mirror = Some(Mirror::new(&limits, self.epoch));
        self.send(&FromWorker::Ready(Ready { epoch: self.epoch, ..ready }))
    }

    /// Transfers between the host tier and the disk have ended.
    pub fn tell_transfers(&mut self, report: DiskReport) -> Result<(), SessionError> {
        self.send(&FromWorker::Disk(DiskReport { epoch: self.epoch, ..report }))
    }

    /// The result of the step that was received last.
    pub fn reply(&mut self, result: StepResult) -> Result<(), SessionError> {
        self.send(&FromWorker::Result(result))
    }

    /// Last words.
    pub fn fail(&mut self, code: FailureCode, message: &str) -> Result<(), SessionError> {
        self.tell_failure(None, code, message)
    }

    fn tell_failure(&mut self, step: Option<StepId>, code: FailureCode, message: &str) -> Result<(), SessionError> {
        let message = self.codec.bounded_text(message).to_owned();
        let epoch = self.epoch;
        self.send(&FromWorker::Failed(Failed { epoch, step, code, message }))
    }

    /// The mirror, once the worker is ready.
    pub fn mirror(&self) -> Option<&Mirror> {
        self.mirror.as_ref()
    }

    /// The mirror, for telling it what was sampled.
    pub fn mirror_mut(&mut self) -> Option<&mut Mirror> {
        self.mirror.as_mut()
    }

    fn send(&mut self, message: &FromWorker) -> Result<(), SessionError> {
        let frame = encode(message, &self.codec)?;
        Ok(self.link.send(frame)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_types::{Admission, BlockId, Chunk, EngineLimits, Sampling, Slot};
    use llmscale_wire::Dtype;
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    /// The engine's end, written down before and read afterwards.
    #[derive(Clone, Default)]
    struct Paper {
        orders: Arc<Mutex<VecDeque<ToWorker>>>,
        said: Arc<Mutex<Vec<FromWorker>>>,
    }

    impl WorkerSide for Paper {
        fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError> {
            self.said.lock().unwrap().push(decode(&frame, &CodecLimits::default()).unwrap());
            Ok(())
        }

        fn receive(&mut self, _: u64) -> Result<Option<Vec<u8>>, LinkError> {
            let order = self.orders.lock().unwrap().pop_front();
            Ok(order.map(|order| encode(&order, &CodecLimits::default()).unwrap()))
        }
    }

    impl Paper {
        fn order(&self, order: ToWorker) {
            self.orders.lock().unwrap().push_back(order);
        }

        fn said(&self) -> Vec<FromWorker> {
            std::mem::take(&mut *self.said.lock().unwrap())
        }
    }

    const EPOCH: Epoch = Epoch(3);

    fn session() -> (Paper, WorkerSession) {
        let paper = Paper::default();
        let limits = EngineLimits {
            block_tokens: 4,
            total_blocks: 64,
            host_blocks: 4,
            disk_blocks: 0,
            max_sequences: 4,
            max_step_tokens: 16,
            max_sequence_tokens: 64,
            max_waiting_sequences: 4,
            max_steps_in_flight: 2,
            groups: 1,
            eos_tokens: vec![2],
            vocabulary: 50,
        };
        let configure = Configure { epoch: EPOCH, model_folder: "/".to_owned(), dtype: Dtype::Auto, limits };
        paper.order(ToWorker::Configure(configure));
        let mut session = WorkerSession::new(Box::new(paper.clone()), EPOCH);
        assert!(matches!(session.receive(0), Ok(Some(Order::Configure(_)))));
        let ready = Ready {
            epoch: EPOCH,
            pid: 1,
            total_blocks: 64,
            layers: 1,
            numerics: "hash".to_owned(),
            loading_ns: 1,
            host_memory: 0,
            disk_files: 0,
        };
        session.ready(ready).unwrap();
        assert_eq!(paper.said().len(), 1);
        (paper, session)
    }

    /// A step that admits a sequence of three ids into slot 0, or decodes.
    fn step(step: u64, base: u64, admits: bool) -> ToWorker {
        let mut delta = Delta::new(EPOCH, StepId(step), StepId(base));
        delta.decodes = !admits;
        if admits {
            delta.admit.push(Admission {
                slot: Slot(0),
                context: vec![7, 8, 9],
                prompt_tokens: 3,
                computed_tokens: 0,
                blocks: vec![BlockId(1)],
                sampling: Sampling::default(),
            });
            delta.chunks.push(Chunk { slot: Slot(0), start_tokens: 0, tokens: 3 });
        }
        ToWorker::Step(delta)
    }

    fn rows(order: Result<Option<Order>, SessionError>) -> Option<u32> {
        match order.unwrap() {
            Some(Order::Step(counts)) => Some(counts.rows),
            None => None,
            Some(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_step_that_does_not_follow_is_answered_once_and_passed_over_until_a_snapshot() {
        let (paper, mut session) = session();
        for order in [step(5, 0, true), step(7, 6, false), step(8, 7, false), step(9, 0, true), step(10, 9, false)] {
            paper.order(order);
        }
        let seen: Vec<_> = (0..5).map(|_| rows(session.receive(0))).collect();
        assert_eq!(seen, [Some(3), None, None, Some(3), Some(1)]);
        let need = NeedSnapshot { epoch: EPOCH, step: StepId(7), last: Some(StepId(5)), bad_host_blocks: Vec::new() };
        assert_eq!(paper.said(), [FromWorker::NeedSnapshot(need)]);
    }

    #[test]
    fn the_first_step_of_a_worker_has_to_be_a_snapshot() {
        let (paper, mut session) = session();
        paper.order(step(7, 6, true));
        assert_eq!(rows(session.receive(0)), None);
        let need = NeedSnapshot { epoch: EPOCH, step: StepId(7), last: None, bad_host_blocks: Vec::new() };
        assert_eq!(paper.said(), [FromWorker::NeedSnapshot(need)]);
    }

    #[test]
    fn bad_host_blocks_are_named_with_their_step_and_what_was_sent_behind_it_is_passed_over() {
        let (paper, mut session) = session();
        for order in [step(1, 0, true), step(2, 1, false), step(3, 0, true)] {
            paper.order(order);
        }
        assert_eq!(rows(session.receive(0)), Some(3));
        session.host_blocks_are_bad(vec![HostBlockId(3)]).unwrap();
        assert_eq!([rows(session.receive(0)), rows(session.receive(0))], [None, Some(3)]);
        let bad_host_blocks = vec![HostBlockId(3)];
        let need = NeedSnapshot { epoch: EPOCH, step: StepId(1), last: None, bad_host_blocks };
        assert_eq!(paper.said(), [FromWorker::NeedSnapshot(need)]);
    }

    #[test]
    fn a_step_that_raised_is_named_and_what_was_sent_behind_it_is_passed_over() {
        let (paper, mut session) = session();
        for order in [step(1, 0, true), step(2, 1, false), step(3, 0, true)] {
            paper.order(order);
        }
        assert_eq!(rows(session.receive(0)), Some(3));
        session.give_up_step("out of patience").unwrap();
        assert_eq!([rows(session.receive(0)), rows(session.receive(0))], [None, Some(3)]);
        let message = "out of patience".to_owned();
        let failed = Failed { epoch: EPOCH, step: Some(StepId(1)), code: FailureCode::Step, message };
        assert_eq!(paper.said(), [FromWorker::Failed(failed)]);
    }
}
