//! What clients of a simulation want: prompts that share prefixes, bounds, deadlines, and what becomes of their patience.
//! Draws only; every draw comes from the simulation's generator. Knows nothing of fronts.

use crate::faults::{DEADLY, EOS_TOKENS, Mix, VOCABULARY};
use crate::happening::ClientAct;
use crate::random::Random;
use llmscale_front::NewRequest;
use llmscale_types::{Class, Duration, Sampling, Time, Token};
use std::sync::Arc;

/// The model that every node of a simulation serves.
pub(crate) const MODEL: &str = "hash";
/// Ids from here up to the deadly one are ordinary.
const FIRST_ORDINARY: Token = 9;

/// A request with what its client will do.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) new: NewRequest,
    /// It reads what it gets.
    pub(crate) reads: bool,
    pub(crate) acts: Vec<(Duration, ClientAct)>,
}

/// The next request of some client: a new one, or the next turn of what was said before.
pub(crate) fn wish(mix: &Mix, random: &mut Random, now: Time, said: Option<Vec<Token>>) -> Wish {
    let mut prompt = said.unwrap_or_else(|| prefix(random));
    let tail = random.count(1, 8);
    prompt.extend((0..tail).map(|_| random.count(FIRST_ORDINARY, DEADLY - 1)));
    if mix.deadly_prompts.is_some_and(|share| random.chance(share)) {
        let at = random.below(prompt.len() as u64) as usize;
        prompt[at] = DEADLY;
    }
    let longest = mix.engine.max_sequence_tokens - prompt.len() as u32;
    let stops = *random.pick(&[0, 0, 1, 7]);
    let sampling = Sampling {
        seed: random.below(3),
        choice: random.count(0, 1),
        max_tokens: random.count(1, 24).min(longest),
        stop_tokens: (0..stops).map(|_| random.count(0, VOCABULARY - 1)).collect(),
        ignore_eos: random.chance(300),
        ..Sampling::default()
    };
    let deadline = random.chance(mix.deadlines).then(|| now + random.span(2_000, 1_500_000));
    let detached = random.chance(mix.impatient_clients / 4);
    let new = NewRequest {
        namespace: [random.count(1, 2) as u8; 32],
        model: MODEL.to_owned(),
        class: *random.pick(&Class::ALL),
        prompt,
        prefix: Arc::default(),
        sampling,
        deadline,
        detached,
    };
    Wish { new, reads: !random.chance(mix.slow_readers), acts: acts(mix, random, detached) }
}

/// One of a few beginnings, so that prefixes are found again: their ids depend on nothing but their number.
fn prefix(random: &mut Random) -> Vec<Token> {
    let number = random.below(5);
    let mut ids = Random::new(number);
    let length = [0, 4, 9, 16, 30][number as usize];
    let ids: Vec<Token> = (0..length).map(|_| ids.count(FIRST_ORDINARY, DEADLY - 1)).collect();
    assert!(!ids.iter().any(|id| EOS_TOKENS.contains(id)), "ordinary ids end nothing");
    ids
}

fn acts(mix: &Mix, random: &mut Random, detached: bool) -> Vec<(Duration, ClientAct)> {
    let mut acts = Vec::new();
    if detached {
        acts.push((random.span(1_000, 600_000), ClientAct::Attach));
    }
    if random.chance(mix.impatient_clients) {
        let at = random.span(100, 400_000);
        match random.below(5) {
            0 => acts.push((at, ClientAct::Cancel)),
            1 => acts.push((at, ClientAct::CutAtToken)),
            2 => acts.push((at, ClientAct::Leave)),
            _ => {
                acts.push((at, ClientAct::Detach));
                if random.chance(700) {
                    acts.push((at + random.span(1_000, 600_000), ClientAct::Attach));
                }
            }
        }
    }
    acts
}
