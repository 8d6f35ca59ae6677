//! Deterministic simulation: the same state machines as in production, driven by a seed instead of sockets and clocks.
//! `simulation` is one seed: fronts (`front_host`) and nodes (`node`) joined by a lossy `network`, under a virtual clock
//! (`agenda`), with `clients` whose `ledger` holds every token against the model, and the `faults` that the seed drew.
//! `swarm` runs many seeds and tells how to see a failing one again. `hash_worker` is a model whose token is a hash of
//! everything that came before, so that any lost, doubled or foreign token, and any KV block that holds something else,
//! shows at once.

mod agenda;
mod around;
mod clients;
pub mod coverage;
pub mod disk_memory;
pub mod faults;
mod front_host;
mod happening;
pub mod hash_worker;
pub mod host_memory;
mod ledger;
mod left_disk;
mod network;
mod node;
mod peers;
mod random;
mod retry_book;
mod simulation;
pub mod swarm;
mod trace;
mod versions;
mod worker;

pub use coverage::Coverage;
pub use disk_memory::{DiskBook, DiskMemory};
pub use faults::{Care, Fault, Mix};
pub use hash_worker::{HashWorker, StepFailure, hash_token};
pub use host_memory::HostMemory;
pub use simulation::{Report, Simulation};
pub use swarm::{Failure, Summary, run_seed, run_seeds};
