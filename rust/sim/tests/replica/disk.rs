//! A replica with three tiers: what comes back from the disk, who goes by meanwhile, and when it is not waited for.

use crate::world::{World, limits};
use llmscale_scheduler::{Drained, Event};
use llmscale_types::{Class, Duration, EngineLimits, Token};

/// A replica with a pool of one conversation, a host tier of two and a disk of many.
fn three_tiers() -> World {
    World::new(EngineLimits { host_blocks: 16, disk_blocks: 128, ..limits(10, 1, 40, 1) })
}

fn prompt_of(conversation: u32) -> Vec<Token> {
    (0..33).map(|at| 4 + (conversation * 7 + at * (conversation + 1)) % 46).collect()
}

/// Conversations of eight full blocks each, one after the other.
fn talk(world: &mut World, conversations: std::ops::Range<u32>) {
    for conversation in conversations {
        world.submit(0, prompt_of(conversation), 2, Class::Standard);
        world.finish_all();
    }
}

#[test]
fn a_conversation_comes_back_from_the_disk_in_the_next_process_too() {
    let mut world = three_tiers();
    talk(&mut world, 0..8);
    let before = world.replica.cache_counters();
    assert!(before.disk_written_blocks >= 24, "{before:?}");
    talk(&mut world, 2..3);
    let after = world.replica.cache_counters();
    assert!(after.disk_read_blocks >= 6, "{after:?}");
    assert!(after.hit_tokens - before.hit_tokens >= 24, "{after:?}");
    world.restart_node(None);
    talk(&mut world, 3..4);
    let again = world.replica.cache_counters();
    assert!(again.disk_read_blocks >= 6 && again.hit_tokens >= 24, "{again:?}");
    assert_eq!((again.bad_disk_blocks, again.disk_waits), (0, 0));
}

#[test]
fn a_conversation_comes_back_from_the_disk_to_a_device_with_less_room_than_planned() {
    let mut world = World::new(EngineLimits { host_blocks: 16, disk_blocks: 128, ..limits(14, 1, 40, 1) });
    talk(&mut world, 0..8);
    world.restart_node(Some(10));
    assert_eq!(world.replica.load().total_blocks, 10);
    talk(&mut world, 3..4);
    let again = world.replica.cache_counters();
    assert!(again.disk_read_blocks >= 6 && again.hit_tokens >= 24, "{again:?}");
}

#[test]
fn others_go_by_while_a_conversation_waits_for_the_disk() {
    let mut world = three_tiers();
    talk(&mut world, 0..8);
    let first = prompt_of(2);
    world.submit(0, first, 2, Class::Standard);
    world.submit(0, vec![7, 8, 9], 2, Class::Standard);
    world.plan();
    let admitted: Vec<usize> = world.sent[0].admit.iter().map(|admission| admission.context.len()).collect();
    assert_eq!(admitted, [3], "the first one waits for its reads");
    assert!(!world.sent[0].transfers.is_empty());
    world.finish_all();
}

#[test]
fn a_disk_that_is_slower_than_computing_is_not_waited_for() {
    let mut world = three_tiers();
    talk(&mut world, 0..8);
    world.submit(0, prompt_of(2), 2, Class::Standard);
    world.plan();
    world.complete();
    assert_eq!((world.plan(), world.replica.waits_for_disk()), (false, true));
    let gives_up = world.replica.next_deadline().expect("it does not wait for ever");
    assert!(world.replica.on_event(gives_up, Event::Tick, &mut world.out));
    assert!(world.plan(), "it is computed");
    assert_eq!(world.replica.counters().late_fetches, 1);
    world.finish_all();
}

/// Two conversations, of which the disk has nothing.
fn cached_above_the_disk() -> World {
    let mut world = three_tiers();
    talk(&mut world, 0..2);
    assert_eq!(world.replica.cache_counters().disk_written_blocks, 0);
    world
}

#[test]
fn a_drain_saves_what_was_never_evicted_and_the_next_process_finds_it() {
    let mut world = cached_above_the_disk();
    let before = world.replica.whole_contents();
    world.drain(Duration::from_millis(5_000));
    assert_eq!(world.replica.drained(), None, "there is something to save");
    world.finish_all();
    let saved_blocks = before.len() as u64;
    assert!(saved_blocks >= 8, "the last conversation is there whole");
    let drained = Drained { saved_blocks, unsaved_blocks: 0, cut_short: false };
    assert_eq!(world.replica.drained(), Some(drained));
    world.restart_node(None);
    talk(&mut world, 1..2);
    let again = world.replica.cache_counters();
    assert!(again.disk_read_blocks >= 8 && again.hit_tokens >= 32, "{again:?}");
    assert_eq!((again.bad_disk_blocks, again.disk_waits), (0, 0));
}

#[test]
fn a_drain_whose_time_is_over_says_what_it_left() {
    let mut world = cached_above_the_disk();
    let whole = world.replica.whole_contents().len() as u64;
    world.drain(Duration(1));
    assert!(world.plan());
    let until = world.replica.next_deadline().expect("it does not save for ever");
    assert!(world.replica.on_event(until, Event::Tick, &mut world.out));
    let drained = Drained { saved_blocks: 0, unsaved_blocks: whole, cut_short: true };
    assert_eq!(world.replica.drained(), Some(drained));
}

#[test]
fn a_drain_whose_worker_dies_while_it_saves_has_ended() {
    let mut world = cached_above_the_disk();
    world.drain(Duration::from_millis(5_000));
    assert!(world.plan() && world.complete() && world.transfer(1));
    world.crash();
    let drained = world.replica.drained().expect("nothing is left to save it");
    assert!(drained.cut_short && drained.saved_blocks > 0, "{drained:?}");
}

#[test]
fn a_drain_finishes_what_runs_before_it_saves() {
    let mut world = three_tiers();
    world.submit(0, prompt_of(1), 6, Class::Standard);
    world.plan();
    world.drain(Duration::from_millis(5_000));
    world.complete();
    assert_eq!(world.replica.drained(), None);
    world.finish_all();
    assert!(world.replica.drained().is_some_and(|drained| drained.saved_blocks >= 8));
}
