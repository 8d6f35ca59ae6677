//! The door for scheduling policies: a pure function from facts about a waiting request to an ordering key. One file per
//! policy; a policy keeps no state and allocates nothing, so that the queue stays a sorted map.

mod fcfs;

pub use fcfs::FirstComeFirstServed;

use llmscale_types::{Class, Time};

/// What a policy may know about a request.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Its latency class.
    pub class: Class,
    /// When it arrived, as a number that grows with every arrival and survives preemption.
    pub arrival: u64,
    /// Tokens left to compute before its first token.
    pub uncomputed_tokens: u32,
    /// When it expires.
    pub deadline: Option<Time>,
}

/// Smaller runs first; ties go to the earlier arrival.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct OrderKey(pub u64, pub u64);

/// Orders what waits. The victim of a preemption is the running sequence that would be ordered last.
pub trait Policy: Send + std::fmt::Debug {
    /// The ordering key of a request.
    fn key(&self, facts: &Facts) -> OrderKey;
}
