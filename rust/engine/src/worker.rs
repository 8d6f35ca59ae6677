//! The worker's end of the engine's link: receives orders, keeps the mirror, replies with results. One thread owns it.
//! Knows frames and deltas; the model, the device and the sampler belong to whoever drives it.

use crate::drawn::{DrawnRow, SampledStep};
use crate::unanswered::Unanswered;
use llmscale_net::link::{LinkError, WorkerSide};
use llmscale_scheduler::{Mirror, StepCounts};
use llmscale_types::{Delta, DiskReport, EngineLimits, Epoch, HostBlockId, StepId, StepResult};
use llmscale_wire::{
    CodecLimits, Configure, Failed, FailureCode, FromWorker, NeedSnapshot, Ready, ToWorker, WireError, decode, encode,
};
use std::time::{Duration, Instant};

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
    unanswered: Unanswered,
}

impl WorkerSession {
    /// A session over a link that is being connected.
    pub fn new(link: Box<dyn WorkerSide>, epoch: Epoch) -> Self {
        Self {
            link,
            codec: CodecLimits::default(),
            epoch,
            configured: None,
            mirror: None,
            unanswered: Unanswered::default(),
        }
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
            Ok(counts) => {
                self.unanswered.begin(mirror, Instant::now());
                Ok(Some(counts))
            }
            Err(gap) => {
                let last = (last != Delta::NOTHING).then_some(last);
                let need = NeedSnapshot { epoch: self.epoch, step: gap.step, last, bad_host_blocks: Vec::new() };
                self.send(&FromWorker::NeedSnapshot(need))?;
                Ok(None)
            }
        }
    }

    /// The oldest step that is not answered raised. The worker lives, and passes over what was sent behind it until it is
    /// told anew what runs.
    pub fn give_up_step(&mut self, message: &str) -> Result<(), SessionError> {
        let mirror = self.mirror.as_mut().ok_or(SessionError::Order("a step before the worker is ready"))?;
        mirror.lose();
        let (_, step) = self.unanswered.oldest().map_or_else(|| mirror.step(), SampledStep::id);
        self.unanswered.clear();
        self.tell_failure(Some(step), FailureCode::Step, message)
    }

    /// Blocks of the host tier do not hold what the step that was received last wants back. The worker lives, and passes
    /// over what was sent behind that step until it is told anew what runs.
    pub fn host_blocks_are_bad(&mut self, bad_host_blocks: Vec<HostBlockId>) -> Result<(), SessionError> {
        let mirror = self.mirror.as_mut().ok_or(SessionError::Order("a step before the worker is ready"))?;
        if self.unanswered.len() > 1 {
            return Err(SessionError::Order("a step is given up before the one in front of it is answered"));
        }
        mirror.lose();
        let (epoch, step) = mirror.step();
        self.unanswered.clear();
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

    /// The result of a step.
    pub fn reply(&mut self, result: StepResult) -> Result<(), SessionError> {
        self.send(&FromWorker::Result(result))
    }

    /// Another rank answers the steps that were received so far.
    pub fn leave_answers(&mut self) {
        self.unanswered.clear();
    }

    /// The steps that are received and not answered.
    pub fn unanswered(&self) -> &Unanswered {
        &self.unanswered
    }

    /// What the copies of the step that was received last take.
    pub fn set_copied(&mut self, took: Duration) {
        self.unanswered.set_copied(took);
    }

    /// Takes what was drawn for the oldest step that is not answered, and makes its result.
    pub fn complete(&mut self, rows: Vec<DrawnRow>) -> Result<StepResult, SessionError> {
        let mirror = self.mirror.as_mut().ok_or(SessionError::Order("a step before the worker is ready"))?;
        let oldest = self.unanswered.oldest().ok_or(SessionError::Order("an answer and no step"))?;
        let mut result = oldest.complete(mirror, rows);
        self.unanswered.answer(&mut result, Instant::now());
        Ok(result)
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

        fn orders<const N: usize>(&self, orders: [ToWorker; N]) {
            for order in orders {
                self.order(order);
            }
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

    fn row(token: u32) -> Vec<DrawnRow> {
        vec![DrawnRow { token: Ok(token), logprobs: None }]
    }

    #[test]
    fn a_step_is_answered_behind_the_next_one_and_its_id_is_what_that_one_reads() {
        let (paper, mut session) = session();
        paper.orders([step(1, 0, true), step(2, 1, false)]);
        assert_eq!([rows(session.receive(0)), rows(session.receive(0))], [Some(3), Some(1)]);
        assert!(session.mirror().unwrap().follows_on());
        assert_eq!(session.mirror().unwrap().drawn_rows(), [Some(0)]);
        let first = session.complete(row(33)).unwrap();
        assert_eq!((first.step, first.slots, first.tokens), (StepId(1), vec![Slot(0)], vec![33]));
        assert_eq!(session.mirror().unwrap().buffers().token_ids[0], 33);
        assert_eq!(session.complete(row(34)).unwrap().step, StepId(2));
        assert!(session.complete(row(35)).is_err(), "nothing is left to answer");
    }

    #[test]
    fn a_sequence_that_ends_while_its_last_row_is_computed_is_answered_by_what_was_kept() {
        let (paper, mut session) = session();
        let ToWorker::Step(mut next) = step(2, 1, true) else { unreachable!() };
        next.leave.push(Slot(0));
        next.admit[0].sampling.logprobs = Some(3);
        paper.orders([step(1, 0, true), ToWorker::Step(next)]);
        assert_eq!([rows(session.receive(0)), rows(session.receive(0))], [Some(3), Some(3)]);
        assert!(!session.mirror().unwrap().follows_on(), "another sequence has its first rows");
        assert_eq!(session.unanswered().oldest().unwrap().asked(), [None]);
        session.complete(row(33)).unwrap();
        assert_eq!(session.unanswered().oldest().unwrap().asked(), [Some(3)]);
    }

    #[test]
    fn of_two_steps_the_oldest_is_named_as_the_one_that_raised() {
        let (paper, mut session) = session();
        paper.orders([step(1, 0, true), step(2, 1, false)]);
        assert_eq!([rows(session.receive(0)), rows(session.receive(0))], [Some(3), Some(1)]);
        session.give_up_step("out of patience").unwrap();
        let said = paper.said();
        assert!(matches!(&said[..], [FromWorker::Failed(Failed { step: Some(StepId(1)), .. })]), "{said:?}");
        assert!(session.unanswered().is_empty());
    }

    #[test]
    fn bad_blocks_are_not_told_before_the_step_in_front_is_answered() {
        let (paper, mut session) = session();
        paper.orders([step(1, 0, true), step(2, 1, false)]);
        assert_eq!([rows(session.receive(0)), rows(session.receive(0))], [Some(3), Some(1)]);
        assert!(session.host_blocks_are_bad(vec![HostBlockId(3)]).is_err());
        session.complete(row(33)).unwrap();
        session.host_blocks_are_bad(vec![HostBlockId(3)]).unwrap();
    }

    #[test]
    fn an_answer_from_before_a_snapshot_changes_nothing() {
        let (paper, mut session) = session();
        paper.orders([step(1, 0, true), step(3, 2, false), step(5, 0, true)]);
        let seen: Vec<_> = (0..3).map(|_| rows(session.receive(0))).collect();
        assert_eq!(seen, [Some(3), None, Some(3)], "the second does not follow");
        assert_eq!(session.complete(row(33)).unwrap().step, StepId(1));
        assert_eq!(
            session.mirror().unwrap().oldest_samples(),
            Some(1),
            "those of the snapshot's step are awaited still"
        );
        assert_eq!(session.complete(row(34)).unwrap().step, StepId(5));
    }
}
