//! The live drivers: threads that own sockets and clocks and drive the pure state machines. `node` runs a replica for
//! the fronts that connect to it; `worker` is the other end of the engine's link; `front` connects a gateway to its nodes; `group_door` is where the hosts of one replica meet. A driver decides nothing: it turns
//! frames into events and actions into frames.

mod client_namespaces;
pub mod clock;
pub mod columns;
pub mod disk_index;
pub mod drawn;
pub mod front;
mod fronts;
pub mod group_door;
pub mod group_keys;
pub mod node;
pub mod packed;
mod rank_transfers;
pub mod ranks;
pub mod report;
pub mod unanswered;
pub mod worker;

pub use clock::Clock;
pub use disk_index::{DiskIndex, IndexMeaning, Recalled};
pub use front::{Arrival, FrontConfig, FrontHandle, NodeAddress};
pub use group_door::GroupDoor;
pub use group_keys::GroupKeys;
pub use llmscale_scheduler::Drained;
pub use node::{Command, MAX_ATTACH, NodeConfig, NodeError, NodeHandle};
pub use ranks::RankLinks;
pub use report::{NodeEvent, NodeReport};
pub use worker::{Order, WorkerSession};
