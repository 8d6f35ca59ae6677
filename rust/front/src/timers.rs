//! Moments at which something is due, in order. Everything that waits has at most one entry. O(log n) per change, O(1) to
//! see the next.

use llmscale_fleet::PoolId;
use llmscale_types::{ReplicaId, RequestId, Time};
use std::collections::BTreeSet;

/// What is due.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Due {
    /// A deadline, the end of a detached time, or a check for silence.
    Request(RequestId),
    /// A replica that was full may be tried again.
    Replica(ReplicaId),
    /// A replica of a pool that is left alone may be tried.
    Trial(PoolId),
    /// A pool has been without a replica to wait for for too long.
    Pool(PoolId),
}

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    due: BTreeSet<(Time, Due)>,
    announced: Option<Time>,
}

impl Timers {
    pub(crate) fn set(&mut self, at: Time, due: Due) {
        self.due.insert((at, due));
    }

    pub(crate) fn clear(&mut self, at: Time, due: Due) {
        self.due.remove(&(at, due));
    }

    pub(crate) fn contains(&self, at: Time, due: Due) -> bool {
        self.due.contains(&(at, due))
    }

    /// Takes the next that is due.
    pub(crate) fn pop(&mut self, now: Time) -> Option<Due> {
        let &(at, due) = self.due.first()?;
        if at > now {
            return None;
        }
        self.due.pop_first();
        Some(due)
    }

    /// The next moment, if it is another one than was announced last.
    pub(crate) fn announce(&mut self) -> Option<Time> {
        let next = self.due.first().map(|&(at, _)| at);
        if next == self.announced {
            return None;
        }
        self.announced = next;
        next
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Time, Due)> {
        self.due.iter().copied()
    }
}
