//! Deterministic simulation: the same state machines as in production, driven by a seed instead of sockets and clocks.
//! `hash_worker` is a model whose token is a hash of everything that came before, so that any lost, doubled or foreign
//! token, and any KV block that holds something else, shows at once.

pub mod hash_worker;

pub use hash_worker::{HashWorker, WorkerDeath, hash_token};
