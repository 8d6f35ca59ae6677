//! Runs one attention task: walks its KV tiles, keeps the state of its query vectors, writes output or partial results.
//! A query vector is one (kv head, row, head of the group), numbered in this order within the task. All working memory is this
//! thread's scratch. O(vectors x tokens x head size). Knows the plan, but not how tasks were divided.
#![expect(unsafe_code, reason = "kernels on scratch memory and disjoint parts of the output")]

use super::direct;
use super::layout::{Layout, PartialLayout};
use super::micro::{self, Accumulate};
use super::pack::{TileRows, pack_row};
use super::plan::{AttentionPlan, Task, TaskPart};
use super::softmax::{exponents_to_factors, raise_maximum, scale_scores, scores_to_weights};
use super::{Partials, SPLIT_TOKENS, TILE_TOKENS};
use crate::dispatch::Kernel;
use crate::element::Element;
use crate::kv_format::Stored;
use crate::kv_region::RUN_TOKENS;
use crate::scratch::Scratch;
use crate::shared_output::SharedOutput;
use crate::simd::Simd;
use core::ops::Range;

/// What all tasks of a layer share.
pub(super) struct TaskInput<'a, T, K> {
    pub(super) plan: &'a AttentionPlan,
    pub(super) layer: usize,
    pub(super) query: &'a [T],
    pub(super) kv_region: &'a [K],
    pub(super) output: &'a SharedOutput<'a, T>,
    pub(super) partials: Partials,
}

// SAFETY: the partial results are the only raw pointer, and every task writes only its own part of them.
unsafe impl<T: Element, K: Stored> Sync for TaskInput<'_, T, K> {}

/// One task as a kernel.
pub(super) struct TaskKernel<'a, T, K> {
    pub(super) input: &'a TaskInput<'a, T, K>,
    pub(super) task: &'a Task,
    pub(super) scratch: &'a mut Scratch,
}

impl<T: Element, K: Stored> Kernel for TaskKernel<'_, T, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let head_dim = self.input.plan.shape().region.head_dim;
        let vectors = self.task.kv_heads.len() * self.task.rows.len() * self.input.plan.group();
        let layout = Layout::new::<S, T>(head_dim, vectors);
        let scratch = self.scratch.words(layout.words);
        let work = Work::new(simd, self.input, self.task, layout, scratch);
        // SAFETY: the scratch is as long as the layout says, and borrowed by this kernel alone.
        unsafe {
            if S::BF16_DOT && T::IS_BF16 {
                work.execute::<true>();
            } else {
                work.execute::<false>();
            }
        }
    }
}

/// A task at work: its parameters and its scratch.
pub(super) struct Work<'a, S, T, K> {
    pub(super) simd: S,
    pub(super) input: &'a TaskInput<'a, T, K>,
    pub(super) task: &'a Task,
    pub(super) layout: Layout,
    pub(super) scratch: *mut u32,
    pub(super) group: usize,
    /// Softmax scale times log2(e).
    pub(super) scale: f32,
}

impl<'a, S: Simd, T: Element, K: Stored> Work<'a, S, T, K> {
    #[inline(always)]
    fn new(simd: S, input: &'a TaskInput<'a, T, K>, task: &'a Task, layout: Layout, scratch: *mut u32) -> Self {
        let scale = input.plan.shape().softmax_scale * core::f32::consts::LOG2_E;
        Self { simd, input, task, layout, scratch, group: input.plan.group(), scale }
    }

    #[inline(always)]
    pub(super) fn at(&self, offset: usize) -> *mut u32 {
        // Offsets come from the layout that sized the scratch.
        self.scratch.wrapping_add(offset)
    }

    /// Where a vector's query and output begin.
    #[inline(always)]
    pub(super) fn query_offset(&self, vector: usize) -> usize {
        let shape = self.input.plan.shape();
        let (head, in_head) = (vector / self.head_vectors(), vector % self.head_vectors());
        let row = self.input.plan.step_row(self.task.sequence, self.task.rows.start + in_head / self.group);
        let query_head = (self.task.kv_heads.start + head) * self.group + in_head % self.group;
        (row * shape.query_heads + query_head) * shape.region.head_dim
    }

    /// Vectors of one kv head.
    #[inline(always)]
    fn head_vectors(&self) -> usize {
        self.task.rows.len() * self.group
    }

    #[inline(always)]
    pub(super) fn vectors(&self) -> usize {
        self.task.kv_heads.len() * self.head_vectors()
    }

    /// # Safety
    /// The scratch holds `layout.words` words for this call alone.
    #[inline(always)]
    unsafe fn execute<const PAIRS: bool>(&self) {
        let partial_layout = PartialLayout::new(self.input.plan.shape().region.head_dim);
        // SAFETY: the layout places every array; each task owns its part of partials and output.
        unsafe {
            for vector in 0..self.vectors() {
                let total = partial_layout.result(self.at(self.layout.totals), vector);
                (*total.maximum, *total.denominator) = (f32::NEG_INFINITY, 0.0);
            }
            if let TaskPart::Merge { partial, stride } = self.task.part {
                for split in 0..self.task.splits.len() {
                    self.merge(self.input.partials.0, partial + split * stride);
                }
                self.write_output();
                return;
            }
            self.pack_queries::<PAIRS>();
            for (index, split) in self.task.splits.clone().enumerate() {
                self.run_split::<PAIRS>(split);
                match self.task.part {
                    TaskPart::Some { partial } => {
                        self.store_split(self.input.partials.0, partial + index * self.vectors());
                    }
                    _ => self.merge_current(),
                }
            }
            if matches!(self.task.part, TaskPart::Whole) {
                self.write_output();
            }
        }
    }

    /// # Safety
    /// As [`Self::execute`].
    #[inline(always)]
    unsafe fn pack_queries<const PAIRS: bool>(&self) {
        let head_dim = self.input.plan.shape().region.head_dim;
        for vector in 0..self.vectors() {
            let source = &self.input.query[self.query_offset(vector)..][..head_dim];
            let target = self.at(self.layout.queries + vector * self.layout.units);
            // SAFETY: the queries have a vector of slack at their end.
            unsafe { pack_row::<S, T, PAIRS>(self.simd, source.as_ptr(), target, head_dim) };
        }
    }

    /// Computes one split of 256 tokens from scratch for all vectors of the tile.
    ///
    /// # Safety
    /// As [`Self::execute`].
    #[inline(always)]
    unsafe fn run_split<const PAIRS: bool>(&self, split: usize) {
        // SAFETY: the layout places every array.
        unsafe {
            for vector in 0..self.vectors() {
                *self.at(self.layout.maxima + vector).cast::<f32>() = f32::NEG_INFINITY;
            }
            self.at(self.layout.denominators).write_bytes(0, self.vectors() * S::LANES);
            self.at(self.layout.sums).write_bytes(0, self.vectors() * self.layout.padded_dim);
            let mut after = self.tile_rows(split * SPLIT_TOKENS);
            for tile in 0..SPLIT_TOKENS / TILE_TOKENS {
                let start = split * SPLIT_TOKENS + tile * TILE_TOKENS;
                let first_head = after;
                // The tile after this may lie in the next split; past the last one it is empty.
                after = self.tile_rows(start + TILE_TOKENS);
                if !first_head.tokens().is_empty() {
                    self.run_heads::<PAIRS>(start, first_head, &after);
                }
            }
        }
    }

    /// Runs a tile for every head of the task, prefetching the next head's or the next tile's keys and values.
    ///
    /// # Safety
    /// As [`Self::execute`].
    #[inline(always)]
    unsafe fn run_heads<const PAIRS: bool>(&self, start: usize, first_head: TileRows<K>, after: &TileRows<K>) {
        let (active, full) = self.active_and_full(start);
        let head_elements = self.input.plan.shape().region.head_elements();
        let mut current = first_head;
        for head in 0..self.task.kv_heads.len() {
            let next = if head + 1 < self.task.kv_heads.len() { current.shifted(head_elements) } else { *after };
            // SAFETY: the caller's promise.
            unsafe { self.run_tile::<PAIRS>(start, head, (active.clone(), full.clone()), &current, &next) };
            current = next;
        }
    }

    /// The tokens of a tile that some row of the task attends to, and where those of the task's first head lie.
    #[inline(always)]
    fn tile_rows(&self, start: usize) -> TileRows<K> {
        let plan = self.input.plan;
        let region = &plan.shape().region;
        let sequence = self.task.sequence;
        let from = plan.row_range(sequence, self.task.rows.start).start.max(start);
        let to = plan.row_range(sequence, self.task.rows.end - 1).end.min(start + TILE_TOKENS);
        let mut rows = TileRows::new(region.key_to_value(), region.head_dim);
        if from >= to {
            return rows;
        }
        rows.want(from - start..to - start);
        for run in (from - start) / RUN_TOKENS..(to - start).div_ceil(RUN_TOKENS) {
            let position = start + RUN_TOKENS * run;
            let block = plan.block(sequence, position.max(from));
            let offset = region.layer_offset(block, self.input.layer)
                + self.task.kv_heads.start * region.head_elements()
                + region.row_offset(position % region.block_tokens);
            // All heads' keys and values of the run, checked once.
            let end = offset + (self.task.kv_heads.len() - 1) * region.head_elements() + region.run_elements();
            rows.set_run(run, self.input.kv_region[offset..end + region.key_to_value()].as_ptr());
        }
        rows
    }

    /// # Safety
    /// As [`Self::execute`].
    #[inline(always)]
    unsafe fn run_tile<const PAIRS: bool>(
        &self,
        start: usize,
        head: usize,
        (active, full): (Range<usize>, Range<usize>),
        tile: &TileRows<K>,
        next: &TileRows<K>,
    ) {
        let (simd, layout) = (self.simd, &self.layout);
        let head_first = head * self.head_vectors();
        let (first, vectors) = (head_first + active.start * self.group, active.len() * self.group);
        let is_whole = tile.tokens() == (0..TILE_TOKENS) && full == active;
        let head_dim = self.input.plan.shape().region.head_dim;
        let is_direct = (1..=direct::MAX_VECTORS).contains(&vectors) && head_dim.is_multiple_of(direct::DIMS);
        // SAFETY: the layout places every array; `first + vectors` is at most the vectors of the task.
        unsafe {
            if PAIRS && S::LANES == 16 && K::IS_BF16 && is_whole && is_direct {
                match vectors {
                    1 => self.run_whole::<1>(start, first, active, tile, next),
                    2 => self.run_whole::<2>(start, first, active, tile, next),
                    3 => self.run_whole::<3>(start, first, active, tile, next),
                    _ => self.run_whole::<4>(start, first, active, tile, next),
                }
                return;
            }
            let (keys, values) = (self.at(layout.keys), self.at(layout.values));
            tile.pack_keys::<S, PAIRS>(simd, keys, self.at(layout.staged), next);
            let scores = self.at(layout.scores + first * TILE_TOKENS).cast::<f32>();
            let queries = self.at(layout.queries + first * layout.units);
            micro::scores::<S, PAIRS>(simd, vectors, layout.units, queries, keys, scores, tile.tokens());
            if K::IS_BYTES {
                let (key_scales, value_scales) = (self.at(layout.key_scales), self.at(layout.value_scales));
                tile.copy_scales(key_scales.cast(), value_scales.cast());
                for vector in 0..vectors {
                    scale_scores(simd, scores.add(vector * TILE_TOKENS), key_scales.cast());
                }
            }
            self.softmax::<PAIRS>(start, head_first, active.clone());
            tile.pack_values::<S, PAIRS>(simd, values, layout.padded_dim, next);
            self.accumulate::<PAIRS>(start, head_first, active, full);
        }
    }

    /// [`Self::run_tile`] of a tile that its few vectors see whole, without packing it.
    ///
    /// # Safety
    /// As [`Self::execute`], for bf16 and vectors of sixteen lanes.
    #[inline(always)]
    unsafe fn run_whole<const VECTORS: usize>(
        &self,
        start: usize,
        first: usize,
        active: Range<usize>,
        tile: &TileRows<K>,
        next: &TileRows<K>,
    ) {
        let (simd, layout) = (self.simd, &self.layout);
        let head_first = first - active.start * self.group;
        // SAFETY: the layout places every array.
        unsafe {
            let scores = self.at(layout.scores + first * TILE_TOKENS).cast::<f32>();
            let queries = self.at(layout.queries + first * layout.units);
            direct::scores::<S, K, VECTORS>(simd, layout.units, queries, scores, tile, next);
            self.softmax::<true>(start, head_first, active);
            let head_dim = self.input.plan.shape().region.head_dim;
            direct::accumulate::<S, K, VECTORS>(simd, self.operands(first), head_dim, tile, next);
        }
    }

    /// Turns the active rows' scores of a tile into weights and updates their state.
    ///
    /// # Safety
    /// As [`Self::execute`].
    #[inline(always)]
    unsafe fn softmax<const PAIRS: bool>(&self, start: usize, head_first: usize, active: Range<usize>) {
        let (simd, layout) = (self.simd, &self.layout);
        // SAFETY: the layout places every array.
        unsafe {
            let factors = self.at(layout.factors).cast::<f32>();
            let maxima = self.at(layout.maxima).cast::<f32>();
            let scores = |vector: usize| self.at(layout.scores + vector * TILE_TOKENS).cast::<f32>();
            for row in active.clone() {
                let tokens = self.tile_tokens(self.task.rows.start + row, start);
                for vector in (head_first + row * self.group)..(head_first + (row + 1) * self.group) {
                    let (maximum, factor) = (maxima.add(vector), factors.add(vector));
                    raise_maximum(simd, scores(vector), &tokens, self.scale, maximum, factor);
                }
            }
            let first = head_first + active.start * self.group;
            exponents_to_factors(simd, factors.add(first), active.len() * self.group);
            for row in active {
                let tokens = self.tile_tokens(self.task.rows.start + row, start);
                for vector in (head_first + row * self.group)..(head_first + (row + 1) * self.group) {
                    let denominators = self.at(layout.denominators + vector * S::LANES).cast();
                    let (maximum, factor) = (*maxima.add(vector), *factors.add(vector));
                    let state = (maximum, factor, denominators);
                    if K::IS_BYTES {
                        let scales = self.at(layout.value_scales).cast();
                        scores_to_weights::<S, PAIRS, true>(simd, scores(vector), &tokens, self.scale, state, scales);
                    } else {
                        let none = core::ptr::null();
                        scores_to_weights::<S, PAIRS, false>(simd, scores(vector), &tokens, self.scale, state, none);
                    }
                }
            }
        }
    }

    /// Weights, packed values and sums from a vector on.
    #[inline(always)]
    fn operands(&self, vector: usize) -> Accumulate {
        let layout = &self.layout;
        Accumulate {
            weights: self.at(layout.scores + vector * TILE_TOKENS),
            values: self.at(layout.values),
            sums: self.at(layout.sums + vector * layout.padded_dim).cast(),
            factors: self.at(layout.factors + vector).cast(),
            padded_dim: layout.padded_dim,
        }
    }

    /// Adds the tile's weighted values to the sums of the active rows.
    ///
    /// # Safety
    /// As [`Self::execute`], after the weights of the active rows were made.
    #[inline(always)]
    unsafe fn accumulate<const PAIRS: bool>(
        &self,
        start: usize,
        head_first: usize,
        active: Range<usize>,
        full: Range<usize>,
    ) {
        // SAFETY: the layout places every array; row numbers are within the task.
        unsafe {
            if !full.is_empty() {
                let token_units = if PAIRS { TILE_TOKENS / 2 } else { TILE_TOKENS };
                let (first, vectors) = (head_first + full.start * self.group, full.len() * self.group);
                self.operands(first).full_rows::<S, PAIRS>(self.simd, vectors, token_units);
            }
            for row in active.filter(|row| !full.contains(row)) {
                let tokens = self.tile_tokens(self.task.rows.start + row, start);
                for head in 0..self.group {
                    self.operands(0).partial_row::<S, PAIRS>(
                        self.simd,
                        head_first + row * self.group + head,
                        tokens.clone(),
                    );
                }
            }
        }
    }

    /// Rows of the task (counted from its first) that see some, and that see all, of the tile. Both are contiguous,
    /// because the ends and starts of the rows' ranges ascend.
    #[inline(always)]
    fn active_and_full(&self, start: usize) -> (Range<usize>, Range<usize>) {
        let (mut active, mut full) = (0..0, 0..0);
        for row in 0..self.task.rows.len() {
            let seen = self.tile_tokens(self.task.rows.start + row, start).len();
            if seen > 0 {
                active = if active.end == 0 { row..row + 1 } else { active.start..row + 1 };
            }
            if seen == TILE_TOKENS {
                full = if full.end == 0 { row..row + 1 } else { full.start..row + 1 };
            }
        }
        (active, full)
    }

    /// Tokens of a tile that a row of the sequence attends to.
    #[inline(always)]
    fn tile_tokens(&self, row: usize, start: usize) -> Range<usize> {
        let range = self.input.plan.row_range(self.task.sequence, row);
        let from = range.start.saturating_sub(start).min(TILE_TOKENS);
        from..range.end.saturating_sub(start).min(TILE_TOKENS).max(from)
    }
}
