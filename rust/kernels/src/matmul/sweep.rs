//! One product as chunks that threads claim: some panels of weights times a block of rows each. A panel is read once per
//! block of rows, whose inputs stay in the second-level cache meanwhile. Knows nothing of formats.
#![expect(unsafe_code, reason = "disjoint parts of the output and micro-kernels")]

use super::micro::{Arithmetic, PanelProduct};
use super::panels::{PANEL, Panels};
use crate::dispatch::{Kernel, Level};
use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::pool::Pool;
use crate::simd::Simd;

/// Rows that share a panel before the next panel is read.
const ROW_BLOCK: usize = 192;
/// Weights of a chunk: claiming takes 50 ns, reading these 5 us.
const CHUNK_BYTES: usize = 128 << 10;

/// The memory of a product.
pub(super) struct Sweep<'a, T> {
    /// `rows x units` words.
    pub(super) input: &'a [u32],
    pub(super) rows: usize,
    pub(super) panels: &'a Panels,
    pub(super) bias: Option<&'a [T]>,
    /// `rows x outputs`.
    pub(super) output: &'a mut [T],
}

impl<T: Element> Sweep<'_, T> {
    /// `arithmetic(first_row, panel)` is that of a block of rows and a panel.
    pub(super) fn run<A: Arithmetic>(
        self,
        pool: &Pool,
        level: Level,
        arithmetic: impl Fn(usize, usize) -> A + Sync,
    ) -> Result<(), KernelError> {
        let Sweep { input, rows, panels, bias, output } = self;
        let (outputs, units) = (panels.outputs(), panels.units());
        require_length("output", rows * outputs, output.len())?;
        if let Some(bias) = bias {
            require_length("bias", outputs, bias.len())?;
        }
        assert_eq!(input.len(), rows * units, "the input was made for these panels");
        let panels_per_chunk = (CHUNK_BYTES / (units * PANEL * 4)).max(1);
        let (row_blocks, panel_chunks) = (rows.div_ceil(ROW_BLOCK), panels.count().div_ceil(panels_per_chunk));
        let target = Target(output.as_mut_ptr());
        pool.parallel_for(row_blocks * panel_chunks, |chunk| {
            let first_row = chunk / panel_chunks * ROW_BLOCK;
            let first_panel = chunk % panel_chunks * panels_per_chunk;
            for panel in first_panel..(first_panel + panels_per_chunk).min(panels.count()) {
                let column = panel * PANEL;
                level.run(RunPanel(PanelProduct {
                    arithmetic: arithmetic(first_row, panel),
                    input: input[first_row * units..].as_ptr(),
                    input_stride: units,
                    rows: (rows - first_row).min(ROW_BLOCK),
                    panel: panels.panel(panel).as_ptr(),
                    units,
                    bias: bias.map_or(core::ptr::null(), |bias| bias[column..].as_ptr()),
                    output: target.at(first_row * outputs + column),
                    output_stride: outputs,
                    outputs: (outputs - column).min(PANEL),
                }));
            }
        })
    }
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

struct RunPanel<T, A>(PanelProduct<T, A>);

impl<T: Element, A: Arithmetic> Kernel for RunPanel<T, A> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: lengths were checked in `Sweep::run`, which gives every panel rows and columns of its own.
        unsafe { self.0.run(simd) }
    }
}
