//! What happened, for people and for comparison: a running hash over everything that a simulation did, and the last
//! fifty entries in words. O(1) per entry; formats nothing unless somebody asks.

use crate::hash_worker::mix;
use llmscale_types::Time;
use std::collections::VecDeque;
use std::fmt;

/// Entries that are kept in words.
const KEPT: usize = 50;

/// One thing that happened: a verb, and the numbers of whom it concerns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    at: Time,
    what: &'static str,
    numbers: [u64; 4],
}

impl fmt::Display for Entry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.numbers;
        write!(formatter, "{:>12} us  {:<28} {a} {b} {c} {d}", self.at.0, self.what)
    }
}

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: u64,
    last: VecDeque<Entry>,
}

impl Trace {
    /// Adds an entry.
    pub(crate) fn note(&mut self, at: Time, what: &'static str, numbers: [u64; 4]) {
        self.hash = mix(self.hash ^ at.0);
        for byte in what.bytes() {
            self.hash = self.hash.wrapping_mul(0x0100_0000_01b3) ^ u64::from(byte);
        }
        for number in numbers {
            self.hash = mix(self.hash.wrapping_add(number));
        }
        if self.last.len() == KEPT {
            self.last.pop_front();
        }
        self.last.push_back(Entry { at, what, numbers });
    }

    /// Over all entries, in order.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    /// The last entries in words.
    pub(crate) fn last(&self) -> Vec<String> {
        self.last.iter().map(ToString::to_string).collect()
    }
}
