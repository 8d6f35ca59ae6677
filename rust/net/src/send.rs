//! From a message to libzmq: the limits that hold for every sent one, and what became of it.
//! A message over a limit is an error before anything moves; a full queue or an absent peer gives the message back.
//! `Ok` means handed to libzmq: a connection that ends takes with it what it had not delivered. O(parts).

use crate::counters::Counters;
use crate::message::Message;
use crate::options::EndpointOptions;
use crate::socket::Unsent;
use std::io;

/// Why a message was not sent. Nothing of it went out.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The peer does not read fast enough; here is the message again.
    #[error("the peer's queue is full; send again after it has read")]
    Full(Message),
    /// No such peer is connected; here is the message again.
    #[error("no such peer is connected")]
    Unreachable(Message),
    /// A part is over the limit.
    #[error(
        "a part has {part_bytes} bytes, the limit is {limit_bytes} (`max_frame_bytes`); split it or raise the limit on both sides"
    )]
    TooLarge {
        /// Its size.
        part_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Too many attachments.
    #[error("the message has {parts} parts, the limit is {limit} (`max_parts`)")]
    TooManyParts {
        /// Parts of the message.
        parts: usize,
        /// The limit.
        limit: u32,
    },
    /// The library failed.
    #[error("sending failed: {0}")]
    System(io::Error),
}

/// The largest part and the number of parts against the limits.
pub(crate) fn check_limits(message: &Message, options: &EndpointOptions) -> Result<(), SendError> {
    let parts = message.attachments.len() + 1;
    if parts > options.max_parts as usize {
        return Err(SendError::TooManyParts { parts, limit: options.max_parts });
    }
    let part_bytes = message.parts().map(|part| part.len() as u64).max().unwrap_or_default();
    if part_bytes > options.max_frame_bytes {
        return Err(SendError::TooLarge { part_bytes, limit_bytes: options.max_frame_bytes });
    }
    Ok(())
}

/// Counts what became of a message of `bytes`.
pub(crate) fn note_outcome(outcome: Result<(), Unsent>, bytes: u64, counters: &mut Counters) -> Result<(), SendError> {
    match outcome {
        Ok(()) => {
            counters.frames_out += 1;
            counters.bytes_out += bytes;
            Ok(())
        }
        Err(Unsent::Full(message)) => {
            counters.full += 1;
            Err(SendError::Full(message))
        }
        Err(Unsent::Away(message)) => {
            counters.unreachable += 1;
            Err(SendError::Unreachable(message))
        }
        Err(Unsent::System(error)) => Err(SendError::System(error.into())),
    }
}
