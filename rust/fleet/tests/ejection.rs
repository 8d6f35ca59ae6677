//! Who of a fleet is left alone, against a model that keeps every event and counts them anew each time.

mod common;

use common::{fleet, need, offer, set};
use llmscale_fleet::{Fleet, LeastWork, Policy, ReplicaState, Trust};
use llmscale_types::{Duration, ReplicaId, RequestId, Time};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SECOND: u64 = 1_000_000;
const PREDICTED: Duration = Duration(100_000);
const SOON: Duration = Duration(200_000);
const LATE: Duration = Duration(5_000_000);
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
        self.last_end = now + ((5 * SECOND) << (self.strikes - 1).min(20)).min(60 * SECOND);
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
                prop_assert_eq!(fleet.get(ReplicaId(id)).map(|member| member.health.trust()), Some(patient.trust()), "replica {} after {:?}", id, happens);
            }
            let someone = LeastWork.choose(&fleet, &llmscale_fleet::Need { now: Time(model.now), ..need(pool) });
            let ready = model.patients.values().any(|patient| patient.ready);
            prop_assert_eq!(someone.is_some(), ready, "whoever is ready alone gets work");
        }
    }
}
