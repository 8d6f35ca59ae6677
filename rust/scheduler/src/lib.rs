//! One replica as a deterministic state machine: events in, actions out, no clock, socket, thread or randomness.
//! `replica` composes; `queue` orders what waits, `planner` makes the next step within its `budget`, whose time is `pace`'s, `complete` takes a step's result in one
//! pass, `kv_feed` tells fronts what is cached, `groups` splits what runs among the stages of a pipeline, `restore` brings
//! back what went to the host, `fetch` what went to the disk, `recovery` turns a dead worker, or one that gave up its steps, into a preemption,
//! `sequences` holds the rows of what runs, `view` shows how full it is. `mirror` is the workers' half of the plan contract: it expands deltas into the buffers that an executor reads.

pub mod event;
pub mod mirror;
pub mod policy;
pub mod replica;

mod budget;
mod check;
mod complete;
mod fetch;
mod groups;
mod kv_feed;
mod pace;
mod planner;
mod queue;
mod record;
mod recovery;
mod restore;
mod save;
mod sequences;
mod view;
mod wheel;

pub use event::{Actions, Event, GiveBack, KvWord, ReplicaCounters, ReplicaLoad};
pub use mirror::{Gap, Mirror, SlotSampling, StepCounts};
pub use pace::Pace;
pub use policy::{FirstComeFirstServed, OrderKey, Policy};
pub use replica::Replica;
pub use save::Drained;
