//! Which class is served next: strictly the most urgent, but a request ranks one class higher for every `promote_after`
//! that it has waited, so nothing waits for ever; replicas, which promote nobody, are told the class that it has reached.
//! Within a class, and among equals, first come, first served. Stateless and O(classes).

use llmscale_types::{Class, Duration, RequestId, Time};

/// The oldest waiting request of a class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Head {
    pub(crate) class: Class,
    pub(crate) request: RequestId,
    pub(crate) arrived: Time,
}

/// The class that a request ranks with now.
pub(crate) fn promoted(class: Class, arrived: Time, now: Time, promote_after: Duration) -> Class {
    let promotions = now.since(arrived).0 / promote_after.0;
    Class::ALL[(class as u64).saturating_sub(promotions) as usize]
}

/// The head that is served next.
pub(crate) fn most_urgent(heads: impl Iterator<Item = Head>, now: Time, promote_after: Duration) -> Option<Head> {
    heads.min_by_key(|head| (promoted(head.class, head.arrived, now, promote_after), head.request))
}

#[cfg(test)]
mod tests {
    use super::{Head, most_urgent};
    use llmscale_types::{Class, Duration, RequestId, Time};

    fn head(class: Class, request: u64, arrived: u64) -> Head {
        Head { class, request: RequestId(request), arrived: Time(arrived) }
    }

    fn chosen(heads: &[Head], now: u64) -> u64 {
        most_urgent(heads.iter().copied(), Time(now), Duration(100)).expect("there is a head").request.0
    }

    #[test]
    fn the_most_urgent_class_goes_first() {
        let heads = [head(Class::Standard, 1, 0), head(Class::Interactive, 2, 50)];
        assert_eq!(chosen(&heads, 60), 2);
    }

    #[test]
    fn waiting_promotes_and_the_elder_of_equal_rank_goes_first() {
        let heads = [head(Class::Standard, 1, 0), head(Class::Interactive, 2, 50)];
        assert_eq!(chosen(&heads, 99), 2);
        assert_eq!(chosen(&heads, 100), 1);
    }

    #[test]
    fn the_least_urgent_class_is_served_after_three_promotions_at_the_latest() {
        let heads = [head(Class::Background, 1, 0), head(Class::Interactive, 2, 299)];
        assert_eq!(chosen(&heads, 299), 2);
        assert_eq!(chosen(&heads, 300), 1);
    }
}
