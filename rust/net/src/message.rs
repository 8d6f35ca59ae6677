//! A message: one payload and, rarely, attachments that travel with it as further parts.
//! The owner of an endpoint sends and receives whole messages; a refused send gives the message back. Parts above a
//! few hundred bytes are handed to libzmq without a copy. It does not look into the bytes.

/// Above this size a part is handed over as it is; below, copying it into libzmq's own small buffer is cheaper than
/// the call-back that would free it.
pub(crate) const MAX_COPIED_BYTES: usize = 512;

/// A payload and its attachments.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Message {
    /// The first part.
    pub payload: Vec<u8>,
    /// The other parts; mostly none, which takes no memory.
    pub attachments: Vec<Vec<u8>>,
}

impl Message {
    /// Bytes of all parts.
    pub fn bytes(&self) -> u64 {
        self.parts().map(|part| part.len() as u64).sum()
    }

    /// All parts in order.
    pub fn parts(&self) -> impl Iterator<Item = &Vec<u8>> {
        std::iter::once(&self.payload).chain(&self.attachments)
    }
}

impl From<Vec<u8>> for Message {
    fn from(payload: Vec<u8>) -> Self {
        Self { payload, attachments: Vec::new() }
    }
}

/// Moves a part into libzmq.
pub(crate) fn into_part(part: Vec<u8>) -> zmq::Message {
    if part.len() <= MAX_COPIED_BYTES { zmq::Message::from(part.as_slice()) } else { zmq::Message::from(part) }
}
