//! What goes to the host tier of a replica and comes back, and when that is given up because computing costs less.

use crate::world::{World, limits};
use llmscale_types::{Class, CopyDirection, EngineLimits, Token};

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
