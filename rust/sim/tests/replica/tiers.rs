//! What goes down the tiers of a replica and comes back, and when that is given up because computing costs less.

use crate::world::{World, limits};
use llmscale_types::{Class, CopyDirection, EngineLimits, Token};

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

/// One of three prompts of 33 tokens, so 8 whole blocks and a token.
fn long_prompt(number: u32) -> Vec<Token> {
    let first = 4 + 15 * (number % 3);
    (0..33).map(|at| first + at % 15).collect()
}

/// Three long prompts take turns in a pool that has room for one: each one's blocks are evicted before it comes again.
fn take_turns(world: &mut World, turns: u32) {
    for turn in 0..turns {
        world.submit(0, long_prompt(turn), 3, Class::Standard);
        world.finish_all();
    }
}

#[test]
fn what_comes_back_is_copied_where_that_pays_and_computed_where_it_does_not() {
    let limits = || EngineLimits { host_blocks: 64, ..limits(10, 4, 40, 2) };
    let (mut cheap, mut dear) = (World::new(limits()), World::new(limits()));
    dear.copy_ns = 10_000_000;
    dear.crash();
    take_turns(&mut cheap, 18);
    take_turns(&mut dear, 18);
    let (cheap, dear) = (cheap.replica.cache_counters(), dear.replica.cache_counters());
    assert!(cheap.restored_blocks >= 100, "{cheap:?}");
    assert!(dear.offloaded_blocks > 0, "nobody knew that copies are dear: {dear:?}");
    assert_eq!(dear.restored_blocks, 0, "{dear:?}");
}

#[test]
fn a_long_prefix_is_copied_back_over_several_steps_beside_others() {
    let mut world = World::new(EngineLimits { host_blocks: 64, ..limits(14, 2, 4, 2) });
    take_turns(&mut world, 9);
    let before = world.replica.cache_counters().restored_blocks;
    world.submit(1, vec![7, 8, 9], 12, Class::Interactive);
    world.plan();
    world.complete();
    world.submit(0, long_prompt(0), 3, Class::Standard);
    let mut steps = Vec::new();
    while world.plan() {
        let delta = world.sent.back().expect("it was planned");
        let restored = delta.copies.iter().filter(|copy| copy.direction == CopyDirection::Restore).count();
        if restored > 0 {
            steps.push((restored, delta.decodes));
        }
        world.complete();
    }
    world.finish_all();
    let restored = world.replica.cache_counters().restored_blocks - before;
    assert_eq!(steps.iter().map(|&(restored, _)| restored as u64).sum::<u64>(), restored);
    assert!(steps.len() > 1, "{steps:?}");
    assert!(steps.iter().all(|&(restored, decodes)| restored <= 4 && decodes), "{steps:?}");
}
