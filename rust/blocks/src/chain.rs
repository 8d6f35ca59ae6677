//! The chain hash of prefixes: each full block's hash covers its own ids and, through its parent's hash, everything
//! before it, starting from the namespace of (tenant, model, revision, adapter). Keyed BLAKE3, 256 bits, so that a tenant
//! cannot compute another's keys; about 0.2 us per block of 32 ids, paid when a request arrives or while a step runs.

use llmscale_types::{PrefixKey, Token};

/// A link of the chain.
pub type BlockHash = [u8; 32];

/// Separates what may share blocks: keyed by the fleet's secret over tenant, model, revision and adapter.
pub type Namespace = [u8; 32];

/// Makes chain hashes under one secret key.
#[derive(Clone)]
pub struct ChainHasher {
    key: [u8; 32],
    kept_bits: u32,
}

impl std::fmt::Debug for ChainHasher {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ChainHasher").field("kept_bits", &self.kept_bits).finish_non_exhaustive()
    }
}

impl ChainHasher {
    /// A hasher under the replica's secret.
    pub fn new(key: [u8; 32]) -> Self {
        Self { key, kept_bits: 256 }
    }

    /// A deliberately weak hasher that keeps only the first bits, so that tests can force collisions.
    pub fn truncated(key: [u8; 32], kept_bits: u32) -> Self {
        assert!((1..=256).contains(&kept_bits), "between 1 and 256 bits are kept, not {kept_bits}");
        Self { key, kept_bits }
    }

    /// How much of a hash it keeps.
    #[cfg(test)]
    pub(crate) fn kept_bits(&self) -> u32 {
        self.kept_bits
    }

    /// Hash of one full block after `parent` (none for the first block of a namespace).
    pub fn block(&self, namespace: &Namespace, parent: Option<&BlockHash>, ids: &[Token]) -> BlockHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        match parent {
            Some(hash) => hasher.update(hash),
            None => hasher.update(namespace),
        };
        hasher.update(&[u8::from(parent.is_some())]);
        let mut bytes = [0_u8; 4 * 64];
        for part in ids.chunks(64) {
            for (id, out) in part.iter().zip(bytes.chunks_exact_mut(4)) {
                out.copy_from_slice(&id.to_le_bytes());
            }
            hasher.update(&bytes[..part.len() * 4]);
        }
        self.cut(*hasher.finalize().as_bytes())
    }

    /// Hashes of every full block of `ids`, in order.
    pub fn chain(&self, namespace: &Namespace, ids: &[Token], block_tokens: u32) -> Vec<BlockHash> {
        let mut hashes: Vec<BlockHash> = Vec::with_capacity(ids.len() / block_tokens as usize);
        for block in ids.chunks_exact(block_tokens as usize) {
            let hash = self.block(namespace, hashes.last(), block);
            hashes.push(hash);
        }
        hashes
    }

    /// Names of the prefixes of `ids`, one every `key_tokens`; none if blocks are longer than that.
    pub fn keys(&self, namespace: &Namespace, ids: &[Token], block_tokens: u32, key_tokens: u32) -> Vec<PrefixKey> {
        let blocks = (key_tokens / block_tokens) as usize;
        if blocks == 0 {
            return Vec::new();
        }
        let named = ids.len() - ids.len() % key_tokens as usize;
        let chain = self.chain(namespace, &ids[..named], block_tokens);
        chain.iter().skip(blocks - 1).step_by(blocks).map(PrefixKey::of_hash).collect()
    }

    fn cut(&self, mut hash: BlockHash) -> BlockHash {
        for (index, byte) in hash.iter_mut().enumerate() {
            let kept = self.kept_bits.saturating_sub(8 * index as u32).min(8);
            if kept < 8 {
                // A shift by eight would overflow, so the empty byte is written as such.
                *byte = if kept == 0 { 0 } else { *byte & (0xff << (8 - kept)) };
            }
        }
        hash
    }
}
