//! One product as chunks that threads claim: some panels of weights times a block of tiles each. A panel is read once per
//! block of tiles, whose rows stay in the second-level cache meanwhile. Knows nothing of formats.
#![expect(unsafe_code, reason = "disjoint parts of the output and micro-kernels")]

use super::micro::{Arithmetic, TileProduct, TileWords};
use super::panels::{PANEL, Panels};
use super::tiles::MatmulScratch;
use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::row_source::RowSource;
use crate::simd::Simd;

/// Rows that share a panel before the next panel is read: half of a second-level cache of 1 MiB.
const BLOCK_BYTES: usize = 512 << 10;
/// Weights of a chunk, about: claiming takes 50 ns, reading these 5 us. Half of it was slower: memory is read ahead within a
/// chunk, and not from one to the next.
const CHUNK_BYTES: usize = 128 << 10;

/// The memory of a product.
pub(super) struct Sweep<'a, T> {
    pub(super) rows: &'a MatmulScratch,
    pub(super) panels: &'a Panels,
    pub(super) bias: Option<&'a [T]>,
    /// `rows x outputs`.
    pub(super) output: &'a mut [T],
}

impl<T: Element> Sweep<'_, T> {
    /// `arithmetic(panel)` is that of a panel.
    pub(super) fn run<A: Arithmetic>(
        self,
        pool: &Pool,
        level: Level,
        arithmetic: impl Fn(usize) -> A + Sync,
    ) -> Result<(), KernelError> {
        let Sweep { rows, panels, bias, output } = self;
        let (outputs, units) = (panels.outputs(), panels.units());
        let tiling = rows.tiling();
        if tiling.count() == 0 {
            return Ok(());
        }
        let most_rows = tiling.rows(0).len();
        let tiles_per_block = (BLOCK_BYTES / rows.tile(0).len().max(1) / 4).max(1);
        // Dealt evenly: 14 panels for one thread and 4 for the other would be no faster than one and a half threads.
        let panel_chunks = (panels.count() * units * PANEL * 4).div_ceil(CHUNK_BYTES);
        let panel_chunks = panel_chunks.next_multiple_of(pool.threads()).min(panels.count());
        let panels_of =
            |chunk: usize| chunk * panels.count() / panel_chunks..(chunk + 1) * panels.count() / panel_chunks;
        let blocks = tiling.count().div_ceil(tiles_per_block);
        assert!(most_rows <= A::max_rows(super::tiles::lanes(level)), "tiles were made for this arithmetic");
        assert_eq!(output.len(), tiling.rows(tiling.count() - 1).end * outputs, "checked before rows were taken");
        let target = Target(output.as_mut_ptr());
        pool.parallel_for(blocks * panel_chunks, |chunk| {
            let first_tile = chunk / panel_chunks * tiles_per_block;
            let tiles = first_tile..(first_tile + tiles_per_block).min(tiling.count());
            for panel in panels_of(chunk % panel_chunks) {
                let column = panel * PANEL;
                let bias = bias.map_or(core::ptr::null(), |bias| bias[column..].as_ptr());
                for tile in tiles.clone() {
                    let taken = tiling.rows(tile);
                    let words = TileWords {
                        first_row: taken.start,
                        input: rows.tile(tile).as_ptr(),
                        panel: panels.panel(panel).as_ptr(),
                        units,
                    };
                    let product = TileProduct {
                        words,
                        rows: taken.len(),
                        bias,
                        output: target.at(taken.start * outputs + column),
                        output_stride: outputs,
                        outputs: (outputs - column).min(PANEL),
                    };
                    level.run(RunTile { arithmetic: arithmetic(panel), product });
                }
            }
        })
    }
}

/// Checks the operands of a product and returns its number of rows.
pub(super) fn rows_of<T: Element>(
    input: &(impl RowSource<T> + ?Sized),
    panels: &Panels,
    bias: Option<&[T]>,
    output: &[T],
) -> Result<usize, KernelError> {
    let rows = input.elements() / panels.inputs();
    require_length("input", rows * panels.inputs(), input.elements())?;
    require_length("output", rows * panels.outputs(), output.len())?;
    if let Some(bias) = bias {
        require_length("bias", panels.outputs(), bias.len())?;
    }
    Ok(rows)
}

/// The output's address, which the threads of a pool share.
#[derive(Clone, Copy)]
struct Target<T>(*mut T);

// SAFETY: every chunk writes rows and columns of its own.
unsafe impl<T: Send> Sync for Target<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Target<T> {}

impl<T> Target<T> {
    fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

struct RunTile<T, A> {
    arithmetic: A,
    product: TileProduct<T>,
}

impl<T: Element, A: Arithmetic> Kernel for RunTile<T, A> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: lengths were checked in `Sweep::run`, which gives every tile rows and columns of its own.
        unsafe { self.arithmetic.run(simd, self.product) }
    }
}
