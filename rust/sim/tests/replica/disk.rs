//! A replica with three tiers: what comes back from the disk, who goes by meanwhile, and when it is not waited for.

use crate::world::{World, limits};
use llmscale_scheduler::Event;
use llmscale_types::{Class, EngineLimits, Token};

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
    world.restart_node();
    talk(&mut world, 3..4);
    let again = world.replica.cache_counters();
    assert!(again.disk_read_blocks >= 6 && again.hit_tokens >= 24, "{again:?}");
    assert_eq!((again.bad_disk_blocks, again.disk_waits), (0, 0));
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
