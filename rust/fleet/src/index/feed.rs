//! Whether a replica's events have all arrived. Batches are numbered from 0 in each incarnation of a replica; a number that
//! does not follow is a gap, which is asked for once, and again after a while. O(1) per batch. Knows nothing of what the
//! batches say.

use super::PrefixIndex;
use llmscale_types::{Duration, ReplicaId, Time};

/// What is to be done with a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    /// It was the next one.
    Applied,
    /// It had been applied before; nothing changed.
    Old,
    /// Batches are missing: ask the replica for all from this number on. It answers with them, or with a snapshot if it
    /// does not keep them any more. The batch itself was dropped, because it will come again.
    Ask {
        /// The first that is missing.
        from: u64,
    },
    /// Batches are missing and were asked for already. The batch itself was dropped.
    Waiting,
    /// The replica is not known.
    Unknown,
}

/// Where one replica's events stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Feed {
    next: u64,
    asked: Option<Time>,
}

impl Feed {
    /// Judges the batch of a number; `Applied` means that it must be applied now.
    pub(super) fn take(&mut self, now: Time, number: u64, ask_again_after: Duration) -> Taken {
        match number.cmp(&self.next) {
            std::cmp::Ordering::Less => Taken::Old,
            std::cmp::Ordering::Equal => {
                self.reach(number);
                Taken::Applied
            }
            std::cmp::Ordering::Greater => self.ask(now, ask_again_after),
        }
    }

    /// Judges the number of the last batch that was sent, by word of the replica itself.
    fn hear_of(&mut self, now: Time, number: u64, ask_again_after: Duration) -> Taken {
        if number < self.next { Taken::Old } else { self.ask(now, ask_again_after) }
    }

    fn ask(&mut self, now: Time, ask_again_after: Duration) -> Taken {
        if self.asked.is_some_and(|at| now < at + ask_again_after) {
            return Taken::Waiting;
        }
        self.asked = Some(now);
        Taken::Ask { from: self.next }
    }

    /// Judges a snapshot of the state after the batch of a number. One as old as what was applied is not needed.
    pub(super) fn take_snapshot(&mut self, number: u64) -> Taken {
        if number < self.next {
            return Taken::Old;
        }
        self.reach(number);
        Taken::Applied
    }

    fn reach(&mut self, number: u64) {
        // A replica that names the last number of all only harms itself.
        self.next = number.saturating_add(1);
        self.asked = None;
    }
}

impl PrefixIndex {
    /// A replica says which batch it sent last: also the last one of all is missed in time.
    pub fn hear_of(&mut self, now: Time, replica: ReplicaId, number: u64) -> Taken {
        let Some(feed) = self.feeds.get_mut(&replica) else { return Taken::Unknown };
        let taken = feed.hear_of(now, number, self.options.ask_again_after);
        self.counters.gaps += u64::from(matches!(taken, Taken::Ask { from } if from > 0));
        taken
    }
}
