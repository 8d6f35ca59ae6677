//! What a node tells fronts of its prefix cache: numbered changes, and all that is held for whoever missed some. Keys are
//! columns of numbers, 9 bytes each. Linear in the keys; knows nothing of what fronts make of them.

use crate::field::record;
use llmscale_types::{Epoch, KvEvent, NodeId, PrefixKey};

/// A question for the changes of the prefix cache. From then on the node tells every change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvAsk {
    /// Number of the first change that the front has not heard of.
    pub from: u64,
}

/// A change of the prefix cache. Changes are numbered without gaps while anybody listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KvChanges {
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// Which change.
    pub number: u64,
    /// Whether everything that was held before is gone.
    pub cleared: bool,
    /// How many of the keys, in turn, can be found from now on, and can be found no longer.
    pub runs: Vec<u32>,
    /// Names of prefixes.
    pub keys: Vec<PrefixKey>,
}

impl KvChanges {
    /// The wire form of a change.
    pub fn depart(node: NodeId, epoch: Epoch, number: u64, events: &[KvEvent]) -> Self {
        let mut changes = Self { node, epoch, number, cleared: false, runs: Vec::new(), keys: Vec::new() };
        for event in events {
            let (stored, run) = match event {
                KvEvent::Stored(run) => (true, run),
                KvEvent::Removed(run) => (false, run),
                KvEvent::Cleared => {
                    // What came before does not matter any more.
                    changes = Self { cleared: true, runs: Vec::new(), keys: Vec::new(), ..changes };
                    continue;
                }
            };
            if changes.runs.len().is_multiple_of(2) != stored {
                changes.runs.push(0);
            }
            changes.runs.push(run.len() as u32);
            changes.keys.extend(run);
        }
        changes
    }

    /// What changed, in order.
    pub fn arrive(self) -> Vec<KvEvent> {
        let mut events = Vec::with_capacity(self.runs.len() + usize::from(self.cleared));
        events.extend(self.cleared.then_some(KvEvent::Cleared));
        let mut keys = self.keys.into_iter();
        for (turn, run) in self.runs.into_iter().enumerate().filter(|(_, run)| *run > 0) {
            let run = keys.by_ref().take(run as usize).collect();
            events.push(if turn % 2 == 0 { KvEvent::Stored(run) } else { KvEvent::Removed(run) });
        }
        events
    }
}

/// All that the prefix cache holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KvSnapshot {
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// The change after which this is so.
    pub number: u64,
    /// Names of prefixes.
    pub keys: Vec<PrefixKey>,
}

record!(KvAsk { from: u64 });
record!(KvChanges {
    node: NodeId,
    epoch: Epoch,
    number: u64,
    cleared: bool,
    runs: Vec<u32>,
    keys: Vec<PrefixKey>,
});
record!(KvSnapshot { node: NodeId, epoch: Epoch, number: u64, keys: Vec<PrefixKey> });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_arrive_as_they_left_but_for_what_was_cleared_after() {
        let (one, two, three) = (PrefixKey(1), PrefixKey(2), PrefixKey(3));
        let tail = vec![KvEvent::Removed(vec![one]), KvEvent::Stored(vec![two, three]), KvEvent::Removed(vec![three])];
        let clear = [KvEvent::Stored(vec![one]), KvEvent::Cleared];
        let there_and_back = |events: &[KvEvent]| KvChanges::depart(NodeId(1), Epoch(2), 3, events).arrive();
        assert_eq!(there_and_back(&tail), tail);
        assert_eq!(there_and_back(&[&clear[..], &tail].concat()), [&[KvEvent::Cleared][..], &tail].concat());
        assert_eq!(there_and_back(&[]), []);
    }
}
