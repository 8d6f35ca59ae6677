//! Paged KV blocks of one replica: which block holds what, who shares it, which one is reused next, on the device and on
//! the host and the disk behind it. `pool` counts references, `prefix` remembers contents, `host` is the second tier, `disk`
//! the third, `store` composes them into what the scheduler asks for.
//! Nothing here moves a byte of KV: it is bookkeeping that workers follow.

pub mod chain;
pub mod changes;
pub mod disk;
pub mod host;
pub mod pool;
pub mod prefix;
pub mod store;

pub use chain::{BlockHash, ChainHasher, Namespace};
pub use changes::Changes;
pub use disk::{DiskRecord, IndexChange};
pub use pool::BlockPool;
pub use prefix::{ContentId, PrefixIndex};
pub use store::{BlockStore, CacheCounters, Found, PrefixHit};
