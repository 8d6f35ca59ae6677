//! The virtual clock and what is to happen: events in the order of their time and, among equals, of their planning, so
//! that one seed is one history. O(log n) per event. Nothing else in a simulation knows what time it is.

use llmscale_types::{Duration, Time};
use std::collections::BTreeMap;

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Agenda<E> {
    now: Time,
    planned: u64,
    events: BTreeMap<(Time, u64), E>,
}

impl<E> Default for Agenda<E> {
    fn default() -> Self {
        Self { now: Time(0), planned: 0, events: BTreeMap::new() }
    }
}

impl<E> Agenda<E> {
    /// The present.
    pub(crate) fn now(&self) -> Time {
        self.now
    }

    /// Plans an event; one in the past happens now.
    pub(crate) fn at(&mut self, at: Time, event: E) {
        self.planned += 1;
        self.events.insert((at.max(self.now), self.planned), event);
    }

    /// Plans an event that is a span away.
    pub(crate) fn after(&mut self, span: Duration, event: E) {
        self.at(self.now + span, event);
    }

    /// Goes on to the next event.
    pub(crate) fn next_event(&mut self) -> Option<E> {
        let ((at, _), event) = self.events.pop_first()?;
        self.now = at;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::Agenda;
    use llmscale_types::{Duration, Time};

    #[test]
    fn events_happen_in_the_order_of_time_and_then_of_planning() {
        let mut agenda = Agenda::default();
        agenda.at(Time(20), 'c');
        agenda.at(Time(10), 'a');
        agenda.after(Duration(10), 'b');
        let seen: Vec<char> = std::iter::from_fn(|| agenda.next_event()).collect();
        assert_eq!((seen, agenda.now()), (vec!['a', 'b', 'c'], Time(20)));
    }

    #[test]
    fn an_event_in_the_past_happens_now() {
        let mut agenda = Agenda::default();
        agenda.at(Time(5), 'a');
        agenda.next_event();
        agenda.at(Time(1), 'b');
        assert_eq!((agenda.next_event(), agenda.now()), (Some('b'), Time(5)));
    }
}
