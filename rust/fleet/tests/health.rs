//! Breakers: who is left alone, for how long, and how it comes back.

mod common;

use common::{fleet, need, offer, set};
use llmscale_cost::StepShape;
use llmscale_fleet::{Fleet, HealthOptions, LeastWork, Policy, PoolId, Tally, Trust};
use llmscale_types::{Duration, ReplicaId, RequestId, StepId, Time};

const SECOND: u64 = 1_000_000;
const PREDICTED: Duration = Duration(100_000);
const SOON: Duration = Duration(200_000);
const LATE: Duration = Duration(5_000_000);

fn fail(fleet: &mut Fleet, now: u64, replica: u32, times: u32) {
    (0..times).for_each(|_| fleet.failed(Time(now), ReplicaId(replica), None));
}

fn answer(fleet: &mut Fleet, now: u64, replica: u32, taken: Duration) {
    fleet.answered(Time(now), ReplicaId(replica), RequestId(9), PREDICTED, taken);
}

fn trust(fleet: &Fleet, replica: u32) -> Trust {
    fleet.get(ReplicaId(replica)).expect("it joined").health.trust()
}

fn ejected_until(fleet: &Fleet, replica: u32) -> Option<u64> {
    match trust(fleet, replica) {
        Trust::Ejected { until } => Some(until.0),
        Trust::Trusted | Trust::Probing { .. } => None,
    }
}

fn takes_work(fleet: &Fleet, now: u64, replica: u32) -> bool {
    fleet.get(ReplicaId(replica)).expect("it joined").takes_work(Time(now))
}

/// Sends a request there and lets it be answered, or fail.
fn probe(fleet: &mut Fleet, now: u64, replica: u32, request: u64, good: bool) {
    set(fleet, replica, |member| member.health.sent(RequestId(request)));
    if good {
        fleet.answered(Time(now), ReplicaId(replica), RequestId(request), PREDICTED, SOON);
    } else {
        fleet.failed(Time(now), ReplicaId(replica), Some(RequestId(request)));
    }
}

#[test]
fn five_failures_that_are_half_of_all_outcomes_eject_and_four_or_fewer_than_half_do_not() {
    let (mut fleet, _) = fleet(3);
    fail(&mut fleet, SECOND, 0, 4);
    assert_eq!(trust(&fleet, 0), Trust::Trusted);
    fail(&mut fleet, SECOND, 0, 1);
    assert_eq!(ejected_until(&fleet, 0), Some(6 * SECOND));
    (0..6).for_each(|_| answer(&mut fleet, SECOND, 1, SOON));
    fail(&mut fleet, SECOND, 1, 5);
    assert_eq!(trust(&fleet, 1), Trust::Trusted);
    assert_eq!(fleet.health_counters().ejections, 1);
}

#[test]
fn failures_of_long_ago_do_not_count() {
    let (mut fleet, _) = fleet(3);
    fail(&mut fleet, SECOND, 0, 4);
    fail(&mut fleet, 11 * SECOND, 0, 4);
    assert_eq!(trust(&fleet, 0), Trust::Trusted);
    let tally = fleet.get(ReplicaId(0)).expect("it joined").health.tally(Time(11 * SECOND), fleet.health_options());
    assert_eq!(tally, Tally { failures: 4, ..Tally::default() });
}

#[test]
fn a_policy_passes_over_an_ejected_replica_until_its_span_is_over_and_then_sends_one_request() {
    let (mut fleet, pool) = fleet(2);
    fail(&mut fleet, SECOND, 0, 5);
    let choose = |fleet: &Fleet, now| LeastWork.choose(fleet, &llmscale_fleet::Need { now: Time(now), ..need(pool) });
    assert_eq!(choose(&fleet, 6 * SECOND - 1), Some(ReplicaId(1)));
    assert_eq!(choose(&fleet, 6 * SECOND), Some(ReplicaId(0)));
    assert_eq!(fleet.next_trial(Time(2 * SECOND), pool), Some(Time(6 * SECOND)));
    set(&mut fleet, 0, |member| member.health.sent(RequestId(3)));
    assert_eq!(trust(&fleet, 0), Trust::Probing { request: RequestId(3) });
    assert_eq!(choose(&fleet, 6 * SECOND), Some(ReplicaId(1)), "one probe at a time");
    assert_eq!(fleet.next_trial(Time(6 * SECOND), pool), None);
}

#[test]
fn a_probe_that_is_answered_in_time_lets_it_in_and_one_that_fails_or_is_late_keeps_it_out_for_longer() {
    let (mut fleet, _) = fleet(3);
    fail(&mut fleet, 0, 0, 5);
    assert_eq!(ejected_until(&fleet, 0), Some(5 * SECOND));
    probe(&mut fleet, 5 * SECOND, 0, 1, false);
    assert_eq!(ejected_until(&fleet, 0), Some(15 * SECOND));
    set(&mut fleet, 0, |member| member.health.sent(RequestId(2)));
    fleet.answered(Time(20 * SECOND), ReplicaId(0), RequestId(2), PREDICTED, LATE);
    assert_eq!(ejected_until(&fleet, 0), Some(40 * SECOND));
    probe(&mut fleet, 40 * SECOND, 0, 3, true);
    assert_eq!(trust(&fleet, 0), Trust::Trusted);
    assert_eq!((fleet.health_counters().failed_probes, fleet.health_counters().ejections), (2, 3));
}

#[test]
fn what_others_of_its_requests_do_does_not_decide_a_probe() {
    let (mut fleet, _) = fleet(3);
    fail(&mut fleet, 0, 0, 5);
    set(&mut fleet, 0, |member| member.health.sent(RequestId(1)));
    answer(&mut fleet, 5 * SECOND, 0, SOON);
    fleet.failed(Time(5 * SECOND), ReplicaId(0), Some(RequestId(7)));
    assert_eq!(trust(&fleet, 0), Trust::Probing { request: RequestId(1) });
    set(&mut fleet, 0, |member| member.health.let_go(Time(6 * SECOND), RequestId(1)));
    assert!(takes_work(&fleet, 6 * SECOND, 0), "the next request is the probe");
}

#[test]
fn spans_end_at_a_minute_and_calm_takes_doublings_back() {
    let (mut fleet, _) = fleet(3);
    fail(&mut fleet, 0, 0, 5);
    let mut now = 5 * SECOND;
    for expected in [10, 20, 40, 60, 60] {
        probe(&mut fleet, now, 0, 1, false);
        assert_eq!(ejected_until(&fleet, 0), Some(now + expected * SECOND));
        now += expected * SECOND;
    }
    probe(&mut fleet, now, 0, 2, true);
    now += 4 * 60 * SECOND;
    fail(&mut fleet, now, 0, 5);
    assert_eq!(ejected_until(&fleet, 0), Some(now + 20 * SECOND), "four of six strikes are forgiven");
}

#[test]
fn the_only_replica_is_never_ejected_and_of_many_at_most_half() {
    let (mut alone, _) = fleet(1);
    fail(&mut alone, 0, 0, 100);
    assert_eq!(trust(&alone, 0), Trust::Trusted);
    assert!(alone.health_counters().spared > 0);
    let (mut five, _) = fleet(5);
    (0..5).for_each(|replica| fail(&mut five, 0, replica, 5));
    let out = (0..5).filter(|&replica| trust(&five, replica) != Trust::Trusted).count();
    assert_eq!(out, 2);
    five.check_health();
}

#[test]
fn the_worst_are_ejected_first_and_make_room_for_worse_ones() {
    let (mut fleet, _) = fleet(4);
    for replica in 0..2 {
        (0..4 + replica).for_each(|_| answer(&mut fleet, 0, replica, SOON));
        fail(&mut fleet, 0, replica, 5);
    }
    assert_eq!((ejected_until(&fleet, 0), ejected_until(&fleet, 1)), (Some(5 * SECOND), Some(5 * SECOND)));
    fail(&mut fleet, 0, 2, 5);
    assert_eq!(trust(&fleet, 1), Trust::Trusted, "it answered most of all");
    assert_eq!(ejected_until(&fleet, 2), Some(5 * SECOND));
}

#[test]
fn an_ejected_replica_gets_work_again_when_too_few_others_are_left() {
    let (mut fleet, _) = fleet(2);
    fail(&mut fleet, 0, 0, 5);
    assert!(!takes_work(&fleet, 1, 0));
    fleet.leave(ReplicaId(1));
    assert!(takes_work(&fleet, 1, 0));
    fleet.join(ReplicaId(1), offer("a")).expect("there is room");
    fleet.check_health();
}

#[test]
fn a_replica_that_comes_back_is_judged_by_what_it_did_before() {
    let (mut fleet, _) = fleet(4);
    fail(&mut fleet, 0, 0, 5);
    fleet.leave(ReplicaId(0));
    fleet.join(ReplicaId(0), offer("a")).expect("there is room");
    assert!(!takes_work(&fleet, SECOND, 0));
}

#[test]
fn late_first_tokens_eject_where_the_others_are_in_time_and_nobody_where_all_are_late() {
    let (mut one, _) = fleet(3);
    answer(&mut one, 0, 1, SOON);
    (0..5).for_each(|_| answer(&mut one, 0, 0, LATE));
    assert_eq!(ejected_until(&one, 0), Some(5 * SECOND));
    let (mut all, _) = fleet(3);
    (0..15).for_each(|number| answer(&mut all, 0, number % 3, LATE));
    assert!((0..3).all(|replica| trust(&all, replica) == Trust::Trusted));
}

#[test]
fn a_first_token_is_late_beyond_a_multiple_of_its_prediction_and_a_grace() {
    let options = HealthOptions::default();
    let late = |predicted, taken| options.is_late(Duration(predicted), Duration(taken));
    assert!(!late(1_000, 501_000) && late(1_000, 501_001), "a short prediction has a grace");
    assert!(!late(SECOND, 4 * SECOND) && late(SECOND, 4 * SECOND + 1));
    assert!(!late(u64::MAX, u64::MAX));
}

#[test]
fn a_replica_whose_steps_take_many_times_the_median_is_ejected_and_two_alone_have_no_median() {
    let learn = |fleet: &mut Fleet, replica, step_us: u64| {
        set(fleet, replica, |member| {
            for step in 0..100 {
                let shape = StepShape { decodes: 4, context_tokens: 400, ..StepShape::default() };
                member.observe(StepId(step), Time(step * step_us), shape);
            }
        });
    };
    for (replicas, expected) in [(3, true), (2, false)] {
        let (mut fleet, _) = fleet(replicas);
        (0..replicas).for_each(|replica| learn(&mut fleet, replica, if replica == 1 { 90_000 } else { 10_000 }));
        fleet.review(Time(SECOND));
        assert_eq!(ejected_until(&fleet, 1).is_some(), expected, "{replicas} replicas");
        assert_eq!(trust(&fleet, 0), Trust::Trusted);
    }
}

#[test]
fn options_that_do_not_fit_together_are_refused_with_the_limit() {
    let refused = |options: HealthOptions| options.check().expect_err("out of bounds").to_string();
    assert!(HealthOptions::default().check().is_ok());
    let shorter = HealthOptions { max_ejection: Duration(1), ..HealthOptions::default() };
    assert!(refused(shorter).starts_with("max_ejection is 1, the least is 5000000"));
    assert!(refused(HealthOptions { late_factor: 1, ..HealthOptions::default() }).starts_with("late_factor is 1"));
}

#[test]
fn pools_do_not_judge_each_other() {
    let (mut fleet, first) = fleet(2);
    let second = fleet.join(ReplicaId(7), offer("b")).expect("there is room");
    assert_ne!(first, second);
    fail(&mut fleet, 0, 7, 20);
    assert_eq!(trust(&fleet, 7), Trust::Trusted, "it is the only one of its pool");
    assert_eq!(fleet.next_trial(Time(0), PoolId(1)), None);
}
