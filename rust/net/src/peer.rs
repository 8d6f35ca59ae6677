//! A connection of a server endpoint, as the number that libzmq gave it.
//! A peer that connects again is another peer, and one that asked for an identity of its own is none: so a number
//! never passes from one key holder to the next, and holding it is no proof of who is behind it. Four bytes, `Copy`.

use std::fmt;

/// Bytes of a routing id that libzmq made: a zero and a 32-bit number.
pub(crate) const ROUTING_ID_BYTES: usize = 5;

/// One connection, for as long as it lasts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(u32);

impl PeerId {
    /// `None` for an identity that the peer chose itself.
    pub(crate) fn from_routing_id(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [0, a, b, c, d] => Some(Self(u32::from_be_bytes([a, b, c, d]))),
            _ => None,
        }
    }

    /// What libzmq knows the connection by.
    pub(crate) fn routing_id(self) -> [u8; ROUTING_ID_BYTES] {
        let [a, b, c, d] = self.0.to_be_bytes();
        [0, a, b, c, d]
    }
}

/// For an owner in another language.
impl From<PeerId> for u32 {
    fn from(peer: PeerId) -> Self {
        peer.0
    }
}

/// Back again; a number that is no connection reaches nobody.
impl From<u32> for PeerId {
    fn from(number: u32) -> Self {
        Self(number)
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:08x}", self.0)
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PeerId({self})")
    }
}
