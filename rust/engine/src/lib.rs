//! The live drivers: threads that own sockets and clocks and drive the pure state machines. `node` runs a replica for
//! the fronts that connect to it; `worker` is the other end of the engine's link; `front` connects a gateway to its nodes. A driver decides nothing: it turns
//! frames into events and actions into frames.

pub mod clock;
pub mod front;
mod fronts;
pub mod node;
pub mod ranks;
pub mod report;
pub mod worker;

pub use clock::Clock;
pub use front::{Arrival, FrontConfig, FrontHandle, NodeAddress};
pub use node::{Command, NodeConfig, NodeError, NodeHandle};
pub use ranks::RankLinks;
pub use report::{NodeEvent, NodeReport};
pub use worker::{Order, WorkerSession};
