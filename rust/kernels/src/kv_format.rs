//! How a token's key or value of one head is stored: as the activations are, or as signed bytes with a scale of its own.
//! A row x of bytes is `round(x * 127 / max|x|)`, its scale `max|x| / 127`: single IEEE operations, so every level writes
//! the same bits, and a row is written once from itself alone, so that bits do not depend on batches or chunks.
//! O(head size) per row. Readers use the codes as they are, which f32 and bf16 hold exactly, and bring a key's scale to
//! its score and a value's to its weight. Knows nothing of where rows lie.
#![expect(unsafe_code, reason = "vector loads and stores on raw pointers")]

use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::simd::{Simd, load_element, load_element_partial};

/// Codes lie between minus this and this.
const MAX_CODE: f32 = 127.0;
/// Least divisor, so that a row of zeros has codes of zero.
const LEAST: f32 = 1e-36;

/// The format of a KV region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// Elements of the activations' format.
    Activations,
    /// Signed bytes with an f32 scale per row.
    Bytes,
}

impl KvFormat {
    /// Stored elements that a row's scale takes.
    pub const fn scale_elements(self) -> usize {
        match self {
            Self::Activations => 0,
            Self::Bytes => size_of::<f32>(),
        }
    }

    /// Bytes of a stored element, for activations of so many.
    pub const fn element_bytes(self, activation_bytes: usize) -> usize {
        match self {
            Self::Activations => activation_bytes,
            Self::Bytes => 1,
        }
    }
}

mod sealed {
    /// What a stored row consists of.
    pub trait Stored: Copy + Default + Send + Sync + core::fmt::Debug + 'static {
        /// Whether these are bfloat16, of which two are a unit as they lie.
        const IS_BF16: bool;
        /// Whether these are bytes, whose rows have scales.
        const IS_BYTES: bool;
    }
}
pub(crate) use sealed::Stored;

impl<T: Element> Stored for T {
    const IS_BF16: bool = T::IS_BF16;
    const IS_BYTES: bool = false;
}

impl Stored for i8 {
    const IS_BF16: bool = false;
    const IS_BYTES: bool = true;
}

/// Loads `LANES` stored elements as f32, without their scale.
///
/// # Safety
/// As [`Simd::load`].
#[inline(always)]
pub(crate) unsafe fn load_stored<S: Simd, K: Stored>(simd: S, source: *const K) -> S::F32 {
    // SAFETY: the caller's promise covers every format; `K` is told apart by its constants.
    unsafe {
        if K::IS_BYTES {
            simd.load_signed_bytes(source.cast())
        } else if K::IS_BF16 {
            simd.load_bf16(source.cast())
        } else {
            simd.load(source.cast())
        }
    }
}

/// Loads `count <= LANES` stored elements as f32; further lanes are zero.
///
/// # Safety
/// As [`Simd::load_partial`].
#[inline(always)]
pub(crate) unsafe fn load_stored_partial<S: Simd, K: Stored>(simd: S, source: *const K, count: usize) -> S::F32 {
    // SAFETY: as in `load_stored`; a vector has at most 16 lanes.
    unsafe {
        if K::IS_BYTES {
            let mut bytes = [0_i8; 16];
            core::ptr::copy_nonoverlapping(source.cast(), bytes.as_mut_ptr(), count);
            simd.load_signed_bytes(bytes.as_ptr())
        } else if K::IS_BF16 {
            simd.load_bf16_partial(source.cast(), count)
        } else {
            simd.load_partial(source.cast(), count)
        }
    }
}

/// An element of a KV region beside activations of `T`: `T` itself, or a byte.
pub trait KvElement<T: Element>: Stored {
    /// The region's format.
    const FORMAT: KvFormat;

    /// Stores a head's key or value: `row` and `stored` of the head's size, `scale` of [`KvFormat::scale_elements`].
    fn store(level: Level, row: &[T], stored: &mut [Self], scale: &mut [Self]);

    /// One element, without its scale.
    fn value(self) -> f32;

    /// The factor of a row's elements, of which `scale` holds the bytes.
    fn scale(scale: &[Self]) -> f32;
}

impl<T: Element> KvElement<T> for T {
    const FORMAT: KvFormat = KvFormat::Activations;

    #[inline(always)]
    fn store(_: Level, row: &[T], stored: &mut [Self], _: &mut [Self]) {
        stored.copy_from_slice(row);
    }

    fn value(self) -> f32 {
        self.to_f32()
    }

    fn scale(_: &[Self]) -> f32 {
        1.0
    }
}

impl<T: Element> KvElement<T> for i8 {
    const FORMAT: KvFormat = KvFormat::Bytes;

    fn store(level: Level, row: &[T], stored: &mut [Self], scale: &mut [Self]) {
        let factor = level.run(Quantize { row, codes: stored });
        for (target, byte) in scale.iter_mut().zip(factor.to_ne_bytes()) {
            *target = byte.cast_signed();
        }
    }

    fn value(self) -> f32 {
        f32::from(self)
    }

    fn scale(scale: &[Self]) -> f32 {
        f32::from_ne_bytes(core::array::from_fn(|byte| scale[byte].cast_unsigned()))
    }
}

/// Writes a row's codes and returns its scale, which is not finite if an element is not.
struct Quantize<'a, T> {
    row: &'a [T],
    codes: &'a mut [i8],
}

impl<T: Element> Kernel for Quantize<'_, T> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let length = self.row.len();
        assert!(self.codes.len() == length);
        let (whole, rest) = (length - length % S::LANES, length % S::LANES);
        let (row, codes) = (self.row.as_ptr(), self.codes.as_mut_ptr());
        let mut largest = simd.splat_u32(0);
        let mut lanes = [0_u32; 16];
        // SAFETY: accesses cover `whole` elements in vectors and `rest` more in a partial one.
        unsafe {
            for at in (0..whole).step_by(S::LANES) {
                largest = larger(simd, largest, load_element(simd, row.add(at)));
            }
            if rest > 0 {
                largest = larger(simd, largest, load_element_partial(simd, row.add(whole), rest));
            }
            simd.store_u32(lanes.as_mut_ptr(), largest);
        }
        let largest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
        let factor = simd.splat(MAX_CODE / largest.max(LEAST));
        // SAFETY: as above; what remains goes through the stack, since a vector of codes would leave the row.
        unsafe {
            for at in (0..whole).step_by(S::LANES) {
                simd.store_signed_bytes(codes.add(at), simd.mul(load_element(simd, row.add(at)), factor));
            }
            if rest > 0 {
                let mut last = [0_i8; 16];
                let value = load_element_partial(simd, row.add(whole), rest);
                simd.store_signed_bytes(last.as_mut_ptr(), simd.mul(value, factor));
                core::ptr::copy_nonoverlapping(last.as_ptr(), codes.add(whole), rest);
            }
        }
        largest / MAX_CODE
    }
}

/// The larger magnitudes, as bits: these are ordered like numbers, with NaN above all.
#[inline(always)]
fn larger<S: Simd>(simd: S, largest: S::U32, value: S::F32) -> S::U32 {
    let bits = simd.and_u32(simd.f32_to_bits(value), simd.splat_u32(0x7fff_ffff));
    let more = simd.less_equal_u32(largest, bits);
    simd.f32_to_bits(simd.select(more, simd.bits_to_f32(bits), simd.bits_to_f32(largest)))
}

#[cfg(test)]
mod tests {
    use super::KvElement;
    use crate::dispatch::Level;
    use crate::element::Bf16;
    use crate::reference;

    fn stored(level: Level, row: &[f32]) -> (Vec<i8>, f32) {
        let (mut codes, mut scale) = (vec![99; row.len()], [99; 4]);
        <i8 as KvElement<f32>>::store(level, row, &mut codes, &mut scale);
        (codes, <i8 as KvElement<f32>>::scale(&scale))
    }

    #[test]
    fn every_level_writes_the_bits_of_the_reference() {
        for length in [8, 16, 24, 40, 64, 80, 128, 256] {
            for spread in [0.0, 1e-30, 1e-3, 1.0, 1e30] {
                let row: Vec<f32> = (0..length).map(|i| spread * ((i * 37 + 11) as f32).sin()).collect();
                let expected = reference::quantize_row(&row);
                let halves: Vec<Bf16> = row.iter().map(|&x| Bf16::from_f32(x)).collect();
                let of_halves = reference::quantize_row(&halves);
                for level in Level::available() {
                    assert_eq!(stored(level, &row), expected, "{level}, {length} x {spread}");
                    let (mut codes, mut scale) = (vec![99; length], [99; 4]);
                    <i8 as KvElement<Bf16>>::store(level, &halves, &mut codes, &mut scale);
                    assert_eq!((codes, <i8 as KvElement<Bf16>>::scale(&scale)), of_halves, "{level}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_off_by_half_a_code_at_most() {
        for level in Level::available() {
            let row: Vec<f32> = (0..200).map(|i| ((i * i) as f32 * 0.013).cos() * 7.0).collect();
            let (codes, scale) = stored(level, &row);
            for (&code, &x) in codes.iter().zip(&row) {
                assert!((f32::from(code) * scale - x).abs() <= 0.5001 * scale, "{level}: {code} x {scale} for {x}");
            }
            assert_eq!(codes.iter().map(|code| code.unsigned_abs()).max(), Some(127));
        }
    }

    #[test]
    fn what_is_not_finite_shows_in_the_scale() {
        for level in Level::available() {
            for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = [1.0; 24];
                row[17] = broken;
                assert!(!stored(level, &row).1.is_finite(), "{level}: {broken}");
            }
        }
    }
}
