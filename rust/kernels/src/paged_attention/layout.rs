//! Where the arrays of an attention task lie: in the thread's scratch and in the partial results.
//! Every array begins at a cache line. O(1). Knows sizes only, nothing of what the arrays mean to each other.
#![expect(unsafe_code, reason = "addresses within one buffer")]

use super::TILE_TOKENS;
use super::softmax::SplitResult;
use crate::element::Element;
use crate::scratch::line_rounded;
use crate::simd::Simd;

/// The layout of one vector's partial result: maximum and denominator in a line of their own, then the sums.
#[derive(Clone, Copy)]
pub(super) struct PartialLayout {
    padded_dim: usize,
}

impl PartialLayout {
    pub(super) const fn new(head_dim: usize) -> Self {
        Self { padded_dim: line_rounded(head_dim) }
    }

    pub(super) const fn words(self) -> usize {
        line_rounded(2) + self.padded_dim
    }

    /// # Safety
    /// `base` holds more than `vector` results of [`Self::words`] words.
    #[inline(always)]
    pub(super) unsafe fn result(self, base: *mut u32, vector: usize) -> SplitResult {
        // SAFETY: the caller's promise.
        unsafe {
            let start = base.add(vector * self.words()).cast::<f32>();
            SplitResult { maximum: start, denominator: start.add(1), sums: start.add(line_rounded(2)) }
        }
    }
}

/// Offsets in words of the working arrays in the scratch, each at a cache line.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Words of a query vector: `head_dim`, or half of it for pairs.
    pub(super) units: usize,
    /// `head_dim` rounded up to whole vectors.
    pub(super) padded_dim: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) staged: usize,
    /// Scales of the tile's keys and values, where they have any.
    pub(super) key_scales: usize,
    pub(super) value_scales: usize,
    pub(super) scores: usize,
    pub(super) factors: usize,
    pub(super) maxima: usize,
    pub(super) denominators: usize,
    pub(super) sums: usize,
    pub(super) totals: usize,
    pub(super) words: usize,
}

impl Layout {
    pub(super) fn new<S: Simd, T: Element>(head_dim: usize, vectors: usize) -> Self {
        let pairs = S::BF16_DOT && T::IS_BF16;
        let units = if pairs { head_dim / 2 } else { head_dim };
        let padded_dim = head_dim.next_multiple_of(S::LANES);
        let token_units = if pairs { TILE_TOKENS / 2 } else { TILE_TOKENS };
        let mut words = 0;
        let mut place = |length: usize| {
            let offset = words;
            words += line_rounded(length);
            offset
        };
        Self {
            units,
            padded_dim,
            // One vector of slack, because the last query is written in whole vectors.
            queries: place(vectors * units + S::LANES),
            keys: place(units * TILE_TOKENS),
            values: place(token_units * padded_dim),
            staged: place(S::LANES * head_dim + S::LANES),
            key_scales: place(TILE_TOKENS),
            value_scales: place(TILE_TOKENS),
            scores: place(vectors * TILE_TOKENS),
            // Two vectors of slack, because factors of a head are made in whole vectors wherever they begin.
            factors: place(vectors + S::LANES),
            maxima: place(vectors),
            denominators: place(vectors * S::LANES),
            sums: place(vectors * padded_dim),
            totals: place(vectors * PartialLayout::new(head_dim).words()),
            words,
        }
    }
}
