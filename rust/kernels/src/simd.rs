//! Vectors of f32 and u32 behind one trait, so that a kernel is written once and compiled per instruction level.
//! A value of a [`Simd`] type is the proof that its instructions exist on this machine; only `dispatch` makes one.
//! Every operation is IEEE single precision and lane by lane, so two levels agree in bits as long as a kernel keeps to
//! `add`, `sub`, `mul`, `div`, `sqrt` and the integer operations; only [`Simd::mul_add`], [`Simd::exp2_scale`],
//! [`Simd::dot_bf16`] and the reductions differ between levels.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod exact;
pub(crate) mod fast;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::{Avx512, Avx512Bf16};
pub(crate) use portable::Portable;

use crate::element::{Bf16, Element};

/// One instruction level's vectors of `LANES` 32-bit lanes.
///
/// # Safety of the pointer methods
/// Each `unsafe` method reads or writes `LANES` consecutive elements (or `count <= LANES` for the partial ones) at the
/// given pointer, which must be valid for that and need only the element's alignment.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector; a power of two, 8 or 16.
    const LANES: usize;
    /// Whether [`Self::dot_bf16`] exists at this level.
    const BF16_DOT: bool;
    /// `LANES` f32.
    type F32: Copy;
    /// `LANES` u32.
    type U32: Copy;
    /// One truth value per lane.
    type Mask: Copy;
    /// Sixteen running f64 sums, whatever the width of a vector, so that every level adds in the same order.
    type Sums: Copy;

    fn splat(self, value: f32) -> Self::F32;
    unsafe fn load(self, source: *const f32) -> Self::F32;
    unsafe fn store(self, target: *mut f32, value: Self::F32);
    /// Lanes past `count` are zero.
    unsafe fn load_partial(self, source: *const f32, count: usize) -> Self::F32;
    unsafe fn store_partial(self, target: *mut f32, value: Self::F32, count: usize);
    unsafe fn load_bf16(self, source: *const Bf16) -> Self::F32;
    /// Rounds to nearest, ties to even; NaN stays NaN.
    unsafe fn store_bf16(self, target: *mut Bf16, value: Self::F32);
    /// Lanes past `count` are zero.
    unsafe fn load_bf16_partial(self, source: *const Bf16, count: usize) -> Self::F32;
    unsafe fn store_bf16_partial(self, target: *mut Bf16, value: Self::F32, count: usize);

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a > b ? a : b`: the second operand where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a < b ? a : b`: the second operand where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the level has fused multiply-add, twice where not.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// A fraction in [0, 1] and an exponent for [`Self::exp2_scale`] whose sum is `a`, for `a < 120`. Exponents are
    /// cut off at -126 where the level cannot scale below; minus infinity gives the least exponent.
    fn split_exponent(self, a: Self::F32) -> (Self::F32, Self::F32);
    /// `value * 2^exponent` for an exponent from [`Self::split_exponent`].
    fn exp2_scale(self, value: Self::F32, exponent: Self::F32) -> Self::F32;
    /// The lowest lane's sum with all others, in a fixed tree.
    fn reduce_add(self, a: Self::F32) -> f32;
    fn reduce_max(self, a: Self::F32) -> f32;

    fn less(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    fn less_equal(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `mask ? a : b`.
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Bit `i` is the truth of lane `i`.
    fn mask_bits(self, mask: Self::Mask) -> u32;
    /// Stores the lanes of the mask side by side and returns their number. Writes up to `LANES` elements.
    unsafe fn store_selected(self, target: *mut f32, value: Self::F32, mask: Self::Mask) -> usize;
    /// Lanes whose index lies in `from..to`.
    fn lane_range(self, from: usize, to: usize) -> Self::Mask;

    fn splat_u32(self, value: u32) -> Self::U32;
    unsafe fn load_u32(self, source: *const u32) -> Self::U32;
    unsafe fn store_u32(self, target: *mut u32, value: Self::U32);
    /// Wraps.
    fn add_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    /// Wraps.
    fn sub_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn and_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn xor_u32(self, a: Self::U32, b: Self::U32) -> Self::U32;
    fn shift_left<const BITS: u32>(self, a: Self::U32) -> Self::U32;
    fn shift_right<const BITS: u32>(self, a: Self::U32) -> Self::U32;
    /// Lanes as signed integers: the sign comes in from the left.
    fn shift_right_signed<const BITS: u32>(self, a: Self::U32) -> Self::U32;
    /// The upper and lower halves of the 64-bit products, as `(high, low)`.
    fn mul_wide(self, a: Self::U32, b: Self::U32) -> (Self::U32, Self::U32);
    /// Unsigned `a <= b`.
    fn less_equal_u32(self, a: Self::U32, b: Self::U32) -> Self::Mask;
    fn f32_to_bits(self, a: Self::F32) -> Self::U32;
    fn bits_to_f32(self, a: Self::U32) -> Self::F32;
    /// Lanes as signed integers, exactly rounded to f32.
    fn i32_to_f32(self, a: Self::U32) -> Self::F32;

    fn zero_sums(self) -> Self::Sums;
    /// Adds lane `i` of the `vector`-th vector of a row to sum `(vector * LANES + i) % 16`.
    fn add_to_sums(self, sums: Self::Sums, vector: usize, value: Self::F32) -> Self::Sums;
    /// Adds the sixteen sums in pairs 8, 4, 2 and 1 apart.
    fn total_of_sums(self, sums: Self::Sums) -> f64;

    /// `sum + a.low * b.low + a.high * b.high` on lanes that hold two bf16. Only where `BF16_DOT`.
    fn dot_bf16(self, sum: Self::F32, a: Self::U32, b: Self::U32) -> Self::F32;
    /// `sum + a.0 * b.0 + a.1 * b.1 + a.2 * b.2 + a.3 * b.3` on lanes that hold four bytes, unsigned ones in `a` and signed
    /// ones in `b`. Exact: only the sum wraps.
    fn dot_bytes(self, sum: Self::U32, unsigned: Self::U32, signed: Self::U32) -> Self::U32;
    /// Rounds to the nearest integer, ties to even, and stores one signed byte per lane; beyond -128 to 127 the nearer of
    /// the two.
    unsafe fn store_signed_bytes(self, target: *mut i8, value: Self::F32);
    /// Loads one signed byte per lane, as f32.
    unsafe fn load_signed_bytes(self, source: *const i8) -> Self::F32;
    /// Interleaves two rows of bf16: lane `i` of the first (second) result holds `(even[i], odd[i])` for the first
    /// (second) `LANES` elements of the rows. Reads `count <= 2 * LANES` elements of each; the rest are zero.
    unsafe fn interleave_bf16(self, even: *const Bf16, odd: *const Bf16, count: usize) -> (Self::U32, Self::U32);
    /// Transposes 4 consecutive 32-bit units of `LANES` rows: lane `r` of result `u` holds unit `u` of row `r`, which
    /// begins `r % 4` times `row_words` after `bases[r / 4]`.
    unsafe fn transposed_units(self, bases: [*const u32; 4], row_words: usize) -> [Self::U32; 4];
    /// The same to memory: unit `u` of row `r` goes to `target[u * stride + r]`.
    #[inline(always)]
    unsafe fn transpose_units(self, bases: [*const u32; 4], row_words: usize, target: *mut u32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            for (unit, lanes) in self.transposed_units(bases, row_words).into_iter().enumerate() {
                self.store_u32(target.add(unit * stride), lanes);
            }
        }
    }
    /// Hints that the cache line at `address` will be read soon, and should come to the second-level cache. Any address is
    /// allowed.
    fn prefetch(self, address: *const u8);
}

/// Adds sixteen sums in pairs 8, 4, 2 and 1 apart.
#[inline(always)]
fn total_of_sixteen(sums: [f64; 16]) -> f64 {
    let eight: [f64; 8] = core::array::from_fn(|i| sums[i] + sums[i + 8]);
    let four: [f64; 4] = core::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Loads `LANES` elements of either format as f32.
///
/// # Safety
/// As [`Simd::load`].
#[inline(always)]
pub(crate) unsafe fn load_element<S: Simd, T: Element>(simd: S, source: *const T) -> S::F32 {
    // SAFETY: the caller's promise covers either format; `T` is exactly f32 or Bf16, told apart by `IS_BF16`.
    unsafe { if T::IS_BF16 { simd.load_bf16(source.cast()) } else { simd.load(source.cast()) } }
}

/// Loads `count <= LANES` elements of either format as f32; further lanes are zero.
///
/// # Safety
/// As [`Simd::load_partial`].
#[inline(always)]
pub(crate) unsafe fn load_element_partial<S: Simd, T: Element>(simd: S, source: *const T, count: usize) -> S::F32 {
    // SAFETY: as in `load_element`.
    unsafe {
        if T::IS_BF16 { simd.load_bf16_partial(source.cast(), count) } else { simd.load_partial(source.cast(), count) }
    }
}

/// Stores `LANES` f32 as elements of either format.
///
/// # Safety
/// As [`Simd::store`].
#[inline(always)]
pub(crate) unsafe fn store_element<S: Simd, T: Element>(simd: S, target: *mut T, value: S::F32) {
    // SAFETY: as in `load_element`.
    unsafe { if T::IS_BF16 { simd.store_bf16(target.cast(), value) } else { simd.store(target.cast(), value) } }
}

/// Stores the first `count <= LANES` lanes as elements of either format.
///
/// # Safety
/// As [`Simd::store_partial`].
#[inline(always)]
pub(crate) unsafe fn store_element_partial<S: Simd, T: Element>(simd: S, target: *mut T, value: S::F32, count: usize) {
    // SAFETY: as in `load_element`.
    unsafe {
        if T::IS_BF16 {
            simd.store_bf16_partial(target.cast(), value, count);
        } else {
            simd.store_partial(target.cast(), value, count);
        }
    }
}

/// Rounds every lane to the nearest value of `T`, kept as f32.
#[inline(always)]
pub(crate) fn round_to_element<S: Simd, T: Element>(simd: S, value: S::F32) -> S::F32 {
    if !T::IS_BF16 {
        return value;
    }
    // Round to nearest, ties to even, on the bit pattern; NaN lanes are passed through unrounded.
    let bits = simd.f32_to_bits(value);
    let odd = simd.and_u32(simd.shift_right::<16>(bits), simd.splat_u32(1));
    let rounded = simd.add_u32(bits, simd.add_u32(odd, simd.splat_u32(0x7fff)));
    let rounded = simd.bits_to_f32(simd.and_u32(rounded, simd.splat_u32(0xffff_0000)));
    let magnitude = simd.and_u32(bits, simd.splat_u32(0x7fff_ffff));
    simd.select(simd.less_equal_u32(magnitude, simd.splat_u32(0x7f80_0000)), rounded, value)
}
