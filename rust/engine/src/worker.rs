//! The worker's end of the engine's link: receives orders, keeps the mirror, replies with results. One thread owns it.
//! Knows frames and deltas; the model, the device and the sampler belong to whoever drives it.

use llmscale_net::link::{LinkError, WorkerSide};
use llmscale_scheduler::{Gap, Mirror, StepCounts};
use llmscale_types::{Epoch, StepId, StepResult};
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
    /// A delta did not follow from the one before; the engine has been told.
    #[error(transparent)]
    Gap(#[from] Gap),
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

    /// Waits for the next order, at most this long.
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
            ToWorker::Step(delta) => {
                let mirror = self.mirror.as_mut().ok_or(SessionError::Order("a step before the worker is ready"))?;
                match mirror.expand(&delta) {
                    Ok(counts) => Ok(Some(Order::Step(counts))),
                    Err(gap) => {
                        let (epoch, step) = (self.epoch, delta.step);
                        self.send(&FromWorker::NeedSnapshot(NeedSnapshot { epoch, step, last: None }))?;
                        Err(SessionError::Gap(gap))
                    }
                }
            }
        }
    }

    /// The model is loaded: makes the mirror and tells the engine.
    pub fn ready(&mut self, pid: u32, layers: u32, numerics: String, loading_ns: u64) -> Result<(), SessionError> {
        let configure = self.configured.as_ref().ok_or(SessionError::Order("ready before a configuration"))?;
        let total_blocks = configure.limits.total_blocks;
        self.mirror = Some(Mirror::new(&configure.limits, self.epoch));
        let epoch = self.epoch;
        self.send(&FromWorker::Ready(Ready { epoch, pid, total_blocks, layers, numerics, loading_ns }))
    }

    /// The result of the step that was received last.
    pub fn reply(&mut self, result: StepResult) -> Result<(), SessionError> {
        self.send(&FromWorker::Result(result))
    }

    /// Last words.
    pub fn fail(&mut self, step: Option<StepId>, code: FailureCode, message: &str) -> Result<(), SessionError> {
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
