//! Messages between fronts, nodes and workers, and the codec that turns them into msgpack bytes and back.
//! One frame is `[version, tag, body]`; bodies are arrays in field order, enums are small integers, nothing is looked up by
//! name. Decoding is linear in the frame, allocates at most a small multiple of it, and accepts only what passes every
//! bound of `CodecLimits`, so that later stages check nothing again. Knows nothing of sockets, peers or time.

mod bounds;
mod caches;
mod error;
mod field;
mod frame;
mod identity;
mod limits;
mod marker;
mod node;
mod reader;
mod scan;
mod version;
mod words;
mod worker;
mod writer;

pub use caches::{KvAsk, KvChanges, KvSnapshot};
pub use error::WireError;
pub use frame::{Message, decode, decode_as, encode, encode_at, encode_into};
pub use identity::{ModelIdentity, ModelRef, NodeLimits};
pub use limits::CodecLimits;
pub use node::{
    Abort, FromNode, GiveBack, Hello, NodeOutputs, NodeState, Ping, Pong, Recall, RejectCode, Rejected, Status, Submit,
    ToNode, Welcome,
};
pub use version::{HANDSHAKE_VERSION, VERSIONS, VersionRange};
pub use worker::{Configure, Dtype, Failed, FailureCode, FromWorker, NeedSnapshot, Ready, ToWorker};
