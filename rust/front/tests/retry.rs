//! Attempts are made again within a budget: what finds no room waits and does not end, and dead nodes are not counted.

mod common;

use common::{ABORTED, Bench, DEADLINE, new_request};
use llmscale_front::{FrontEvent, FrontOptions, HealthOptions, RetryOptions};
use llmscale_types::{Duration, Refusal, RequestId, Time};

/// One replica that is always trusted, and a budget of this many retries in ten seconds.
fn bench(least_retries: u32) -> Bench {
    let retries = RetryOptions { least_retries, permille: 0, ..RetryOptions::default() };
    let health = HealthOptions { least_failures: u32::MAX, ..HealthOptions::default() };
    let mut bench = Bench::new(FrontOptions { retries, health, ..FrontOptions::default() });
    bench.up(0);
    bench
}

impl Bench {
    /// The number of the attempt that was just sent, if one was.
    fn attempt(&mut self) -> Option<u32> {
        self.submissions().pop().map(|(_, submission)| submission.key.attempt.0)
    }

    fn refuse(&mut self, request: RequestId, attempt: u32) {
        self.give_back(0, request, attempt, Some(Refusal::Duplicate));
    }
}

#[test]
fn the_first_fault_is_retried_at_once_and_the_next_after_a_jittered_wait_that_doubles() {
    let mut bench = bench(100);
    let id = bench.take(new_request(4));
    assert_eq!(bench.attempt(), Some(1));
    bench.refuse(id, 1);
    assert_eq!(bench.attempt(), Some(2));
    for (attempt, most_ms) in [(2, 100), (3, 200), (4, 400)] {
        bench.refuse(id, attempt);
        assert_eq!(bench.attempt(), None);
        let at = bench.wake_at.expect("it is woken for the retry");
        let wait = at.since(bench.now).0;
        assert!((most_ms * 500..=most_ms * 1_000).contains(&wait), "{wait} us after attempt {attempt}");
        bench.now = Time(at.0 - 1);
        bench.event(FrontEvent::Tick);
        assert_eq!(bench.attempt(), None);
        bench.now = at;
        bench.event(FrontEvent::Tick);
        assert_eq!(bench.attempt(), Some(attempt + 1));
    }
    assert_eq!(bench.front.counters().retries, 4);
}

#[test]
fn the_first_retries_of_many_requests_are_free_and_a_stream_that_fails_again_waits_for_room_and_goes_on() {
    let mut bench = bench(1);
    let requests = bench.take_many(4, &new_request(4));
    bench.token(0, requests[1], 1, 0, 50);
    bench.submissions();
    for &id in &requests {
        bench.refuse(id, 1);
        assert_eq!(bench.attempt(), Some(2));
    }
    bench.refuse(requests[0], 2);
    bench.pass(Duration::from_millis(100));
    assert_eq!(bench.attempt(), Some(3), "the budget has room for one");
    bench.refuse(requests[1], 2);
    bench.pass(Duration::from_millis(100));
    assert_eq!(bench.attempt(), None);
    assert_eq!((bench.front.counters().retries_delayed, bench.reason(requests[1])), (1, None));
    let begun = bench.now;
    while bench.now.since(begun) < Duration::from_millis(20_000) {
        bench.pass(Duration::from_millis(500));
        if let Some((_, submission)) = bench.submissions().pop() {
            assert_eq!((submission.key.request, submission.context.last()), (requests[1], Some(&50)));
            assert!(bench.now.since(begun) >= Duration::from_millis(4_000), "the window has not passed");
            return;
        }
    }
    panic!("it waits for ever");
}

#[test]
fn requests_make_room_for_retries() {
    let retries = RetryOptions { least_retries: 1, permille: 100, ..RetryOptions::default() };
    let mut bench = Bench::new(FrontOptions { retries, ..FrontOptions::default() });
    bench.up(0);
    let requests = bench.take_many(4, &new_request(4));
    for _ in 0..16 {
        let id = bench.take(new_request(4));
        bench.event(FrontEvent::ClientGone { request: id });
    }
    for attempt in 1..3 {
        requests.iter().copied().for_each(|id| bench.refuse(id, attempt));
    }
    bench.submissions();
    bench.pass(Duration::from_millis(100));
    // 20 requests make room for two, one more is always free.
    assert_eq!((bench.submissions().len(), bench.front.counters().retries_delayed), (3, 1));
}

#[test]
fn all_streams_of_a_dead_node_move_at_once_though_the_budget_is_used_up() {
    let mut bench = bench(1);
    let streams = bench.take_many(4, &new_request(4));
    bench.submissions();
    for attempt in 1..3 {
        bench.refuse(streams[0], attempt);
        bench.pass(Duration::from_millis(100));
    }
    assert_eq!(bench.front.counters().retries, 2);
    bench.submissions();
    bench.down(0);
    bench.up(0);
    let moved: Vec<RequestId> = bench.submissions().iter().map(|(_, sent)| sent.key.request).collect();
    assert!(streams.iter().all(|id| moved.contains(id)), "{moved:?} without one of {streams:?}");
    assert_eq!(bench.front.counters().retries, 2);
}

#[test]
fn a_request_that_is_set_aside_can_be_cancelled_and_expires() {
    let mut bench = bench(1);
    let cancelled = bench.take(new_request(4));
    let mut expiring = new_request(4);
    expiring.deadline = Some(bench.now + Duration::from_millis(20));
    let expiring = bench.take(expiring);
    for attempt in 1..3 {
        bench.refuse(cancelled, attempt);
        bench.refuse(expiring, attempt);
    }
    bench.event(FrontEvent::Cancel { request: cancelled, at_token: None });
    bench.pass(Duration::from_millis(50));
    assert_eq!((bench.reason(cancelled), bench.reason(expiring)), (Some(ABORTED), Some(DEADLINE)));
}

#[test]
fn a_request_that_was_set_aside_while_its_model_was_given_up_ends_as_unavailable() {
    let mut bench = bench(1);
    let id = bench.take(new_request(4));
    bench.refuse(id, 1);
    bench.refuse(id, 2);
    bench.down(0);
    for _ in 0..80 {
        bench.pass(Duration::from_millis(1_000));
    }
    assert_eq!(bench.reason(id).map(|reason| reason.label()), Some("unavailable"));
    assert_eq!(bench.front.status(bench.now).live_requests, 0);
}
