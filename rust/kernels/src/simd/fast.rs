//! The exponential of the attention kernel: fast, within a few units in the last place, and not equal between levels.
//! Works on base 2, because the softmax scale absorbs the factor log2(e); costs 6 or 8 instructions per vector.
//! Coefficients: minimax fits of 2^r on [0, 1] with p(0) = 1 (Remez), so that 2^0 is exactly 1.

use super::Simd;

/// `2^x` for `x < 120`; far below -126 it gives at most 2^-126. Relative error below 1e-4 (`PRECISE = false`, enough
/// where the result is rounded to bf16, whose step is 4e-3) or 3e-7 (`PRECISE = true`).
#[inline(always)]
pub(crate) fn exp2<S: Simd, const PRECISE: bool>(simd: S, x: S::F32) -> S::F32 {
    let (r, whole) = simd.split_exponent(x);
    let mut p;
    if PRECISE {
        p = simd.splat(1.867_13e-3);
        p = simd.mul_add(p, r, simd.splat(9.017_03e-3));
        p = simd.mul_add(p, r, simd.splat(5.579_991_3e-2));
        p = simd.mul_add(p, r, simd.splat(2.401_644_5e-1));
        p = simd.mul_add(p, r, simd.splat(6.931_513e-1));
    } else {
        p = simd.splat(7.706_704e-2);
        p = simd.mul_add(p, r, simd.splat(2.276_45e-1));
        p = simd.mul_add(p, r, simd.splat(6.951_168e-1));
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
    fn infinitely_negative_exponents_give_next_to_nothing_and_nan_stays_nan() {
        for level in Level::available() {
            let mut values = [f32::NEG_INFINITY, -1e30, -127.0, f32::NAN, -0.0, 0.0, 1.0, -1.0].repeat(2);
            level.run(Exp2::<true>(&mut values));
            assert!(values[..3].iter().all(|&y| (0.0..=1.2e-38).contains(&y)), "{level}: {values:?}");
            assert!(values[3].is_nan(), "{level}: {values:?}");
            assert!((values[6] - 2.0).abs() < 1e-6 && (values[7] - 0.5).abs() < 1e-6, "{level}: {values:?}");
            assert_eq!([values[4], values[5]].map(f32::to_bits), [1.0_f32.to_bits(); 2]);
        }
    }

    #[test]
    fn the_error_of_exp2_stays_within_its_documented_bound_at_every_level() {
        for level in Level::available() {
            assert!(worst_relative_error(level, true) < 3e-7, "{level}");
            assert!(worst_relative_error(level, false) < 1e-4, "{level}");
        }
    }
}
