//! A link inside one process: two bounded channels, and the engine's waker for the way back.
//! A frame is moved, never copied. O(1) per frame; the engine's thread is woken at most once per wait.

use super::{LinkError, WorkerLink, WorkerSide, check_size};
use crate::error::NetError;
use crate::options::EndpointOptions;
use crate::poller::PollHandle;
use crate::wake::Waker;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, TrySendError, bounded};
use std::time::Duration;

/// The engine's side.
pub struct InProcessLink {
    to_worker: Sender<Vec<u8>>,
    from_worker: Receiver<Vec<u8>>,
    limit_bytes: u64,
}

/// The worker's side.
pub struct InProcessWorker {
    /// Taken when the worker is dropped, so that the engine is woken only after the channel is closed.
    to_engine: Option<Sender<Vec<u8>>>,
    from_engine: Receiver<Vec<u8>>,
    engine: Waker,
    limit_bytes: u64,
}

/// Both sides of a new link. The engine's queues are those of `max_send_queue_frames` and `max_receive_queue_frames`;
/// the waker is the one of the engine's poller.
pub fn in_process_link(options: &EndpointOptions, engine: Waker) -> Result<(InProcessLink, InProcessWorker), NetError> {
    options.validate()?;
    let limit_bytes = options.max_frame_bytes;
    let (to_worker, from_engine) = bounded(options.max_send_queue_frames as usize);
    let (to_engine, from_worker) = bounded(options.max_receive_queue_frames as usize);
    let worker = InProcessWorker { to_engine: Some(to_engine), from_engine, engine, limit_bytes };
    Ok((InProcessLink { to_worker, from_worker, limit_bytes }, worker))
}

fn send(channel: &Sender<Vec<u8>>, frame: Vec<u8>, limit_bytes: u64) -> Result<(), LinkError> {
    check_size(&frame, limit_bytes)?;
    channel.try_send(frame).map_err(|error| match error {
        TrySendError::Full(frame) => LinkError::Full(frame),
        TrySendError::Disconnected(_) => LinkError::Down,
    })
}

impl WorkerLink for InProcessLink {
    fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError> {
        send(&self.to_worker, frame, self.limit_bytes)
    }

    fn receive(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        match self.from_worker.try_recv() {
            Ok(frame) => Ok(Some(frame)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(LinkError::Down),
        }
    }

    fn is_attached(&self) -> bool {
        true
    }

    fn poll_handle(&self) -> Option<PollHandle<'_>> {
        None
    }
}

impl WorkerSide for InProcessWorker {
    fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError> {
        let to_engine = self.to_engine.as_ref().ok_or(LinkError::Down)?;
        send(to_engine, frame, self.limit_bytes)?;
        self.engine.wake();
        Ok(())
    }

    fn receive(&mut self, max_wait_us: u64) -> Result<Option<Vec<u8>>, LinkError> {
        match self.from_engine.recv_timeout(Duration::from_micros(max_wait_us)) {
            Ok(frame) => Ok(Some(frame)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(LinkError::Down),
        }
    }
}

impl Drop for InProcessWorker {
    fn drop(&mut self) {
        self.to_engine = None;
        self.engine.wake();
    }
}
