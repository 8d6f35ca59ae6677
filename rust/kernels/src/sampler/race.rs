//! The exponential race: the token with the greatest scaled score plus Gumbel noise is a sample of the softmax
//! (Gumbel 1954; Efraimidis and Spirakis 2006 for the race form). Ties go to the lower id.
//! Noise is made only where it can matter: a block whose maximum plus the greatest possible noise stays below the best
//! key so far is skipped, and in other blocks the logarithms are taken only for words small enough to win. Both are
//! exact: the winner is that of the full race, in every bit. O(vocabulary / 64) for rows with few likely tokens.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use super::BLOCK_TOKENS;
use super::filter::{Scale, Threshold};
use super::philox::{NoiseKey, block_words};
use super::scan::Scores;
use crate::simd::Simd;
use crate::simd::exact::{self, MAX_GUMBEL};

/// Covers the rounding of a key (1e-5 at the magnitudes that can win), of the noise (4e-6) and of the bound below.
const MARGIN: f32 = 1e-3;

/// One row's race.
pub(super) struct Race<'a, S> {
    pub(super) simd: S,
    pub(super) scores: &'a Scores,
    /// Scaled block maxima.
    pub(super) maxima: &'a [f32],
    pub(super) scale: Scale,
    pub(super) threshold: Threshold,
    pub(super) stream: NoiseKey,
}

/// The leader.
#[derive(Clone, Copy)]
struct Best {
    key: f32,
    token: u32,
}

impl<S: Simd> Race<'_, S> {
    /// The winning token. `bounds` is working memory.
    #[inline(always)]
    pub(super) fn run(&self, bounds: &mut Vec<f32>) -> u32 {
        let first = self.maxima.iter().position(|&maximum| maximum >= 0.0).expect("the greatest score is scaled to 0");
        let mut best = Best { key: f32::NEG_INFINITY, token: u32::MAX };
        self.run_block(first, u32::MAX, &mut best);
        // A lane can win only if its noise g satisfies maximum + g >= key. As g <= -ln(v) for the uniform v of its word,
        // that needs v <= e^(maximum - key): a bound that one comparison of integers tests.
        let start = best.key;
        self.bounds(start - MARGIN, bounds);
        let (mut factor, mut factor_key) = (1.0_f32, start);
        for (block, (&maximum, &bound)) in self.maxima.iter().zip(&*bounds).enumerate() {
            if block == first || maximum < self.threshold.value || maximum + MAX_GUMBEL < best.key {
                continue;
            }
            if best.key > factor_key {
                factor_key = best.key;
                factor = (start - factor_key).exp();
            }
            // The cast saturates, which admits every word.
            self.run_block(block, (bound * factor).ceil() as u32, &mut best);
        }
        assert!(best.token != u32::MAX, "the most likely token always takes part");
        best.token
    }

    /// Writes `2^32 e^(maximum - key)` for every block.
    #[inline(always)]
    fn bounds(&self, key: f32, bounds: &mut Vec<f32>) {
        let simd = self.simd;
        bounds.clear();
        bounds.resize(self.maxima.len().next_multiple_of(S::LANES), 0.0);
        for (block, bounds) in (0..).step_by(S::LANES).zip(bounds.chunks_exact_mut(S::LANES)) {
            let count = (self.maxima.len() - block).min(S::LANES);
            // SAFETY: `count` maxima remain; the chunk has `LANES` elements.
            unsafe {
                let maximum = simd.load_partial(self.maxima.as_ptr().add(block), count);
                let bound = exact::exp(simd, simd.sub(maximum, simd.splat(key)));
                simd.store(bounds.as_mut_ptr(), simd.mul(bound, simd.splat(4_294_967_296.0)));
            }
        }
    }

    /// Lets the tokens of a block whose words are at most `cutoff` compete.
    #[inline(always)]
    fn run_block(&self, block: usize, cutoff: u32, best: &mut Best) {
        let simd = self.simd;
        let values = self.scores.block(block);
        for first_lane in (0..16).step_by(S::LANES) {
            let words = block_words(simd, self.stream, block as u32, first_lane as u32);
            for (word, words) in words.into_iter().enumerate() {
                let offset = 16 * word + first_lane;
                let contenders = simd.mask_bits(simd.less_equal_u32(words, simd.splat_u32(cutoff)));
                if contenders == 0 {
                    continue;
                }
                // SAFETY: a block has 64 values.
                let score = self.scale.apply_vector(simd, unsafe { simd.load(values.add(offset)) });
                let key = simd.add(score, exact::gumbel(simd, words));
                let behind = simd.mask_bits(simd.less(key, simd.splat(best.key)));
                let contenders = contenders & !behind;
                if contenders != 0 {
                    self.compete(block * BLOCK_TOKENS + offset, contenders, score, key, best);
                }
            }
        }
    }

    /// Compares the contending lanes one by one.
    #[inline(always)]
    fn compete(&self, first_token: usize, mut contenders: u32, score: S::F32, key: S::F32, best: &mut Best) {
        let (mut scores, mut keys) = ([0.0; 16], [0.0; 16]);
        // SAFETY: both arrays hold the lanes of any level.
        unsafe {
            self.simd.store(scores.as_mut_ptr(), score);
            self.simd.store(keys.as_mut_ptr(), key);
        }
        while contenders != 0 {
            let lane = contenders.trailing_zeros() as usize;
            contenders &= contenders - 1;
            let token = (first_token + lane) as u32;
            let ahead = keys[lane] > best.key || (keys[lane] >= best.key && token < best.token);
            if ahead && self.threshold.keeps(scores[lane], token) {
                *best = Best { key: keys[lane], token };
            }
        }
    }
}
