//! Brings a tile's keys and values from the paged region into the layout of the micro-kernels.
//! Keys are transposed to `[unit][token]`, values become `[token unit][dim]` with bf16 tokens interleaved in pairs, so
//! that lanes are tokens (scores) or dimensions (sums) and no sum across lanes is ever needed. O(tokens x head size);
//! the cost is shared by all query vectors of the tile. Tokens outside the wanted range are never read.
//! While a tile is packed, the one after it is prefetched into the second-level cache: decode over more than the third
//! level then runs at 26 GB/s where a plain sum of the same bytes in the same order gives 20; prefetched into the first
//! level it ran at 15, because that cache has few places for lines under way.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use super::TILE_TOKENS;
use crate::element::Bf16;
use crate::kv_format::{KvFormat, Stored, load_stored, load_stored_partial};
use crate::kv_region::RUN_TOKENS;
use crate::simd::Simd;
use core::ops::Range;

/// Of a row that has one.
const SCALE_BYTES: usize = KvFormat::Bytes.scale_elements();
/// Bytes that are transposed as one.
const BYTES_OF_UNIT: usize = 4;
/// Runs of a tile.
pub(super) const TILE_RUNS: usize = TILE_TOKENS / RUN_TOKENS;
/// A row of zeros as long as the longest head, for tokens outside the wanted range.
static ZEROS: [u32; 256] = [0; 256];

/// Where the keys of a tile lie for one kv head; values are `to_value` elements further.
#[derive(Clone, Copy)]
pub(super) struct TileRows<K> {
    /// The first key of every run of 8 tokens that holds a wanted token.
    runs: [*const K; TILE_RUNS],
    to_value: usize,
    head_dim: usize,
    from: usize,
    to: usize,
}

impl<K: Stored> TileRows<K> {
    /// A tile of which no token is wanted.
    pub(super) fn new(to_value: usize, head_dim: usize) -> Self {
        Self { runs: [core::ptr::null(); TILE_RUNS], to_value, head_dim, from: 0, to: 0 }
    }

    /// Wants a range of the tile's tokens, of which every run must be given by [`Self::set_run`].
    pub(super) fn want(&mut self, tokens: Range<usize>) {
        (self.from, self.to) = (tokens.start, tokens.end);
    }

    /// Tells where the 8 tokens from `8 run` lie.
    #[inline(always)]
    pub(super) fn set_run(&mut self, run: usize, key: *const K) {
        self.runs[run] = key;
    }

    /// The same tokens of another head, `elements` further.
    #[inline(always)]
    pub(super) fn shifted(mut self, elements: usize) -> Self {
        for run in &mut self.runs {
            *run = run.wrapping_add(elements);
        }
        self
    }

    /// Tokens of the tile that are wanted.
    #[inline(always)]
    pub(super) fn tokens(&self) -> Range<usize> {
        self.from..self.to
    }

    #[inline(always)]
    fn key(&self, token: usize) -> *const K {
        if token >= self.from && token < self.to {
            self.runs[token / RUN_TOKENS].wrapping_add(token % RUN_TOKENS * self.head_dim)
        } else {
            ZEROS.as_ptr().cast()
        }
    }

    #[inline(always)]
    fn value(&self, token: usize) -> *const K {
        let key = self.key(token);
        if core::ptr::eq(key.cast(), ZEROS.as_ptr()) { key } else { key.wrapping_add(self.to_value) }
    }

    /// Copies the scales of the wanted tokens' keys and values; those of others are zero.
    ///
    /// # Safety
    /// Both targets hold `TILE_TOKENS` f32; rows have scales.
    #[inline(always)]
    pub(super) unsafe fn copy_scales(&self, keys: *mut f32, values: *mut f32) {
        // SAFETY: the scales of a run follow its rows.
        unsafe {
            for (target, further) in [(keys, 0), (values, self.to_value)] {
                if self.tokens().len() < TILE_TOKENS {
                    target.write_bytes(0, TILE_TOKENS);
                }
                for run in self.from / RUN_TOKENS..self.to.div_ceil(RUN_TOKENS) {
                    let first = self.from.max(run * RUN_TOKENS);
                    let end = self.to.min((run + 1) * RUN_TOKENS);
                    let scales = self.runs[run].add(further + RUN_TOKENS * self.head_dim).cast::<u8>();
                    let scales = scales.add(first % RUN_TOKENS * SCALE_BYTES);
                    core::ptr::copy_nonoverlapping(scales, target.add(first).cast(), (end - first) * SCALE_BYTES);
                }
            }
        }
    }

    /// Where the key of the first token of a run lies, and its value; all tokens of the run are wanted.
    #[inline(always)]
    pub(super) fn run(&self, run: usize) -> (*const K, *const K) {
        (self.runs[run], self.runs[run].wrapping_add(self.to_value))
    }

    /// Hints that the next tile's run of keys will be read soon.
    #[inline(always)]
    pub(super) fn prefetch_keys<S: Simd>(&self, simd: S, run: usize) {
        self.prefetch_run(simd, run, 0);
    }

    /// The same for values.
    #[inline(always)]
    pub(super) fn prefetch_values<S: Simd>(&self, simd: S, run: usize) {
        self.prefetch_run(simd, run, self.to_value);
    }

    /// Hints that a run of keys (or values, `offset` elements further) will be read soon.
    #[inline(always)]
    fn prefetch_run<S: Simd>(&self, simd: S, run: usize, offset: usize) {
        if run * RUN_TOKENS < self.to && (run + 1) * RUN_TOKENS > self.from {
            let start = self.runs[run].wrapping_add(offset).cast::<u8>();
            let bytes = RUN_TOKENS * (self.head_dim * size_of::<K>() + SCALE_BYTES * usize::from(K::IS_BYTES));
            let mut line = 0;
            while line < bytes {
                simd.prefetch(start.wrapping_add(line));
                line += 64;
            }
        }
    }

    /// Writes `keys[unit * TILE_TOKENS + token]` for the wanted tokens, rounded out to whole vectors of tokens.
    ///
    /// # Safety
    /// `keys` holds `units x TILE_TOKENS` words; `staged` holds `LANES x head_dim` words and a vector of slack.
    #[inline(always)]
    pub(super) unsafe fn pack_keys<S: Simd, const PAIRS: bool>(
        &self,
        simd: S,
        keys: *mut u32,
        staged: *mut u32,
        next: &Self,
    ) {
        let units = if PAIRS { self.head_dim / 2 } else { self.head_dim };
        let mut group = self.from / S::LANES * S::LANES;
        while group < self.to {
            for run in group / RUN_TOKENS..(group + S::LANES) / RUN_TOKENS {
                next.prefetch_keys(simd, run);
            }
            let whole = group >= self.from && group + S::LANES <= self.to;
            if whole && K::IS_BYTES && self.head_dim.is_multiple_of(4 * BYTES_OF_UNIT) {
                // SAFETY: the caller's promise; the wanted rows hold `head_dim` bytes.
                unsafe { self.pack_bytes::<S, PAIRS>(simd, group, keys.add(group), staged) };
                group += S::LANES;
                continue;
            }
            let mut bases = [ZEROS.as_ptr(); 4];
            // SAFETY: every base is followed by three more rows of `units` words; the target is the caller's promise.
            unsafe {
                if whole && !K::IS_BYTES && K::IS_BF16 == PAIRS {
                    for (half_run, base) in bases.iter_mut().enumerate().take(S::LANES / 4) {
                        *base = self.key(group + 4 * half_run).cast();
                    }
                } else {
                    self.stage::<S, PAIRS>(simd, group, units, staged);
                    for (half_run, base) in bases.iter_mut().enumerate().take(S::LANES / 4) {
                        *base = staged.add(4 * half_run * units);
                    }
                }
                let mut target = keys.add(group);
                let end = target.wrapping_add(units * TILE_TOKENS);
                while target < end {
                    simd.transpose_units(bases, units, target, TILE_TOKENS);
                    bases = bases.map(|base| base.wrapping_add(4));
                    target = target.wrapping_add(4 * TILE_TOKENS);
                }
            }
            group += S::LANES;
        }
    }

    /// As [`Self::pack_keys`] for a whole vector of tokens: four bytes are a unit until they are in their lane, so that
    /// a quarter (half for pairs) as much is transposed.
    ///
    /// # Safety
    /// As [`Self::pack_keys`]; all tokens from `group` are wanted.
    #[inline(always)]
    unsafe fn pack_bytes<S: Simd, const PAIRS: bool>(&self, simd: S, group: usize, target: *mut u32, staged: *mut u32) {
        let mut bases = [ZEROS.as_ptr(); 4];
        for (half_run, base) in bases.iter_mut().enumerate().take(S::LANES / 4) {
            *base = self.key(group + 4 * half_run).cast();
        }
        let mut target = target;
        // SAFETY: rows are `head_dim` bytes, four units of them per turn; each turn writes as many units as it has bytes
        // (half for pairs).
        unsafe {
            for _ in 0..self.head_dim / (4 * BYTES_OF_UNIT) {
                simd.transpose_units(bases, self.head_dim / BYTES_OF_UNIT, staged, S::LANES);
                bases = bases.map(|base| base.wrapping_add(4));
                for unit in 0..4 {
                    let bytes = simd.load_u32(staged.add(unit * S::LANES));
                    let codes = [
                        signed_byte::<S, 24>(simd, bytes),
                        signed_byte::<S, 16>(simd, bytes),
                        signed_byte::<S, 8>(simd, bytes),
                        signed_byte::<S, 0>(simd, bytes),
                    ];
                    if PAIRS {
                        simd.store_u32(target, pair(simd, codes[0], codes[1]));
                        simd.store_u32(target.add(TILE_TOKENS), pair(simd, codes[2], codes[3]));
                        target = target.wrapping_add(2 * TILE_TOKENS);
                    } else {
                        for code in codes {
                            simd.store(target.cast(), code);
                            target = target.wrapping_add(TILE_TOKENS);
                        }
                    }
                }
            }
        }
    }

    /// Copies `LANES` keys side by side, widened to f32 unless they stay pairs; unwanted ones as zeros.
    ///
    /// # Safety
    /// As [`Self::pack_keys`].
    #[inline(always)]
    unsafe fn stage<S: Simd, const PAIRS: bool>(&self, simd: S, group: usize, units: usize, staged: *mut u32) {
        for lane in 0..S::LANES {
            // SAFETY: a key (or the zeros) holds `head_dim` elements; rows are staged in ascending order, so that the
            // padding of one is overwritten by the next.
            unsafe { pack_row::<S, K, PAIRS>(simd, self.key(group + lane), staged.add(lane * units), self.head_dim) };
        }
    }

    /// Writes `values[token unit * padded_dim + dim]` for the wanted tokens; dimensions past the head are zero.
    ///
    /// # Safety
    /// `values` holds `token units x padded_dim` words, `padded_dim` being `head_dim` rounded up to whole vectors.
    #[inline(always)]
    pub(super) unsafe fn pack_values<S: Simd, const PAIRS: bool>(
        &self,
        simd: S,
        values: *mut u32,
        padded_dim: usize,
        next: &Self,
    ) {
        for run in self.from / RUN_TOKENS..self.to.div_ceil(RUN_TOKENS) {
            next.prefetch_values(simd, run);
            let (first, end) = (run * RUN_TOKENS, (run + 1) * RUN_TOKENS);
            // SAFETY: reads stay within `head_dim`, writes within `padded_dim` of a wanted token's unit.
            unsafe {
                if PAIRS {
                    let (first, end) = (first.max(self.from / 2 * 2), end.min(self.to.next_multiple_of(2)));
                    let mut target = values.add(first / 2 * padded_dim);
                    for token in (first..end).step_by(2) {
                        let (even, odd) = (self.value(token), self.value(token + 1));
                        if K::IS_BF16 {
                            interleave_row(simd, even.cast(), odd.cast(), target, self.head_dim, padded_dim);
                        } else {
                            pair_rows(simd, even, odd, target, self.head_dim);
                        }
                        target = target.wrapping_add(padded_dim);
                    }
                } else {
                    for token in first.max(self.from)..end.min(self.to) {
                        widen_row(simd, self.value(token), values.add(token * padded_dim).cast(), self.head_dim);
                    }
                }
            }
        }
    }
}

/// Writes two rows of bf16 as pairs `(even[dim], odd[dim])`, padded with zeros.
///
/// # Safety
/// `even` and `odd` hold `head_dim` elements, `target` `padded_dim` words.
#[inline(always)]
unsafe fn interleave_row<S: Simd>(
    simd: S,
    even: *const Bf16,
    odd: *const Bf16,
    target: *mut u32,
    head_dim: usize,
    padded_dim: usize,
) {
    let width = 2 * S::LANES;
    let mut dim = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while dim + width <= head_dim {
            let (low, high) = simd.interleave_bf16(even.add(dim), odd.add(dim), width);
            simd.store_u32(target.add(dim), low);
            simd.store_u32(target.add(dim + S::LANES), high);
            dim += width;
        }
        if dim < head_dim {
            let (low, high) = simd.interleave_bf16(even.add(dim), odd.add(dim), head_dim - dim);
            simd.store_u32(target.add(dim), low);
            if dim + S::LANES < padded_dim {
                simd.store_u32(target.add(dim + S::LANES), high);
            }
        }
    }
}

/// Writes two rows of bytes as pairs of bf16 `(even[dim], odd[dim])`, padded with zeros to a whole vector.
///
/// # Safety
/// `even` and `odd` hold `head_dim` elements, `target` `head_dim` rounded up to whole vectors.
#[inline(always)]
unsafe fn pair_rows<S: Simd, K: Stored>(simd: S, even: *const K, odd: *const K, target: *mut u32, head_dim: usize) {
    let whole = head_dim - head_dim % S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        for dim in (0..whole).step_by(S::LANES) {
            let (low, high) = (load_stored(simd, even.add(dim)), load_stored(simd, odd.add(dim)));
            simd.store_u32(target.add(dim), pair(simd, low, high));
        }
        if whole < head_dim {
            let rest = head_dim - whole;
            let low = load_stored_partial(simd, even.add(whole), rest);
            let high = load_stored_partial(simd, odd.add(whole), rest);
            simd.store_u32(target.add(whole), pair(simd, low, high));
        }
    }
}

/// The byte of every lane that `LEFT` more would shift out, as f32.
#[inline(always)]
fn signed_byte<S: Simd, const LEFT: u32>(simd: S, bytes: S::U32) -> S::F32 {
    simd.i32_to_f32(simd.shift_right_signed::<24>(simd.shift_left::<LEFT>(bytes)))
}

/// Two f32 that bf16 holds exactly, as a pair of these.
#[inline(always)]
fn pair<S: Simd>(simd: S, low: S::F32, high: S::F32) -> S::U32 {
    let high = simd.and_u32(simd.f32_to_bits(high), simd.splat_u32(0xffff_0000));
    simd.xor_u32(simd.shift_right::<16>(simd.f32_to_bits(low)), high)
}

/// Copies one head's row as f32, padding it with zeros to a whole vector.
///
/// # Safety
/// `source` holds `head_dim` elements, `target` `head_dim` rounded up to whole vectors.
#[inline(always)]
unsafe fn widen_row<S: Simd, K: Stored>(simd: S, source: *const K, target: *mut f32, head_dim: usize) {
    let mut dim = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while dim + S::LANES <= head_dim {
            simd.store(target.add(dim), load_stored(simd, source.add(dim)));
            dim += S::LANES;
        }
        if dim < head_dim {
            simd.store(target.add(dim), load_stored_partial(simd, source.add(dim), head_dim - dim));
        }
    }
}

/// Writes one query vector (or staged key) as units: f32, or pairs of bf16, which hold bytes exactly.
///
/// # Safety
/// `source` holds `head_dim` elements; `target` holds as many words (half for pairs) rounded up to a whole vector.
#[inline(always)]
pub(super) unsafe fn pack_row<S: Simd, K: Stored, const PAIRS: bool>(
    simd: S,
    source: *const K,
    target: *mut u32,
    head_dim: usize,
) {
    // SAFETY: the caller's promise; pairs of bf16 are the elements' own bytes.
    unsafe {
        if PAIRS && K::IS_BF16 {
            core::ptr::copy_nonoverlapping(source.cast::<Bf16>(), target.cast::<Bf16>(), head_dim);
        } else if PAIRS {
            let target = target.cast::<Bf16>();
            let whole = head_dim - head_dim % S::LANES;
            for dim in (0..whole).step_by(S::LANES) {
                simd.store_bf16(target.add(dim), load_stored(simd, source.add(dim)));
            }
            if whole < head_dim {
                let rest = head_dim - whole;
                simd.store_bf16_partial(target.add(whole), load_stored_partial(simd, source.add(whole), rest), rest);
            }
        } else {
            widen_row(simd, source, target.cast(), head_dim);
        }
    }
}
