//! First come, first served within a class, classes in order of urgency. Favours predictability: whoever waits longest is
//! next. Long prompts delay what comes after them in their class; lower classes wait while a higher one has work.

use super::{Facts, OrderKey, Policy};

/// See the file's header.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirstComeFirstServed;

impl Policy for FirstComeFirstServed {
    fn key(&self, facts: &Facts) -> OrderKey {
        OrderKey(facts.class as u64, facts.arrival)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_types::Class;

    fn key(class: Class, arrival: u64, uncomputed_tokens: u32) -> OrderKey {
        FirstComeFirstServed.key(&Facts { class, arrival, uncomputed_tokens, deadline: None })
    }

    #[test]
    fn within_a_class_the_earlier_arrival_is_first_whatever_its_length() {
        assert!(key(Class::Standard, 1, 9_000) < key(Class::Standard, 2, 1));
    }

    #[test]
    fn a_more_urgent_class_is_first_whenever_it_arrived() {
        assert!(key(Class::Interactive, 9, 1) < key(Class::Standard, 1, 1));
        assert!(key(Class::Batch, 9, 1) < key(Class::Background, 1, 1));
    }
}
