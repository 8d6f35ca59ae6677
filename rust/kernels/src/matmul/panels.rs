//! Weights in the one layout that all phases read: a stream of single rows, batches of decodes and whole prompts.
//! A panel is 32 outputs; within it lies, unit after unit of the inputs, one 32-bit word per output, which one instruction
//! multiplies and adds: one f32, two bf16, four bytes. So a product of any number of rows reads a panel once, in order,
//! and 128 bytes of it feed 32 sums. Outputs and inputs are padded with zeros. Packing is linear in the weights.
#![expect(unsafe_code, reason = "panels are written by several threads")]

use crate::element::Element;
use crate::error::{KernelError, require_index, require_length};
use crate::huge_pages::HugeArray;
use crate::pool::Pool;
use crate::rows::RowChunks;
use crate::shared_output::SharedOutput;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Outputs of a panel.
pub(super) const PANEL: usize = 32;

/// Why weights could not be packed.
#[derive(Debug)]
pub enum PackError {
    /// Shapes that do not fit.
    Kernel(KernelError),
    /// There is no memory for them.
    Memory(io::Error),
    /// They could not be read.
    Read(io::Error),
}

impl std::fmt::Display for PackError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kernel(error) => error.fmt(out),
            Self::Memory(error) => write!(out, "there is no memory for packed weights: {error}"),
            Self::Read(error) => write!(out, "weights cannot be read: {error}"),
        }
    }
}

impl std::error::Error for PackError {}

impl From<KernelError> for PackError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

/// Words of weights `[outputs, inputs]`, whatever they mean.
#[derive(Debug)]
pub(super) struct Panels {
    words: HugeArray<u32>,
    outputs: usize,
    inputs: usize,
    units: usize,
}

impl Panels {
    /// `rows(first, count, words)` fills `count x units` words, row after row, with outputs from `first` on; `unit_inputs`
    /// inputs are one unit. Threads share the panels.
    pub(super) fn pack(
        pool: &Pool,
        outputs: usize,
        inputs: usize,
        unit_inputs: usize,
        rows: impl Fn(usize, usize, &mut [u32]) -> io::Result<()> + Sync,
    ) -> Result<Self, PackError> {
        for (argument, given) in [("outputs", outputs), ("inputs", inputs)] {
            if given == 0 {
                return Err(KernelError::Unsupported { argument, given: 0, rule: "at least 1" }.into());
            }
        }
        let units = inputs.div_ceil(unit_inputs);
        let count = outputs.div_ceil(PANEL);
        let mut words = HugeArray::zeroed(count * units * PANEL).map_err(PackError::Memory)?;
        let target = SharedOutput::new(&mut words);
        let failure = Mutex::new(None);
        pool.parallel_for(count, |panel| {
            // SAFETY: every panel is written once.
            let target = unsafe { target.part(panel * units * PANEL, units * PANEL) };
            let first = panel * PANEL;
            let taken = (outputs - first).min(PANEL);
            let mut lines = vec![0; taken * units];
            match rows(first, taken, &mut lines) {
                Ok(()) => transpose(&lines, units, target),
                Err(error) => *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
            }
        })?;
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(PackError::Read(error)),
            None => Ok(Self { words, outputs, inputs, units }),
        }
    }

    /// Copies the inputs of outputs `ids` to rows of `out`; `values(output, word)` are those of one unit.
    ///
    /// # Errors
    /// An id that there is not, or another length; nothing has been written then.
    pub(super) fn gather<T: Element, const UNIT: usize>(
        &self,
        pool: &Pool,
        ids: &[i32],
        out: &mut [T],
        values: impl Fn(usize, u32) -> [T; UNIT] + Sync,
    ) -> Result<(), KernelError> {
        let inputs = self.inputs;
        require_length("out", ids.len() * inputs, out.len())?;
        for (position, &id) in ids.iter().enumerate() {
            require_index("ids", position, id, self.outputs)?;
        }
        let out = SharedOutput::new(out);
        // Every word of an output lies in a cache line of its own.
        let chunks = RowChunks::new(ids.len(), self.units * 64);
        pool.parallel_for(chunks.count(), |chunk| {
            for row in chunks.rows(chunk) {
                // SAFETY: every row belongs to one chunk and is written once.
                let target = unsafe { out.part(row * inputs, inputs) };
                let output = ids[row] as usize;
                let words = self.panel(output / PANEL)[output % PANEL..].iter().step_by(PANEL);
                for (target, &word) in target.chunks_mut(UNIT).zip(words) {
                    target.copy_from_slice(&values(output, word)[..target.len()]);
                }
            }
        })
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn units(&self) -> usize {
        self.units
    }

    pub(super) fn count(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    pub(super) fn bytes(&self) -> usize {
        self.words.len() * 4
    }

    pub(super) fn panel(&self, panel: usize) -> &[u32] {
        &self.words[panel * self.units * PANEL..][..self.units * PANEL]
    }
}

/// Rows of `units` words to units of `PANEL` words, in squares that stay in the first cache.
fn transpose(lines: &[u32], units: usize, target: &mut [u32]) {
    const SQUARE: usize = 32;
    for first in (0..units).step_by(SQUARE) {
        for (output, line) in lines.chunks_exact(units).enumerate() {
            for unit in first..(first + SQUARE).min(units) {
                target[unit * PANEL + output] = line[unit];
            }
        }
    }
}
