//! Turns min-p, top-k and top-p into one threshold on the scaled scores.
//! A kept token has a score above the threshold, or equal to it and an id not after the last tied one, so the race needs
//! no list. Top-k selects among the scores that reach the k-th greatest block maximum. Top-p sums the survivors, bounds
//! from below the scores that can matter, puts their masses into a histogram and sorts only the bin in which the sum
//! crosses. O(vocabulary) for the sums, the rest is proportional to the survivors. Sums are f64 in one order at every level.
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

/// Bins of the histogram: each spans about a thousandth of the range of scores.
const BINS: usize = 1024;
/// 2^23: added to a small positive f32, it leaves the rounded integer in the low bits.
const INTEGER_BITS: f32 = 8_388_608.0;

/// One block of scaled scores.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Block([f32; BLOCK_TOKENS]);

/// Working memory of the filters.
#[derive(Default)]
pub(super) struct FilterScratch {
    values: Vec<f32>,
    entries: Vec<(f32, u32)>,
    /// Two tables that take turns, so that neighbouring tokens in one bin do not wait for each other's addition.
    masses: Vec<[f64; 2]>,
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

/// How scores from 0 down to `floor` fall into bins.
#[derive(Clone, Copy)]
struct Bins {
    floor: f32,
    /// Bins per unit of score, negative because scores are.
    slope: f32,
}

impl Bins {
    fn new(floor: f32) -> Self {
        // A floor of 0 means that only the greatest score counts; then everything is in bin 0.
        let slope = (BINS - 2) as f32 / floor;
        Self { floor, slope: if slope.is_finite() { slope } else { 0.0 } }
    }

    /// The bin of every lane; lanes below the floor get the floor's.
    #[inline(always)]
    fn index<S: Simd>(self, simd: S, score: S::F32) -> S::U32 {
        let clamped = simd.max(score, simd.splat(self.floor));
        let position = simd.add(simd.mul(clamped, simd.splat(self.slope)), simd.splat(INTEGER_BITS));
        simd.and_u32(simd.f32_to_bits(position), simd.splat_u32(0x007f_ffff))
    }
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
        let total = self.mass_at_least(least);
        let target = f64::from(share) * total;
        // Even if every token lay below this floor, together they would hold less than the share that is cut off, so the
        // sum reaches its target above it. The margin covers the rounding of the masses.
        let cut_each = (1.0 - f64::from(share)) * total / self.scores.vocabulary() as f64;
        let bins = Bins::new((cut_each.ln() as f32 - 1e-3).max(least));
        self.fill_histogram(bins);
        let mut mass = 0.0;
        for bin in 0..BINS {
            let [even, odd] = self.scratch.masses[bin];
            if mass + (even + odd) >= target {
                return self.threshold_in_bin(bins, bin as u32, mass, target);
            }
            mass += even + odd;
        }
        // Only rounding can bring the sum here, with everything above the floor needed.
        Threshold { value: bins.floor, last_tied: u32::MAX }
    }

    /// The sum of e^score over scores of at least `least`.
    #[inline(always)]
    fn mass_at_least(&self, least: f32) -> f64 {
        let simd = self.simd;
        let mut sums = simd.zero_sums();
        // Blocks left out would add zeros, which change no bit.
        for (block, _) in self.maxima.iter().enumerate().filter(|&(_, &maximum)| maximum >= least) {
            let source = self.scores.block(block);
            for (vector, offset) in (0..BLOCK_TOKENS).step_by(S::LANES).enumerate() {
                // SAFETY: a block has 64 values.
                let score = self.scale.apply_vector(simd, unsafe { simd.load(source.add(offset)) });
                let below = simd.less(score, simd.splat(least));
                let mass = simd.select(below, simd.splat(0.0), exact::exp(simd, score));
                sums = simd.add_to_sums(sums, vector, mass);
            }
        }
        simd.total_of_sums(sums)
    }

    #[inline(always)]
    fn fill_histogram(&mut self, bins: Bins) {
        let simd = self.simd;
        self.scratch.masses.clear();
        self.scratch.masses.resize(BINS, [0.0; 2]);
        for block in 0..self.maxima.len() {
            if self.maxima[block] < bins.floor {
                continue;
            }
            let scaled = self.scaled(block);
            let (mut mass, mut bin) = (Block([0.0; BLOCK_TOKENS]), [0; BLOCK_TOKENS]);
            for offset in (0..BLOCK_TOKENS).step_by(S::LANES) {
                // SAFETY: the three arrays hold 64 values.
                unsafe {
                    let score = simd.load(scaled.0.as_ptr().add(offset));
                    let below = simd.less(score, simd.splat(bins.floor));
                    let value = simd.select(below, simd.splat(0.0), exact::exp(simd, score));
                    simd.store(mass.0.as_mut_ptr().add(offset), value);
                    simd.store_u32(bin.as_mut_ptr().add(offset), bins.index(simd, score));
                }
            }
            for (index, (&mass, &bin)) in mass.0.iter().zip(&bin).enumerate() {
                self.scratch.masses[bin as usize % BINS][index % 2] += f64::from(mass);
            }
        }
    }

    /// Finds the token at which the sum, `mass` before this bin, reaches its target.
    #[inline(always)]
    fn threshold_in_bin(&mut self, bins: Bins, bin: u32, mut mass: f64, target: f64) -> Threshold {
        let mut threshold = Threshold { value: bins.floor, last_tied: u32::MAX };
        for &(score, token) in self.entries_in_bin(bins, bin) {
            threshold = Threshold { value: score, last_tied: token };
            mass += f64::from(exact::exp_scalar(score));
            if mass >= target {
                break;
            }
        }
        threshold
    }

    /// The (score, token) of one bin, the greatest first and the lower id first among equals.
    #[inline(always)]
    fn entries_in_bin(&mut self, bins: Bins, bin: u32) -> &[(f32, u32)] {
        let simd = self.simd;
        let mut entries = core::mem::take(&mut self.scratch.entries);
        entries.clear();
        for (block, _) in self.maxima.iter().enumerate().filter(|&(_, &maximum)| maximum >= bins.floor) {
            let scaled = self.scaled(block);
            let mut bin_of = [0; BLOCK_TOKENS];
            for offset in (0..BLOCK_TOKENS).step_by(S::LANES) {
                // SAFETY: both arrays hold 64 values.
                unsafe {
                    let index = bins.index(simd, simd.load(scaled.0.as_ptr().add(offset)));
                    simd.store_u32(bin_of.as_mut_ptr().add(offset), index);
                }
            }
            for (offset, (&score, &bin_of)) in scaled.0.iter().zip(&bin_of).enumerate() {
                if bin_of == bin && score >= bins.floor {
                    entries.push((score, (block * BLOCK_TOKENS + offset) as u32));
                }
            }
        }
        entries.sort_unstable_by(most_likely_first);
        self.scratch.entries = entries;
        &self.scratch.entries
    }
}
