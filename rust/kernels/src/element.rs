//! The number formats that kernels read and write: f32 and bfloat16.
//! Owns the conversion between them, which rounds to nearest with ties to even, as hardware does.
//! Arithmetic happens elsewhere and always in f32; this file knows nothing of vectors or tensors.

/// A bfloat16 number as its bit pattern: the upper half of an f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Bf16 {
    /// The value as f32, exactly.
    #[inline(always)]
    pub const fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }

    /// Rounds to nearest, ties to even. Every NaN becomes the quiet NaN of the same sign.
    #[inline(always)]
    pub const fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            return Self(((bits >> 16) as u16) | 0x0040);
        }
        let rounding = 0x7fff + ((bits >> 16) & 1);
        // An infinity has a zero mantissa, so the addition cannot carry out of the sign bit.
        Self((bits.wrapping_add(rounding) >> 16) as u16)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for super::Bf16 {}
}

/// A storage format of activations, weights or the KV cache. Sealed: kernels handle exactly these two.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + core::fmt::Debug + 'static {
    /// Whether this is bfloat16; lets generic kernels choose their arithmetic at compile time.
    const IS_BF16: bool;
    /// The value as f32, exactly.
    fn to_f32(self) -> f32;
    /// The nearest representable value, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const IS_BF16: bool = false;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for Bf16 {
    const IS_BF16: bool = true;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

#[cfg(test)]
mod tests {
    use super::Bf16;

    #[test]
    fn rounding_to_bf16_takes_the_nearest_and_breaks_ties_to_even() {
        assert_eq!(Bf16::from_f32(1.0).0, 0x3f80);
        assert_eq!(Bf16::from_f32(f32::from_bits(0x3f80_8000)).0, 0x3f80);
        assert_eq!(Bf16::from_f32(f32::from_bits(0x3f81_8000)).0, 0x3f82);
        assert_eq!(Bf16::from_f32(f32::from_bits(0x3f80_8001)).0, 0x3f81);
        assert_eq!(Bf16::from_f32(f32::MAX).0, 0x7f80);
        assert_eq!(Bf16::from_f32(f32::NEG_INFINITY).0, 0xff80);
        assert!(Bf16::from_f32(f32::NAN).to_f32().is_nan());
        assert!(Bf16::from_f32(f32::from_bits(0x7f80_0001)).to_f32().is_nan());
    }

    #[test]
    fn every_bf16_survives_the_trip_through_f32() {
        for bits in 0..=u16::MAX {
            let value = Bf16(bits).to_f32();
            if !value.is_nan() {
                assert_eq!(Bf16::from_f32(value).0, bits);
            }
        }
    }
}
