//! Paged causal attention with grouped-query heads for a mixed batch of prefill chunks and decode rows.
//! Flash-style (Dao et al. 2022): KV is read in tiles of 64 tokens, once for all query heads of a group and all rows of
//! a query tile; O(query rows x context), memory O(query tile) per thread.
//! Invariance by construction: tiles and splits lie at absolute KV positions, every split of 256 tokens is computed from
//! scratch and splits are merged in order, so a row's bits depend on its own query and KV alone, not on other rows,
//! chunking, block size or threads. They do depend on the level, on the element type and on the region's format.
//! Scales of rows never meet elements: a key's is brought to its scores, a value's to its weights, 64 at a time.
//! Keys and values outside of a row's causal window are never multiplied, so stale or non-finite memory cannot leak in.

mod direct;
mod layout;
mod micro;
mod pack;
mod plan;
mod results;
mod softmax;
mod tile;
mod waves;

pub use plan::AttentionPlan;

use crate::dispatch::Level;
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::kv_format::KvElement;
use crate::kv_region::KvRegionShape;
use crate::pool::Pool;
use crate::scratch::{Scratch, with_thread_scratch};
use crate::shared_output::SharedOutput;
use core::cell::RefCell;
use layout::PartialLayout;
use plan::Task;
use tile::{TaskInput, TaskKernel};

/// Tokens per tile: scores of a tile fill four 512-bit vectors per query.
pub(crate) const TILE_TOKENS: usize = 64;
/// Tokens per split, the unit of parallelism along one sequence and of ordered merging.
pub(crate) const SPLIT_TOKENS: usize = 256;

/// The attention of one layer group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads of this rank: a multiple of the region's `kv_heads`.
    pub query_heads: usize,
    /// Factor on the scores before the softmax, usually `1 / sqrt(head_dim)`; positive and finite.
    pub softmax_scale: f32,
    /// Each row attends to at most this many latest tokens, itself included; unlimited where `None`.
    pub window_tokens: Option<u32>,
    /// The KV region.
    pub region: KvRegionShape,
}

/// A step's sequences as index arrays.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBatch<'a> {
    /// First row of every sequence, and the row count at the end: `sequences + 1` ascending values from 0.
    pub query_start: &'a [i32],
    /// KV tokens of every sequence, this step's included: at least its row count.
    pub sequence_lengths: &'a [i32],
    /// Where each sequence's blocks begin in `block_tables`.
    pub table_offsets: &'a [i32],
    /// Block ids in order of position. Entries that no row's window reaches are not looked at.
    pub block_tables: &'a [i32],
}

thread_local! {
    /// Results of splits that are merged by another task. Kept by the calling thread from layer to layer.
    static PARTIALS: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

impl AttentionPlan {
    /// Computes one layer: `query` and `output` are `rows x query_heads x head_dim`, `kv_region` the whole region.
    ///
    /// # Errors
    /// A buffer whose length or format does not fit the plan, or a layer that the region lacks.
    pub fn run<T: Element, K: KvElement<T>>(
        &self,
        pool: &Pool,
        level: Level,
        layer: usize,
        query: &[T],
        kv_region: &[K],
        output: &mut [T],
    ) -> Result<(), KernelError> {
        let shape = self.shape();
        let elements = self.rows() * shape.query_heads * shape.region.head_dim;
        require_length("query", elements, query.len())?;
        require_length("output", elements, output.len())?;
        shape.region.require_format(K::FORMAT)?;
        require_length("kv_region", shape.region.elements(), kv_region.len())?;
        if layer >= shape.region.layers {
            let rule = "less than the layers of the region";
            return Err(KernelError::Unsupported { argument: "layer", given: layer as i64, rule });
        }
        let output = SharedOutput::new(output);
        PARTIALS.with_borrow_mut(|partials| {
            let layout = PartialLayout::new(shape.region.head_dim);
            let words = partials.words(self.partial_vectors() * layout.words());
            let input = TaskInput { plan: self, layer, query, kv_region, output: &output, partials: Partials(words) };
            let run = |task: &Task| {
                with_thread_scratch(|scratch| level.run(TaskKernel { input: &input, task, scratch }));
            };
            for wave in self.waves() {
                pool.parallel_for(wave.tasks.len(), |index| run(&wave.tasks[index]))?;
                pool.parallel_for(wave.merges.len(), |index| run(&wave.merges[index]))?;
            }
            Ok(())
        })
    }
}

/// The buffer of partial results, of which every task uses its own part.
#[derive(Clone, Copy)]
struct Partials(*mut u32);

/// Plans and computes one layer; see [`AttentionPlan`] for reuse over the layers of a step.
///
/// # Errors
/// As [`AttentionPlan::new`] and [`AttentionPlan::run`].
#[expect(clippy::too_many_arguments, reason = "the plan's constructor and its run in one call")]
pub fn paged_attention<T: Element, K: KvElement<T>>(
    pool: &Pool,
    level: Level,
    shape: &AttentionShape,
    batch: &AttentionBatch<'_>,
    layer: usize,
    query: &[T],
    kv_region: &[K],
    output: &mut [T],
) -> Result<(), KernelError> {
    AttentionPlan::new(shape, batch, pool.threads())?.run(pool, level, layer, query, kv_region, output)
}
