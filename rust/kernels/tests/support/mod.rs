//! What the integration tests share: a pool, random numbers and a paged batch with its memory.
#![allow(dead_code, reason = "each test binary uses a part")]

use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::kv_format::KvElement;
use llmscale_kernels::kv_region::KvRegionShape;
use llmscale_kernels::paged_attention::{AttentionBatch, AttentionShape};
use llmscale_kernels::pool::Pool;
use std::num::NonZeroUsize;

pub(crate) fn pool(threads: usize) -> Pool {
    Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap()
}

/// `SplitMix64`.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Uniform in (-1, 1).
    pub(crate) fn signed(&mut self) -> f32 {
        ((self.next() >> 40) as f32 / 16_777_216.0).mul_add(2.0, -1.0)
    }

    /// About normal: the sum of four uniform numbers, scaled to unit variance.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.signed()).sum::<f32>() * 0.866
    }

    pub(crate) fn elements<T: Element>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| T::from_f32(self.normal())).collect()
    }
}

/// One sequence of a test: all its queries (one per position) and its whole KV content for all layers and heads.
#[derive(Clone)]
pub(crate) struct Sequence<T> {
    pub(crate) tokens: usize,
    /// `tokens x query_heads x head_dim`.
    pub(crate) queries: Vec<T>,
    /// `tokens x layers x 2 x kv_heads x head_dim`.
    pub(crate) kv: Vec<T>,
}

impl<T: Element> Sequence<T> {
    pub(crate) fn random(random: &mut Random, shape: &AttentionShape, tokens: usize) -> Self {
        let region = &shape.region;
        let queries = random.elements(tokens * shape.query_heads * region.head_dim);
        let kv = random.elements(tokens * region.layers * 2 * region.kv_heads * region.head_dim);
        Self { tokens, queries, kv }
    }
}

/// A part of a sequence to compute: rows for positions `computed..length` with `length` tokens in the cache.
pub(crate) struct Chunk {
    pub(crate) sequence: usize,
    pub(crate) computed: usize,
    pub(crate) length: usize,
}

/// What memory of no sequence holds: NaN, or scales that are NaN.
pub(crate) trait Poison {
    const POISON: Self;
}

impl Poison for f32 {
    const POISON: Self = Self::NAN;
}

impl Poison for Bf16 {
    const POISON: Self = Self(0x7fc0);
}

impl Poison for i8 {
    const POISON: Self = -1;
}

/// A step in paged form. Memory that belongs to no sequence holds NaN, so that reading it shows.
pub(crate) struct Step<T, K = T> {
    pub(crate) shape: AttentionShape,
    pub(crate) query: Vec<T>,
    pub(crate) region: Vec<K>,
    pub(crate) query_start: Vec<i32>,
    pub(crate) sequence_lengths: Vec<i32>,
    pub(crate) table_offsets: Vec<i32>,
    pub(crate) block_tables: Vec<i32>,
}

impl<T: Element, K: KvElement<T> + Poison> Step<T, K> {
    /// Lays the chunks out in a region with shuffled blocks; only the first `length` tokens of a chunk are written.
    pub(crate) fn new(random: &mut Random, shape: AttentionShape, sequences: &[Sequence<T>], chunks: &[Chunk]) -> Self {
        let block_tokens = shape.region.block_tokens;
        let needed: usize = chunks.iter().map(|chunk| chunk.length.div_ceil(block_tokens)).sum();
        let region_shape = KvRegionShape { blocks: needed + 3, format: K::FORMAT, ..shape.region };
        let mut free: Vec<usize> = (0..region_shape.blocks).collect();
        for index in (1..free.len()).rev() {
            free.swap(index, random.below(index + 1));
        }
        let mut step = Self {
            shape: AttentionShape { region: region_shape, ..shape },
            query: Vec::new(),
            region: vec![K::POISON; region_shape.elements()],
            query_start: vec![0],
            sequence_lengths: Vec::new(),
            table_offsets: Vec::new(),
            block_tables: Vec::new(),
        };
        for chunk in chunks {
            let row_elements = shape.query_heads * shape.region.head_dim;
            let source = &sequences[chunk.sequence];
            step.query.extend(&source.queries[chunk.computed * row_elements..chunk.length * row_elements]);
            step.query_start.push((step.query.len() / row_elements) as i32);
            step.sequence_lengths.push(chunk.length as i32);
            step.table_offsets.push(step.block_tables.len() as i32);
            let blocks: Vec<usize> = (0..chunk.length.div_ceil(block_tokens)).map(|_| free.pop().unwrap()).collect();
            step.block_tables.extend(blocks.iter().map(|&block| block as i32));
            for position in 0..chunk.length {
                step.write_token(source, position, blocks[position / block_tokens]);
            }
        }
        step
    }

    fn write_token(&mut self, source: &Sequence<T>, position: usize, block: usize) {
        let region = self.shape.region;
        let mut from = position * region.layers * 2 * region.kv_heads * region.head_dim;
        for layer in 0..region.layers {
            for part in 0..2 {
                for head in 0..region.kv_heads {
                    let first = region.layer_offset(block, layer)
                        + part * region.key_to_value()
                        + head * region.head_elements();
                    let token = position % region.block_tokens;
                    let mut stored = vec![K::default(); region.head_dim];
                    let mut scale = vec![K::default(); region.format.scale_elements()];
                    K::store(Level::detected(), &source.kv[from..from + region.head_dim], &mut stored, &mut scale);
                    self.region[first + region.row_offset(token)..][..stored.len()].copy_from_slice(&stored);
                    self.region[first + region.scale_offset(token)..][..scale.len()].copy_from_slice(&scale);
                    from += region.head_dim;
                }
            }
        }
    }

    pub(crate) fn batch(&self) -> AttentionBatch<'_> {
        AttentionBatch {
            query_start: &self.query_start,
            sequence_lengths: &self.sequence_lengths,
            table_offsets: &self.table_offsets,
            block_tables: &self.block_tables,
        }
    }
}
