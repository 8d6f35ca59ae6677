//! The vectors of the two AVX-512 levels: sixteen lanes, with or without bfloat16 dot products.
//! A token of these types proves AVX-512 F, BW, DQ and VL (and BF16 and VNNI for [`Avx512Bf16`]: every processor with the
//! first has the second).
//! VDPBF16PS rounds every product and sum to nearest even and treats denormals as zero, whatever MXCSR says; so does
//! VCVTNEPS2BF16 with denormal inputs, which [`Simd::store_bf16`] uses where it exists.
#![expect(unsafe_code, reason = "vendor intrinsics")]

use super::{Simd, total_of_sixteen};
use crate::element::Bf16;
#[allow(clippy::wildcard_imports, reason = "intrinsics are named after their set")]
use core::arch::x86_64::*;

/// Token of an AVX-512 level.
#[derive(Clone, Copy)]
pub(crate) struct Vectors512<const BF16: bool>(());

/// AVX-512 without bfloat16 instructions.
pub(crate) type Avx512 = Vectors512<false>;
/// AVX-512 with bfloat16 instructions.
pub(crate) type Avx512Bf16 = Vectors512<true>;

impl<const BF16: bool> Vectors512<BF16> {
    /// # Safety
    /// The machine must have AVX-512 F, BW, DQ and VL, and BF16 and VNNI where the parameter says so.
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

#[inline(always)]
fn first(count: usize) -> u16 {
    ((1_u32 << count) - 1) as u16
}

/// Widens 16 bf16 to f32.
#[inline(always)]
fn widen(half: __m256i) -> __m512 {
    proven!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half))))
}

/// Rounds 16 f32 to bf16.
#[inline(always)]
fn narrow<const BF16: bool>(value: __m512) -> __m256i {
    if BF16 {
        // SAFETY: only a token with BF16 calls this variant; both types are 256 plain bits.
        return unsafe { core::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value)) };
    }
    proven!({
        let bits = _mm512_castps_si512(value);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet)))
    })
}

/// Folds 16 lanes to one in the order 8, 4, 2, 1 apart, with an intrinsic on four lanes.
macro_rules! reduce {
    ($value:expr, $fold:ident) => {
        proven!({
            let half = $fold(_mm512_extractf32x4_ps::<0>($value), _mm512_extractf32x4_ps::<2>($value));
            let other = $fold(_mm512_extractf32x4_ps::<1>($value), _mm512_extractf32x4_ps::<3>($value));
            let quarter = $fold(half, other);
            let pair = $fold(quarter, _mm_movehl_ps(quarter, quarter));
            _mm_cvtss_f32($fold(pair, _mm_shuffle_ps::<1>(pair, pair)))
        })
    };
}

/// Four consecutive words of one row behind each base, so that a 4x4 transposition of every quarter leaves the rows in
/// order. A function and not a closure, because a closure would be compiled for the baseline.
///
/// # Safety
/// Every base is valid for 4 words at `offset`.
#[inline(always)]
unsafe fn quarters(bases: [*const u32; 4], offset: usize) -> __m512i {
    proven!({
        let q0 = _mm_loadu_si128(bases[0].add(offset).cast());
        let q1 = _mm_loadu_si128(bases[1].add(offset).cast());
        let q2 = _mm_loadu_si128(bases[2].add(offset).cast());
        let q3 = _mm_loadu_si128(bases[3].add(offset).cast());
        let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(q0), q1);
        let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(q2), q3);
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    })
}

impl<const BF16: bool> Simd for Vectors512<BF16> {
    const LANES: usize = 16;
    const BF16_DOT: bool = BF16;
    type F32 = __m512;
    type U32 = __m512i;
    type Mask = __mmask16;
    type Sums = [__m512d; 2];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        proven!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> Self::F32 {
        proven!(_mm512_loadu_ps(source))
    }
    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: Self::F32) {
        proven!(_mm512_storeu_ps(target, value));
    }
    #[inline(always)]
    unsafe fn load_partial(self, source: *const f32, count: usize) -> Self::F32 {
        proven!(_mm512_maskz_loadu_ps(first(count), source))
    }
    #[inline(always)]
    unsafe fn store_partial(self, target: *mut f32, value: Self::F32, count: usize) {
        proven!(_mm512_mask_storeu_ps(target, first(count), value));
    }
    #[inline(always)]
    unsafe fn load_bf16(self, source: *const Bf16) -> Self::F32 {
        proven!(widen(_mm256_loadu_si256(source.cast())))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, target: *mut Bf16, value: Self::F32) {
        proven!(_mm256_storeu_si256(target.cast(), narrow::<BF16>(value)));
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(self, source: *const Bf16, count: usize) -> Self::F32 {
        proven!(widen(_mm256_maskz_loadu_epi16(first(count), source.cast())))
    }
    #[inline(always)]
    unsafe fn store_bf16_partial(self, target: *mut Bf16, value: Self::F32, count: usize) {
        proven!(_mm256_mask_storeu_epi16(target.cast(), first(count), narrow::<BF16>(value)));
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        proven!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn split_exponent(self, a: Self::F32) -> (Self::F32, Self::F32) {
        // The scaling instruction floors its exponent itself. Control 9 is the distance from the floor, no exceptions.
        proven!((_mm512_reduce_ps::<9>(a), a))
    }
    #[inline(always)]
    fn exp2_scale(self, value: Self::F32, exponent: Self::F32) -> Self::F32 {
        proven!(_mm512_scalef_ps(value, exponent))
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
        proven!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn less_equal(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        proven!(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        proven!(_mm512_mask_blend_ps(mask, b, a))
    }
    #[inline(always)]
    fn mask_bits(self, mask: Self::Mask) -> u32 {
        u32::from(mask)
    }
    #[inline(always)]
    unsafe fn store_selected(self, target: *mut f32, value: Self::F32, mask: Self::Mask) -> usize {
        // Compressing in a register and storing all of it: the form with a memory operand is microcoded on AMD.
        proven!(_mm512_storeu_ps(target, _mm512_maskz_compress_ps(mask, value)));
        mask.count_ones() as usize
    }
    #[inline(always)]
    fn lane_range(self, from: usize, to: usize) -> Self::Mask {
        first(to) & !first(from)
    }

    #[inline(always)]
    fn splat_u32(self, value: u32) -> Self::U32 {
        proven!(_mm512_set1_epi32(value as i32))
    }
    #[inline(always)]
    unsafe fn load_u32(self, source: *const u32) -> Self::U32 {
        proven!(_mm512_loadu_si512(source.cast()))
    }
    #[inline(always)]
    unsafe fn store_u32(self, target: *mut u32, value: Self::U32) {
        proven!(_mm512_storeu_si512(target.cast(), value));
    }
    #[inline(always)]
    fn add_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn and_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn xor_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        proven!(_mm512_xor_si512(a, b))
    }
    #[inline(always)]
    fn shift_left<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        proven!(_mm512_slli_epi32::<BITS>(a))
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        proven!(_mm512_srli_epi32::<BITS>(a))
    }
    #[inline(always)]
    fn shift_right_signed<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        proven!(_mm512_srai_epi32::<BITS>(a))
    }
    #[inline(always)]
    fn mul_wide(self, a: Self::U32, b: Self::U32) -> (Self::U32, Self::U32) {
        proven!({
            let even = _mm512_mul_epu32(a, b);
            let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(a), _mm512_srli_epi64::<32>(b));
            let high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64::<32>(even), odd);
            let low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64::<32>(odd));
            (high, low)
        })
    }
    #[inline(always)]
    fn less_equal_u32(self, a: Self::U32, b: Self::U32) -> Self::Mask {
        proven!(_mm512_cmple_epu32_mask(a, b))
    }
    #[inline(always)]
    fn f32_to_bits(self, a: Self::F32) -> Self::U32 {
        proven!(_mm512_castps_si512(a))
    }
    #[inline(always)]
    fn bits_to_f32(self, a: Self::U32) -> Self::F32 {
        proven!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn i32_to_f32(self, a: Self::U32) -> Self::F32 {
        proven!(_mm512_cvtepi32_ps(a))
    }

    #[inline(always)]
    fn zero_sums(self) -> Self::Sums {
        proven!([_mm512_setzero_pd(); 2])
    }
    #[inline(always)]
    fn add_to_sums(self, sums: Self::Sums, _: usize, value: Self::F32) -> Self::Sums {
        proven!({
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(value));
            [_mm512_add_pd(sums[0], low), _mm512_add_pd(sums[1], high)]
        })
    }
    #[inline(always)]
    fn total_of_sums(self, sums: Self::Sums) -> f64 {
        let mut lanes = [0.0; 16];
        proven!({
            _mm512_storeu_pd(lanes.as_mut_ptr(), sums[0]);
            _mm512_storeu_pd(lanes.as_mut_ptr().add(8), sums[1]);
        });
        total_of_sixteen(lanes)
    }

    #[inline(always)]
    fn dot_bf16(self, sum: Self::F32, a: Self::U32, b: Self::U32) -> Self::F32 {
        assert!(BF16, "guarded by BF16_DOT");
        // SAFETY: the token has BF16; both types are 512 plain bits.
        unsafe {
            let a = core::mem::transmute::<__m512i, __m512bh>(a);
            let b = core::mem::transmute::<__m512i, __m512bh>(b);
            _mm512_dpbf16_ps(sum, a, b)
        }
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::U32, unsigned: Self::U32, signed: Self::U32) -> Self::U32 {
        if BF16 {
            return proven!(_mm512_dpbusd_epi32(sum, unsigned, signed));
        }
        // Bytes 0 and 2 of every lane, then 1 and 3, as 16-bit numbers: the instruction for bytes would saturate.
        proven!({
            let low = _mm512_madd_epi16(
                _mm512_and_si512(unsigned, _mm512_set1_epi32(0x00ff_00ff)),
                _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(signed)),
            );
            let high = _mm512_madd_epi16(_mm512_srli_epi16::<8>(unsigned), _mm512_srai_epi16::<8>(signed));
            _mm512_add_epi32(sum, _mm512_add_epi32(low, high))
        })
    }
    #[inline(always)]
    unsafe fn store_signed_bytes(self, target: *mut i8, value: Self::F32) {
        proven!(_mm_storeu_si128(target.cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value))));
    }
    #[inline(always)]
    unsafe fn load_signed_bytes(self, source: *const i8) -> Self::F32 {
        proven!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(source.cast()))))
    }
    #[inline(always)]
    unsafe fn interleave_bf16(self, even: *const Bf16, odd: *const Bf16, count: usize) -> (Self::U32, Self::U32) {
        proven!({
            let mask = ((1_u64 << count) - 1) as u32;
            let (even, odd) = if count == 32 {
                (_mm512_loadu_si512(even.cast()), _mm512_loadu_si512(odd.cast()))
            } else {
                (_mm512_maskz_loadu_epi16(mask, even.cast()), _mm512_maskz_loadu_epi16(mask, odd.cast()))
            };
            // Lane i of the first result takes element i of both rows (word indices i and 32 + i).
            let lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            let low = _mm512_or_si512(lane, _mm512_slli_epi32::<16>(_mm512_add_epi32(lane, _mm512_set1_epi32(32))));
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(0x0010_0010));
            (_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd))
        })
    }
    #[inline(always)]
    unsafe fn transposed_units(self, bases: [*const u32; 4], row_words: usize) -> [Self::U32; 4] {
        proven!({
            let (r0, r1, r2, r3) = (
                quarters(bases, 0),
                quarters(bases, row_words),
                quarters(bases, 2 * row_words),
                quarters(bases, 3 * row_words),
            );
            let (a, b) = (_mm512_unpacklo_epi32(r0, r1), _mm512_unpackhi_epi32(r0, r1));
            let (c, d) = (_mm512_unpacklo_epi32(r2, r3), _mm512_unpackhi_epi32(r2, r3));
            [
                _mm512_unpacklo_epi64(a, c),
                _mm512_unpackhi_epi64(a, c),
                _mm512_unpacklo_epi64(b, d),
                _mm512_unpackhi_epi64(b, d),
            ]
        })
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T1>(address.cast()));
    }
}
