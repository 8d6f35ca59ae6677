//! Exponential, logarithm and Gumbel noise whose bits are the same at every instruction level.
//! They use only single IEEE additions, multiplications and integer operations in a fixed order, never a fused
//! multiply-add, so that a sampled token does not depend on the machine that sampled it.
//! Polynomials and range reduction are those of the Cephes library (S. Moshier, `expf` and `logf`).

use super::{Portable, Simd};

/// 1.5 * 2^23: adding and subtracting it rounds an f32 below 2^22 to an integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has few enough bits that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// The bits of sqrt(1/2): mantissas are reduced to [sqrt(1/2), sqrt(2)).
const SQRT_HALF_BITS: u32 = 0x3f35_04f3;

/// No noise value is larger: the greatest, drawn for the word 0, is 22.873857.
pub(crate) const MAX_GUMBEL: f32 = 22.875;

/// `a * b + c`, rounded twice at every level.
#[inline(always)]
fn mul_then_add<S: Simd>(simd: S, a: S::F32, b: S::F32, c: f32) -> S::F32 {
    simd.add(simd.mul(a, b), simd.splat(c))
}

/// `e^x` within 2 units in the last place for x in [-87.33, 88.02]; inputs outside give the value at the nearer end.
/// NaN gives the value at the lower end, so callers check for NaN first.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let x = simd.min(simd.max(x, simd.splat(-87.33)), simd.splat(88.02));
    let shifted = mul_then_add(simd, x, simd.splat(core::f32::consts::LOG2_E), ROUNDER);
    let whole = simd.sub(shifted, simd.splat(ROUNDER));
    let r = simd.sub(x, simd.mul(whole, simd.splat(LN2_HIGH)));
    let r = simd.sub(r, simd.mul(whole, simd.splat(LN2_LOW)));
    let mut p = simd.splat(1.987_569_1e-4);
    p = mul_then_add(simd, p, r, 1.398_199_9e-3);
    p = mul_then_add(simd, p, r, 8.333_452e-3);
    p = mul_then_add(simd, p, r, 4.166_579_6e-2);
    p = mul_then_add(simd, p, r, 1.666_666_5e-1);
    p = mul_then_add(simd, p, r, 0.5);
    let p = simd.add(simd.add(simd.mul(simd.mul(p, r), r), r), simd.splat(1.0));
    // The low bits of `shifted` are the integer itself; adding 127 makes it a biased exponent.
    let biased = simd.sub_u32(simd.f32_to_bits(shifted), simd.splat_u32(ROUNDER.to_bits().wrapping_sub(127)));
    simd.mul(p, simd.bits_to_f32(simd.shift_left::<23>(biased)))
}

/// The exponent and the mantissa in [sqrt(1/2), sqrt(2)) of a positive normal number.
#[inline(always)]
fn split<S: Simd>(simd: S, x: S::F32) -> (S::U32, S::F32) {
    let shifted = simd.add_u32(simd.f32_to_bits(x), simd.splat_u32(0x3f80_0000 - SQRT_HALF_BITS));
    let exponent = simd.sub_u32(simd.shift_right::<23>(shifted), simd.splat_u32(127));
    let mantissa = simd.and_u32(shifted, simd.splat_u32(0x007f_ffff));
    (exponent, simd.bits_to_f32(simd.add_u32(mantissa, simd.splat_u32(SQRT_HALF_BITS))))
}

/// `ln(1 + f) + exponent * ln 2` for f in [sqrt(1/2) - 1, sqrt(2) - 1).
#[inline(always)]
fn ln_1p_scaled<S: Simd>(simd: S, f: S::F32, exponent: S::U32) -> S::F32 {
    let exponent = simd.i32_to_f32(exponent);
    let mut p = simd.splat(7.037_683_6e-2);
    p = mul_then_add(simd, p, f, -1.151_461e-1);
    p = mul_then_add(simd, p, f, 1.167_699_87e-1);
    p = mul_then_add(simd, p, f, -1.242_014_1e-1);
    p = mul_then_add(simd, p, f, 1.424_932_3e-1);
    p = mul_then_add(simd, p, f, -1.666_805_8e-1);
    p = mul_then_add(simd, p, f, 0.200_007_14);
    p = mul_then_add(simd, p, f, -2.499_999_4e-1);
    p = mul_then_add(simd, p, f, 3.333_333e-1);
    let square = simd.mul(f, f);
    let mut y = simd.mul(simd.mul(p, f), square);
    y = simd.add(y, simd.mul(exponent, simd.splat(LN2_LOW)));
    y = simd.sub(y, simd.mul(square, simd.splat(0.5)));
    simd.add(simd.add(f, y), simd.mul(exponent, simd.splat(LN2_HIGH)))
}

/// Natural logarithm of positive normal numbers, within 2 units in the last place away from 1 and absolutely near it.
#[inline(always)]
pub(crate) fn ln<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let (exponent, mantissa) = split(simd, x);
    ln_1p_scaled(simd, simd.sub(mantissa, simd.splat(1.0)), exponent)
}

/// [`exp`] of one number, the same bits.
pub(crate) fn exp_scalar(x: f32) -> f32 {
    exp(Portable, [x; 8])[0]
}

/// [`ln`] of one number, the same bits.
pub(crate) fn ln_scalar(x: f32) -> f32 {
    ln(Portable, [x; 8])[0]
}

/// [`gumbel`] of one word, the same bits.
pub(crate) fn gumbel_scalar(word: u32) -> f32 {
    gumbel(Portable, [word; 8])[0]
}

/// `(word + 1/2) / 2^32` rounded to f32, without relying on an unsigned conversion that AVX2 lacks.
#[inline(always)]
fn unit_interval<S: Simd>(simd: S, word: S::U32) -> S::F32 {
    let high = simd.i32_to_f32(simd.shift_right::<16>(word));
    let low = simd.i32_to_f32(simd.and_u32(word, simd.splat_u32(0xffff)));
    let value = simd.add(simd.mul(high, simd.splat(65536.0)), low);
    simd.mul(simd.add(value, simd.splat(0.5)), simd.splat(1.0 / 4_294_967_296.0))
}

/// An exponential variate `-ln(1 - v)` with `v = (word + 1/2) / 2^32`.
///
/// Small words give small variates with full relative precision, which is the end that decides a race: a token of
/// probability 1e-9 can still win, which it could not with `-ln(u)` of an f32 near 1.
#[inline(always)]
pub(crate) fn exponential<S: Simd>(simd: S, word: S::U32) -> S::F32 {
    let v = unit_interval(simd, word);
    let complement = unit_interval(simd, simd.xor_u32(word, simd.splat_u32(u32::MAX)));
    let (exponent, mantissa) = split(simd, complement);
    // Where the exponent is 0, `mantissa - 1` would have lost the low bits of v; -v has them all.
    let near_one = simd.less_equal_u32(simd.f32_to_bits(v), simd.splat_u32(0x3e95_f61a));
    let near_one_f = simd.sub(simd.splat(0.0), v);
    let f = simd.select(near_one, near_one_f, simd.sub(mantissa, simd.splat(1.0)));
    let exponent = simd.f32_to_bits(simd.select(near_one, simd.splat(0.0), simd.bits_to_f32(exponent)));
    simd.sub(simd.splat(0.0), ln_1p_scaled(simd, f, exponent))
}

/// A standard Gumbel variate `-ln(-ln(1 - v))`, at most [`MAX_GUMBEL`].
#[inline(always)]
pub(crate) fn gumbel<S: Simd>(simd: S, word: S::U32) -> S::F32 {
    simd.sub(simd.splat(0.0), ln(simd, exponential(simd, word)))
}

#[cfg(test)]
#[expect(unsafe_code, reason = "vector loads and stores on raw pointers")]
mod tests {
    use super::MAX_GUMBEL;
    use crate::dispatch::{Kernel, Level};
    use crate::simd::Simd;

    #[derive(Clone, Copy)]
    enum Function {
        Exp,
        Ln,
        Exponential,
        Gumbel,
    }

    struct Map<'a>(Function, &'a mut [u32]);

    impl Kernel for Map<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for chunk in self.1.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk has exactly `LANES` elements.
                unsafe {
                    let x = simd.load_u32(chunk.as_ptr());
                    let y = match self.0 {
                        Function::Exp => super::exp(simd, simd.bits_to_f32(x)),
                        Function::Ln => super::ln(simd, simd.bits_to_f32(x)),
                        Function::Exponential => super::exponential(simd, x),
                        Function::Gumbel => super::gumbel(simd, x),
                    };
                    simd.store_u32(chunk.as_mut_ptr(), simd.f32_to_bits(y));
                }
            }
        }
    }

    fn map(level: Level, function: Function, inputs: &[u32]) -> Vec<f32> {
        let mut outputs = inputs.to_vec();
        level.run(Map(function, &mut outputs));
        outputs.into_iter().map(f32::from_bits).collect()
    }

    fn words() -> Vec<u32> {
        let mut words: Vec<u32> = (0..200_000_u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        for shift in 0..32 {
            words.extend([1 << shift, (1_u32 << shift) - 1, !(1 << shift), !((1_u32 << shift) - 1)]);
        }
        words
    }

    fn floats(from: f32, to: f32) -> Vec<u32> {
        (0..160_000).map(|i| (from + (to - from) * (i as f32 / 160_000.0)).to_bits()).collect()
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        for (function, inputs) in [
            (Function::Exp, floats(-100.0, 100.0)),
            (Function::Ln, floats(1e-12, 30.0)),
            (Function::Exponential, words()),
            (Function::Gumbel, words()),
        ] {
            let expected: Vec<u32> = map(Level::Portable, function, &inputs).into_iter().map(f32::to_bits).collect();
            for level in Level::available() {
                let given: Vec<u32> = map(level, function, &inputs).into_iter().map(f32::to_bits).collect();
                assert!(given == expected, "{level}");
            }
        }
    }

    fn worst_ulp(function: Function, inputs: &[u32], truth: impl Fn(u32) -> f64) -> f64 {
        map(Level::detected(), function, inputs)
            .into_iter()
            .zip(inputs)
            .map(|(given, &input)| {
                let truth = truth(input);
                let rounded = (truth.abs() as f32).max(f32::MIN_POSITIVE);
                let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
                (f64::from(given) - truth).abs() / ulp
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_and_ln_stay_within_two_units_in_the_last_place() {
        let exp = worst_ulp(Function::Exp, &floats(-87.3, 88.0), |x| f64::from(f32::from_bits(x)).exp());
        assert!(exp < 2.0, "exp: {exp}");
        let ln = worst_ulp(Function::Ln, &floats(1.6, 30.0), |x| f64::from(f32::from_bits(x)).ln());
        assert!(ln < 2.0, "ln: {ln}");
    }

    #[test]
    fn the_exponential_variate_is_precise_at_its_small_end() {
        let truth = |word: u32| -(-((f64::from(word) + 0.5) / 4_294_967_296.0)).ln_1p();
        let error = worst_ulp(Function::Exponential, &words(), truth);
        assert!(error < 4.0, "{error}");
    }

    #[test]
    fn gumbel_noise_follows_its_formula_and_never_exceeds_its_bound() {
        let inputs = words();
        for (word, given) in inputs.iter().zip(map(Level::detected(), Function::Gumbel, &inputs)) {
            let truth = -(-(-((f64::from(*word) + 0.5) / 4_294_967_296.0)).ln_1p()).ln();
            assert!((f64::from(given) - truth).abs() < 4e-6, "{word}: {given} for {truth}");
            assert!(given <= MAX_GUMBEL);
        }
    }
}
