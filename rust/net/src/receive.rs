//! From libzmq's parts to a message: the limits that hold for every received one.
//! A part over `max_frame_bytes` or too many parts make the whole message an error that names the peer; the bytes are
//! dropped uncopied and the caller goes on. O(bytes) for a good message, O(parts) for a bad one.

use crate::counters::Counters;
use crate::message::Message;
use crate::options::EndpointOptions;
use crate::peer::PeerId;
use crate::principal::Principal;
use std::io;
use std::sync::Arc;

/// A message and who sent it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// The connection that it came by; answers go there.
    pub peer: PeerId,
    /// The holder of the peer's key; `None` on an endpoint without keys, whatever the peer says about itself.
    pub principal: Option<Arc<Principal>>,
    /// What it sent.
    pub message: Message,
}

/// A received message that is not handed on. All but `System` leave the endpoint as it was.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// A part is over the limit.
    #[error(
        "a part of {part_bytes} bytes was dropped, the limit is {limit_bytes} (`max_frame_bytes`); use the same limit on both sides"
    )]
    TooLarge {
        /// Who sent it; `None` on a client, which has one peer.
        peer: Option<PeerId>,
        /// Its size.
        part_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Too many attachments.
    #[error("a message of {parts} parts was dropped, the limit is {limit} (`max_parts`)")]
    TooManyParts {
        /// Who sent it; `None` on a client.
        peer: Option<PeerId>,
        /// Parts of the message.
        parts: usize,
        /// The limit.
        limit: u32,
    },
    /// A peer that chose its own identity, which another key holder could choose too.
    #[error("a peer chose its own identity; leave ZMQ_ROUTING_ID (`identity`) unset on the client")]
    ChosenIdentity,
    /// A peer whose User-Id our own handler did not write; cannot happen while authentication is enforced.
    #[error("a peer without a valid User-Id was heard on an endpoint with keys")]
    Unauthenticated {
        /// Who sent it.
        peer: PeerId,
    },
    /// The library failed.
    #[error("receiving failed: {0}")]
    System(io::Error),
}

impl ReceiveError {
    /// The peer that it is about, if there is one to name.
    pub const fn peer(&self) -> Option<PeerId> {
        match self {
            Self::TooLarge { peer, .. } | Self::TooManyParts { peer, .. } => *peer,
            Self::Unauthenticated { peer } => Some(*peer),
            Self::ChosenIdentity | Self::System(_) => None,
        }
    }
}

/// Checks the parts against the limits and copies them out.
pub(crate) fn into_message(
    parts: &[zmq::Message],
    peer: Option<PeerId>,
    options: &EndpointOptions,
    counters: &mut Counters,
) -> Result<Message, ReceiveError> {
    if parts.len() > options.max_parts as usize {
        counters.malformed += 1;
        return Err(ReceiveError::TooManyParts { peer, parts: parts.len(), limit: options.max_parts });
    }
    let largest = parts.iter().map(|part| part.len() as u64).max().unwrap_or_default();
    if largest > options.max_frame_bytes {
        counters.oversized += 1;
        return Err(ReceiveError::TooLarge { peer, part_bytes: largest, limit_bytes: options.max_frame_bytes });
    }
    let mut copies = parts.iter().map(|part| part.to_vec());
    let message = Message { payload: copies.next().unwrap_or_default(), attachments: copies.collect() };
    counters.frames_in += 1;
    counters.bytes_in += message.bytes();
    Ok(message)
}
