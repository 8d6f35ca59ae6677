//! How often attempts are made again and again after replicas answered badly. The first such retry of a request is free; all
//! further ones are at most a share of the requests of a window, and a few more, so that a fleet in trouble is not asked for
//! many times as much. A request that finds no room waits, set aside from the queue, and never ends for it; before that it waits a little in any
//! case, by a jitter that follows from its number. What a dead node takes down is not counted, because moving it is what
//! fronts are for. O(1) per retry.

use crate::event::{EndReason, FrontAction};
use crate::front::Front;
use crate::request::Place;
use llmscale_types::{Duration, LimitError, Planted, RequestId, Time};

/// Settings of the retry budget.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryOptions {
    /// Requests and retries count for at least half of this, and at most all of it.
    pub window: Duration,
    /// Retries of requests that failed before, per thousand requests of a window.
    pub permille: u32,
    /// Retries of a window that need no requests.
    pub least_retries: u32,
    /// What a request waits at most before its third attempt; twice as much before each that follows.
    pub delay: Duration,
    /// What it waits at most before any, and before it asks for room again.
    pub max_delay: Duration,
}

impl Default for RetryOptions {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(10_000),
            permille: 100,
            least_retries: 10,
            delay: Duration::from_millis(100),
            max_delay: Duration::from_millis(2_000),
        }
    }
}

impl RetryOptions {
    /// Checks that the sizes fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        LimitError::at_least("retry window", self.window.0, 2)?;
        LimitError::at_most("retry permille", u64::from(self.permille), 1_000)?;
        // Without requests there would be none at all, and a small fleet would wait for ever.
        LimitError::at_least("least_retries", u64::from(self.least_retries), 1)?;
        LimitError::at_least("retry max_delay", self.max_delay.0, self.delay.0.max(1))
    }

    /// Between half and all of the delay that comes after so many faults. The same request waits equally long everywhere.
    fn delay_after(&self, request: RequestId, faults: u32) -> Duration {
        let doublings = faults.saturating_sub(2).min(32);
        let most = self.delay.0.checked_shl(doublings).unwrap_or(u64::MAX).min(self.max_delay.0);
        jitter(request, faults, Duration(most))
    }
}

/// Between half and all of a span, drawn from the request's number (the finalizer of splitmix64, Steele et al. 2014).
fn jitter(request: RequestId, draw: u32, most: Duration) -> Duration {
    let mut mixed = (request.0 ^ u64::from(draw).rotate_left(48)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    Duration(most.0 - mixed % (most.0 / 2 + 1))
}

/// Requests and retries of this half of a window, and of the one before.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RetryBudget {
    requests: [u64; 2],
    retries: [u64; 2],
    half: u64,
}

impl RetryBudget {
    fn roll(&mut self, now: Time, options: &RetryOptions) {
        let half = now.0 / (options.window.0 / 2).max(1);
        match half.saturating_sub(self.half) {
            0 => {}
            1 => (self.requests, self.retries) = ([0, self.requests[0]], [0, self.retries[0]]),
            _ => (self.requests, self.retries) = ([0; 2], [0; 2]),
        }
        self.half = self.half.max(half);
    }

    /// A request was taken.
    pub(crate) fn earn(&mut self, now: Time, options: &RetryOptions) {
        self.roll(now, options);
        self.requests[0] += 1;
    }

    /// Room for one more retry is taken, if there is any.
    fn take(&mut self, now: Time, options: &RetryOptions) -> bool {
        self.roll(now, options);
        let requests: u64 = self.requests.iter().sum();
        let most = u64::from(options.least_retries) + requests * u64::from(options.permille) / 1_000;
        let free = self.retries.iter().sum::<u64>() < most || Planted::RetriesWithoutBudget.is_here();
        self.retries[0] += u64::from(free);
        free
    }
}

impl Front {
    /// A replica answered a request badly. It is tried again when that may be.
    pub(crate) fn set_aside(&mut self, id: RequestId) {
        let request = self.request_mut(id);
        request.faults += 1;
        // Due at once: what is due is looked at after every event.
        request.place = Place::SetAside { until: (request.faults < 2).then_some(Time(0)) };
        self.arm(id);
    }

    /// The wait of a request that was set aside is over; `None` for one that has just failed and has to wait.
    pub(crate) fn try_again(&mut self, now: Time, id: RequestId, until: Option<Time>, out: &mut Vec<FrontAction>) {
        let options = self.options.retries;
        let faults = self.requests[&id].faults;
        let wait = match until {
            None => Some(options.delay_after(id, faults)),
            Some(_) if faults < 2 || self.retry_budget.take(now, &options) => None,
            Some(_) => {
                self.counters.retries_delayed += 1;
                Some(jitter(id, now.0 as u32, options.max_delay))
            }
        };
        if let Some(wait) = wait {
            self.request_mut(id).place = Place::SetAside { until: Some(now + wait) };
            self.arm(id);
            return;
        }
        self.counters.retries += 1;
        self.counters.repeated_retries += u64::from(faults >= 2);
        let pool = self.requests[&id].pool;
        if self.fleet.has_prospect(pool) || self.queue(pool).alone_since.is_some() {
            self.enqueue(id);
        } else if self.enqueue_for_heir(id) {
            // Its own pool was given up meanwhile.
        } else {
            self.conclude(id, EndReason::Unavailable, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{RetryBudget, RetryOptions, jitter};
    use llmscale_types::{Duration, RequestId, Time};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn retries_of_a_window_are_the_least_and_a_share_of_its_requests(
            events in prop::collection::vec((0_u64..300_000, any::<bool>()), 1..300),
            least_retries in 1_u32..5,
            permille in 0_u32..500,
        ) {
            let options = RetryOptions { window: Duration(1_000_000), permille, least_retries, ..RetryOptions::default() };
            let mut budget = RetryBudget::default();
            let (mut requests, mut retries, mut now) = (Vec::new(), Vec::new(), 0);
            for (wait, is_request) in events {
                now += wait;
                if is_request {
                    budget.earn(Time(now), &options);
                    requests.push(now);
                    continue;
                }
                let recent = |times: &[u64]| times.iter().filter(|&&at| at / 500_000 + 1 >= now / 500_000).count() as u64;
                let most = u64::from(least_retries) + recent(&requests) * u64::from(permille) / 1_000;
                let free = recent(&retries) < most;
                prop_assert_eq!(budget.take(Time(now), &options), free);
                retries.extend(free.then_some(now));
            }
        }

        #[test]
        fn a_jitter_is_between_half_and_all_of_its_span(request: u64, draw: u32, most in 0_u64..1 << 40) {
            let drawn = jitter(RequestId(request), draw, Duration(most)).0;
            prop_assert!(drawn <= most && drawn >= most / 2);
        }
    }

    #[test]
    fn delays_double_up_to_the_most() {
        let options = RetryOptions::default();
        let delay_ms = |faults| options.delay_after(RequestId(7), faults).0 / 1_000;
        let delays: Vec<u64> = (2..9).map(delay_ms).collect();
        for (delay, most) in delays.iter().zip([100, 200, 400, 800, 1_600, 2_000, 2_000]) {
            assert!((most / 2..=most).contains(delay), "{delays:?}");
        }
    }
}
