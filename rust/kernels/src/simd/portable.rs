//! The vectors of the portable level: arrays of eight lanes in plain Rust.
//! The compiler turns most loops into the target's baseline vectors (SSE2 or NEON); nothing here depends on that.
//! Multiplication and addition are never fused, because a software fused multiply-add costs about 50 ns.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use super::{Simd, total_of_sixteen};
use crate::element::Bf16;

const LANES: usize = 8;
/// 1.5 * 2^23: adding and subtracting it rounds an f32 below 2^22 to an integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// Token of the portable level; it proves nothing, so anyone may make one.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn lanes<A: Copy, B: Copy, R: Copy + Default>(a: [A; LANES], b: [B; LANES], f: impl Fn(A, B) -> R) -> [R; LANES] {
    let mut result = [R::default(); LANES];
    for lane in 0..LANES {
        result[lane] = f(a[lane], b[lane]);
    }
    result
}

impl Simd for Portable {
    const LANES: usize = LANES;
    const BF16_DOT: bool = false;
    type F32 = [f32; LANES];
    type U32 = [u32; LANES];
    type Mask = [bool; LANES];
    type Sums = [f64; 16];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> Self::F32 {
        // SAFETY: the caller promises `LANES` readable elements.
        unsafe { source.cast::<Self::F32>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: Self::F32) {
        // SAFETY: the caller promises `LANES` writable elements.
        unsafe { target.cast::<Self::F32>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn load_partial(self, source: *const f32, count: usize) -> Self::F32 {
        let mut result = [0.0; LANES];
        for (lane, value) in result.iter_mut().enumerate().take(count) {
            // SAFETY: the caller promises `count` readable elements.
            *value = unsafe { source.add(lane).read_unaligned() };
        }
        result
    }
    #[inline(always)]
    unsafe fn store_partial(self, target: *mut f32, value: Self::F32, count: usize) {
        for (lane, value) in value.into_iter().enumerate().take(count) {
            // SAFETY: the caller promises `count` writable elements.
            unsafe { target.add(lane).write_unaligned(value) };
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, source: *const Bf16) -> Self::F32 {
        // SAFETY: the caller promises `LANES` readable elements.
        unsafe { source.cast::<[Bf16; LANES]>().read_unaligned() }.map(Bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, target: *mut Bf16, value: Self::F32) {
        // SAFETY: the caller promises `LANES` writable elements.
        unsafe { target.cast::<[Bf16; LANES]>().write_unaligned(value.map(Bf16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(self, source: *const Bf16, count: usize) -> Self::F32 {
        let mut result = [0.0; LANES];
        for (lane, value) in result.iter_mut().enumerate().take(count) {
            // SAFETY: the caller promises `count` readable elements.
            *value = unsafe { source.add(lane).read_unaligned() }.to_f32();
        }
        result
    }
    #[inline(always)]
    unsafe fn store_bf16_partial(self, target: *mut Bf16, value: Self::F32, count: usize) {
        for (lane, value) in value.into_iter().enumerate().take(count) {
            // SAFETY: the caller promises `count` writable elements.
            unsafe { target.add(lane).write_unaligned(Bf16::from_f32(value)) };
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn split_exponent(self, a: Self::F32) -> (Self::F32, Self::F32) {
        // Rounding a - 1/2 to an integer is a floor that may give a fraction of 1; `f32::floor` would be a call.
        let a = a.map(|a| if a < -126.0 { -126.0 } else { a });
        let whole = a.map(|a| (a - 0.5 + ROUNDER) - ROUNDER);
        (lanes(a, whole, |a, whole| a - whole), whole)
    }
    #[inline(always)]
    fn exp2_scale(self, value: Self::F32, exponent: Self::F32) -> Self::F32 {
        // Lanes that will be masked out may hold anything, so the addition wraps.
        lanes(value, exponent, |value, exponent| {
            value * f32::from_bits(((exponent as i32).wrapping_add(127) << 23) as u32)
        })
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F32) -> f32 {
        let quarter = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (quarter[0] + quarter[2]) + (quarter[1] + quarter[3])
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F32) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn less(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        lanes(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn less_equal(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        lanes(a, b, |a, b| a <= b)
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        let mut result = b;
        for lane in 0..LANES {
            if mask[lane] {
                result[lane] = a[lane];
            }
        }
        result
    }
    #[inline(always)]
    fn mask_bits(self, mask: Self::Mask) -> u32 {
        mask.into_iter().enumerate().map(|(lane, truth)| u32::from(truth) << lane).sum()
    }
    #[inline(always)]
    unsafe fn store_selected(self, target: *mut f32, value: Self::F32, mask: Self::Mask) -> usize {
        let mut count = 0;
        for lane in 0..LANES {
            // SAFETY: the caller promises `LANES` writable elements.
            unsafe { target.add(count).write_unaligned(value[lane]) };
            count += usize::from(mask[lane]);
        }
        count
    }
    #[inline(always)]
    fn lane_range(self, from: usize, to: usize) -> Self::Mask {
        core::array::from_fn(|lane| lane >= from && lane < to)
    }

    #[inline(always)]
    fn splat_u32(self, value: u32) -> Self::U32 {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load_u32(self, source: *const u32) -> Self::U32 {
        // SAFETY: the caller promises `LANES` readable elements.
        unsafe { source.cast::<Self::U32>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_u32(self, target: *mut u32, value: Self::U32) {
        // SAFETY: the caller promises `LANES` writable elements.
        unsafe { target.cast::<Self::U32>().write_unaligned(value) }
    }
    #[inline(always)]
    fn add_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        lanes(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn sub_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        lanes(a, b, u32::wrapping_sub)
    }
    #[inline(always)]
    fn and_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        lanes(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn xor_u32(self, a: Self::U32, b: Self::U32) -> Self::U32 {
        lanes(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shift_left<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        a.map(|a| a << BITS)
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        a.map(|a| a >> BITS)
    }
    #[inline(always)]
    fn shift_right_signed<const BITS: u32>(self, a: Self::U32) -> Self::U32 {
        a.map(|a| (a.cast_signed() >> BITS).cast_unsigned())
    }
    #[inline(always)]
    fn mul_wide(self, a: Self::U32, b: Self::U32) -> (Self::U32, Self::U32) {
        (lanes(a, b, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32), lanes(a, b, u32::wrapping_mul))
    }
    #[inline(always)]
    fn less_equal_u32(self, a: Self::U32, b: Self::U32) -> Self::Mask {
        lanes(a, b, |a, b| a <= b)
    }
    #[inline(always)]
    fn f32_to_bits(self, a: Self::F32) -> Self::U32 {
        a.map(f32::to_bits)
    }
    #[inline(always)]
    fn bits_to_f32(self, a: Self::U32) -> Self::F32 {
        a.map(f32::from_bits)
    }
    #[inline(always)]
    fn i32_to_f32(self, a: Self::U32) -> Self::F32 {
        a.map(|a| a as i32 as f32)
    }

    #[inline(always)]
    fn zero_sums(self) -> Self::Sums {
        [0.0; 16]
    }
    #[inline(always)]
    fn add_to_sums(self, mut sums: Self::Sums, vector: usize, value: Self::F32) -> Self::Sums {
        for lane in 0..LANES {
            sums[vector % 2 * LANES + lane] += f64::from(value[lane]);
        }
        sums
    }
    #[inline(always)]
    fn total_of_sums(self, sums: Self::Sums) -> f64 {
        total_of_sixteen(sums)
    }

    #[inline(always)]
    fn dot_bf16(self, _: Self::F32, _: Self::U32, _: Self::U32) -> Self::F32 {
        unreachable!("guarded by BF16_DOT")
    }
    #[inline(always)]
    fn dot_bytes(self, mut sum: Self::U32, unsigned: Self::U32, signed: Self::U32) -> Self::U32 {
        for lane in 0..LANES {
            let products = unsigned[lane].to_le_bytes().into_iter().zip(signed[lane].to_le_bytes());
            let dot: i32 = products.map(|(a, b)| i32::from(a) * i32::from(b as i8)).sum();
            sum[lane] = sum[lane].wrapping_add(dot as u32);
        }
        sum
    }
    #[inline(always)]
    unsafe fn store_signed_bytes(self, target: *mut i8, value: Self::F32) {
        for (lane, value) in value.into_iter().enumerate() {
            // SAFETY: the caller promises `LANES` writable elements. A cast saturates, and makes 0 of NaN.
            unsafe { target.add(lane).write(value.round_ties_even() as i8) }
        }
    }
    #[inline(always)]
    unsafe fn load_signed_bytes(self, source: *const i8) -> Self::F32 {
        // SAFETY: the caller promises `LANES` readable elements.
        unsafe { source.cast::<[i8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn interleave_bf16(self, _: *const Bf16, _: *const Bf16, _: usize) -> (Self::U32, Self::U32) {
        unreachable!("guarded by BF16_DOT")
    }
    #[inline(always)]
    unsafe fn transposed_units(self, bases: [*const u32; 4], row_words: usize) -> [Self::U32; 4] {
        core::array::from_fn(|unit| {
            core::array::from_fn(|row| {
                // SAFETY: the caller promises rows of 4 units behind the bases.
                unsafe { bases[row / 4].add(row % 4 * row_words + unit).read_unaligned() }
            })
        })
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
