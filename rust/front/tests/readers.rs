//! Readers that leave, come back, catch up or fall behind.

mod common;

use common::{ABORTED, Bench, DEADLINE, LENGTH, new_request};
use llmscale_front::{FrontEvent, FrontOptions, NewRequest, ReplicaFrame, ToReplica};
use llmscale_types::{Attempt, Duration, FinishReason, FrontLimits, RequestId, Sampling, TokenLogprobs};

fn tokens(bench: &mut Bench, request: RequestId, indexes: std::ops::Range<u32>) {
    for index in indexes {
        bench.token(0, request, 1, index, 40 + index);
    }
}

#[test]
fn a_reader_who_comes_back_gets_what_it_lacks_and_then_the_stream() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(9));
    tokens(&mut bench, request, 0..2);
    bench.event(FrontEvent::Detach { request });
    tokens(&mut bench, request, 2..5);
    assert_eq!(bench.tokens(request), [40, 41]);
    // The reader had received one token only when its connection broke.
    bench.event(FrontEvent::Attach { request, from_index: 1 });
    assert_eq!(bench.tokens(request), [40, 41, 42, 43, 44]);
    tokens(&mut bench, request, 5..6);
    assert_eq!(bench.tokens(request).len(), 6);
}

#[test]
fn the_end_of_a_detached_request_waits_for_its_reader() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(2));
    bench.event(FrontEvent::Detach { request });
    tokens(&mut bench, request, 0..2);
    bench.end(0, request, 1, FinishReason::Length, 2);
    assert_eq!(bench.reason(request), None);
    bench.event(FrontEvent::Attach { request, from_index: 0 });
    assert_eq!(bench.tokens(request), [40, 41]);
    assert_eq!(bench.ends[&request], (LENGTH, 2, 2, 0));
}

#[test]
fn a_finished_request_that_nobody_fetches_ends_when_its_time_is_over() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(NewRequest { detached: true, ..new_request(1) });
    tokens(&mut bench, request, 0..1);
    bench.end(0, request, 1, FinishReason::Length, 1);
    assert_eq!(bench.wake_at, Some(bench.now + Duration::from_millis(60_000)));
    bench.pass(Duration::from_millis(60_000));
    assert_eq!(bench.reason(request), Some(LENGTH));
    assert_eq!(bench.tokens(request), []);
}

#[test]
fn a_running_request_without_a_reader_is_aborted_when_its_time_is_over() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(50));
    bench.event(FrontEvent::Detach { request });
    bench.pass(Duration::from_millis(30_000));
    tokens(&mut bench, request, 0..1);
    // Leaving twice does not buy time.
    bench.event(FrontEvent::Detach { request });
    bench.sent();
    bench.pass(Duration::from_millis(30_000));
    assert_eq!(bench.reason(request), Some(ABORTED));
    assert_eq!(bench.sent(), [(0, ToReplica::Abort { request, attempt: Attempt(1), at_token: None })]);
}

#[test]
fn a_deadline_holds_for_detached_requests_too() {
    let mut bench = Bench::with_replicas(1);
    let deadline = bench.now + Duration(1_000);
    let request = bench.take(NewRequest { deadline: Some(deadline), detached: true, ..new_request(5) });
    bench.pass(Duration(1_000));
    assert_eq!(bench.reason(request), None);
    bench.event(FrontEvent::Attach { request, from_index: 0 });
    assert_eq!(bench.reason(request), Some(DEADLINE));
}

#[test]
fn a_reader_with_too_much_unread_loses_its_request() {
    let limits = FrontLimits { max_unread_tokens: 3, ..FrontLimits::default() };
    let mut bench = Bench::new(FrontOptions { limits, ..FrontOptions::default() });
    bench.up(0);
    let request = bench.take(new_request(50));
    tokens(&mut bench, request, 0..3);
    bench.event(FrontEvent::Read { request, up_to_index: 2 });
    tokens(&mut bench, request, 3..5);
    assert_eq!(bench.reason(request), None);
    tokens(&mut bench, request, 5..6);
    assert_eq!(bench.reason(request), Some(ABORTED));
    assert_eq!(bench.front.counters().slow_readers, 1);
}

#[test]
fn reading_beyond_the_last_token_counts_up_to_it() {
    let limits = FrontLimits { max_unread_tokens: 1, ..FrontLimits::default() };
    let mut bench = Bench::new(FrontOptions { limits, ..FrontOptions::default() });
    bench.up(0);
    let request = bench.take(new_request(50));
    tokens(&mut bench, request, 0..1);
    bench.event(FrontEvent::Read { request, up_to_index: u32::MAX });
    tokens(&mut bench, request, 1..2);
    assert_eq!(bench.reason(request), None);
    tokens(&mut bench, request, 2..3);
    assert_eq!(bench.reason(request), Some(ABORTED));
}

#[test]
fn log_probabilities_come_with_their_tokens_and_again_for_a_reader_who_is_back() {
    let mut bench = Bench::with_replicas(1);
    let sampling = Sampling { max_tokens: 9, logprobs: Some(1), ..Sampling::default() };
    let request = bench.take(NewRequest { sampling, ..new_request(9) });
    let logprobs = |index: u32| TokenLogprobs { chosen: -(index as f32), top: vec![(index, 0.5)] };
    for index in 0..4 {
        let mut outputs = common::row(request, 1, index, 40 + index);
        outputs.logprobs.push((0, logprobs(index)));
        bench.frame(0, ReplicaFrame::Outputs(outputs));
    }
    let seen: Vec<u32> = bench.logprobs[&request].iter().map(|(index, _)| *index).collect();
    assert_eq!(seen, [0, 1, 2, 3]);
    bench.event(FrontEvent::Read { request, up_to_index: 2 });
    bench.logprobs.clear();
    bench.event(FrontEvent::Detach { request });
    bench.event(FrontEvent::Attach { request, from_index: 2 });
    assert_eq!(bench.logprobs[&request], [(2, logprobs(2)), (3, logprobs(3))]);
    assert_eq!(bench.tokens(request), [40, 41, 42, 43]);
}

#[test]
fn a_cancelled_detached_request_ends_at_once() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(NewRequest { detached: true, ..new_request(9) });
    bench.event(FrontEvent::Cancel { request, at_token: None });
    assert_eq!(bench.reason(request), Some(ABORTED));
}
