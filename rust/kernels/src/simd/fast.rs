//! The exponential of the attention kernel: fast, within a few units in the last place, and not equal between levels.
//! Works on base 2, because the softmax scale absorbs the factor log2(e); costs about 10 instructions per vector.
//! Coefficients: minimax fits of 2^r on [-1/2, 1/2] with p(0) = 1 (Remez), so that 2^0 is exactly 1.

use super::Simd;

/// 1.5 * 2^23: adding and subtracting it rounds an f32 below 2^22 to an integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// `2^x` for `x <= 0`; inputs below -126 give about 2^-126. Relative error below 4e-6 (`PRECISE = false`, enough where
/// the result is rounded to bf16, whose step is 4e-3) or 1.5e-7 (`PRECISE = true`).
#[inline(always)]
pub(crate) fn exp2<S: Simd, const PRECISE: bool>(simd: S, x: S::F32) -> S::F32 {
    let x = simd.max(x, simd.splat(-126.0));
    let whole = simd.sub(simd.add(x, simd.splat(ROUNDER)), simd.splat(ROUNDER));
    let r = simd.sub(x, whole);
    let mut p;
    if PRECISE {
        p = simd.splat(1.559_467_8e-4);
        p = simd.mul_add(p, r, simd.splat(1.340_664_4e-3));
        p = simd.mul_add(p, r, simd.splat(9.617_693e-3));
        p = simd.mul_add(p, r, simd.splat(5.550_310_6e-2));
        p = simd.mul_add(p, r, simd.splat(2.402_265_3e-1));
        p = simd.mul_add(p, r, simd.splat(6.931_472e-1));
    } else {
        p = simd.splat(9.782_913e-3);
        p = simd.mul_add(p, r, simd.splat(5.597_688_4e-2));
        p = simd.mul_add(p, r, simd.splat(2.402_071e-1));
        p = simd.mul_add(p, r, simd.splat(6.931_136e-1));
    }
    p = simd.mul_add(p, r, simd.splat(1.0));
    simd.exp2_scale(p, whole)
}

#[cfg(test)]
#[expect(unsafe_code, reason = "vector loads and stores on raw pointers")]
mod tests {
    use crate::dispatch::{Kernel, Level};
    use crate::simd::Simd;

    struct Exp2<'a, const PRECISE: bool>(&'a mut [f32]);

    impl<const PRECISE: bool> Kernel for Exp2<'_, PRECISE> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for chunk in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk has exactly `LANES` elements.
                unsafe {
                    let x = simd.load(chunk.as_ptr());
                    simd.store(chunk.as_mut_ptr(), super::exp2::<S, PRECISE>(simd, x));
                }
            }
        }
    }

    fn worst_relative_error(level: Level, precise: bool) -> f64 {
        let inputs: Vec<f32> = (0..160_000).map(|i| -(i as f32) * 7.8e-4).collect();
        let mut outputs = inputs.clone();
        if precise {
            level.run(Exp2::<true>(&mut outputs));
        } else {
            level.run(Exp2::<false>(&mut outputs));
        }
        assert_eq!(
            outputs[0].to_bits(),
            1.0_f32.to_bits(),
            "2^0 must be exactly 1, or an unchanged maximum would rescale the sums"
        );
        inputs.iter().zip(&outputs).map(|(&x, &y)| (f64::from(y) / f64::from(x).exp2() - 1.0).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn the_error_of_exp2_stays_within_its_documented_bound_at_every_level() {
        for level in Level::available() {
            assert!(worst_relative_error(level, true) < 1.5e-7, "{level}");
            assert!(worst_relative_error(level, false) < 4e-6, "{level}");
        }
    }
}
