//! Goal: the simulator finds what it is there to find. Method: one bug at a time is switched on in the production state
//! machines, and some seed must fail; `make mutants` tells which.

use llmscale_sim::run_seed;
use llmscale_types::Planted;
use std::panic;

/// Seeds that a bug may hide in.
const MAX_SEEDS: u64 = 1_000;

/// The first seed that fails with this bug, and how.
fn find(bug: Planted) -> Option<(u64, String)> {
    bug.while_here(|| (0..MAX_SEEDS).find_map(|seed| run_seed(seed).err().map(|failure| (seed, failure.message))))
}

#[test]
#[expect(clippy::print_stdout, reason = "`make mutants` shows where each was found")]
fn every_planted_bug_is_found() {
    // What a bug panics with is expected, and hundreds of lines of it would hide the rest.
    panic::set_hook(Box::new(|_| {}));
    let found = Planted::ALL.map(|bug| (bug, find(bug)));
    let _ = panic::take_hook();
    for (bug, first) in &found {
        let words = first.as_ref().map(|(seed, message)| format!("seed {seed}: {:.100}", message.replace('\n', " ")));
        println!("{bug:?}: {}", words.unwrap_or_else(|| "hidden".to_owned()));
    }
    let hidden: Vec<Planted> = found.iter().filter(|(_, first)| first.is_none()).map(|(bug, _)| *bug).collect();
    assert!(hidden.is_empty(), "no seed below {MAX_SEEDS} fails with {hidden:?}");
}

#[test]
fn a_bug_is_gone_when_it_is_not_planted_any_more() {
    assert!(Planted::AbortLeaksBlocks.while_here(|| Planted::AbortLeaksBlocks.is_here()));
    assert!(Planted::ALL.iter().all(|bug| !bug.is_here()));
}
