//! The vectors of the AVX2 level: eight lanes with fused multiply-add.
//! A token of this type proves AVX2 and FMA. Masks are full-width vectors whose sign bits hold the truth.
//! Partial bf16 loads and stores go through a stack buffer, because AVX2 has no 16-bit masked ones; they are off the
//! hot paths (head dimensions are multiples of eight).
#![expect(unsafe_code, reason = "vendor intrinsics")]

use super::{Simd, total_of_sixteen};
use crate::element::Bf16;
#[allow(clippy::wildcard_imports, reason = "intrinsics are named after their set")]
use core::arch::x86_64::*;

/// Token of the AVX2 level.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The machine must have AVX2 and FMA.
    #[inline(always)]
    pub(crate) const unsafe fn assume() -> Self {
        Self(())
    }
}

/// Calls an intrinsic whose instructions `self` proves to exist.
macro_rules! proven {
    ($expression:expr) => {
        // SAFETY: a token exists only where detection found the instructions; pointers are the caller's promise.
        unsafe { $expression }
    };
}

/// All ones in the first `count` lanes.
#[inline(always)]
fn first(count: usize) -> __m256i {
    proven!(_mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0)))
}

/// Widens 8 bf16 to f32.
#[inline(always)]
fn widen(half: __m128i) -> __m256 {
    proven!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
}

/// Rounds 8 f32 to bf16.
#[inline(always)]
fn narrow(value: __m256) -> __m128i {
    proven!({
        let bits = _mm256_castps_si256(value);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let words = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
    })
}

/// Folds 8 lanes to one in the order 4, 2, 1 apart, with an intrinsic on four lanes.
macro_rules! reduce {
    ($value:expr, $fold:ident) => {
        proven!({
            let quarter = $fold(_mm256_castps256_ps128($value), _mm256_extractf128_ps::<1>($value));
            let pair = $fold(quarter, _mm_movehl_ps(quarter, quarter));
            _mm_cvtss_f32($fold(pair, _mm_shuffle_ps::<1>(pair, pair)))
        })
    };
}

/// Four consecutive words of one row behind each of the first two bases, so that a 4x4 transposition of every half
/// leaves the rows in order. A function and not a closure, because a closure would be compiled for the baseline.
///
/// # Safety
/// Both bases are valid for 4 words at `offset`.
#[inline(always)]
unsafe fn halves(bases: [*const u32; 4], offset: usize) -> __m256i {
    proven!({
        let low = _mm_loadu_si128(bases[0].add(offset).cast());
        let high = _mm_loadu_si128(bases[1].add(offset).cast());
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
    })
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const BF16_DOT: bool = false;
    type F32 = __m256;
    type U32 = __m256i;
    type Mask = __m256;
    type Sums = [__m256d; 4];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        proven!(_mm256_set1_ps(value))
    }
    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> Self::F32 {
        proven!(_mm256_loadu_ps(source))
    }
    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: Self::F32) {
        proven!(_mm256_storeu_ps(target, value));
    }
    #[inline(always)]
    unsafe fn load_partial(self, source: *const f32, count: usize) -> Self::F32 {
        proven!(_mm256_maskload_ps(source, first(count)))
    }
    #[inline(always)]
    unsafe fn store_partial(self, target: *mut f32, value: Self::F32, count: usize) {
        proven!(_mm256_maskstore_ps(target, first(count), value));
    }
    #[inline(always)]
    unsafe fn load_bf16(self, source: *const Bf16) -> Self::F32 {
        proven!(widen(_mm_loadu_si128(source.cast())))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, target: *mut Bf16, value: Self::F32) {
        proven!(_mm_storeu_si128(target.cast(), narrow(value)));
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(self, source: *const Bf16, count: usize) -> Self::F32 {
        let mut buffer = [Bf16::default(); 8];
        proven!({
            core::ptr::copy_nonoverlapping(source, buffer.as_mut_ptr(), count);
            self.load_bf16(buffer.as_ptr())
        })
    }
    #[inline(always)]
    unsafe fn store_bf16_partial(self, target: *mut Bf16, value: Self::F32, count: usize) {
        let mut buffer = [Bf16::default(); 8];
        proven!({
            self.store_bf16(buffer.as_mut_ptr(), value);
            core::ptr::copy_nonoverlapping(buffer.as_ptr(), target, count);
        });
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        proven!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn split_exponent(self, a: Self::F32) -> (Self::F32, Self::F32) {
        proven!({
            // In this order a NaN stays.
            let a = _mm256_max_ps(_mm256_set1_ps(-126.0), a);
            let whole = _mm256_floor_ps(a);
            (_mm256_sub_ps(a, whole), whole)
        })
    }
    #[inline(always)]
    fn exp2_scale(self, value: Self::F32, exponent: Self::F32) -> Self::F32 {
        proven!({
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
            _mm256_mul_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
        })
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F32) -> f32 {
        reduce!(a, _mm_add_ps)
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F32) -> f32 {
        reduce!(a, _mm_max_ps)
    }

    #[inline(always)]
    fn less(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        proven!(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn less_equal(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        proven!(_mm256_cmp_ps::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm256_blendv_ps(b, a, mask))
    }
    #[inline(always)]
    fn mask_bits(self, mask: Self::Mask) -> u32 {
        proven!(_mm256_movemask_ps(mask) as u32)
    }
    #[inline(always)]
    unsafe fn store_selected(self, target: *mut f32, value: Self::F32, mask: Self::Mask) -> usize {
        let (mut lanes, bits) = ([0.0; 8], self.mask_bits(mask));
        proven!({
            self.store(lanes.as_mut_ptr(), value);
            let mut count = 0;
            for (lane, value) in lanes.into_iter().enumerate() {
                *target.add(count) = value;
                count += (bits >> lane & 1) as usize;
            }
            count
        })
    }
    #[inline(always)]
    fn lane_range(self, from: usize, to: usize) -> Self::Mask {
        proven!(_mm256_castsi256_ps(_mm256_andnot_si256(first(from), first(to))))
    }

    #[inline(always)]
    fn splat_u32(self, value: u32) -> Self::U32 {
        proven!(_mm256_set1_epi32(value as i32))
    }
    #[inline(always)]
    unsafe fn load_u32(self, source: *const u32) -> Self::U32 {
        proven!(_mm256_loadu_si256(source.cast()))
    }
    #[inline(always)]
    unsafe fn store_u32(self, target: *mut u32, value: Self::U32) {
        proven!(_mm256_storeu_si256(target.cast(), value));
    }
    #[inline(always)]
    fn add_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn and_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn xor_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm256_xor_si256(a, b))
    }
    #[inline(always)]
    fn shift_left<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        proven!(_mm256_sll_epi32(a, _mm_cvtsi32_si128(BITS as i32)))
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        proven!(_mm256_srl_epi32(a, _mm_cvtsi32_si128(BITS as i32)))
    }
    #[inline(always)]
    fn shift_right_signed<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        proven!(_mm256_sra_epi32(a, _mm_cvtsi32_si128(BITS as i32)))
    }
    #[inline(always)]
    fn mul_wide(self, a: Self::U32, b: Self::U32) -> (Self::U32, Self::U32) {
        proven!({
            let even = _mm256_mul_epu32(a, b);
            let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), _mm256_srli_epi64::<32>(b));
            let high = _mm256_blend_epi32::<0xaa>(_mm256_srli_epi64::<32>(even), odd);
            let low = _mm256_blend_epi32::<0xaa>(even, _mm256_slli_epi64::<32>(odd));
            (high, low)
        })
    }
    #[inline(always)]
    fn less_equal_u32(self, a: Self::U32, b: Self::U32) -> Self::Mask {
        proven!(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_min_epu32(a, b), a)))
    }
    #[inline(always)]
    fn f32_to_bits(self, a: Self::F32) -> Self::U32 {
        proven!(_mm256_castps_si256(a))
    }
    #[inline(always)]
    fn bits_to_f32(self, a: Self::U32) -> Self::F32 {
        proven!(_mm256_castsi256_ps(a))
    }
    #[inline(always)]
    fn i32_to_f32(self, a: Self::U32) -> Self::F32 {
        proven!(_mm256_cvtepi32_ps(a))
    }

    #[inline(always)]
    fn zero_sums(self) -> Self::Sums {
        proven!([_mm256_setzero_pd(); 4])
    }
    #[inline(always)]
    fn add_to_sums(self, sums: Self::Sums, vector: usize, value: Self::F32) -> Self::Sums {
        proven!({
            let low = _mm256_cvtps_pd(_mm256_castps256_ps128(value));
            let high = _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(value));
            let [s0, s1, s2, s3] = sums;
            if vector.is_multiple_of(2) {
                [_mm256_add_pd(s0, low), _mm256_add_pd(s1, high), s2, s3]
            } else {
                [s0, s1, _mm256_add_pd(s2, low), _mm256_add_pd(s3, high)]
            }
        })
    }
    #[inline(always)]
    fn total_of_sums(self, sums: Self::Sums) -> f64 {
        let mut lanes = [0.0; 16];
        for (part, sum) in sums.into_iter().enumerate() {
            proven!(_mm256_storeu_pd(lanes.as_mut_ptr().add(4 * part), sum));
        }
        total_of_sixteen(lanes)
    }

    #[inline(always)]
    fn dot_bf16(self, _: Self::F32, _: Self::U32, _: Self::U32) -> Self::F32 {
        unreachable!("guarded by BF16_DOT")
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::U32, unsigned: Self::U32, signed: Self::U32) -> Self::U32 {
        // Bytes 0 and 2 of every lane, then 1 and 3, as 16-bit numbers: the instruction for bytes would saturate.
        proven!({
            let low = _mm256_madd_epi16(
                _mm256_and_si256(unsigned, _mm256_set1_epi32(0x00ff_00ff)),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed)),
            );
            let high = _mm256_madd_epi16(_mm256_srli_epi16::<8>(unsigned), _mm256_srai_epi16::<8>(signed));
            _mm256_add_epi32(sum, _mm256_add_epi32(low, high))
        })
    }
    #[inline(always)]
    unsafe fn store_signed_bytes(self, target: *mut i8, value: Self::F32) {
        proven!({
            let words = _mm256_cvtps_epi32(value);
            let halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storel_epi64(target.cast(), _mm_packs_epi16(halves, halves));
        });
    }
    #[inline(always)]
    unsafe fn load_signed_bytes(self, source: *const i8) -> Self::F32 {
        proven!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(source.cast()))))
    }
    #[inline(always)]
    unsafe fn interleave_bf16(self, _: *const Bf16, _: *const Bf16, _: usize) -> (Self::U32, Self::U32) {
        unreachable!("guarded by BF16_DOT")
    }
    #[inline(always)]
    unsafe fn transposed_units(self, bases: [*const u32; 4], row_words: usize) -> [Self::U32; 4] {
        proven!({
            let (r0, r1, r2, r3) = (
                halves(bases, 0),
                halves(bases, row_words),
                halves(bases, 2 * row_words),
                halves(bases, 3 * row_words),
            );
            let (a, b) = (_mm256_unpacklo_epi32(r0, r1), _mm256_unpackhi_epi32(r0, r1));
            let (c, d) = (_mm256_unpacklo_epi32(r2, r3), _mm256_unpackhi_epi32(r2, r3));
            [
                _mm256_unpacklo_epi64(a, c),
                _mm256_unpackhi_epi64(a, c),
                _mm256_unpacklo_epi64(b, d),
                _mm256_unpackhi_epi64(b, d),
            ]
        })
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T1>(address.cast()));
    }
}
