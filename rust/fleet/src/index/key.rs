//! The name of a prefix in the routing index: the first 64 bits of the keyed chain hash over everything up to the end of a
//! block, the namespace of tenant, model and adapter included. One key stands for a fixed number of tokens (128 in a
//! fleet). Two prefixes with equal keys are taken for one another, which costs a wrong guess and never content, because
//! replicas compare ids. Knows nothing of who holds what.

/// The name of one prefix.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PrefixKey(pub u64);

impl PrefixKey {
    /// The key of a prefix whose chain hash is this.
    pub fn of_hash(hash: &[u8; 32]) -> Self {
        Self(u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes")))
    }
}
