//! The waiting queue of one replica: records in policy order, O(log n) in and out. Suspects of a crash wait apart, because
//! they run alone and before everything else. Knows nothing of blocks; bounded by whoever pushes.

use crate::policy::OrderKey;
use crate::record::Record;
use std::collections::BTreeMap;

/// Position in the queue: the policy's key, then the arrival, which no two records share.
pub(crate) type Place = (OrderKey, u64);

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    ordinary: BTreeMap<Place, Box<Record>>,
    suspects: BTreeMap<Place, Box<Record>>,
    tokens: u64,
}

impl WaitingQueue {
    pub(crate) fn len(&self) -> usize {
        self.ordinary.len() + self.suspects.len()
    }

    /// Context tokens that wait.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    pub(crate) fn has_suspects(&self) -> bool {
        !self.suspects.is_empty()
    }

    pub(crate) fn push(&mut self, record: Box<Record>) -> Place {
        let place = record.place();
        self.tokens += record.submission.context.len() as u64;
        let queue = if record.suspect { &mut self.suspects } else { &mut self.ordinary };
        let replaced = queue.insert(place, record);
        assert!(replaced.is_none(), "two records arrived as number {}", place.1);
        place
    }

    /// The next record of the ordinary queue.
    pub(crate) fn first(&self) -> Option<&Record> {
        self.ordinary.first_key_value().map(|(_, record)| &**record)
    }

    /// What waits and is no suspect, in order.
    pub(crate) fn ordinary(&self) -> impl Iterator<Item = &Record> {
        self.ordinary.values().map(|record| &**record)
    }

    /// What waits at a place.
    pub(crate) fn get(&self, place: Place) -> Option<&Record> {
        self.ordinary.get(&place).or_else(|| self.suspects.get(&place)).map(|record| &**record)
    }

    /// The next suspect.
    pub(crate) fn first_suspect(&self) -> Option<&Record> {
        self.suspects.first_key_value().map(|(_, record)| &**record)
    }

    pub(crate) fn remove(&mut self, place: Place) -> Option<Box<Record>> {
        let record = self.ordinary.remove(&place).or_else(|| self.suspects.remove(&place))?;
        self.tokens -= record.submission.context.len() as u64;
        Some(record)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.suspects.values().chain(self.ordinary.values()).map(|record| &**record)
    }
}
