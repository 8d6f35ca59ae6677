//! The connection between an engine and one worker: frames of bytes in order, both ways, each frame once.
//! The engine's side never blocks; the worker's side waits for its next frame. A link lives as long as its connection:
//! once either side is gone it is down for good, and a worker that comes back gets a new link. All kinds behave alike
//! and run the same conformance tests; none knows what a frame means.

pub mod in_process;
pub mod socket;

use crate::poller::PollHandle;
use crate::receive::ReceiveError;
use std::io;

/// Why a frame did not pass a link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other side does not read fast enough; here is the frame again.
    #[error("the queue of the link is full; send again after the other side has read")]
    Full(Vec<u8>),
    /// The worker has not attached yet; here is the frame again.
    #[error("no worker is attached to the link yet")]
    NotAttached(Vec<u8>),
    /// The other side is gone for good. `receive` says so only after the last frame that arrived.
    #[error("the other side of the link is gone; open a new link")]
    Down,
    /// A frame over the limit; nothing of it was sent.
    #[error("a frame has {frame_bytes} bytes, the limit is {limit_bytes} (`max_frame_bytes`); raise it on both sides")]
    TooLarge {
        /// Its size.
        frame_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// An empty frame, which links keep for themselves.
    #[error("a link carries no empty frame; send at least one byte")]
    Empty,
    /// A received frame was dropped; the link goes on.
    #[error(transparent)]
    Dropped(ReceiveError),
    /// The library failed.
    #[error("the link failed: {0}")]
    System(io::Error),
}

/// The engine's side of one worker's link.
pub trait WorkerLink: Send {
    /// Hands a frame over, or gives it back.
    fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError>;

    /// The next frame, if one has arrived.
    fn receive(&mut self) -> Result<Option<Vec<u8>>, LinkError>;

    /// Whether a worker is attached.
    fn is_attached(&self) -> bool;

    /// Which of the processes behind it are not attached, by their place in a link that is made of several.
    fn missing(&self) -> Vec<usize> {
        if self.is_attached() { Vec::new() } else { vec![0] }
    }

    /// For the engine's poller; `None` for a kind that uses the poller's waker instead.
    fn poll_handle(&self) -> Option<PollHandle<'_>>;

    /// The same of a link that is made of several.
    fn poll_handles(&self) -> Vec<PollHandle<'_>> {
        self.poll_handle().into_iter().collect()
    }
}

/// The worker's side of its link.
pub trait WorkerSide: Send {
    /// Hands a frame over, or gives it back.
    fn send(&mut self, frame: Vec<u8>) -> Result<(), LinkError>;

    /// The next frame; waits for it up to the given time and then returns `None`.
    fn receive(&mut self, max_wait_us: u64) -> Result<Option<Vec<u8>>, LinkError>;
}

/// A frame against the limits.
fn check_size(frame: &[u8], limit_bytes: u64) -> Result<(), LinkError> {
    match frame.len() as u64 {
        0 => Err(LinkError::Empty),
        frame_bytes if frame_bytes > limit_bytes => Err(LinkError::TooLarge { frame_bytes, limit_bytes }),
        _ => Ok(()),
    }
}
