//! Rows as products read them: words, in tiles of a few rows each, unit after unit, so that a tile is one stream of memory.
//! Rows that lie 4 KiB apart would all fall into one set of the first-level cache: products of 2,048 inputs lost a quarter
//! to that. Rows are dealt evenly: 13 are 7 and 6, not 12 and a panel read again for one. One scratch serves all products
//! of a step. Linear in the elements. What a word means is the format's affair.
#![expect(unsafe_code, reason = "tiles are written by several threads")]

use crate::dispatch::{Kernel, Level};
use crate::error::KernelError;
use crate::pool::Pool;
use crate::shared_output::SharedOutput;
use crate::simd::Simd;
use core::ops::Range;

/// How rows are dealt to tiles.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tiling {
    rows: usize,
    tiles: usize,
}

impl Tiling {
    pub(super) fn new(rows: usize, max_rows: usize) -> Self {
        Self { rows, tiles: rows.div_ceil(max_rows) }
    }

    pub(super) fn count(self) -> usize {
        self.tiles
    }

    pub(super) fn rows(self, tile: usize) -> Range<usize> {
        let (each, more) = (self.rows / self.tiles, self.rows % self.tiles);
        let first = |tile: usize| tile * each + tile.min(more);
        first(tile)..first(tile + 1)
    }
}

/// What products need beside their operands; kept from one product to the next.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    words: Vec<u32>,
    /// One per row.
    pub(super) scales: Vec<f32>,
    /// Some per row, in the order that the format wants.
    pub(super) sums: Vec<i32>,
    tiling: Tiling,
    units: usize,
}

/// What a format does to a row.
pub(super) trait RowFormat: Sync {
    /// Fills `line`, whatever is in it, with a row's words; `sums` are the row's own. Returns its scale.
    fn convert(&self, row: usize, line: &mut [u32], sums: &mut [i32]) -> f32;
}

impl MatmulScratch {
    /// Takes rows of `units` words in tiles of at most `max_rows`, with `sums` numbers each.
    pub(super) fn fill(
        &mut self,
        pool: &Pool,
        rows: usize,
        max_rows: usize,
        units: usize,
        sums: usize,
        format: &impl RowFormat,
    ) -> Result<(), KernelError> {
        let tiling = Tiling::new(rows, max_rows);
        (self.tiling, self.units) = (tiling, units);
        self.words.resize(rows * units, 0);
        self.scales.resize(rows, 0.0);
        self.sums.resize(rows * sums, 0);
        let words = SharedOutput::new(&mut self.words);
        let (scales, all_sums) = (SharedOutput::new(&mut self.scales), SharedOutput::new(&mut self.sums));
        pool.parallel_for(tiling.count(), |tile| {
            let rows = tiling.rows(tile);
            let count = rows.len();
            // SAFETY: every tile is written once, and its rows belong to it alone, in all three arrays.
            let (words, scales) =
                unsafe { (words.part(rows.start * units, count * units), scales.part(rows.start, count)) };
            // SAFETY: as above.
            let sums_of = |row: usize| unsafe { all_sums.part(row * sums, sums) };
            if count == 1 {
                scales[0] = format.convert(rows.start, words, sums_of(rows.start));
                return;
            }
            // Not a multiple of 4 KiB apart, see above.
            let stride = units + 16;
            let mut lines = vec![0; count * stride];
            for (index, row) in rows.enumerate() {
                scales[index] = format.convert(row, &mut lines[index * stride..][..units], sums_of(row));
            }
            for (unit, target) in words.chunks_exact_mut(count).enumerate() {
                for (target, line) in target.iter_mut().zip(lines[unit..].iter().step_by(stride)) {
                    *target = *line;
                }
            }
        })
    }

    pub(super) fn tiling(&self) -> Tiling {
        self.tiling
    }

    /// A tile's words: its rows of the first unit, then those of the next.
    pub(super) fn tile(&self, tile: usize) -> &[u32] {
        let rows = self.tiling.rows(tile);
        &self.words[rows.start * self.units..][..rows.len() * self.units]
    }
}

struct Lanes;

impl Kernel for Lanes {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::LANES
    }
}

/// Lanes of a level's vectors.
pub(super) fn lanes(level: Level) -> usize {
    level.run(Lanes)
}
