//! The sampler's random numbers: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011), which passes the strictest public batteries, needs no state, and costs about 2 cycles per 32-bit word in 512-bit vectors.
//! The key is the request's seed; the counter names one word: vocabulary id, position, choice and purpose. So a word can
//! be recomputed anywhere, in any order, by any instruction level, and by a rank that holds a part of the vocabulary.
//! A cheaper keyed hash was not taken: the race skips most noise anyway, and the quality of Philox is documented.

use crate::simd::Simd;

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// What a word is drawn for; words of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The race that picks a token.
    Token = 0,
    /// Accepting a drafted token.
    Acceptance = 1,
    /// The race over what is left after a drafted token was rejected.
    Residual = 2,
}

/// The stream of one sampled token: everything but the vocabulary id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoiseKey {
    pub(crate) seed: u64,
    pub(crate) choice: u32,
    pub(crate) position: u32,
    pub(crate) purpose: Purpose,
}

/// The word for one vocabulary id, uniform over all 32-bit values.
///
/// Ids are dealt to counters so that vectors need no shuffling: counter `id / 64 * 16 + id % 16`, word `id / 16 % 4`.
pub fn random_word(seed: u64, choice: u32, position: u32, id: u32, purpose: Purpose) -> u32 {
    let counter = [id / 64 * 16 + id % 16, position, choice, purpose as u32];
    philox4x32(counter, [seed as u32, (seed >> 32) as u32])[(id / 16 % 4) as usize]
}

/// The Philox4x32-10 function.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let first = u64::from(counter[0]) * u64::from(MULTIPLIERS[0]);
        let second = u64::from(counter[2]) * u64::from(MULTIPLIERS[1]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// The words of the ids `64 block + 16 word + first_lane + lane`: one vector for each of the four words.
#[inline(always)]
pub(crate) fn block_words<S: Simd>(simd: S, stream: NoiseKey, block: u32, first_lane: u32) -> [S::U32; 4] {
    const LANES: [u32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    #[expect(unsafe_code, reason = "a vector load")]
    // SAFETY: `LANES` holds 16 words, at least as many as a vector.
    let lanes = unsafe { simd.load_u32(LANES.as_ptr()) };
    let mut counter = [
        simd.add_u32(simd.splat_u32(block * 16 + first_lane), lanes),
        simd.splat_u32(stream.position),
        simd.splat_u32(stream.choice),
        simd.splat_u32(stream.purpose as u32),
    ];
    let mut key = [stream.seed as u32, (stream.seed >> 32) as u32];
    for _ in 0..ROUNDS {
        let (high0, low0) = simd.mul_wide(counter[0], simd.splat_u32(MULTIPLIERS[0]));
        let (high1, low1) = simd.mul_wide(counter[2], simd.splat_u32(MULTIPLIERS[1]));
        counter = [
            simd.xor_u32(simd.xor_u32(high1, counter[1]), simd.splat_u32(key[0])),
            low1,
            simd.xor_u32(simd.xor_u32(high0, counter[3]), simd.splat_u32(key[1])),
            low0,
        ];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

#[cfg(test)]
#[expect(unsafe_code, reason = "vector stores on raw pointers")]
mod tests {
    use super::{NoiseKey, Purpose, block_words, philox4x32, random_word};
    use crate::dispatch::{Kernel, Level};
    use crate::simd::Simd;

    #[test]
    fn known_answers_of_the_authors_are_reproduced() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    struct Words(NoiseKey, u32);

    impl Kernel for Words {
        type Output = [u32; 64];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [u32; 64] {
            let mut words = [0; 64];
            for first in (0..16).step_by(S::LANES) {
                for (word, vector) in block_words(simd, self.0, self.1, first as u32).into_iter().enumerate() {
                    // SAFETY: 16 words starting at `16 word`, of which this vector fills a part.
                    unsafe { simd.store_u32(words.as_mut_ptr().add(16 * word + first), vector) };
                }
            }
            words
        }
    }

    #[test]
    fn vectors_give_the_words_of_the_scalar_function_at_every_level() {
        let stream = NoiseKey { seed: 0x0123_4567_89ab_cdef, choice: 3, position: 77, purpose: Purpose::Residual };
        for level in Level::available() {
            for block in [0, 1, 2000] {
                for (offset, word) in level.run(Words(stream, block)).into_iter().enumerate() {
                    let id = block * 64 + offset as u32;
                    assert_eq!(word, random_word(stream.seed, 3, 77, id, Purpose::Residual), "{level} {id}");
                }
            }
        }
    }
}
