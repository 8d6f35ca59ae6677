//! The replica where a request costs the least predicted time: queue, prefill of what is not in the cache there, and what
//! decoding it adds for all. Looks at a few replicas that hold the rarest part of the prompt, two at random and the least
//! loaded one, hence O(1) in the number of replicas while one of these can begin it. Favours conversations staying where
//! they were, hence time to first token; the fleet pays with a queue that may be longer by a few times what that saves.
//! A prefix that most replicas hold leads nowhere and counts for no more than it saves (or a common system prompt would send
//! everybody to the first that had it); of the others, those that fewer hold count for more.

use super::{LeastWork, Need, Policy};
use crate::fleet::Fleet;
use crate::index::{Level, Levels};
use crate::member::Member;
use crate::ranking::Ranking;
use llmscale_types::ReplicaId;

/// Replicas that are looked at because they hold a part of the prompt.
const MAX_HOLDERS: usize = 4;
const RANDOM: usize = 2;
const MAX_CANDIDATES: usize = MAX_HOLDERS + RANDOM + 1;
/// What was computed once and is computed again elsewhere also takes room from other prefixes there, which are then computed
/// again as well: prefill that a cache saves counts so often beyond itself. On Mooncake's conversations with 16 replicas of
/// 3,000 blocks, 0 finds 0.29 of the prompt tokens in caches, 6 finds 0.334 and 12 finds 0.341; more lengthens the queues.
const REUSE_WEIGHT: i128 = 12;
/// A first token that is this far away weighs twice as much as its time, so that long prompts, which wait longest of all, do
/// not queue for the sake of a cache. Fronts that send no more than 250 ms of work ahead never get there.
const LONG_WAIT_NS: i128 = 16_000_000_000;

/// See the file's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PredictedSeconds;

impl Policy for PredictedSeconds {
    fn choose(&self, fleet: &Fleet, need: &Need) -> Option<ReplicaId> {
        let ranking = fleet.ranking(need.pool);
        let levels = fleet.prefixes().map(|prefixes| prefixes.levels(&need.prefix)).unwrap_or_default();
        let candidates = Candidates::gather(ranking, &levels, need);
        let fitting = candidates.iter().filter_map(|id| fleet.get(id)).filter(|member| need.fits(member));
        // The first of equals, hence a drawn one before the least loaded: idle replicas fill their caches evenly.
        let best = fitting
            .min_by_key(|member| (need.changes_numerics(member), cost_ns(fleet, ranking, &levels, need, member)));
        match best {
            Some(member) if !need.changes_numerics(member) => Some(member.id),
            // None of the few can begin it, or begin it with equal numbers: somebody else may.
            Some(_) | None => LeastWork.choose(fleet, need),
        }
    }
}

/// Replicas that are compared, each once.
struct Candidates {
    ids: [ReplicaId; MAX_CANDIDATES],
    count: usize,
}

impl Candidates {
    fn gather(ranking: &Ranking, levels: &Levels<'_>, need: &Need) -> Self {
        let mut candidates = Self { ids: [ReplicaId(0); MAX_CANDIDATES], count: 0 };
        let Some(least) = ranking.least() else {
            return candidates;
        };
        let seed = mix(need.request.0 ^ need.now.0.rotate_left(32)) >> 1;
        for level in levels.iter().filter(|level| !is_common(ranking, level)) {
            let start = seed as usize % level.count();
            for place in 0..level.count() {
                if candidates.count == MAX_HOLDERS {
                    break;
                }
                if let Some(replica) = level.replica((start + place) % level.count()) {
                    candidates.add(replica);
                }
            }
        }
        for draw in 1..=RANDOM as u64 {
            candidates.add(ranking.at(mix(seed + draw) as usize % ranking.count()));
        }
        candidates.add(least);
        candidates
    }

    fn add(&mut self, replica: ReplicaId) {
        if !self.ids[..self.count].contains(&replica) {
            self.ids[self.count] = replica;
            self.count += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = ReplicaId> {
        self.ids[..self.count].iter().copied()
    }
}

/// Whether most replicas hold a part of a prompt.
fn is_common(ranking: &Ranking, level: &Level<'_>) -> bool {
    level.count() * 2 > ranking.count().max(2)
}

/// A well mixed function of a number (the finalizer of splitmix64, Steele et al. 2014).
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Predicted nanoseconds, less what the reuse of rare prefixes is worth beyond them.
fn cost_ns(fleet: &Fleet, ranking: &Ranking, levels: &Levels<'_>, need: &Need, member: &Member) -> i128 {
    let tokens_per_key = fleet.prefixes().map_or(0, |prefixes| u64::from(prefixes.tokens_per_key()));
    let mut cached_keys = 0;
    // Keys that count, times the number of replicas.
    let mut rare_keys = 0;
    if let Some(held) = levels.held_by(member.id) {
        cached_keys = u64::from(held.keys());
        let mut shallower = levels.iter().skip_while(|level| level.keys() > held.keys()).peekable();
        while let Some(level) = shallower.next() {
            let keys = level.keys() - shallower.peek().map_or(0, |next| next.keys());
            if !is_common(ranking, level) {
                rare_keys += u64::from(keys) * (ranking.count() + 1 - level.count()) as u64;
            }
        }
    }
    // The last token is always computed: its output is the next one.
    let cached_tokens = (cached_keys * tokens_per_key).min(need.context_tokens.saturating_sub(1));
    let prefill_ns = member.prefill_ns(need.context_tokens - cached_tokens);
    let saved_ns = member.prefill_ns(need.context_tokens).saturating_sub(prefill_ns);
    let shares = (cached_keys * ranking.count() as u64).max(1);
    let credit_ns = REUSE_WEIGHT * i128::from(saved_ns) * i128::from(rare_keys) / i128::from(shares);
    let first_token_ns = i128::from(member.backlog_ns(need.now)) + i128::from(prefill_ns);
    let wait_ns = first_token_ns + first_token_ns * first_token_ns / LONG_WAIT_NS;
    wait_ns + i128::from(member.marginal_decode_ns(need.output_tokens)) - credit_ns
}
