//! Goal: one replica, whatever arrives in whatever order, emits exactly the tokens of the model, ends every attempt once
//! and gives every block back. Method: random submissions, aborts, recalls, crashes, lapses and delays against the hash
//! worker.

mod disk;
mod host;
mod pace;
mod world;

use llmscale_scheduler::{Actions, Event, FirstComeFirstServed, GiveBack, Pace, Replica};
use llmscale_types::frame::MAX_ADMISSION_BYTES;
use llmscale_types::{
    Attempt, Class, Duration, EngineLimits, Epoch, FinishReason, FrontId, GroupId, Refusal, RequestId, Sampling,
    SequenceKey, StepId, Submission, Time, Token,
};
use proptest::prelude::*;
use world::{World, limits, prefill_pairs, prefill_tokens};

#[derive(Clone, Debug)]
enum Operation {
    Submit { front: u32, shared: usize, tail: Vec<Token>, max_tokens: u32, class: usize },
    NextTurn { of: usize, tail: Vec<Token>, max_tokens: u32 },
    Abort(usize),
    Recall(usize),
    Plan,
    Complete,
    Housekeeping,
    Crash,
    Lose { mirror: bool },
    Raise,
    Flip(usize),
    LoseHost,
    Transfer(usize),
    FlipDisk(usize),
    RestartNode { fewer: u32 },
}

fn operation() -> impl Strategy<Value = Operation> {
    let submit = (0_u32..2, 0_usize..20, prop::collection::vec(4_u32..50, 1..8), 1_u32..13, 0_usize..4).prop_map(
        |(front, shared, tail, max_tokens, class)| Operation::Submit { front, shared, tail, max_tokens, class },
    );
    let next_turn = (any::<usize>(), prop::collection::vec(4_u32..50, 0..6), 1_u32..9)
        .prop_map(|(of, tail, max_tokens)| Operation::NextTurn { of, tail, max_tokens });
    prop_oneof![
        6 => submit,
        4 => next_turn,
        2 => any::<usize>().prop_map(Operation::Abort),
        1 => any::<usize>().prop_map(Operation::Recall),
        12 => Just(Operation::Plan),
        12 => Just(Operation::Complete),
        3 => Just(Operation::Housekeeping),
        1 => Just(Operation::Crash),
        1 => any::<bool>().prop_map(|mirror| Operation::Lose { mirror }),
        1 => Just(Operation::Raise),
        1 => (0_usize..16).prop_map(Operation::Flip),
        1 => Just(Operation::LoseHost),
        8 => (1_usize..4).prop_map(Operation::Transfer),
        1 => (0_usize..16).prop_map(Operation::FlipDisk),
        1 => (0_u32..3).prop_map(|fewer| Operation::RestartNode { fewer }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn every_attempt_gets_the_models_tokens_and_one_end(
        total_blocks in 10_u32..40,
        host_blocks in prop::sample::select(vec![0, 1, 8, 64]),
        disk_blocks in prop::sample::select(vec![0, 1, 12, 64]),
        max_sequences in 1_u32..8,
        max_step_tokens in 1_u32..24,
        steps in 1_u32..5,
        pipeline in any::<bool>(),
        deadly in prop::option::weighted(0.2, Just(49)),
        max_admission_bytes in prop::sample::select(vec![1, 400, 700, MAX_ADMISSION_BYTES]),
        target_us in prop::sample::select(vec![0, 1, 100, 400]),
        attends in any::<bool>(),
        operations in prop::collection::vec(operation(), 0..150),
    ) {
        let disk_blocks = if host_blocks == 0 { 0 } else { disk_blocks };
        let groups = if pipeline { steps } else { 1 };
        let limits = EngineLimits { groups, host_blocks, disk_blocks, ..limits(total_blocks, max_sequences, max_step_tokens, steps) };
        let mut world = World::with_deadly_token(limits, deadly)
            .with_max_admission_bytes(max_admission_bytes)
            .with_pace(Pace::of(Duration(target_us)));
        if attends {
            // The end of a long context costs several times what the start of the next one does.
            world.step_ns = |delta, _| 1_000 + 10_000 * prefill_tokens(delta) + 4_000 * prefill_pairs(delta);
        }
        for operation in operations {
            let keys: Vec<SequenceKey> = world.wanted.keys().copied().collect();
            match operation {
                Operation::Submit { front, shared, tail, max_tokens, class } => {
                    let prompt = (10..10 + shared as u32).chain(tail).collect();
                    world.submit(front, prompt, max_tokens, Class::ALL[class]);
                }
                Operation::NextTurn { of, tail, max_tokens } if !keys.is_empty() => {
                    // A conversation goes on: the prompt is what was said before, so its blocks are found again.
                    let wanted = &world.wanted[&keys[of % keys.len()]];
                    let said = wanted.submission.context.iter().chain(&wanted.emitted).copied();
                    let prompt: Vec<Token> = said.chain(tail).collect();
                    if prompt.len() + max_tokens as usize <= 40 {
                        world.submit(keys[of % keys.len()].front.0, prompt, max_tokens, Class::Standard);
                    }
                }
                Operation::Abort(pick) if !keys.is_empty() => world.event(Event::Abort(keys[pick % keys.len()])),
                Operation::Recall(pick) if !keys.is_empty() => world.event(Event::Recall(keys[pick % keys.len()])),
                Operation::Plan => { world.plan(); }
                Operation::Complete => { world.complete(); }
                Operation::Housekeeping => { world.replica.housekeeping(2); }
                Operation::Crash => world.crash(),
                Operation::Lose { mirror } => world.lose(mirror),
                Operation::Raise => { world.answer(true); }
                Operation::Flip(place) => world.flip(place),
                Operation::LoseHost => world.lose_host(),
                Operation::Transfer(most) => { world.transfer(most); }
                Operation::FlipDisk(place) => world.flip_disk(place),
                Operation::RestartNode { fewer } => {
                    let total = world.replica.limits().total_blocks;
                    // The longest sequence needs ten.
                    world.restart_node((total >= 10 + fewer && fewer > 0).then(|| total - fewer));
                }
                _ => {}
            }
        }
        world.finish_all();
    }
}

#[test]
fn sequences_of_a_pipeline_spread_over_its_groups_and_each_group_has_one_step_in_flight() {
    let mut world = World::new(EngineLimits { groups: 3, ..limits(128, 9, 64, 3) });
    for request in 0..9 {
        world.submit(0, vec![7, 8, 10 + request], 30, Class::Standard);
    }
    let mut rows = Vec::new();
    for _ in 0..12 {
        while world.plan() {}
        let flights: Vec<u32> = world.sent.iter().map(|delta| delta.group.0).collect();
        assert_eq!(flights.len(), 3, "no stage is idle: {flights:?}");
        assert!((0..3).all(|group| flights.contains(&group)), "{flights:?}");
        world.complete();
        rows = (0..3).map(|group| world.replica.decoding(GroupId(group))).collect();
    }
    assert_eq!(rows, [3, 3, 3]);
    world.finish_all();
}

#[test]
fn a_long_prompt_alone_keeps_every_stage_of_a_pipeline_busy() {
    let mut world = World::new(EngineLimits { groups: 2, ..limits(128, 4, 8, 2) });
    world.submit(0, (10..46).collect(), 4, Class::Standard);
    while world.plan() {}
    let chunks: Vec<(u32, u32)> = world.sent.iter().map(|delta| (delta.group.0, delta.chunks[0].tokens)).collect();
    assert_eq!(chunks, [(0, 8), (1, 8)]);
    world.finish_all();
}

#[test]
fn a_prefix_of_an_earlier_request_is_not_computed_again() {
    let mut world = World::new(limits(32, 4, 16, 2));
    world.submit(0, (10..29).collect(), 4, Class::Standard);
    world.finish_all();
    let before = world.replica.counters().prefill_tokens;
    world.submit(0, (10..29).chain([5, 6]).collect(), 4, Class::Standard);
    world.finish_all();
    assert_eq!(world.replica.cache_counters().hit_tokens, 16);
    let told: Vec<Option<u32>> = world.wanted.values().map(|wanted| wanted.cached).collect();
    assert_eq!(told, [None, Some(16)]);
    assert_eq!(world.replica.counters().prefill_tokens - before, 21 - 16);
}

#[test]
fn contexts_that_are_cached_whole_are_admitted_over_as_many_steps_as_their_frames_need() {
    let mut world = World::new(limits(64, 8, 64, 1));
    let prompt: Vec<Token> = (10..43).collect();
    world.submit(0, prompt.clone(), 1, Class::Standard);
    world.finish_all();
    // A context of 33 ids takes about 330 bytes, and all but one of them are in the prefix cache.
    world = world.with_max_admission_bytes(700);
    for _ in 0..7 {
        world.submit(0, prompt.clone(), 4, Class::Standard);
    }
    let mut admitted = Vec::new();
    while world.plan() {
        admitted.push(world.sent[0].admit.len());
        world.complete();
    }
    assert_eq!(admitted[..5], [2, 2, 2, 1, 0], "{admitted:?}");
    world.finish_all();
}

#[test]
fn a_request_that_kills_two_workers_is_poisoned_and_its_neighbours_go_on() {
    let mut world = World::with_deadly_token(limits(64, 8, 16, 2), Some(49));
    for request in 0..5 {
        world.submit(0, if request == 2 { vec![7, 49, 9] } else { vec![7, 8, request] }, 8, Class::Standard);
    }
    world.finish_all();
    assert_eq!(world.replica.counters().worker_losses, 2, "the deadly request takes down exactly two workers");
    for (key, wanted) in &world.wanted {
        assert_eq!(wanted.ended == Some(FinishReason::Poisoned), key.request == RequestId(3), "{key:?} {wanted:?}");
    }
}

#[test]
fn a_request_that_kills_workers_with_its_last_chunk_is_poisoned_while_steps_overlap() {
    let mut world = World::with_deadly_token(limits(64, 4, 8, 2), Some(49));
    let prompt: Vec<Token> = (10..22).chain([49]).collect();
    world.submit(0, prompt, 4, Class::Standard);
    // The second chunk is planned, and kills, while the first one completes and proves nothing.
    for _ in 0..40 {
        world.plan();
        world.plan();
        world.complete();
    }
    world.finish_all();
    assert_eq!(world.replica.counters().worker_losses, 2, "the deadly request takes down exactly two workers");
    let wanted = world.wanted.values().next().unwrap();
    assert_eq!(wanted.ended, Some(FinishReason::Poisoned));
}

#[test]
fn a_worker_that_lost_its_mirror_is_told_everything_again_and_finds_what_it_had_computed() {
    let mut world = World::new(limits(64, 4, 40, 2));
    for request in 0..4 {
        world.submit(0, (10 + request..26 + request).collect(), 12, Class::Standard);
    }
    for _ in 0..6 {
        world.plan();
        world.complete();
    }
    let before = world.replica.counters();
    world.lose(true);
    world.plan();
    world.complete();
    assert_eq!(world.replica.load().running, 0, "everything waits to be told again");
    world.plan();
    assert!(world.sent[0].is_snapshot());
    assert_eq!(world.sent[0].admit.len(), 4);
    world.finish_all();
    let after = world.replica.counters();
    assert_eq!((after.worker_losses, after.steps_lost - before.steps_lost), (0, 1));
    // Contexts of about 20 tokens; all but the last block of four is there.
    assert!(after.prefill_tokens - before.prefill_tokens <= 4 * 5, "{after:?} {before:?}");
}

#[test]
fn a_request_whose_steps_raise_is_poisoned_and_its_neighbours_go_on() {
    let mut world = World::new(limits(64, 4, 40, 2));
    for request in 0..3 {
        world.submit(0, vec![7, 8, 20 + request], 8, Class::Standard);
    }
    world.plan();
    world.plan();
    world.answer(true);
    let suspects = world.replica.load().waiting;
    assert_eq!(suspects, 3);
    // The first one alone raises again, the others do not.
    world.plan();
    assert_eq!(world.sent[0].admit.len(), 1, "a suspect runs alone");
    world.answer(true);
    world.finish_all();
    let poisoned: Vec<_> = world.wanted.values().map(|wanted| wanted.ended == Some(FinishReason::Poisoned)).collect();
    assert_eq!(poisoned, [true, false, false]);
    assert_eq!(world.replica.counters().worker_losses, 0);
}

#[test]
fn a_worker_that_names_a_step_which_cannot_have_raised_is_not_believed() {
    let mut world = World::new(limits(64, 4, 40, 2));
    let raised = |step| Event::StepsLost { raised: Some(step), bad_host_blocks: Vec::new() };
    assert!(!world.replica.on_event(Time(0), raised(StepId(1)), &mut world.out), "nothing is in flight");
    world.submit(0, vec![7, 8, 9], 8, Class::Standard);
    world.plan();
    world.plan();
    let second = world.sent[1].step;
    assert!(!world.replica.on_event(Time(0), raised(second), &mut world.out), "the first has no result yet");
    world.finish_all();
}

/// Of five requests four were computed when the worker died.
fn after_a_crash() -> World {
    let mut world = World::new(limits(64, 4, 16, 2));
    for _ in 0..5 {
        world.submit(0, vec![7, 8, 9], 8, Class::Standard);
    }
    world.plan();
    world.crash();
    world
}

fn told(world: &World) -> Vec<GiveBack> {
    world.given_back.iter().map(|(_, reason)| *reason).collect()
}

const SUSPECTS: [bool; 5] = [true, true, true, true, false];

#[test]
fn a_suspect_of_a_crash_stays_one_where_it_goes_on() {
    let mut world = after_a_crash();
    let keys: Vec<SequenceKey> = world.wanted.keys().copied().collect();
    for key in keys {
        world.event(Event::Recall(key));
    }
    assert_eq!(told(&world), SUSPECTS.map(|suspect| GiveBack { refusal: None, suspect }));
    let mut elsewhere = World::new(limits(64, 4, 16, 2));
    elsewhere.submit(1, vec![5, 6], 8, Class::Standard);
    let (submission, _) = world.given_back.remove(0);
    elsewhere.take_over(Submission { suspect: true, ..submission });
    elsewhere.plan();
    elsewhere.crash();
    let ended: Vec<Option<FinishReason>> = elsewhere.wanted.values().map(|wanted| wanted.ended).collect();
    assert_eq!(ended, [Some(FinishReason::Poisoned), None], "it was alone in a second crash");
    elsewhere.finish_all();
    world.finish_all();
}

#[test]
fn a_suspect_of_a_crash_stays_one_where_it_goes_when_the_node_drains() {
    let mut world = after_a_crash();
    world.drain(Duration(0));
    assert_eq!(told(&world), SUSPECTS.map(|suspect| GiveBack { refusal: Some(Refusal::Draining), suspect }));
    world.finish_all();
}

#[test]
fn suspects_that_do_not_fit_together_keep_nobody_waiting() {
    let mut world = World::new(limits(10, 4, 32, 2));
    world.submit(0, vec![7, 8, 9], 12, Class::Standard);
    world.plan();
    world.complete();
    for first in [4, 25] {
        world.submit(0, (first..first + 21).collect(), 12, Class::Standard);
        let (&key, _) = world.wanted.last_key_value().expect("it was just submitted");
        world.event(Event::Recall(key));
        let (submission, _) = world.given_back.pop().expect("it has not begun");
        world.take_over(Submission { suspect: true, ..submission });
    }
    let stream = *world.wanted.keys().next().expect("there are three");
    let before = world.wanted[&stream].emitted.len();
    for _ in 0..4 {
        while world.plan() {}
        world.complete();
    }
    assert!(world.wanted[&stream].emitted.len() > before, "{:?}", world.wanted);
    world.finish_all();
}

#[test]
fn what_runs_when_a_node_drains_is_finished_though_its_worker_dies() {
    let mut world = World::new(limits(64, 4, 40, 2));
    for _ in 0..2 {
        world.submit(0, vec![7, 8, 9], 8, Class::Standard);
    }
    world.plan();
    world.complete();
    world.drain(Duration::from_millis(5_000));
    world.crash();
    world.finish_all();
    assert_eq!(world.wanted.len(), 2, "nothing that had begun is given back");
}

#[test]
fn what_a_front_was_to_be_told_goes_with_it() {
    let mut world = World::new(limits(64, 4, 40, 2));
    for front in [1, 2] {
        world.submit(front, vec![7, 8, 9], 8, Class::Standard);
    }
    let keys: Vec<SequenceKey> = world.wanted.keys().copied().collect();
    for &key in &keys {
        assert!(world.replica.on_event(Time(0), Event::Abort(key), &mut world.out));
    }
    assert!(world.replica.on_event(Time(0), Event::FrontGone(FrontId(1)), &mut world.out));
    assert!(world.out.outputs[1].is_empty(), "the next front of this number would take it for its own");
    assert_eq!(world.out.outputs[2].finished.len(), 1);
}

#[test]
fn a_stream_survives_any_number_of_worker_deaths_between_which_it_makes_progress() {
    let mut world = World::new(limits(64, 8, 40, 2));
    world.submit(0, vec![7, 8, 9], 30, Class::Standard);
    for _ in 0..20 {
        world.plan();
        world.plan();
        world.complete();
        world.crash();
    }
    world.finish_all();
    let wanted = world.wanted.values().next().unwrap();
    assert!(matches!(wanted.ended, Some(FinishReason::Length | FinishReason::Stop)), "{wanted:?}");
}

#[test]
fn a_full_queue_refuses_with_its_limit() {
    let mut world = World::new(EngineLimits { max_waiting_sequences: 1, ..limits(32, 1, 16, 1) });
    world.submit(0, vec![7], 1, Class::Standard);
    let key = SequenceKey { front: FrontId(0), request: RequestId(9), attempt: Attempt(1) };
    let submission = Submission {
        key,
        namespace: [1; 32],
        class: Class::Standard,
        context: vec![7],
        prompt_tokens: 1,
        sampling: Sampling::default(),
        deadline: None,
        suspect: false,
    };
    assert!(world.replica.on_event(Time(0), Event::Submit(Box::new(submission)), &mut world.out));
    let [(refused, GiveBack { refusal: Some(refusal), .. })] = world.out.give_back[..] else {
        panic!("{:?}", world.out.give_back)
    };
    assert_eq!((refused, refusal.label()), (key, "queue_full"));
}

#[test]
fn blocks_that_the_first_worker_has_no_room_for_are_never_planned() {
    let mut replica = Replica::new(limits(64, 4, 16, 2), [9; 32], Box::new(FirstComeFirstServed)).unwrap();
    let mut out = Actions::default();
    let mut has = |total: u32| replica.on_event(Time(0), Event::FewerBlocks(total), &mut out);
    assert!(!has(9), "the longest sequence needs ten");
    assert!(!has(65), "no more than were planned");
    assert!(has(10));
    assert_eq!((replica.load().total_blocks, replica.load().free_blocks), (10, 10));
    replica.check();
}

#[test]
#[should_panic(expected = "a worker has had the blocks that were planned")]
fn a_later_worker_cannot_have_fewer_blocks() {
    let mut replica = Replica::new(limits(64, 4, 16, 2), [9; 32], Box::new(FirstComeFirstServed)).unwrap();
    let mut out = Actions::default();
    let _ = replica.on_event(Time(0), Event::WorkerUp { epoch: Epoch(1), host_memory: 0, disk_files: 0 }, &mut out);
    let _ = replica.on_event(Time(0), Event::FewerBlocks(10), &mut out);
}
