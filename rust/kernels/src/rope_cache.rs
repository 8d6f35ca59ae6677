//! One pass over the fused QKV projection of a step: optional query/key norms, rotary embedding, KV cache write.
//! Rotation is the half-split form of Llama and Qwen in Hugging Face: element i pairs with `i + rotary_dim / 2`
//! (Su et al. 2021); elements past `rotary_dim` pass through. Rotation is in f32 and rounded once; the norms round as
//! [`crate::norm`] does. O(rows x heads x head size), each element read and written once; a row depends on itself alone.
#![expect(unsafe_code, reason = "vector loads and stores, and rows of the KV region written on several threads")]

use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_index, require_length};
use crate::kv_format::KvElement;
use crate::kv_region::{KvRegionShape, SlotMapping};
use crate::norm::norm_row;
use crate::pool::Pool;
use crate::rows::RowChunks;
use crate::shared_output::SharedOutput;
use crate::simd::{Simd, load_element, load_element_partial, store_element, store_element_partial};

/// Per-head RMS norms applied to queries and keys before the rotation (Qwen3). Both weights hold `head_dim` elements.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms<'a, T> {
    /// Weight of the query norm.
    pub query: &'a [T],
    /// Weight of the key norm.
    pub key: &'a [T],
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Cosines and sines of the rotation, `positions x rotary_dim / 2` each.
#[derive(Clone, Copy, Debug)]
pub struct RotaryTable<'a> {
    /// Cosines.
    pub cosines: &'a [f32],
    /// Sines.
    pub sines: &'a [f32],
    /// Leading elements of a head that rotate: even, at most `head_dim`.
    pub rotary_dim: usize,
}

/// The inputs of one layer's call. Head counts other than `query_heads` come from the slots' region shape.
#[derive(Clone, Copy, Debug)]
pub struct RopeCacheInput<'a, T> {
    /// Fused projections, `rows x (query_heads + 2 kv_heads) x head_dim`, in the order queries, keys, values.
    pub qkv: &'a [T],
    /// Query heads of this rank.
    pub query_heads: usize,
    /// Absolute position of every row.
    pub positions: &'a [i32],
    /// The rotation.
    pub table: RotaryTable<'a>,
    /// Query and key norms, where the model has them.
    pub norms: Option<HeadNorms<'a, T>>,
    /// Where each row's key and value go.
    pub slots: &'a SlotMapping,
    /// Layer within the region.
    pub layer: usize,
}

/// Writes rotated queries to `query_output` (`rows x query_heads x head_dim`), and rotated keys and plain values to
/// the slots of `kv_region`, in its format.
///
/// # Errors
/// A length, layer, position or format that does not fit; nothing has been written then.
pub fn rope_and_cache<T: Element, K: KvElement<T>>(
    pool: &Pool,
    level: Level,
    input: &RopeCacheInput<'_, T>,
    query_output: &mut [T],
    kv_region: &mut [K],
) -> Result<(), KernelError> {
    input.slots.shape().require_format(K::FORMAT)?;
    validate(input, query_output.len(), kv_region.len())?;
    let shape = *input.slots.shape();
    let head_dim = shape.head_dim;
    let query_elements = input.query_heads * head_dim;
    let row_elements = query_elements + 2 * shape.kv_heads * head_dim;
    let half = input.table.rotary_dim / 2;
    let query_output = SharedOutput::new(query_output);
    let region = SharedOutput::new(kv_region);
    let chunks = RowChunks::new(input.slots.rows(), 2 * row_elements * size_of::<T>());
    pool.parallel_for(chunks.count(), |chunk| {
        for row in chunks.rows(chunk) {
            let position = input.positions[row] as usize;
            let rotation = Rotation {
                cosines: &input.table.cosines[position * half..][..half],
                sines: &input.table.sines[position * half..][..half],
            };
            let source = &input.qkv[row * row_elements..][..row_elements];
            let (queries, keys_values) = source.split_at(query_elements);
            let (keys, values) = keys_values.split_at(shape.kv_heads * head_dim);
            // SAFETY: every row belongs to one chunk and is written once.
            let output = unsafe { query_output.part(row * query_elements, query_elements) };
            for (head, target) in output.chunks_exact_mut(head_dim).enumerate() {
                let source = &queries[head * head_dim..][..head_dim];
                let norm = input.norms.map(|norms| (norms.query, norms.epsilon));
                level.run(RotateHead { source, target, norm, rotation });
            }
            let first = input.slots.key_offsets(row, input.layer);
            let norm = input.norms.map(|norms| (norms.key, norms.epsilon));
            let mut rotated = [T::default(); KvRegionShape::MAX_HEAD_DIM];
            let rotated = &mut rotated[..head_dim];
            for head in 0..shape.kv_heads {
                let further = head * shape.head_elements();
                let (key, value) = (&keys[head * head_dim..][..head_dim], &values[head * head_dim..][..head_dim]);
                level.run(RotateHead { source: key, target: &mut *rotated, norm, rotation });
                for (row, further) in [(&*rotated, further), (value, further + shape.key_to_value())] {
                    let (at, scale_at) = (first.0 + further, first.1 + further);
                    // SAFETY: slots are all different (`SlotMapping`), so nobody else writes these places.
                    let (stored, scale) =
                        unsafe { (region.part(at, head_dim), region.part(scale_at, K::FORMAT.scale_elements())) };
                    K::store(level, row, stored, scale);
                }
            }
        }
    })
}

fn validate<T>(input: &RopeCacheInput<'_, T>, query_output: usize, kv_region: usize) -> Result<(), KernelError> {
    let shape = input.slots.shape();
    let rows = input.slots.rows();
    let rotary_dim = input.table.rotary_dim;
    let unsupported = |argument, given: usize, rule| KernelError::Unsupported { argument, given: given as i64, rule };
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > shape.head_dim {
        return Err(unsupported("rotary_dim", rotary_dim, "an even number from 2 to head_dim"));
    }
    if input.query_heads == 0 {
        return Err(unsupported("query_heads", 0, "at least 1"));
    }
    if input.layer >= shape.layers {
        return Err(unsupported("layer", input.layer, "less than the layers of the region"));
    }
    require_length("qkv", rows * (input.query_heads + 2 * shape.kv_heads) * shape.head_dim, input.qkv.len())?;
    require_length("query_output", rows * input.query_heads * shape.head_dim, query_output)?;
    require_length("kv_region", shape.elements(), kv_region)?;
    require_length("positions", rows, input.positions.len())?;
    let half = rotary_dim / 2;
    let positions = input.table.cosines.len() / half;
    require_length("cosines", positions * half, input.table.cosines.len())?;
    require_length("sines", positions * half, input.table.sines.len())?;
    for (row, &position) in input.positions.iter().enumerate() {
        require_index("positions", row, position, positions)?;
    }
    if let Some(norms) = &input.norms {
        require_length("norms.query", shape.head_dim, norms.query.len())?;
        require_length("norms.key", shape.head_dim, norms.key.len())?;
    }
    Ok(())
}

/// One row of the table: `rotary_dim / 2` cosines and sines.
#[derive(Clone, Copy)]
struct Rotation<'a> {
    cosines: &'a [f32],
    sines: &'a [f32],
}

struct RotateHead<'a, T> {
    source: &'a [T],
    target: &'a mut [T],
    norm: Option<(&'a [T], f32)>,
    rotation: Rotation<'a>,
}

impl<T: Element> Kernel for RotateHead<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let head_dim = self.source.len();
        let half = self.rotation.cosines.len();
        assert!(self.target.len() == head_dim && 2 * half <= head_dim && self.rotation.sines.len() == half);
        let target = self.target.as_mut_ptr();
        let mut source = self.source.as_ptr();
        if let Some((weight, epsilon)) = self.norm {
            assert!(weight.len() == head_dim);
            // SAFETY: the three arrays hold `head_dim` elements.
            unsafe { norm_row(simd, source, weight.as_ptr(), epsilon, target, head_dim) };
            source = target;
        }
        let mut at = 0;
        while at < half {
            let count = (half - at).min(S::LANES);
            // SAFETY: `at + count <= half` and `half + half <= head_dim`; each vector is loaded before it is stored.
            unsafe { rotate(simd, source, target, self.rotation, half, at, count) };
            at += count;
        }
        if !core::ptr::eq(source, target) {
            let passed = 2 * half;
            // SAFETY: both arrays hold `head_dim` elements and do not overlap.
            unsafe { core::ptr::copy_nonoverlapping(source.add(passed), target.add(passed), head_dim - passed) };
        }
    }
}

/// Rotates the pairs `at..at + count`.
///
/// # Safety
/// `source` and `target` (which may be one array) must hold `2 half` elements, and `at + count <= half`.
#[inline(always)]
unsafe fn rotate<S: Simd, T: Element>(
    simd: S,
    source: *const T,
    target: *mut T,
    rotation: Rotation<'_>,
    half: usize,
    at: usize,
    count: usize,
) {
    // SAFETY: the caller's promise bounds every access.
    unsafe {
        let (cosines, sines) = (rotation.cosines.as_ptr().add(at), rotation.sines.as_ptr().add(at));
        let (low, high) = (at, at + half);
        if count == S::LANES {
            let (x, y) = (load_element(simd, source.add(low)), load_element(simd, source.add(high)));
            let (cosine, sine) = (simd.load(cosines), simd.load(sines));
            store_element(simd, target.add(low), simd.sub(simd.mul(x, cosine), simd.mul(y, sine)));
            store_element(simd, target.add(high), simd.add(simd.mul(y, cosine), simd.mul(x, sine)));
        } else {
            let x = load_element_partial(simd, source.add(low), count);
            let y = load_element_partial(simd, source.add(high), count);
            let (cosine, sine) = (simd.load_partial(cosines, count), simd.load_partial(sines, count));
            let rotated = simd.sub(simd.mul(x, cosine), simd.mul(y, sine));
            store_element_partial(simd, target.add(low), rotated, count);
            let rotated = simd.add(simd.mul(y, cosine), simd.mul(x, sine));
            store_element_partial(simd, target.add(high), rotated, count);
        }
    }
}
