//! How a step's tiles become tasks. Where tiles leave threads idle, they are cut along the KV splits, whose results a merge
//! task joins, and by head. Results that wait for their merge have a bound: where a step would pass it, its tiles are
//! computed wave after wave over the same memory, each cut for all threads. Cutting changes who computes, never what: see
//! the parent module. O(tasks log tasks).

use super::plan::{Task, TaskPart};
use core::cmp::Reverse;
use core::ops::Range;

/// Tasks per thread that are aimed at, so that claiming evens out unequal ones.
const TASKS_PER_THREAD: usize = 4;
/// Results that a merge task is worth: some megabytes to read, which take longer than waking a thread for them.
const MERGED_VECTORS: usize = 4_096;

/// Tasks that run beside each other, and then what merges their results.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wave {
    pub(crate) tasks: Vec<Task>,
    pub(crate) merges: Vec<Task>,
}

/// What a division knows of its step.
pub(super) struct Division {
    pub(super) threads: usize,
    /// Query heads that share a kv head.
    pub(super) group: usize,
    /// Most vectors of partial results.
    pub(super) room: usize,
}

/// The tiles of a wave.
#[derive(Default)]
struct Tiles {
    /// Those that are not cut along the splits.
    whole: Vec<Task>,
    long: Vec<Task>,
    /// Partial results of the long ones.
    vectors: usize,
}

impl Division {
    /// The waves, and the most vectors of partial results that one has.
    pub(super) fn waves(&self, tiles: Vec<Task>) -> (Vec<Wave>, usize) {
        let tiles = self.among_waves(tiles);
        let most = tiles.iter().map(|tiles| tiles.vectors).max().unwrap_or(0);
        (tiles.into_iter().map(|tiles| self.wave(tiles)).collect(), most)
    }

    /// A new wave begins where the results of the one before have no room for more.
    fn among_waves(&self, tiles: Vec<Task>) -> Vec<Tiles> {
        let target = self.target(tiles.iter());
        let mut waves = vec![Tiles::default()];
        for tile in tiles {
            if self.pieces(&tile, target).min(tile.splits.len()) <= 1 {
                waves[0].whole.push(tile);
                continue;
            }
            for tile in self.fitting(&tile) {
                let needed = self.results(&tile);
                if needed > self.room {
                    waves[0].whole.push(tile);
                    continue;
                }
                if waves[waves.len() - 1].vectors + needed > self.room {
                    waves.push(Tiles::default());
                }
                let last = waves.len() - 1;
                waves[last].vectors += needed;
                waves[last].long.push(tile);
            }
        }
        waves
    }

    /// A tile in parts that have room: of fewer heads, and where one head has too many, of fewer rows.
    fn fitting(&self, tile: &Task) -> Vec<Task> {
        // Of (row, kv head).
        let most = (self.room / (tile.splits.len() * self.group)).max(1);
        let heads = (most / tile.rows.len()).clamp(1, tile.kv_heads.len());
        let rows = most.min(tile.rows.len());
        let row_pieces = tile.rows.len().div_ceil(rows);
        cut(&tile.kv_heads, tile.kv_heads.len().div_ceil(heads))
            .flat_map(|kv_heads| {
                cut(&tile.rows, row_pieces).map(move |rows| Task { kv_heads: kv_heads.clone(), rows, ..tile.clone() })
            })
            .collect()
    }

    /// Cuts what is long for the number of threads, and puts the longest first.
    fn wave(&self, tiles: Tiles) -> Wave {
        let target = self.target(tiles.whole.iter().chain(&tiles.long));
        let mut wave = Wave::default();
        for tile in tiles.whole {
            let pieces = self.pieces(&tile, target).min(tile.kv_heads.len());
            wave.tasks.extend(cut(&tile.kv_heads, pieces).map(|kv_heads| Task { kv_heads, ..tile.clone() }));
        }
        let merge_pieces = self.threads.div_ceil(tiles.long.len().max(1));
        let mut partial = 0;
        for tile in tiles.long {
            let pieces = self.pieces(&tile, target);
            let split_pieces = pieces.min(tile.splits.len());
            let head_pieces = pieces.div_ceil(split_pieces).min(tile.kv_heads.len());
            for kv_heads in cut(&tile.kv_heads, head_pieces) {
                let task = Task { kv_heads, ..tile.clone() };
                if split_pieces == 1 {
                    wave.tasks.push(task);
                    continue;
                }
                let results = self.results(&task);
                self.cut_splits(&mut wave, &task, split_pieces, partial);
                self.cut_merge(&mut wave, &task, merge_pieces.min(results / MERGED_VECTORS).max(1), partial);
                partial += results;
            }
        }
        wave.tasks.sort_by_key(|task| Reverse(task.cost()));
        wave
    }

    fn cut_splits(&self, wave: &mut Wave, task: &Task, pieces: usize, first: usize) {
        let stride = self.vectors(task);
        for splits in cut(&task.splits, pieces) {
            let partial = first + (splits.start - task.splits.start) * stride;
            wave.tasks.push(Task { splits, part: TaskPart::Some { partial }, ..task.clone() });
        }
    }

    /// By head, and the rows of a head where those are too few: a task's vectors are numbered head by head.
    fn cut_merge(&self, wave: &mut Wave, task: &Task, pieces: usize, first: usize) {
        let stride = self.vectors(task);
        let (heads, rows) = (task.kv_heads.len(), task.rows.len());
        let row_pieces = if pieces > heads { pieces.div_ceil(heads).min(rows) } else { 1 };
        for kv_heads in cut(&task.kv_heads, pieces.min(heads)) {
            for part in cut(&task.rows, row_pieces) {
                let before = (kv_heads.start - task.kv_heads.start) * rows + part.start - task.rows.start;
                let merge = TaskPart::Merge { partial: first + before * self.group, stride };
                wave.merges.push(Task { kv_heads: kv_heads.clone(), rows: part, part: merge, ..task.clone() });
            }
        }
    }

    /// The cost of a task that is aimed at.
    fn target<'a>(&self, tiles: impl Iterator<Item = &'a Task>) -> usize {
        tiles.map(Task::cost).sum::<usize>() / (self.threads * TASKS_PER_THREAD) + 1
    }

    fn pieces(&self, tile: &Task, target: usize) -> usize {
        if self.threads > 1 { tile.cost().div_ceil(target).max(1) } else { 1 }
    }

    /// Query vectors of a task.
    fn vectors(&self, task: &Task) -> usize {
        task.rows.len() * task.kv_heads.len() * self.group
    }

    /// Partial results of a task that is cut along its splits.
    fn results(&self, task: &Task) -> usize {
        self.vectors(task) * task.splits.len()
    }
}

impl Task {
    /// Proportional to the time: splits to read, for every row and head of the tile.
    fn cost(&self) -> usize {
        self.splits.len() * self.rows.len() * self.kv_heads.len()
    }
}

/// Divides a range into `pieces` parts whose lengths differ by at most one.
fn cut(range: &Range<usize>, pieces: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let (start, length) = (range.start, range.len());
    (0..pieces).map(move |piece| start + piece * length / pieces..start + (piece + 1) * length / pieces)
}
