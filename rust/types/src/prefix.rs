//! What replicas say about their prefix caches: the names of prefixes, and the events that tell who holds which. Names are
//! short, so two prefixes may share one: that costs a wrong guess about where a prompt is cached and never content, because
//! replicas compare ids. Knows nothing of who holds what.

/// The name of one prefix in the fleet: the first 64 bits of the keyed chain hash over everything up to the end of a block,
/// the namespace of tenant, model and adapter included.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PrefixKey(pub u64);

impl PrefixKey {
    /// Tokens from one named prefix to the next: fine enough for a conversation's turns, a quarter of what every block
    /// would take in each front's memory.
    pub const TOKENS: u32 = 128;

    /// The key of a prefix whose chain hash is this.
    pub fn of_hash(hash: &[u8; 32]) -> Self {
        Self(u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes")))
    }
}

/// What a replica says about its prefix cache.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvEvent {
    /// It holds these prefixes.
    Stored(Vec<PrefixKey>),
    /// It holds them no longer.
    Removed(Vec<PrefixKey>),
    /// It holds nothing any more.
    Cleared,
}
