//! Turns min-p, top-k and top-p into one threshold on the scaled scores.
//! A kept token has a score above the threshold, or equal to it and an id not after the last tied one, so the race needs
//! no list. Top-k selects among the scores that reach the k-th greatest block maximum. Top-p sums the survivors, keeps
//! those above a floor below which the cut cannot lie, narrows them to the few around the cut by sums above a handful of
//! pivots, and sorts only these. O(vocabulary) for the sum, the rest is proportional to the survivors.
//! All sums are f64 in an order that is the same at every level.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use super::scan::{Scores, lower_bound_of_nth, most_likely_first};
use super::{BLOCK_TOKENS, SamplerRow};
use crate::simd::{Simd, exact};

/// Which tokens may be sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Threshold {
    /// Least scaled score.
    pub(super) value: f32,
    /// Last id among the tokens whose score equals `value`.
    pub(super) last_tied: u32,
}

impl Threshold {
    /// Keeps every finite score.
    const NONE: Self = Self { value: f32::MIN, last_tied: u32::MAX };

    #[inline(always)]
    pub(super) fn keeps(self, score: f32, token: u32) -> bool {
        score > self.value || (score >= self.value && token <= self.last_tied)
    }
}

/// Scores relative to the greatest, divided by the temperature: at most 0.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) greatest: f32,
    pub(super) inverse_temperature: f32,
}

impl Scale {
    #[inline(always)]
    pub(super) fn apply(self, score: f32) -> f32 {
        (score - self.greatest) * self.inverse_temperature
    }

    #[inline(always)]
    pub(super) fn apply_vector<S: Simd>(self, simd: S, score: S::F32) -> S::F32 {
        simd.mul(simd.sub(score, simd.splat(self.greatest)), simd.splat(self.inverse_temperature))
    }
}

/// Sums above this many pivots are taken in one pass of the search for the cut.
const PIVOTS: usize = 3;
/// So few scores are sorted rather than narrowed further.
const MAX_SORTED: usize = 64;
/// Each pass narrows the range of scores to a quarter; what is left after these is a tie, or as good as one.
const MAX_PASSES: usize = 12;

/// One block of scaled scores.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Block([f32; BLOCK_TOKENS]);

/// Working memory of the filters.
#[derive(Default)]
pub(super) struct FilterScratch {
    values: Vec<f32>,
    entries: Vec<(f32, u32)>,
    candidates: Candidates,
}

/// Scores around the cut, in order of token, and their masses. Both arrays have room for one more vector than is used.
#[derive(Default)]
struct Candidates {
    scores: Vec<f32>,
    masses: Vec<f32>,
    count: usize,
}

/// The scores `low <= score < high` among which the cut lies, and the mass at and above `high`.
#[derive(Clone, Copy)]
struct Bracket {
    low: f32,
    high: f32,
    mass_above: f64,
}

/// The row under the filters.
pub(super) struct Filter<'a, S> {
    pub(super) simd: S,
    pub(super) scores: &'a Scores,
    /// Scaled block maxima.
    pub(super) maxima: &'a [f32],
    pub(super) scale: Scale,
    pub(super) scratch: &'a mut FilterScratch,
}

impl<S: Simd> Filter<'_, S> {
    /// The threshold that a row's parameters come to.
    #[inline(always)]
    pub(super) fn threshold(&mut self, row: &SamplerRow<'_>) -> Threshold {
        let mut threshold = Threshold::NONE;
        if row.min_p > 0.0 {
            threshold.value = threshold.value.max(exact::ln_scalar(row.min_p.max(f32::MIN_POSITIVE)));
        }
        if row.top_k > 0 && (row.top_k as usize) < self.scores.vocabulary() {
            threshold.value = self.nth_greatest(row.top_k as usize, threshold.value);
        }
        if row.top_p < 1.0 {
            threshold = self.top_p(row.top_p, threshold.value);
        }
        threshold
    }

    /// The scaled scores of a block.
    #[inline(always)]
    fn scaled(&self, block: usize) -> Block {
        let mut scaled = Block([0.0; BLOCK_TOKENS]);
        let source = self.scores.block(block);
        for offset in (0..BLOCK_TOKENS).step_by(S::LANES) {
            // SAFETY: both blocks have 64 values.
            unsafe {
                let score = self.scale.apply_vector(self.simd, self.simd.load(source.add(offset)));
                self.simd.store(scaled.0.as_mut_ptr().add(offset), score);
            }
        }
        scaled
    }

    /// The `count`-th greatest scaled score, or `least` where fewer scores reach that.
    #[inline(always)]
    fn nth_greatest(&mut self, count: usize, least: f32) -> f32 {
        let mut values = core::mem::take(&mut self.scratch.values);
        let bound = lower_bound_of_nth(self.maxima, count, &mut values).max(least);
        values.clear();
        for (block, _) in self.maxima.iter().enumerate().filter(|&(_, &maximum)| maximum >= bound) {
            values.extend(self.scaled(block).0.iter().filter(|&&score| score >= bound));
        }
        let nth = if values.len() < count {
            least
        } else {
            *values.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
        };
        self.scratch.values = values;
        nth
    }

    /// The threshold of the fewest greatest scores, all at least `least`, whose masses reach `share` of their sum.
    #[inline(always)]
    fn top_p(&mut self, share: f32, least: f32) -> Threshold {
        let mut candidates = core::mem::take(&mut self.scratch.candidates);
        let floor = self.floor(share, least);
        let total = self.gather(least, floor, &mut candidates);
        // Above zero, so that a share of 0 still needs the greatest score.
        let target = (f64::from(share) * total).max(f64::MIN_POSITIVE);
        // The greatest score is 0; the bracket begins with everything.
        let mut bracket = Bracket { low: floor, high: f32::MIN_POSITIVE, mass_above: 0.0 };
        for _ in 0..MAX_PASSES {
            if candidates.count <= MAX_SORTED {
                break;
            }
            bracket = self.narrow(bracket, target, &mut candidates);
        }
        self.scratch.candidates = candidates;
        self.cut(bracket, target)
    }

    /// A score below which the cut cannot lie: even if every token had such a score, together they would hold less than
    /// the share that is cut off, so the sum of the others reaches its target. Uses the sum of the block maxima as a
    /// lower bound of the total; the margin covers the rounding of the masses.
    #[inline(always)]
    fn floor(&self, share: f32, least: f32) -> f32 {
        let simd = self.simd;
        let mut sums = simd.zero_sums();
        for (vector, first) in (0..self.maxima.len()).step_by(S::LANES).enumerate() {
            let count = (self.maxima.len() - first).min(S::LANES);
            // SAFETY: `count` maxima remain.
            let maximum = unsafe { simd.load_partial(self.maxima.as_ptr().add(first), count) };
            let counted =
                simd.select(simd.less(maximum, simd.splat(least)), simd.splat(0.0), exact::exp(simd, maximum));
            sums = simd.add_to_sums(sums, vector, simd.select(simd.lane_range(0, count), counted, simd.splat(0.0)));
        }
        let cut_each = (1.0 - f64::from(share)) * simd.total_of_sums(sums) / self.scores.vocabulary() as f64;
        (cut_each.ln() as f32 - 1e-3).max(least)
    }

    /// Collects the scores of at least `floor` with their masses e^score, and returns the sum of the masses of all
    /// scores of at least `least`.
    #[inline(always)]
    fn gather(&self, least: f32, floor: f32, candidates: &mut Candidates) -> f64 {
        let simd = self.simd;
        let room = self.maxima.len() * BLOCK_TOKENS + S::LANES;
        if candidates.scores.len() < room {
            candidates.scores.resize(room, 0.0);
            candidates.masses.resize(room, 0.0);
        }
        let mut count = 0;
        let mut sums = simd.zero_sums();
        // Blocks left out would add zeros, which change no bit.
        for (block, _) in self.maxima.iter().enumerate().filter(|&(_, &maximum)| maximum >= least) {
            let source = self.scores.block(block);
            for (vector, offset) in (0..BLOCK_TOKENS).step_by(S::LANES).enumerate() {
                // SAFETY: a block has 64 values; at most one candidate per score so far is stored, and a vector beyond.
                unsafe {
                    let score = self.scale.apply_vector(simd, simd.load(source.add(offset)));
                    let below = simd.less(score, simd.splat(least));
                    let mass = simd.select(below, simd.splat(0.0), exact::exp(simd, score));
                    sums = simd.add_to_sums(sums, vector, mass);
                    let near = simd.less_equal(simd.splat(floor), score);
                    simd.store_selected(candidates.masses.as_mut_ptr().add(count), mass, near);
                    count += simd.store_selected(candidates.scores.as_mut_ptr().add(count), score, near);
                }
            }
        }
        candidates.count = count;
        simd.total_of_sums(sums)
    }

    /// Finds the part of the bracket, between neighbouring pivots, in which the sum reaches the target, and drops the
    /// candidates outside of it.
    #[inline(always)]
    fn narrow(&self, bracket: Bracket, target: f64, candidates: &mut Candidates) -> Bracket {
        let simd = self.simd;
        let step = (bracket.high - bracket.low) / (PIVOTS + 1) as f32;
        let pivots: [f32; PIVOTS] = core::array::from_fn(|pivot| bracket.low + step * (pivot + 1) as f32);
        let mut sums = [simd.zero_sums(); PIVOTS];
        for (vector, first) in (0..candidates.count).step_by(S::LANES).enumerate() {
            let inside = simd.lane_range(0, (candidates.count - first).min(S::LANES));
            // SAFETY: the arrays have a vector of slack.
            unsafe {
                let score = simd.load(candidates.scores.as_ptr().add(first));
                let mass = simd.load(candidates.masses.as_ptr().add(first));
                let mass = simd.select(inside, mass, simd.splat(0.0));
                for (sums, &pivot) in sums.iter_mut().zip(&pivots) {
                    let counted = simd.select(simd.less(score, simd.splat(pivot)), simd.splat(0.0), mass);
                    *sums = simd.add_to_sums(*sums, vector, counted);
                }
            }
        }
        let mut narrowed = bracket;
        for (sums, pivot) in sums.into_iter().zip(pivots) {
            let mass = bracket.mass_above + simd.total_of_sums(sums);
            if mass >= target {
                narrowed.low = pivot;
            } else {
                narrowed.high = pivot;
                narrowed.mass_above = mass;
                break;
            }
        }
        self.keep_inside(narrowed, candidates);
        narrowed
    }

    /// Drops the candidates outside of the bracket, in place.
    #[inline(always)]
    fn keep_inside(&self, bracket: Bracket, candidates: &mut Candidates) {
        let simd = self.simd;
        let mut count = 0;
        for first in (0..candidates.count).step_by(S::LANES) {
            let left = (candidates.count - first).min(S::LANES);
            // SAFETY: the arrays have a vector of slack, and writing never overtakes reading.
            unsafe {
                let score = simd.load(candidates.scores.as_ptr().add(first));
                let mass = simd.load(candidates.masses.as_ptr().add(first));
                // Lanes past the count hold old scores; they are made to lie above the bracket.
                let score = simd.select(simd.lane_range(0, left), score, simd.splat(f32::MAX));
                let reached =
                    simd.select(simd.less(score, simd.splat(bracket.high)), score, simd.splat(f32::NEG_INFINITY));
                let inside = simd.less_equal(simd.splat(bracket.low), reached);
                simd.store_selected(candidates.masses.as_mut_ptr().add(count), mass, inside);
                count += simd.store_selected(candidates.scores.as_mut_ptr().add(count), score, inside);
            }
        }
        candidates.count = count;
    }

    /// Adds up the scores of the bracket from the greatest, the lower id first among equals, and cuts where the sum
    /// reaches the target.
    #[inline(always)]
    fn cut(&mut self, bracket: Bracket, target: f64) -> Threshold {
        let mut entries = core::mem::take(&mut self.scratch.entries);
        entries.clear();
        for (block, _) in self.maxima.iter().enumerate().filter(|&(_, &maximum)| maximum >= bracket.low) {
            let scaled = self.scaled(block);
            for offset in (0..BLOCK_TOKENS).step_by(S::LANES) {
                // SAFETY: a block has 64 values.
                let score = unsafe { self.simd.load(scaled.0.as_ptr().add(offset)) };
                let above_low = self.simd.mask_bits(self.simd.less_equal(self.simd.splat(bracket.low), score));
                let mut inside = above_low & self.simd.mask_bits(self.simd.less(score, self.simd.splat(bracket.high)));
                while inside != 0 {
                    let at = offset + inside.trailing_zeros() as usize;
                    inside &= inside - 1;
                    entries.push((scaled.0[at], (block * BLOCK_TOKENS + at) as u32));
                }
            }
        }
        entries.sort_unstable_by(most_likely_first);
        // Only rounding can leave the target unreached; then everything above the floor is needed.
        let mut threshold = Threshold { value: bracket.low, last_tied: u32::MAX };
        let mut mass = bracket.mass_above;
        for &(score, token) in &entries {
            threshold = Threshold { value: score, last_tied: token };
            mass += f64::from(exact::exp_scalar(score));
            if mass >= target {
                break;
            }
        }
        self.scratch.entries = entries;
        threshold
    }
}
