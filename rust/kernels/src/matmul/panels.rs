//! Weights in the one layout that all phases read: a stream of single rows, batches of decodes and whole prompts.
//! A panel is 32 outputs; within it lies, unit after unit of the inputs, one 32-bit word per output, which one instruction
//! multiplies and adds: one f32, two bf16, four bytes. So a product of any number of rows reads a panel once, in order,
//! and 128 bytes of it feed 32 sums. Outputs and inputs are padded with zeros. Packing is linear in the weights.
#![expect(unsafe_code, reason = "panels are written by several threads")]

use crate::error::KernelError;
use crate::huge_pages::HugeArray;
use crate::pool::Pool;
use crate::shared_output::SharedOutput;
use std::io;

/// Outputs of a panel.
pub(super) const PANEL: usize = 32;

/// Why weights could not be packed.
#[derive(Debug)]
pub enum PackError {
    /// Shapes that do not fit.
    Kernel(KernelError),
    /// There is no memory for them.
    Memory(io::Error),
}

impl std::fmt::Display for PackError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kernel(error) => error.fmt(out),
            Self::Memory(error) => write!(out, "there is no memory for packed weights: {error}"),
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
    /// `word(output, unit)` is what lies in a word; `unit_inputs` inputs are one unit.
    pub(super) fn pack(
        pool: &Pool,
        outputs: usize,
        inputs: usize,
        unit_inputs: usize,
        word: impl Fn(usize, usize) -> u32 + Sync,
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
        pool.parallel_for(count, |panel| {
            // SAFETY: every panel is written once.
            let target = unsafe { target.part(panel * units * PANEL, units * PANEL) };
            let first = panel * PANEL;
            for output in first..(first + PANEL).min(outputs) {
                for unit in 0..units {
                    target[unit * PANEL + output - first] = word(output, unit);
                }
            }
        })?;
        Ok(Self { words, outputs, inputs, units })
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
