//! The division of a step's attention into tasks, made once per step and used by every layer.
//! Owns a checked copy of the index arrays: after construction every block id that a task reads is inside the region.
//! Tasks are (sequence, kv heads, query tile), or parts of them: see `waves`.
//! O(tasks log tasks + table entries); nothing here touches queries, keys or values.

use super::layout::PartialLayout;
use super::waves::{Division, Wave};
use super::{AttentionBatch, AttentionShape, SPLIT_TOKENS};
use crate::error::{KernelError, require_index, require_length};
use core::ops::Range;

/// Query vectors (rows x heads) that a tile aims at: enough that packing keys and values, which costs as much as about 6
/// vectors, is lost in their use, few enough that queries, scores and sums of head size 128 stay in the L2 cache.
const TILE_VECTORS: usize = 96;
/// Memory for partial results. Those of 512 rows at 131,072 tokens take 4.5 GiB together, and a thread keeps what it had.
const PARTIAL_BYTES: usize = 128 << 20;

/// One sequence's checked description.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    /// First row in the step.
    first_row: usize,
    /// Absolute position of that row.
    first_position: usize,
    /// Start of its blocks in the plan's table, counted as if entries below the window were present.
    table: isize,
}

/// What a task does with its splits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TaskPart {
    /// All splits of the tile: merge as they come and write the output.
    Whole,
    /// Some of the splits: store each at its place in the partial results, which begins at this vector.
    Some { partial: usize },
    /// None: merge the stored splits, which begin at this vector and are so many apart, and write the output.
    Merge { partial: usize, stride: usize },
}

/// A unit of work: some splits of one query tile for some kv heads.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) sequence: usize,
    /// Their keys lie side by side within a block, so decode rows take several heads at once: a longer stretch of memory
    /// in one go.
    pub(crate) kv_heads: Range<usize>,
    /// Rows of the sequence, counted from its first row in the step.
    pub(crate) rows: Range<usize>,
    /// Absolute split numbers.
    pub(crate) splits: Range<usize>,
    pub(crate) part: TaskPart,
}

/// A step's attention, ready to run for every layer of a layer group.
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    shape: AttentionShape,
    rows: usize,
    sequences: Vec<Sequence>,
    blocks: Vec<u32>,
    waves: Vec<Wave>,
    partial_vectors: usize,
}

impl AttentionPlan {
    /// Checks a step's index arrays and divides the work for `threads` threads.
    ///
    /// # Errors
    /// A shape that no kernel handles, or an index array that contradicts itself or leaves the region.
    pub fn new(shape: &AttentionShape, batch: &AttentionBatch<'_>, threads: usize) -> Result<Self, KernelError> {
        Self::within(shape, batch, threads, PARTIAL_BYTES)
    }

    /// The same with at most so many bytes of partial results.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn within(
        shape: &AttentionShape,
        batch: &AttentionBatch<'_>,
        threads: usize,
        partial_bytes: usize,
    ) -> Result<Self, KernelError> {
        validate_shape(shape)?;
        let count = batch.sequence_lengths.len();
        require_length("query_start", count + 1, batch.query_start.len())?;
        require_length("table_offsets", count, batch.table_offsets.len())?;
        let mut plan = Self {
            shape: *shape,
            rows: 0,
            sequences: Vec::with_capacity(count),
            blocks: Vec::new(),
            waves: Vec::new(),
            partial_vectors: 0,
        };
        require_index("query_start", 0, batch.query_start[0], 1)?;
        let mut tiles = Vec::new();
        for sequence in 0..count {
            plan.add_sequence(batch, sequence, &mut tiles)?;
        }
        let room = partial_bytes / (PartialLayout::new(shape.region.head_dim).words() * 4);
        let division = Division { threads, group: plan.group(), room };
        (plan.waves, plan.partial_vectors) = division.waves(tiles);
        Ok(plan)
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The shape that the plan was made for.
    pub fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    pub(crate) fn waves(&self) -> &[Wave] {
        &self.waves
    }

    pub(crate) fn partial_vectors(&self) -> usize {
        self.partial_vectors
    }

    /// Query heads that share a kv head.
    pub(crate) fn group(&self) -> usize {
        self.shape.query_heads / self.shape.region.kv_heads
    }

    /// Row of the step that holds a row of a sequence.
    pub(crate) fn step_row(&self, sequence: usize, row: usize) -> usize {
        self.sequences[sequence].first_row + row
    }

    /// Absolute KV positions that a row of a sequence attends to.
    pub(crate) fn row_range(&self, sequence: usize, row: usize) -> Range<usize> {
        let end = self.sequences[sequence].first_position + row + 1;
        let window = self.shape.window_tokens.map_or(end, |window| window as usize);
        end.saturating_sub(window)..end
    }

    /// The block that holds an absolute position inside the range of some row of the sequence.
    pub(crate) fn block(&self, sequence: usize, position: usize) -> usize {
        let entry = self.sequences[sequence].table + (position / self.shape.region.block_tokens) as isize;
        self.blocks[entry as usize] as usize
    }

    /// Checks a sequence and adds its tiles.
    fn add_sequence(
        &mut self,
        batch: &AttentionBatch<'_>,
        sequence: usize,
        tiles: &mut Vec<Task>,
    ) -> Result<(), KernelError> {
        let region = &self.shape.region;
        let (from, to) = (batch.query_start[sequence], batch.query_start[sequence + 1]);
        let length = batch.sequence_lengths[sequence];
        // Ascending from the checked 0, so `to` is not negative.
        if to < from {
            return Err(KernelError::OutOfRange {
                argument: "query_start",
                position: sequence + 1,
                value: i64::from(to),
                limit: i64::from(i32::MAX),
            });
        }
        let rows = (to - from) as usize;
        let length = require_index("sequence_lengths", sequence, length, i32::MAX as usize)?;
        if length < rows {
            let given = length as i64;
            let rule = "at least the rows of the sequence in this step";
            return Err(KernelError::Unsupported { argument: "sequence_lengths", given, rule });
        }
        let limit = batch.block_tables.len() + 1;
        let offset = require_index("table_offsets", sequence, batch.table_offsets[sequence], limit)?;
        self.sequences.push(Sequence { first_row: from as usize, first_position: length - rows, table: 0 });
        self.rows = to as usize;
        if rows == 0 {
            return Ok(());
        }
        let first = self.row_range(sequence, 0).start / region.block_tokens;
        let last = (length - 1) / region.block_tokens;
        self.sequences[sequence].table = self.blocks.len() as isize - first as isize;
        for entry in offset + first..=offset + last {
            let Some(&block) = batch.block_tables.get(entry) else {
                let (required, given) = (offset + last + 1, batch.block_tables.len());
                return Err(KernelError::Length { argument: "block_tables", required, given });
            };
            let block = require_index("block_tables", entry, block, region.blocks)?;
            self.blocks.push(block as u32);
        }
        let tile_rows = (TILE_VECTORS / self.group()).clamp(1, rows);
        let heads = (TILE_VECTORS / (tile_rows * self.group())).clamp(1, region.kv_heads);
        for first_head in (0..region.kv_heads).step_by(heads) {
            let kv_heads = first_head..(first_head + heads).min(region.kv_heads);
            for from in (0..rows).step_by(tile_rows) {
                let rows = from..(from + tile_rows).min(rows);
                let start = self.row_range(sequence, rows.start).start / SPLIT_TOKENS;
                let end = self.row_range(sequence, rows.end - 1).end.div_ceil(SPLIT_TOKENS);
                let (kv_heads, splits) = (kv_heads.clone(), start..end);
                tiles.push(Task { sequence, kv_heads, rows, splits, part: TaskPart::Whole });
            }
        }
        Ok(())
    }
}

fn validate_shape(shape: &AttentionShape) -> Result<(), KernelError> {
    shape.region.validate()?;
    let unsupported = |argument, given: i64, rule| KernelError::Unsupported { argument, given, rule };
    if shape.query_heads == 0 || !shape.query_heads.is_multiple_of(shape.region.kv_heads) {
        return Err(unsupported("query_heads", shape.query_heads as i64, "a positive multiple of kv_heads"));
    }
    if !(shape.softmax_scale.is_finite() && shape.softmax_scale > 0.0) {
        return Err(unsupported("softmax_scale", shape.softmax_scale as i64, "a positive finite number"));
    }
    if shape.window_tokens == Some(0) {
        return Err(unsupported("window_tokens", 0, "at least 1, or none"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_format::KvFormat;
    use crate::kv_region::KvRegionShape;

    /// One sequence whose last `rows` of `tokens` are computed, with 32 heads of 128 that share 8.
    fn plan(rows: usize, tokens: usize, threads: usize, partial_bytes: usize) -> AttentionPlan {
        let format = KvFormat::Activations;
        let region = KvRegionShape { blocks: 4096, layers: 1, kv_heads: 8, block_tokens: 32, head_dim: 128, format };
        let shape = AttentionShape { query_heads: 32, softmax_scale: 0.1, window_tokens: None, region };
        let table: Vec<i32> = (0..tokens.div_ceil(32) as i32).collect();
        let batch = AttentionBatch {
            query_start: &[0, rows as i32],
            sequence_lengths: &[tokens as i32],
            table_offsets: &[0],
            block_tables: &table,
        };
        AttentionPlan::within(&shape, &batch, threads, partial_bytes).unwrap()
    }

    fn partial_bytes(plan: &AttentionPlan) -> usize {
        plan.partial_vectors() * PartialLayout::new(plan.shape().region.head_dim).words() * 4
    }

    /// Every (row, kv head) is written once, and every one of its splits is stored once in the wave that merges it.
    fn check(plan: &AttentionPlan, rows: usize) {
        let mut written = vec![0; rows * 8];
        for wave in plan.waves() {
            let mut stored = vec![0; plan.partial_vectors()];
            for task in &wave.tasks {
                let TaskPart::Some { partial } = task.part else { continue };
                let vectors = task.rows.len() * task.kv_heads.len() * plan.group() * task.splits.len();
                stored[partial..partial + vectors].iter_mut().for_each(|count| *count += 1);
            }
            assert!(stored.iter().all(|&count| count <= 1), "two tasks store at one place");
            for task in wave.tasks.iter().chain(&wave.merges) {
                if matches!(task.part, TaskPart::Some { .. }) {
                    continue;
                }
                let last = plan.row_range(0, task.rows.end - 1).end;
                assert!(task.splits.start == 0 && task.splits.end * SPLIT_TOKENS >= last, "splits are left out");
                for (row, head) in task.rows.clone().flat_map(|row| task.kv_heads.clone().map(move |head| (row, head)))
                {
                    written[row * 8 + head] += 1;
                }
                if let TaskPart::Merge { partial, stride } = task.part {
                    let vectors = task.rows.len() * task.kv_heads.len() * plan.group();
                    for split in 0..task.splits.len() {
                        let read = &mut stored[partial + split * stride..][..vectors];
                        assert!(read.iter().all(|&count| count == 1), "a merge reads what its wave does not store");
                        read.fill(2);
                    }
                }
            }
            assert!(stored.iter().all(|&count| count != 1), "a result is stored that nobody merges");
        }
        assert!(written.iter().all(|&count| count == 1), "an output is written by one task");
    }

    #[test]
    fn partial_results_of_a_long_context_keep_to_their_memory() {
        for (rows, threads) in [(185, 16), (512, 64), (24, 64), (1, 64)] {
            let plan = plan(rows, 131_072, threads, PARTIAL_BYTES);
            assert!(partial_bytes(&plan) <= 128 << 20, "{rows} rows take {}", partial_bytes(&plan));
            check(&plan, rows);
            for wave in plan.waves() {
                assert!(wave.tasks.len() >= threads, "{} tasks for {threads} threads", wave.tasks.len());
            }
        }
    }

    #[test]
    fn a_step_that_fits_is_one_wave_and_merges_little_by_one_task() {
        let plan = plan(8, 4_096, 16, PARTIAL_BYTES);
        assert_eq!(plan.waves().len(), 1);
        // Tiles of three, three and two heads, of which the first two are cut in two.
        assert_eq!(plan.waves()[0].merges.len(), 5);
        check(&plan, 8);
    }

    #[test]
    fn a_tile_whose_partial_results_do_not_fit_is_made_smaller_or_left_whole() {
        for partial_bytes in [0, 20_000, 60_000, 400_000, 2_000_000] {
            for rows in [1, 7, 50] {
                let plan = plan(rows, 2_048, 16, partial_bytes);
                assert!(self::partial_bytes(&plan) <= partial_bytes, "{rows} rows");
                check(&plan, rows);
            }
        }
    }
}
