//! The division of a step's attention into tasks, made once per step and used by every layer.
//! Owns a checked copy of the index arrays: after construction every block id that a task reads is inside the region.
//! Tasks are (sequence, kv heads, query tile); where that leaves threads idle, a task is cut further along the KV
//! splits, which a merge task joins, and then by head. Cutting changes who computes, never what: see the parent module.
//! O(tasks log tasks + table entries); nothing here touches queries, keys or values.

use super::{AttentionBatch, AttentionShape, SPLIT_TOKENS};
use crate::error::{KernelError, require_index, require_length};
use core::cmp::Reverse;
use core::ops::Range;

/// Query vectors (rows x heads) that a tile aims at: enough that packing keys and values, which costs as much as about 6
/// vectors, is lost in their use, few enough that queries, scores and sums of head size 128 stay in the L2 cache.
const TILE_VECTORS: usize = 96;
/// Tasks per thread that the plan aims at, so that claiming evens out unequal ones.
const TASKS_PER_THREAD: usize = 4;

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
    /// None: merge the stored splits, which begin at this vector, and write the output.
    Merge { partial: usize },
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
    tasks: Vec<Task>,
    merges: Vec<Task>,
    partial_vectors: usize,
}

impl AttentionPlan {
    /// Checks a step's index arrays and divides the work for `threads` threads.
    ///
    /// # Errors
    /// A shape that no kernel handles, or an index array that contradicts itself or leaves the region.
    pub fn new(shape: &AttentionShape, batch: &AttentionBatch<'_>, threads: usize) -> Result<Self, KernelError> {
        validate_shape(shape)?;
        let count = batch.sequence_lengths.len();
        require_length("query_start", count + 1, batch.query_start.len())?;
        require_length("table_offsets", count, batch.table_offsets.len())?;
        let mut plan = Self {
            shape: *shape,
            rows: 0,
            sequences: Vec::with_capacity(count),
            blocks: Vec::new(),
            tasks: Vec::new(),
            merges: Vec::new(),
            partial_vectors: 0,
        };
        require_index("query_start", 0, batch.query_start[0], 1)?;
        for sequence in 0..count {
            plan.add_sequence(batch, sequence)?;
        }
        plan.divide(threads);
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

    pub(crate) fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    pub(crate) fn merges(&self) -> &[Task] {
        &self.merges
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

    fn add_sequence(&mut self, batch: &AttentionBatch<'_>, sequence: usize) -> Result<(), KernelError> {
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
                self.tasks.push(Task { sequence, kv_heads, rows, splits, part: TaskPart::Whole });
            }
        }
        Ok(())
    }

    /// Cuts tasks that are long for the number of threads, and puts the longest first.
    fn divide(&mut self, threads: usize) {
        let total: usize = self.tasks.iter().map(Task::cost).sum();
        let target = total / (threads * TASKS_PER_THREAD) + 1;
        for task in core::mem::take(&mut self.tasks) {
            let pieces = if threads > 1 { task.cost().div_ceil(target) } else { 1 };
            let split_pieces = pieces.min(task.splits.len());
            let head_pieces = pieces.div_ceil(split_pieces).min(task.kv_heads.len());
            for kv_heads in cut(&task.kv_heads, head_pieces) {
                let task = Task { kv_heads, ..task.clone() };
                if split_pieces == 1 {
                    self.tasks.push(task);
                } else {
                    self.cut_splits(task, split_pieces);
                }
            }
        }
        self.tasks.sort_by_key(|task| Reverse(task.cost()));
    }

    fn cut_splits(&mut self, task: Task, pieces: usize) {
        let vectors = task.rows.len() * task.kv_heads.len() * self.group();
        let first = self.partial_vectors;
        self.partial_vectors += vectors * task.splits.len();
        for splits in cut(&task.splits, pieces) {
            let part = TaskPart::Some { partial: first + (splits.start - task.splits.start) * vectors };
            self.tasks.push(Task { splits, part, ..task.clone() });
        }
        self.merges.push(Task { part: TaskPart::Merge { partial: first }, ..task });
    }
}

/// Divides a range into `pieces` parts whose lengths differ by at most one.
fn cut(range: &Range<usize>, pieces: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let (start, length) = (range.start, range.len());
    (0..pieces).map(move |piece| start + piece * length / pieces..start + (piece + 1) * length / pieces)
}

impl Task {
    /// Proportional to the time: splits to read, for every row and head of the tile.
    fn cost(&self) -> usize {
        self.splits.len() * self.rows.len() * self.kv_heads.len()
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
