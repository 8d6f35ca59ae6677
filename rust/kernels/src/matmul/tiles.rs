//! Rows as products read them: words, in tiles of a few rows each, unit after unit, so that a tile is one stream of memory.
//! Rows that lie 4 KiB apart would all fall into one set of the first-level cache: products of 2,048 inputs lost a quarter
//! to that. Rows are dealt evenly: 13 are 7 and 6, not 12 and a panel read again for one. One scratch serves all products
//! of a step. Linear in the elements. What a word means is the format's affair.
#![expect(unsafe_code, reason = "tiles are written by several threads")]

use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::KernelError;
use crate::pool::Pool;
use crate::row_source::RowSource;
use crate::scratch::with_thread_scratch;
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
pub(super) trait RowFormat<T>: Sync {
    /// Fills `line`, whatever is in it, with a row's words; `sums` are the row's own. Returns its scale.
    fn convert(&self, level: Level, row: &[T], line: &mut [u32], sums: &mut [i32]) -> f32;
}

/// What [`MatmulScratch::fill`] makes of rows.
#[derive(Clone, Copy)]
pub(super) struct Packing {
    pub(super) rows: usize,
    /// Elements of a row.
    pub(super) width: usize,
    /// Rows of a tile, at most.
    pub(super) max_rows: usize,
    /// Words of a row.
    pub(super) units: usize,
    /// Numbers of a row besides its scale.
    pub(super) sums: usize,
}

impl MatmulScratch {
    /// Takes rows and packs them. A chunk is a whole tile: threads that shared the rows
    /// of one handed its cache lines to and fro, which cost a step of eight rows a tenth.
    pub(super) fn fill<T: Element>(
        &mut self,
        pool: &Pool,
        level: Level,
        packing: Packing,
        input: &(impl RowSource<T> + ?Sized),
        format: &impl RowFormat<T>,
    ) -> Result<(), KernelError> {
        let Packing { rows, width, max_rows, units, sums } = packing;
        let tiling = Tiling::new(rows, max_rows);
        (self.tiling, self.units) = (tiling, units);
        // Never made smaller, or the next larger product would fill it with zeros first.
        self.words.resize(self.words.len().max(rows * units), 0);
        self.scales.resize(self.scales.len().max(rows), 0.0);
        self.sums.resize(self.sums.len().max(rows * sums), 0);
        let words = SharedOutput::new(&mut self.words);
        let (scales, all_sums) = (SharedOutput::new(&mut self.scales), SharedOutput::new(&mut self.sums));
        pool.parallel_for(tiling.count(), |tile| {
            let tile = tiling.rows(tile);
            with_thread_scratch(|scratch| {
                let (line, room) = scratch.line_and_row::<T>(units, width);
                for row in tile.clone() {
                    // SAFETY: every row belongs to one tile, whose thread asks for it and writes its part of the three arrays.
                    unsafe {
                        let values = input.row(level, row, room);
                        scales.part(row, 1)[0] = format.convert(level, values, line, all_sums.part(row * sums, sums));
                        words.write_strided(tile.start * units + row - tile.start, tile.len(), line);
                    }
                }
            });
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
