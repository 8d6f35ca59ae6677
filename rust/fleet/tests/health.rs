//! Breakers: who is left alone, for how long, and how it comes back; and a whole fleet against a model that keeps every event.

mod common;

use common::{fleet, need, offer, set};
use llmscale_cost::StepShape;
use llmscale_fleet::{Fleet, HealthOptions, LeastWork, Policy, PoolId, ReplicaState, Tally, Trust};
use llmscale_types::{Duration, ReplicaId, RequestId, StepId, Time};
use proptest::prelude::*;
use std::collections::BTreeMap;

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
                let shape = StepShape { decodes: 4, prefill_tokens: 0, context_tokens: 400 };
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

const REPLICAS: u32 = 5;

#[derive(Clone, Debug)]
enum Happens {
    Answer(u32, bool),
    Fails(u32),
    Sent(u32),
    ProbeAnswers(u32, bool),
    ProbeFails(u32),
    ProbeLeaves(u32),
    Down(u32),
    Up(u32),
    Recovers(u32, bool),
    Wait(u64),
}

fn happens() -> impl Strategy<Value = Happens> {
    let replica = || 0..REPLICAS;
    prop_oneof![
        4 => (replica(), any::<bool>()).prop_map(|(replica, late)| Happens::Answer(replica, late)),
        12 => replica().prop_map(Happens::Fails),
        3 => replica().prop_map(Happens::Sent),
        1 => (replica(), any::<bool>()).prop_map(|(replica, late)| Happens::ProbeAnswers(replica, late)),
        1 => replica().prop_map(Happens::ProbeFails),
        1 => replica().prop_map(Happens::ProbeLeaves),
        1 => replica().prop_map(Happens::Down),
        2 => replica().prop_map(Happens::Up),
        1 => (replica(), any::<bool>()).prop_map(|(replica, ready)| Happens::Recovers(replica, ready)),
        3 => (1..4 * SECOND).prop_map(Happens::Wait),
    ]
}

/// One replica as the rules of ADR 0011 have it: every outcome since it was last let in, with its time.
#[derive(Clone, Default)]
struct Patient {
    ready: bool,
    alive: bool,
    outcomes: Vec<(u64, u8)>,
    out: Option<(u64, u64)>,
    probe: Option<u64>,
    strikes: u32,
    last_end: u64,
}

const ANSWER: u8 = 0;
const LATE_ANSWER: u8 = 1;
const FAILURE: u8 = 2;

impl Patient {
    fn count(&self, now: u64, kinds: &[u8]) -> u64 {
        let half = |at: u64| at / (5 * SECOND);
        let recent = self.outcomes.iter().filter(|(at, kind)| half(*at) + 1 >= half(now) && kinds.contains(kind));
        recent.count() as u64
    }

    fn eject(&mut self, now: u64, badness: u64) {
        let forgiven = now.saturating_sub(self.last_end) / (60 * SECOND);
        self.strikes = self.strikes.saturating_sub(forgiven as u32) + 1;
        self.last_end = now + (5 * SECOND << (self.strikes - 1).min(20)).min(60 * SECOND);
        self.out = Some((badness, self.last_end));
        self.probe = None;
    }

    fn pardon(&mut self) {
        (self.out, self.probe) = (None, None);
        self.outcomes.clear();
    }

    fn trust(&self) -> Trust {
        match (self.out, self.probe) {
            (None, _) => Trust::Trusted,
            (Some(_), Some(request)) => Trust::Probing { request: RequestId(request) },
            (Some((_, until)), None) => Trust::Ejected { until: Time(until) },
        }
    }
}

struct Model {
    patients: BTreeMap<u32, Patient>,
    now: u64,
    requests: u64,
}

impl Model {
    fn out(&self) -> Vec<(u64, u32)> {
        let out = self.patients.iter().filter(|(_, patient)| patient.ready);
        let mut out: Vec<(u64, u32)> = out.filter_map(|(&id, patient)| Some((patient.out?.0, id))).collect();
        out.sort_unstable();
        out
    }

    fn keep_half(&mut self) {
        let ready = self.patients.values().filter(|patient| patient.ready).count();
        let out = self.out();
        for &(_, id) in out.iter().take(out.len().saturating_sub(ready / 2)) {
            self.patients.get_mut(&id).expect("listed").pardon();
        }
    }

    fn judge(&mut self, id: u32) {
        let patient = &self.patients[&id];
        if !patient.ready || patient.out.is_some() {
            return;
        }
        let count = |kinds: &[u8]| patient.count(self.now, kinds);
        let (answers, late, failures) = (count(&[ANSWER, LATE_ANSWER]), count(&[LATE_ANSWER]), count(&[FAILURE]));
        let others = || self.patients.iter().filter(|(other, _)| **other != id).map(|(_, patient)| patient);
        let others_answers: u64 = others().map(|other| other.count(self.now, &[ANSWER, LATE_ANSWER])).sum();
        let others_late: u64 = others().map(|other| other.count(self.now, &[LATE_ANSWER])).sum();
        let badness = if failures >= 5 && failures >= answers {
            2_000 + failures * 1_000 / (failures + answers)
        } else if late >= 5 && late * 2 >= answers && others_answers > 0 && others_late * 4 < others_answers {
            999 + late * 1_000 / answers
        } else {
            return;
        };
        let ready = self.patients.values().filter(|patient| patient.ready).count();
        let out = self.out();
        if (out.len() + 1) * 2 > ready {
            match out.first() {
                Some(&(least, lucky)) if least < badness => self.patients.get_mut(&lucky).expect("listed").pardon(),
                _ => return,
            }
        }
        let now = self.now;
        self.patients.get_mut(&id).expect("known").eject(now, badness);
    }

    fn outcome(&mut self, id: u32, request: Option<u64>, kind: u8) {
        let now = self.now;
        let patient = self.patients.get_mut(&id).expect("known");
        patient.outcomes.push((now, kind));
        if request.is_some() && patient.probe == request {
            match kind {
                ANSWER => patient.pardon(),
                _ => patient.eject(now, patient.out.expect("it has a probe").0),
            }
        }
        if kind != ANSWER {
            self.judge(id);
        }
    }

    fn apply(&mut self, fleet: &mut Fleet, happens: &Happens) {
        let now = Time(self.now);
        let taken = |late| if late { LATE } else { SOON };
        match *happens {
            Happens::Answer(id, late) => {
                fleet.answered(now, ReplicaId(id), RequestId(0), PREDICTED, taken(late));
                self.outcome(id, None, if late { LATE_ANSWER } else { ANSWER });
            }
            Happens::Fails(id) => {
                fleet.failed(now, ReplicaId(id), None);
                self.outcome(id, None, FAILURE);
            }
            Happens::Sent(id) => {
                self.requests += 1;
                if fleet.get(ReplicaId(id)).is_some_and(|member| member.takes_work(now)) {
                    set(fleet, id, |member| member.health.sent(RequestId(self.requests)));
                    let patient = self.patients.get_mut(&id).expect("known");
                    assert!(patient.ready && patient.probe.is_none());
                    patient.probe = patient.out.map(|(_, until)| {
                        assert!(until <= self.now, "it is left alone");
                        self.requests
                    });
                }
            }
            Happens::ProbeAnswers(id, late) => {
                if let Some(request) = self.patients[&id].probe {
                    fleet.answered(now, ReplicaId(id), RequestId(request), PREDICTED, taken(late));
                    self.outcome(id, Some(request), if late { LATE_ANSWER } else { ANSWER });
                }
            }
            Happens::ProbeFails(id) => {
                if let Some(request) = self.patients[&id].probe {
                    fleet.failed(now, ReplicaId(id), Some(RequestId(request)));
                    self.outcome(id, Some(request), FAILURE);
                }
            }
            Happens::ProbeLeaves(id) => {
                if let Some(request) = self.patients[&id].probe {
                    set(fleet, id, |member| member.health.let_go(now, RequestId(request)));
                    let patient = self.patients.get_mut(&id).expect("known");
                    patient.probe = None;
                    patient.out = patient.out.map(|(badness, _)| (badness, self.now));
                }
            }
            Happens::Down(id) => {
                fleet.leave(ReplicaId(id));
                self.set_state(id, false, false);
            }
            Happens::Up(id) => {
                if !self.patients[&id].alive {
                    fleet.join(ReplicaId(id), offer("a")).expect("there is room");
                    self.set_state(id, true, true);
                }
            }
            Happens::Recovers(id, ready) => {
                if self.patients[&id].alive {
                    let state = if ready { ReplicaState::Ready } else { ReplicaState::Recovering };
                    set(fleet, id, |member| member.state = Some(state));
                    self.set_state(id, true, ready);
                }
            }
            Happens::Wait(time) => self.now += time,
        }
    }

    fn set_state(&mut self, id: u32, alive: bool, ready: bool) {
        let patient = self.patients.get_mut(&id).expect("known");
        (patient.alive, patient.ready) = (alive, ready);
        self.keep_half();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_fleet_ejects_exactly_whom_the_model_ejects(all in prop::collection::vec(happens(), 1..200)) {
        let (mut fleet, pool) = fleet(REPLICAS);
        let patient = Patient { ready: true, alive: true, ..Patient::default() };
        let patients = (0..REPLICAS).map(|id| (id, patient.clone())).collect();
        let mut model = Model { patients, now: 1, requests: 0 };
        for happens in &all {
            model.apply(&mut fleet, happens);
            fleet.check_health();
            for (&id, patient) in &model.patients {
                prop_assert_eq!(trust(&fleet, id), patient.trust(), "replica {} after {:?}", id, happens);
            }
            let someone = LeastWork.choose(&fleet, &llmscale_fleet::Need { now: Time(model.now), ..need(pool) });
            let ready = model.patients.values().any(|patient| patient.ready);
            prop_assert_eq!(someone.is_some(), ready, "whoever is ready alone gets work");
        }
    }
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
