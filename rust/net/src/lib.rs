//! Sockets of llmscale: `ZeroMQ` endpoints, CURVE keys, the links from an engine to its workers, and streams among ranks.
//! It moves frames of bytes with bounded queues and never blocks on a send; a peer is admitted by its
//! CURVE key or, on loopback only, without one. It knows nothing of messages, requests or models.

pub mod address;
pub mod allow_list;
pub mod client;
pub mod context;
pub mod counters;
pub mod error;
pub mod key;
pub mod link;
pub mod message;
pub mod options;
pub mod peer;
pub mod phase;
pub mod poller;
pub mod principal;
pub mod rank_streams;
pub mod receive;
pub mod send;
pub mod server;
mod socket;
pub mod wake;
mod watch;
mod zap;

pub use address::{Address, AddressError, Host};
pub use allow_list::{AllowList, AllowListError};
pub use client::{ClientEndpoint, ClientKeys};
pub use context::{AuthenticationCounters, Context};
pub use counters::Counters;
pub use error::NetError;
pub use key::{KeyError, KeyPair, PublicKey, SecretKey};
pub use link::in_process::{InProcessLink, InProcessWorker, in_process_link};
pub use link::socket::{SocketLink, SocketWorker};
pub use link::{LinkError, WorkerLink, WorkerSide};
pub use message::Message;
pub use options::EndpointOptions;
pub use peer::PeerId;
pub use phase::Phase;
pub use poller::{PollHandle, Poller, Ready};
pub use principal::{Principal, Role, Roles};
pub use rank_streams::{RankStreams, StreamError};
pub use receive::{ReceiveError, Received};
pub use send::SendError;
pub use server::{ServerEndpoint, ServerKeys};
pub use wake::Waker;
