//! A request from submission to its one terminal event: admission, placement, deadlines, cancellation.

mod common;

use common::{ABORTED, Bench, DEADLINE, LENGTH, STOP, new_request, offer};
use llmscale_front::{
    EndReason, FrontEvent, FrontOptions, NewRequest, ReplicaFrame, ReplicaState, SubmitError, ToReplica,
};
use llmscale_types::error::QueueUnit;
use llmscale_types::{
    Attempt, Class, Duration, EngineLimits, FinishReason, FrontLimits, LimitError, Refusal, ReplicaId, RequestId,
    StepId, Time,
};

fn options(limits: FrontLimits) -> FrontOptions {
    FrontOptions { limits, ..FrontOptions::default() }
}

#[test]
fn a_request_runs_and_ends_once_with_its_usage() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(2));
    let (replica, submission) = bench.submissions().remove(0);
    assert_eq!((replica, submission.key.attempt, submission.context.as_slice()), (0, Attempt(1), &[5, 6, 7][..]));
    bench.token(0, request, 1, 0, 41);
    bench.token(0, request, 1, 1, 42);
    bench.end(0, request, 1, FinishReason::Length, 2);
    assert_eq!(bench.tokens(request), [41, 42]);
    assert_eq!(bench.ends[&request], (LENGTH, 2, 2, 0));
    assert_eq!(bench.front.status(bench.now).live_requests, 0);
}

#[test]
fn a_node_that_offers_more_than_a_frame_carries_is_taken_at_what_a_frame_carries() {
    let mut bench = Bench::new(FrontOptions::default());
    let mut boastful = offer(100);
    boastful.limits.max_sequence_tokens = u32::MAX;
    bench.event(FrontEvent::ReplicaUp { replica: ReplicaId(0), offer: Box::new(boastful) });
    let prompt = vec![5; EngineLimits::MAX_SEQUENCE_TOKENS as usize];
    let refused = bench.submit(NewRequest { prompt, ..new_request(1) });
    let limit = u64::from(EngineLimits::MAX_SEQUENCE_TOKENS);
    assert_eq!(refused, Err(SubmitError::Refused(Refusal::TooLong { needed: limit + 1, limit })));
}

#[test]
fn an_ended_request_is_forgotten_and_late_frames_are_counted() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(2));
    bench.event(FrontEvent::ClientGone { request });
    assert_eq!(bench.reason(request), Some(ABORTED));
    bench.token(0, request, 1, 0, 41);
    bench.end(0, request, 1, FinishReason::Aborted, 1);
    bench.give_back(0, request, 1, None);
    bench.event(FrontEvent::Cancel { request, at_token: None });
    assert_eq!(bench.front.counters().late, 4);
    assert_eq!(bench.tokens(request), []);
}

#[test]
fn cancelling_at_a_token_cuts_the_usage_there_and_ends_as_stopped() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(10));
    for index in 0..5 {
        bench.token(0, request, 1, index, 50 + index);
    }
    bench.sent();
    bench.event(FrontEvent::Cancel { request, at_token: Some(3) });
    assert_eq!(bench.ends[&request], (STOP, 3, 2, 0));
    let abort = ToReplica::Abort { request, attempt: Attempt(1), at_token: Some(3) };
    assert_eq!(bench.sent(), [(0, abort)]);
}

#[test]
fn cancelling_beyond_the_last_token_counts_what_there_is() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(10));
    bench.token(0, request, 1, 0, 50);
    bench.event(FrontEvent::Cancel { request, at_token: Some(9) });
    assert_eq!(bench.ends[&request], (STOP, 1, 2, 0));
}

#[test]
fn a_waiting_request_is_cancelled_without_a_word_to_anybody() {
    let mut bench = Bench::with_replicas(1);
    bench.status(0, ReplicaState::Recovering);
    let request = bench.take(new_request(1));
    bench.event(FrontEvent::Cancel { request, at_token: None });
    assert_eq!(bench.reason(request), Some(ABORTED));
    assert_eq!(bench.sent(), []);
}

#[test]
fn a_running_request_ends_at_its_deadline_with_an_abort() {
    let mut bench = Bench::with_replicas(1);
    let deadline = bench.now + Duration(5_000);
    let request = bench.take(NewRequest { deadline: Some(deadline), ..new_request(10) });
    assert_eq!(bench.submissions()[0].1.deadline, Some(deadline));
    assert_eq!(bench.wake_at, Some(deadline));
    bench.token(0, request, 1, 0, 50);
    bench.pass(Duration(4_999));
    assert_eq!(bench.reason(request), None);
    bench.pass(Duration(1));
    assert_eq!(bench.ends[&request], (DEADLINE, 1, 2, 0));
    assert_eq!(bench.sent(), [(0, ToReplica::Abort { request, attempt: Attempt(1), at_token: None })]);
}

#[test]
fn a_waiting_request_ends_at_its_deadline() {
    let mut bench = Bench::with_replicas(1);
    bench.status(0, ReplicaState::Recovering);
    let deadline = bench.now + Duration(5_000);
    let request = bench.take(NewRequest { deadline: Some(deadline), ..new_request(10) });
    bench.pass(Duration(5_000));
    assert_eq!(bench.reason(request), Some(DEADLINE));
}

#[test]
fn requests_outside_the_models_bounds_are_refused_with_the_bound() {
    let mut bench = Bench::with_replicas(1);
    let refused = |bench: &mut Bench, new: NewRequest| bench.submit(new).expect_err("it is out of bounds");
    let too_long = refused(&mut bench, new_request(62));
    assert_eq!(too_long, SubmitError::Refused(Refusal::TooLong { needed: 65, limit: 64 }));
    let empty = refused(&mut bench, NewRequest { prompt: Vec::new(), ..new_request(1) });
    assert_eq!(empty, SubmitError::Refused(Refusal::EmptyPrompt));
    let unknown = refused(&mut bench, NewRequest { prompt: vec![1_000], ..new_request(1) });
    assert_eq!(unknown, SubmitError::Refused(Refusal::UnknownToken { given: 1_000, limit: 1_000 }));
    let no_output = refused(&mut bench, new_request(0));
    let field = LimitError::TooSmall { field: "max_tokens", given: 0, limit: 1 };
    assert_eq!(no_output, SubmitError::InvalidField(field));
    let model = refused(&mut bench, NewRequest { model: "huge".into(), ..new_request(1) });
    assert_eq!(model, SubmitError::UnknownModel { model: "huge".into() });
    assert_eq!(bench.front.counters().refused, 5);
    bench.take(new_request(61));
}

#[test]
fn without_any_replica_requests_are_unavailable_at_once() {
    let mut bench = Bench::with_replicas(0);
    let error = bench.submit(new_request(1)).expect_err("nobody is there");
    assert_eq!(error, SubmitError::Unavailable { model: "tiny".into() });
}

#[test]
fn a_full_queue_refuses_with_the_predicted_time_until_there_is_room() {
    let look_ahead = Duration::from_millis(20);
    let limits = FrontLimits { max_queued_requests: 2, look_ahead, ..FrontLimits::default() };
    let mut bench = Bench::new(options(limits));
    bench.up(0);
    // Four run; further ones wait, as each has 60 tokens of at least 2 ms to go.
    bench.take_many(4, &new_request(60));
    bench.take_many(2, &new_request(60));
    let Err(SubmitError::Refused(Refusal::QueueFull { queued, limit, unit, retry_after })) =
        bench.submit(new_request(60))
    else {
        panic!("the queue is full");
    };
    assert_eq!((queued, limit, unit), (2, 2, QueueUnit::Requests));
    // By the defaults, 120 tokens four at a time take 30 steps of about 2.2 ms; half of that for one of two requests.
    assert!((30_000..40_000).contains(&retry_after.0), "{retry_after:?}");
}

#[test]
fn a_queue_full_of_tokens_refuses_but_a_long_prompt_may_wait_alone() {
    let limits = FrontLimits { max_queued_tokens: 5, ..FrontLimits::default() };
    let mut bench = Bench::new(options(limits));
    bench.up(0);
    bench.status(0, ReplicaState::Recovering);
    bench.take(NewRequest { prompt: vec![1; 20], ..new_request(1) });
    let Err(SubmitError::Refused(Refusal::QueueFull { queued, limit, unit, .. })) = bench.submit(new_request(1)) else {
        panic!("the queue is full");
    };
    assert_eq!((queued, limit, unit), (20, 5, QueueUnit::Tokens));
}

#[test]
fn live_requests_are_bounded() {
    let limits = FrontLimits { max_live_requests: 3, ..FrontLimits::default() };
    let mut bench = Bench::new(options(limits));
    bench.up(0);
    let first = bench.take(new_request(1));
    bench.take_many(2, &new_request(1));
    let Err(SubmitError::Refused(Refusal::QueueFull { unit, .. })) = bench.submit(new_request(1)) else {
        panic!("three are alive");
    };
    assert_eq!(unit, QueueUnit::LiveRequests);
    bench.event(FrontEvent::ClientGone { request: first });
    bench.take(new_request(1));
}

#[test]
fn what_cannot_start_soon_waits_here_and_follows_when_a_sequence_ends() {
    let limits = FrontLimits { look_ahead: Duration::from_millis(20), ..FrontLimits::default() };
    let mut bench = Bench::new(options(limits));
    bench.up(0);
    let requests = bench.take_many(6, &new_request(60));
    assert_eq!(bench.submissions().len(), 4);
    bench.token(0, requests[1], 1, 0, 0);
    bench.end(0, requests[1], 1, FinishReason::Stop, 1);
    let sent: Vec<RequestId> = bench.submissions().iter().map(|(_, submission)| submission.key.request).collect();
    assert_eq!(sent, [requests[4]]);
}

#[test]
fn long_prompts_beyond_the_look_ahead_wait_here_though_sequences_are_free() {
    let limits = FrontLimits { look_ahead: Duration(4_000), ..FrontLimits::default() };
    let mut bench = Bench::new(options(limits));
    bench.up(0);
    // By the defaults, a prompt of 50 tokens takes 4.5 ms: the second would not start within 4 ms.
    let first = bench.take(NewRequest { prompt: vec![1; 50], ..new_request(5) });
    bench.take(NewRequest { prompt: vec![1; 50], ..new_request(5) });
    assert_eq!(bench.submissions().len(), 1);
    bench.token(0, first, 1, 0, 8);
    assert_eq!(bench.submissions().len(), 1);
}

#[test]
fn requests_spread_over_replicas_by_remaining_work() {
    let mut bench = Bench::with_replicas(2);
    bench.take_many(4, &new_request(10));
    let replicas: Vec<u32> = bench.submissions().iter().map(|(replica, _)| *replica).collect();
    assert_eq!(replicas, [0, 1, 0, 1]);
}

#[test]
fn urgent_classes_leave_the_queue_first_and_waiting_promotes() {
    let mut bench = Bench::with_replicas(1);
    bench.status(0, ReplicaState::Recovering);
    let with = |class| NewRequest { class, ..new_request(5) };
    let old_batch = bench.take(with(Class::Batch));
    // Two promotions of 5 s: the batch request ranks with the interactive ones and is older.
    bench.pass(Duration::from_millis(10_000));
    let standard = bench.take(with(Class::Standard));
    let batch = bench.take(with(Class::Batch));
    let interactive = bench.take(with(Class::Interactive));
    bench.status(0, ReplicaState::Ready);
    let order: Vec<RequestId> = bench.submissions().iter().map(|(_, submission)| submission.key.request).collect();
    assert_eq!(order, [old_batch, interactive, standard, batch]);
}

#[test]
fn a_replica_is_told_the_class_that_waiting_has_given_and_the_request_keeps_its_own() {
    let mut bench = Bench::with_replicas(1);
    bench.status(0, ReplicaState::Recovering);
    let background = bench.take(NewRequest { class: Class::Background, ..new_request(5) });
    bench.pass(Duration::from_millis(10_000));
    let interactive = bench.take(NewRequest { class: Class::Interactive, ..new_request(5) });
    bench.status(0, ReplicaState::Ready);
    let told = |bench: &mut Bench| -> Vec<(RequestId, Class)> {
        bench.submissions().iter().map(|(_, sent)| (sent.key.request, sent.class)).collect()
    };
    assert_eq!(told(&mut bench), [(interactive, Class::Interactive), (background, Class::Standard)]);
    // It counts from its own class again: one more promotion, not three from what it was sent with.
    bench.status(0, ReplicaState::Recovering);
    bench.give_back(0, background, 1, None);
    bench.pass(Duration::from_millis(4_999));
    bench.up(1);
    assert_eq!(told(&mut bench), [(background, Class::Standard)]);
    bench.status(1, ReplicaState::Recovering);
    bench.give_back(1, background, 2, None);
    bench.pass(Duration::from_millis(1));
    bench.status(1, ReplicaState::Ready);
    assert_eq!(told(&mut bench), [(background, Class::Interactive)]);
}

#[test]
fn one_frame_gives_one_batch_of_deliveries_for_all_its_requests() {
    let mut bench = Bench::with_replicas(1);
    let requests = bench.take_many(3, &new_request(5));
    let mut outputs = common::row(requests[0], 1, 0, 10);
    for (request, index, token) in [(requests[1], 0, 20), (requests[1], 1, 21), (requests[2], 0, 30)] {
        let more = common::row(request, 1, index, token);
        outputs.requests.extend(more.requests);
        outputs.attempts.extend(more.attempts);
        outputs.indexes.extend(more.indexes);
        outputs.tokens.extend(more.tokens);
    }
    let mut out = Vec::new();
    let event = FrontEvent::Frame {
        replica: ReplicaId(0),
        node: offer(100).node,
        epoch: offer(100).epoch,
        frame: ReplicaFrame::Outputs(outputs),
    };
    bench.front.on_event(bench.now, event, &mut out);
    let [llmscale_front::FrontAction::Deliver(batch)] = out.as_slice() else { panic!("{out:?}") };
    let lengths: Vec<usize> = batch.iter().map(|delivery| delivery.tokens.len()).collect();
    assert_eq!(lengths, [1, 2, 1]);
}

#[test]
fn a_hard_refusal_by_a_replica_ends_the_request_with_that_reason() {
    let mut bench = Bench::with_replicas(1);
    let request = bench.take(new_request(5));
    let refusal = Refusal::TooLong { needed: 8, limit: 7 };
    bench.give_back(0, request, 1, Some(refusal));
    assert_eq!(bench.reason(request), Some(EndReason::Refused(refusal)));
    assert_eq!(EndReason::Refused(refusal).label(), "request_too_long");
    // By these words of OpenAI's clients know it.
    assert!(refusal.to_string().starts_with("This model's maximum context length is 7 tokens ("));
}

#[test]
fn the_reasons_of_replicas_reach_the_client() {
    for reason in [FinishReason::Poisoned, FinishReason::NotANumber, FinishReason::NothingToSample] {
        let mut bench = Bench::with_replicas(1);
        let request = bench.take(new_request(5));
        bench.end(0, request, 1, reason, 0);
        assert_eq!(bench.reason(request), Some(EndReason::Finished(reason)));
    }
}

#[test]
fn the_wake_up_is_announced_when_it_changes_and_only_then() {
    let mut bench = Bench::with_replicas(1);
    bench.take(NewRequest { deadline: Some(Time(9_000_000)), ..new_request(5) });
    assert_eq!(bench.wake_at.take(), Some(Time(9_000_000)));
    bench.take(NewRequest { deadline: Some(Time(10_000_000)), ..new_request(5) });
    assert_eq!(bench.wake_at.take(), None);
    bench.take(NewRequest { deadline: Some(Time(8_000_000)), ..new_request(5) });
    assert_eq!(bench.wake_at.take(), Some(Time(8_000_000)));
}

#[test]
fn expectations_follow_how_long_answers_really_are() {
    let mut bench = Bench::with_replicas(1);
    for _ in 0..100 {
        let request = bench.take(new_request(60));
        bench.token(0, request, 1, 0, 0);
        bench.end(0, request, 1, FinishReason::Stop, 1);
    }
    bench.take(new_request(60));
    let load = bench.front.status(bench.now).replicas[0].load;
    assert!(load.output_tokens < 4, "{load:?}");
}

#[test]
fn a_pause_between_requests_teaches_nothing_about_the_pace() {
    let mut bench = Bench::with_replicas(1);
    for step in 0..20 {
        let request = bench.take(new_request(1));
        let mut outputs = common::row(request, 1, 0, 7);
        outputs.step = StepId(step);
        bench.frame(0, ReplicaFrame::Outputs(outputs));
        bench.end(0, request, 1, FinishReason::Length, 1);
        bench.now = bench.now + Duration::from_millis(60_000);
    }
    bench.take(new_request(10));
    // Still by the defaults: ten tokens of about 2 ms and a short prompt.
    let remaining = bench.front.status(bench.now).replicas[0].remaining_ns;
    assert!((2_000_000..30_000_000).contains(&remaining), "{remaining}");
}

#[test]
fn more_replicas_shorten_the_time_until_there_is_room() {
    let retry_after = |replicas| {
        let limits =
            FrontLimits { max_queued_requests: 2, look_ahead: Duration::from_millis(20), ..FrontLimits::default() };
        let mut bench = Bench::new(options(limits));
        (0..replicas).for_each(|replica| bench.up(replica));
        bench.take_many(4 * replicas as usize + 2, &new_request(60));
        match bench.submit(new_request(60)) {
            Err(SubmitError::Refused(Refusal::QueueFull { retry_after, .. })) => retry_after.0,
            other => panic!("{other:?}"),
        }
    };
    assert!(retry_after(4) * 3 < retry_after(1));
}

#[test]
fn the_pace_of_a_replica_is_learned_from_its_frames() {
    let mut bench = Bench::with_replicas(2);
    let requests = bench.take_many(2, &new_request(60));
    // Steps take 50 ms on the first replica and 1 ms on the second.
    let mut next_step = [0; 2];
    for millisecond in 0..2_500_u32 {
        bench.now = bench.now + Duration::from_millis(1);
        for (replica, period) in [(0, 50), (1, 1)] {
            let step = next_step[replica as usize];
            if millisecond % period == 0 && step < 50 {
                bench.token(replica, requests[replica as usize], 1, step, 7);
                next_step[replica as usize] += 1;
            }
        }
    }
    // Both have ten tokens to go.
    let remaining: Vec<u64> = bench.front.status(bench.now).replicas.iter().map(|status| status.remaining_ns).collect();
    assert!((450_000_000..550_000_000).contains(&remaining[0]), "{remaining:?}");
    assert!((9_000_000..11_000_000).contains(&remaining[1]), "{remaining:?}");
}
