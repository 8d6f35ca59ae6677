//! What happens to streams when replicas die, restart, drain, refuse, fall silent or lose a token.

mod common;

use common::{Bench, LENGTH, STOP, new_request, offer, report, row};
use llmscale_front::{
    EndReason, FrontEvent, FrontOptions, NewRequest, Offer, ReplicaFrame, ReplicaState, SoFar, ToReplica,
};
use llmscale_types::error::QueueUnit;
use llmscale_types::{
    Attempt, Duration, Epoch, FinishReason, FrontLimits, NodeId, Refusal, ReplicaId, RequestId, Time,
};

#[test]
fn a_stream_goes_on_elsewhere_from_its_last_token_when_its_replica_dies() {
    let mut bench = Bench::with_replicas(2);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.token(0, request, 1, 1, 42);
    bench.sent();
    bench.down(0);
    let (replica, submission) = bench.submissions().remove(0);
    assert_eq!((replica, submission.key.attempt), (1, Attempt(2)));
    assert_eq!((submission.context.as_slice(), submission.prompt_tokens), (&[5, 6, 7, 41, 42][..], 3));
    assert_eq!(submission.sampling.max_tokens, 4);
    bench.token(1, request, 2, 2, 43);
    bench.token(1, request, 2, 3, 44);
    bench.end(1, request, 2, FinishReason::Length, 4);
    assert_eq!(bench.tokens(request), [41, 42, 43, 44]);
    let told = [(0, 0), (1, 0), (2, 1), (3, 1)].map(|(index, restarts)| (index, SoFar { cached_tokens: 2, restarts }));
    assert_eq!(bench.so_far[&request], told, "readers hear of it with the next token, not at the end");
    assert_eq!(bench.ends[&request], (LENGTH, 4, 2, 1));
}

#[test]
fn with_one_replica_the_stream_waits_for_its_return() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.sent();
    bench.down(0);
    assert_eq!(bench.sent(), []);
    bench.up_with(0, offer(200));
    let (replica, submission) = bench.submissions().remove(0);
    assert_eq!((replica, submission.key.attempt, submission.context.len()), (0, Attempt(2), 4));
}

#[test]
fn frames_of_a_dead_incarnation_are_dropped_whole() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.down(0);
    bench.token(0, request, 1, 0, 41);
    assert_eq!(bench.front.counters().stale_frames, 1);
    bench.up_with(0, offer(200));
    // The node that died had one more frame on its way, under its own number.
    bench.token(0, request, 1, 0, 41);
    assert_eq!(bench.front.counters().stale_frames, 2);
    assert_eq!(bench.tokens(request), []);
}

#[test]
fn a_connection_that_comes_up_twice_starts_its_requests_again() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.sent();
    bench.up(0);
    let (_, submission) = bench.submissions().remove(0);
    assert_eq!((submission.key.attempt, submission.context.len()), (Attempt(2), 4));
    // The first attempt of the same node is stale now.
    bench.token(0, request, 1, 1, 99);
    assert_eq!(bench.front.counters().stale_rows, 1);
    assert_eq!(bench.tokens(request), [41]);
}

#[test]
fn a_worker_restart_on_the_same_node_is_seen_in_the_count_only() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.sent();
    let (replica, node) = (ReplicaId(0), NodeId(100));
    let frame = |epoch, index, token| {
        let frame = ReplicaFrame::Outputs(row(request, 1, index, token));
        FrontEvent::Frame { replica, node, epoch: Epoch(epoch), frame }
    };
    bench.event(frame(2, 1, 42));
    // What the dead worker group had still said is dropped.
    bench.event(frame(1, 2, 99));
    bench.event(frame(2, 2, 43));
    assert_eq!(bench.tokens(request), [41, 42, 43]);
    assert_eq!(bench.sent(), []);
    assert_eq!(bench.front.counters().stale_frames, 1);
    bench.event(FrontEvent::Cancel { request, at_token: None });
    assert_eq!(bench.ends[&request].3, 1);
}

#[test]
fn a_repeated_token_is_dropped_and_counted() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.token(0, request, 1, 0, 41);
    bench.token(0, request, 1, 1, 42);
    assert_eq!(bench.tokens(request), [41, 42]);
    assert_eq!(bench.front.counters().duplicate_tokens, 1);
}

#[test]
fn a_missing_token_starts_a_new_attempt_from_the_record() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.sent();
    bench.token(0, request, 1, 2, 43);
    let sent = bench.sent();
    assert_eq!(sent[0], (0, ToReplica::Abort { request, attempt: Attempt(1), at_token: None }));
    let ToReplica::Submit(submission) = &sent[1].1 else { panic!("{sent:?}") };
    assert_eq!((submission.key.attempt, submission.context.as_slice()), (Attempt(2), &[5, 6, 7, 41][..]));
    assert_eq!(bench.front.counters().gaps, 1);
}

#[test]
fn an_end_that_counts_more_tokens_than_came_is_a_gap() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.end(0, request, 1, FinishReason::Stop, 2);
    assert_eq!(bench.reason(request), None);
    assert_eq!(bench.front.counters().gaps, 1);
}

#[test]
fn the_end_of_an_older_attempt_is_dropped() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.give_back(0, request, 1, None);
    bench.end(0, request, 1, FinishReason::Aborted, 1);
    assert_eq!(bench.reason(request), None);
    assert_eq!(bench.front.counters().stale_rows, 1);
    bench.end(0, request, 2, FinishReason::Stop, 1);
    assert_eq!(bench.reason(request), Some(STOP));
}

#[test]
fn a_lost_end_after_the_last_token_does_not_run_the_request_again() {
    let mut bench = Bench::with_replicas(2);
    let full = bench.take(new_request(1));
    let stopped = bench.take(new_request(9));
    bench.token(0, full, 1, 0, 41);
    bench.token(1, stopped, 1, 0, 0);
    bench.sent();
    bench.down(0);
    bench.down(1);
    assert_eq!((bench.reason(full), bench.reason(stopped)), (Some(LENGTH), Some(STOP)));
    assert_eq!(bench.sent(), []);
}

#[test]
fn tokens_beyond_the_limit_are_dropped() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(1));
    bench.token(0, request, 1, 0, 41);
    bench.token(0, request, 1, 1, 42);
    bench.end(0, request, 1, FinishReason::Length, 1);
    assert_eq!(bench.tokens(request), [41]);
    assert_eq!(bench.front.counters().surplus_tokens, 1);
}

#[test]
fn after_too_many_lost_attempts_a_request_ends_as_unavailable() {
    let limits = FrontLimits { max_attempts: 3, ..FrontLimits::default() };
    let mut bench = Bench::new(FrontOptions { limits, ..FrontOptions::default() });
    bench.up(0);
    let request = bench.take(new_request(4));
    for incarnation in 0..2 {
        bench.down(0);
        assert_eq!(bench.reason(request), None);
        bench.up_with(0, offer(200 + incarnation));
    }
    bench.down(0);
    assert_eq!(bench.reason(request), Some(EndReason::Unavailable));
}

#[test]
fn requests_that_come_back_stand_at_the_front_of_their_class() {
    let limits = FrontLimits { look_ahead: Duration::from_millis(20), ..FrontLimits::default() };
    let mut bench = Bench::new(FrontOptions { limits, ..FrontOptions::default() });
    bench.up(0);
    let requests = bench.take_many(6, &new_request(60));
    assert_eq!(bench.submissions().len(), 4);
    bench.down(0);
    bench.up_with(0, offer(200));
    let order: Vec<RequestId> = bench.submissions().iter().map(|(_, submission)| submission.key.request).collect();
    assert_eq!(order, requests[..4]);
}

#[test]
fn waiting_requests_move_to_a_new_revision_when_the_old_one_is_gone() {
    let mut bench = Bench::with_replicas(1);
    let started = bench.take(new_request(4));
    let waiting = bench.take(new_request(4));
    bench.token(0, started, 1, 0, 41);
    bench.sent();
    let mut next = offer(300);
    next.model.revision = "next".into();
    next.model.weights_digest = [9; 32];
    bench.down(0);
    bench.up_with(1, next);
    let moved: Vec<RequestId> = bench.submissions().iter().map(|(_, submission)| submission.key.request).collect();
    // A stream that has begun may only go on with the weights it began with.
    assert_eq!(moved, [waiting]);
    assert_eq!(bench.reason(started), None);
}

#[test]
fn a_full_replica_is_left_alone_until_it_may_have_room() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.sent();
    let retry_after = Duration::from_millis(100);
    let refusal = Refusal::QueueFull { queued: 9, limit: 9, unit: QueueUnit::Requests, retry_after };
    bench.give_back(0, request, 1, Some(refusal));
    assert_eq!(bench.sent(), []);
    assert_eq!(bench.wake_at, Some(bench.now + retry_after));
    bench.pass(retry_after);
    assert_eq!(bench.submissions()[0].1.key.attempt, Attempt(2));
    assert_eq!(bench.front.counters().lost_attempts, 0);
}

#[test]
fn a_draining_replica_gives_back_what_waits_and_its_streams_move_when_there_is_room() {
    let mut bench = Bench::with_replicas(2);
    let waiting = bench.take(new_request(20));
    let on_other = bench.take(new_request(20));
    let streaming = bench.take(new_request(20));
    bench.token(0, streaming, 1, 0, 41);
    bench.token(1, on_other, 1, 0, 51);
    bench.sent();
    bench.give_back(0, waiting, 1, Some(Refusal::Draining));
    let (replica, submission) = bench.submissions().remove(0);
    assert_eq!((replica, submission.key.request), (1, waiting));
    bench.status(0, ReplicaState::Draining);
    let sent = bench.sent();
    assert_eq!(sent[0], (0, ToReplica::Abort { request: streaming, attempt: Attempt(1), at_token: None }));
    let (1, ToReplica::Submit(submission)) = &sent[1] else { panic!("{sent:?}") };
    assert_eq!((submission.key.request, submission.context.as_slice()), (streaming, &[5, 6, 7, 41][..]));
    assert_eq!(bench.front.counters().moved, 1);
}

#[test]
fn streams_stay_on_a_draining_replica_while_nobody_else_has_room() {
    let mut bench = Bench::with_replicas(1);
    let streaming = bench.take(new_request(3));
    bench.token(0, streaming, 1, 0, 41);
    bench.sent();
    bench.status(0, ReplicaState::Draining);
    assert_eq!(bench.sent(), []);
    bench.token(0, streaming, 1, 1, 42);
    assert_eq!(bench.tokens(streaming), [41, 42]);
    // Somebody comes: the stream moves there at once.
    bench.up(1);
    let (replica, submission) = bench.submissions().remove(0);
    assert_eq!((replica, submission.context.len()), (1, 5));
}

#[test]
fn what_a_recovering_replica_has_not_begun_is_recalled_for_one_that_can() {
    let mut bench = Bench::with_replicas(2);
    let first = bench.take(new_request(20));
    let second = bench.take(new_request(20));
    let streaming = bench.take(new_request(20));
    bench.token(0, streaming, 1, 0, 41);
    bench.token(1, second, 1, 0, 41);
    bench.sent();
    bench.status(0, ReplicaState::Recovering);
    assert_eq!(bench.sent(), [(0, ToReplica::Recall { request: first, attempt: Attempt(1) })]);
    // Asked once only.
    bench.status(0, ReplicaState::Recovering);
    assert_eq!(bench.sent(), []);
    bench.give_back(0, first, 1, None);
    let (replica, submission) = bench.submissions().remove(0);
    assert_eq!((replica, submission.key.request, submission.key.attempt), (1, first, Attempt(2)));
    assert_eq!(bench.front.counters().lost_attempts, 0);
}

#[test]
fn a_recall_that_comes_too_late_changes_nothing() {
    let mut bench = Bench::with_replicas(2);
    let request = bench.take(new_request(2));
    bench.status(0, ReplicaState::Recovering);
    bench.token(0, request, 1, 0, 41);
    bench.token(0, request, 1, 1, 42);
    bench.end(0, request, 1, FinishReason::Length, 2);
    assert_eq!(bench.tokens(request), [41, 42]);
    assert_eq!(bench.ends[&request].3, 0);
}

#[test]
fn an_idle_replica_takes_over_from_one_that_is_late() {
    let mut bench = Bench::with_replicas(1);
    let requests = bench.take_many(2, &new_request(20));
    bench.sent();
    bench.up(1);
    let late = llmscale_front::Report { predicted_backlog_ns: 900_000_000, ..report(ReplicaState::Ready) };
    bench.frame(0, ReplicaFrame::Status(Box::new(late)));
    assert_eq!(bench.sent(), [(0, ToReplica::Recall { request: requests[1], attempt: Attempt(1) })]);
}

#[test]
fn a_ready_replica_that_stays_silent_loses_the_attempt() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.sent();
    bench.pass(Duration::from_millis(119_000));
    assert_eq!(bench.sent(), []);
    bench.pass(Duration::from_millis(2_000));
    // It is asked first: an attempt that waits for memory would come back.
    assert_eq!(bench.sent(), [(0, ToReplica::Recall { request, attempt: Attempt(1) })]);
    bench.pass(Duration::from_millis(14_000));
    assert_eq!((bench.sent(), bench.front.counters().silences), (vec![], 0));
    bench.pass(Duration::from_millis(2_000));
    let sent = bench.sent();
    assert_eq!(sent[0], (0, ToReplica::Abort { request, attempt: Attempt(1), at_token: None }));
    let ToReplica::Submit(submission) = &sent[1].1 else { panic!("{sent:?}") };
    assert_eq!((submission.key.attempt, submission.context.len()), (Attempt(2), 4));
    assert_eq!(bench.front.counters().silences, 1);
}

#[test]
fn a_stream_that_waits_for_memory_for_long_comes_back_and_nobody_is_blamed() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(9));
    bench.token(0, request, 1, 0, 41);
    bench.sent();
    for attempt in 1..20 {
        bench.pass(Duration::from_millis(121_000));
        assert_eq!(bench.sent(), [(0, ToReplica::Recall { request, attempt: Attempt(attempt) })]);
        bench.give_back(0, request, attempt, None);
        let [(0, submission)] = &bench.submissions()[..] else { panic!("it is sent again") };
        assert_eq!((submission.key.attempt, submission.context.len()), (Attempt(attempt + 1), 4));
    }
    let counters = bench.front.counters();
    assert_eq!((counters.silences, counters.lost_attempts), (0, 0));
}

#[test]
fn a_token_after_the_question_gives_new_patience() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(9));
    bench.token(0, request, 1, 0, 41);
    bench.sent();
    bench.pass(Duration::from_millis(121_000));
    assert_eq!(bench.sent(), [(0, ToReplica::Recall { request, attempt: Attempt(1) })]);
    bench.token(0, request, 1, 1, 42);
    bench.pass(Duration::from_millis(119_000));
    assert_eq!((bench.sent(), bench.front.counters().silences), (vec![], 0));
}

#[test]
fn every_token_gives_new_patience_and_a_recovering_replica_is_not_blamed() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(9));
    for index in 0..5 {
        bench.pass(Duration::from_millis(100_000));
        bench.token(0, request, 1, index, 41);
    }
    bench.status(0, ReplicaState::Recovering);
    bench.pass(Duration::from_millis(500_000));
    assert_eq!(bench.front.counters().silences, 0);
    assert!(bench.wake_at.is_some_and(|at: Time| at > bench.now));
}

#[test]
fn a_duplicate_refusal_counts_as_a_lost_attempt() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.give_back(0, request, 1, Some(Refusal::Duplicate));
    assert_eq!(bench.front.counters().lost_attempts, 1);
    assert_eq!(bench.submissions()[1].1.key.attempt, Attempt(2));
}

fn offer_of(numerics: &str) -> Offer {
    Offer { numerics: numerics.into(), ..offer(300) }
}

#[test]
fn a_stream_that_goes_on_under_other_numerics_is_counted() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(NewRequest { ..new_request(4) });
    bench.token(0, request, 1, 0, 41);
    bench.up_with(1, offer_of("gpu"));
    bench.down(0);
    assert_eq!(bench.front.counters().numerics_changes, 0, "no token has come from there yet");
    let frame = ReplicaFrame::Outputs(row(request, 2, 1, 42));
    bench.event(FrontEvent::Frame { replica: ReplicaId(1), node: NodeId(300), epoch: Epoch(1), frame });
    assert_eq!(bench.tokens(request), [41, 42]);
    assert_eq!(bench.front.counters().numerics_changes, 1);
}

#[test]
fn a_stream_goes_on_with_the_numerics_of_its_last_token_not_of_an_attempt_that_gave_none() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.up_with(1, offer_of("gpu"));
    bench.sent();
    bench.down(0);
    assert_eq!(bench.submissions()[0].0, 1, "there is no other");
    bench.up_with(2, offer_of("cpu"));
    bench.up_with(3, offer_of("gpu"));
    bench.sent();
    bench.down(1);
    assert_eq!(bench.submissions()[0].0, 2);
}

#[test]
fn a_stream_stays_on_a_draining_replica_rather_than_change_its_numerics() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(4));
    bench.token(0, request, 1, 0, 41);
    bench.up_with(1, offer_of("gpu"));
    bench.sent();
    bench.status(0, ReplicaState::Draining);
    assert_eq!(bench.sent(), []);
    bench.up_with(2, offer_of("cpu"));
    assert_eq!(bench.submissions()[0].0, 2);
    assert_eq!(bench.front.counters().moved, 1);
}
