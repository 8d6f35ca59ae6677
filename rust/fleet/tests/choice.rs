//! Who gets the next request.

mod common;

use common::{fleet, need, offer, set};
use llmscale_cost::StepShape;
use llmscale_fleet::{Fleet, FleetFull, LeastWork, Load, Need, Offer, Policy, ReplicaState, Report};
use llmscale_types::{Duration, Epoch, NodeId, ReplicaId, StepId, Time};
use proptest::prelude::*;

fn choose(fleet: &Fleet, need: &Need) -> Option<u32> {
    LeastWork.choose(fleet, need).map(|id| id.0)
}

#[test]
fn the_replica_with_the_least_remaining_work_is_chosen_and_ties_go_to_the_lowest() {
    let (mut fleet, pool) = fleet(3);
    assert_eq!(choose(&fleet, &need(pool)), Some(0));
    set(&mut fleet, 0, |member| member.load = Load { sequences: 1, output_tokens: 100, ..Load::default() });
    assert_eq!(choose(&fleet, &need(pool)), Some(1));
    set(&mut fleet, 1, |member| member.load = Load { sequences: 1, output_tokens: 50, ..Load::default() });
    set(&mut fleet, 2, |member| member.load = Load { sequences: 1, output_tokens: 51, ..Load::default() });
    assert_eq!(choose(&fleet, &need(pool)), Some(1));
}

#[test]
fn a_slow_replica_is_passed_over_though_it_has_less_to_do() {
    let (mut fleet, pool) = fleet(2);
    for step in 0..60 {
        set(&mut fleet, 0, |member| {
            let shape = StepShape { decodes: 1, context_tokens: 500, ..StepShape::default() };
            member.observe(StepId(step), Time(step * 100_000), shape);
        });
    }
    set(&mut fleet, 0, |member| member.load = Load { sequences: 1, output_tokens: 10, ..Load::default() });
    set(&mut fleet, 1, |member| member.load = Load { sequences: 1, output_tokens: 20, ..Load::default() });
    assert_eq!(choose(&fleet, &need(pool)), Some(1));
}

#[test]
fn a_stream_that_goes_on_takes_a_busier_replica_that_computes_alike_if_that_can_begin_it() {
    let (mut fleet, pool) = fleet(1);
    fleet.join(ReplicaId(1), Offer { numerics: "other".into(), ..offer("a") }).expect("there is room");
    set(&mut fleet, 1, |member| member.load = Load { sequences: 2, output_tokens: 100, ..Load::default() });
    let begun = |numerics: &str| Need { numerics: Some(numerics.into()), ..need(pool) };
    assert_eq!(choose(&fleet, &need(pool)), Some(0), "a new request goes where it is done first");
    assert_eq!(choose(&fleet, &begun("other")), Some(1));
    assert_eq!(choose(&fleet, &begun("test")), Some(0));
    assert_eq!(choose(&fleet, &begun("gone")), Some(0), "none computes alike");
    set(&mut fleet, 1, |member| member.state = Some(ReplicaState::Recovering));
    assert_eq!(choose(&fleet, &begun("other")), Some(0), "the one that does cannot begin it");
}

#[test]
fn only_ready_replicas_of_the_pool_are_chosen() {
    let (mut fleet, pool) = fleet(1);
    let other = fleet.join(ReplicaId(7), offer("b")).expect("there is room");
    assert_eq!(choose(&fleet, &need(other)), Some(7));
    let idle = [ReplicaState::Starting, ReplicaState::Recovering, ReplicaState::Draining].map(Some);
    for state in idle.into_iter().chain([None]) {
        set(&mut fleet, 0, |member| member.state = state);
        assert_eq!(choose(&fleet, &need(pool)), None);
    }
    set(&mut fleet, 0, |member| member.state = Some(ReplicaState::Ready));
    assert_eq!(choose(&fleet, &need(pool)), Some(0));
}

#[test]
fn a_sequence_longer_than_a_replica_allows_goes_elsewhere() {
    let (mut fleet, pool) = fleet(2);
    set(&mut fleet, 0, |member| member.limits.max_sequence_tokens = 99);
    assert_eq!(choose(&fleet, &need(pool)), Some(1));
    set(&mut fleet, 0, |member| member.limits.max_sequence_tokens = 100);
    assert_eq!(choose(&fleet, &need(pool)), Some(0));
}

#[test]
fn a_replica_gets_no_more_sequences_than_run_or_soon_will() {
    let (mut fleet, pool) = fleet(1);
    // Each of the eight has 10,000 tokens to go, so none ends within the look-ahead.
    let long = Load { sequences: 8, output_tokens: 80_000, ..Load::default() };
    set(&mut fleet, 0, |member| member.load = Load { sequences: 7, ..long });
    assert_eq!(choose(&fleet, &need(pool)), Some(0));
    set(&mut fleet, 0, |member| member.load = long);
    assert_eq!(choose(&fleet, &need(pool)), None);
    // With ten tokens to go each, all end soon: as many as may wait there are sent ahead.
    set(&mut fleet, 0, |member| member.load = Load { sequences: 11, output_tokens: 80, ..Load::default() });
    assert_eq!(choose(&fleet, &need(pool)), Some(0));
    set(&mut fleet, 0, |member| member.load = Load { sequences: 12, output_tokens: 80, ..Load::default() });
    assert_eq!(choose(&fleet, &need(pool)), None);
}

#[test]
fn a_replica_with_a_backlog_beyond_the_look_ahead_gets_nothing() {
    let (mut fleet, pool) = fleet(1);
    // 50 us per token: 4,000 tokens are 202 ms, 5,000 are 252 ms.
    let waiting = |tokens| Load { sequences: 1, unstarted_sequences: 1, unstarted_tokens: tokens, output_tokens: 1 };
    set(&mut fleet, 0, |member| member.load = waiting(4_000));
    assert_eq!(choose(&fleet, &need(pool)), Some(0));
    set(&mut fleet, 0, |member| member.load = waiting(5_000));
    assert_eq!(choose(&fleet, &need(pool)), None);
}

#[test]
fn a_reported_backlog_counts_and_wears_off_with_time() {
    let (mut fleet, pool) = fleet(1);
    let report = Report {
        state: ReplicaState::Ready,
        running: 0,
        waiting: 3,
        queued_tokens: 9,
        predicted_backlog_ns: 300_000_000,
        free_blocks: 1,
        steps: 1,
        preemptions: 0,
        prefix_queries: 0,
        prefix_hits: 0,
        offloaded_blocks: 0,
        restored_blocks: 0,
        bad_host_blocks: 0,
        worker_restarts: 0,
        worker_pid: None,
        step_ns: 0,
        stage_wait_ns: 0,
        kv_changes: 0,
        disk_written_blocks: 0,
        disk_read_blocks: 0,
        bad_disk_blocks: 0,
        failed_disk_writes: 0,
        disk_waits: 0,
        lost_disk_records: 0,
        predicted_step_ns: 0,
        step_error_ns: 0,
        paced_steps: 0,
    };
    set(&mut fleet, 0, |member| member.report = Some((Time(1_000), report)));
    assert_eq!(choose(&fleet, &need(pool)), None);
    assert_eq!(choose(&fleet, &Need { now: Time(60_000), ..need(pool) }), Some(0));
}

#[test]
fn a_replica_that_refused_is_left_alone_until_its_time() {
    let (mut fleet, pool) = fleet(1);
    set(&mut fleet, 0, |member| member.refused_until = Some(Time(2_000)));
    assert_eq!(choose(&fleet, &Need { now: Time(1_999), ..need(pool) }), None);
    assert_eq!(choose(&fleet, &Need { now: Time(2_000), ..need(pool) }), Some(0));
}

#[test]
fn frames_of_another_incarnation_do_not_pass_the_fence() {
    let (mut fleet, _) = fleet(1);
    set(&mut fleet, 0, |member| {
        assert_eq!(member.fence(NodeId(1), Epoch(1)), Some(false));
        assert_eq!(member.fence(NodeId(2), Epoch(1)), None);
        assert_eq!(member.fence(NodeId(1), Epoch(3)), Some(true));
        assert_eq!(member.fence(NodeId(1), Epoch(2)), None);
        assert_eq!(member.fence(NodeId(1), Epoch(3)), Some(false));
    });
    fleet.leave(ReplicaId(0));
    set(&mut fleet, 0, |member| assert_eq!(member.fence(NodeId(1), Epoch(3)), None));
}

#[test]
fn the_table_is_bounded_and_a_newcomer_takes_the_place_of_one_that_is_down() {
    let mut fleet = Fleet::new(2);
    fleet.join(ReplicaId(0), offer("a")).expect("there is room");
    fleet.join(ReplicaId(1), offer("a")).expect("there is room");
    assert_eq!(fleet.join(ReplicaId(2), offer("a")), Err(FleetFull { max_replicas: 2 }));
    fleet.leave(ReplicaId(0));
    assert!(fleet.join(ReplicaId(2), offer("a")).is_ok());
    assert!(fleet.get(ReplicaId(0)).is_none());
    assert_eq!(fleet.members().count(), 2);
}

#[test]
fn a_new_revision_serves_the_name_as_soon_as_it_is_ready() {
    let mut fleet = Fleet::new(4);
    let old = fleet.join(ReplicaId(0), offer("a")).expect("there is room");
    assert_eq!(fleet.serving("a"), Some(old));
    assert_eq!(fleet.serving("b"), None);
    let mut next = offer("a");
    next.model.revision = "next".into();
    next.state = ReplicaState::Starting;
    let new = fleet.join(ReplicaId(1), next).expect("there is room");
    assert_eq!(fleet.serving("a"), Some(old));
    fleet.get_mut(ReplicaId(1)).expect("it joined").state = Some(ReplicaState::Ready);
    assert_eq!(fleet.serving("a"), Some(new));
    fleet.leave(ReplicaId(1));
    assert_eq!(fleet.serving("a"), Some(old));
}

#[test]
fn an_adapter_is_served_under_its_own_name() {
    let mut fleet = Fleet::new(4);
    let mut adapted = offer("a");
    adapted.model.adapter = Some("a-medical".into());
    let pool = fleet.join(ReplicaId(0), adapted).expect("there is room");
    assert_eq!(fleet.serving("a-medical"), Some(pool));
    assert_eq!(fleet.serving("a"), None);
}

proptest! {
    /// Whatever the loads: the choice fits, nobody that fits has less to do, and nothing overflows.
    #[test]
    fn the_choice_is_the_least_loaded_that_fits(
        loads in prop::collection::vec((0_u32..20, 0_u64..1 << 40, 0_u64..1 << 40, any::<u64>()), 1..20),
        total_tokens in 0_u64..2_000,
        now in any::<u64>(),
    ) {
        let (mut fleet, pool) = fleet(loads.len() as u32);
        for (id, (sequences, unstarted_tokens, output_tokens, until)) in loads.into_iter().enumerate() {
            set(&mut fleet, id as u32, |member| {
                member.load = Load { sequences, unstarted_sequences: sequences, unstarted_tokens, output_tokens };
                member.refused_until = Some(Time(until));
            });
        }
        let look_ahead = Duration(u64::MAX / 3);
        let need = Need { total_tokens, look_ahead, now: Time(now), ..need(pool) };
        let chosen = LeastWork.choose(&fleet, &need);
        let fitting = fleet.members().filter(|member| need.fits(member));
        let best = fitting.map(|member| (member.remaining_ns(need.now), member.id)).min();
        prop_assert_eq!(chosen, best.map(|(_, id)| id));
    }
}
