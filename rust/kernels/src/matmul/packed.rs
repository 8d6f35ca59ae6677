//! Weights in the one layout that all phases read: a stream of single rows, batches of decodes and whole prompts.
//! A panel is 32 outputs; within it lies, unit after unit of the inputs, one 32-bit word per output: two bf16 inputs that
//! one instruction multiplies and adds, or one f32. So a product of any number of rows reads a panel once, in order, and
//! 128 bytes of it feed 32 sums. Outputs and inputs are padded with zeros. Packing is linear in the weights, in parallel.
#![expect(unsafe_code, reason = "panels are written by several threads")]

use crate::element::Element;
use crate::error::{KernelError, require_length};
use crate::huge_pages::HugeArray;
use crate::pool::Pool;
use crate::shared_output::SharedOutput;
use std::io;

/// Outputs of a panel.
pub(crate) const PANEL: usize = 32;

/// A weight `[outputs, inputs]`, packed.
#[derive(Debug)]
pub struct PackedWeights<T> {
    words: HugeArray<T>,
    outputs: usize,
    inputs: usize,
}

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

impl<T: Element> PackedWeights<T> {
    /// Inputs of a 32-bit word.
    pub(crate) const UNIT: usize = 4 / size_of::<T>();

    /// Packs `weights`, `outputs x inputs`, row after row.
    ///
    /// # Errors
    /// A shape of zero or another length, or no memory.
    pub fn pack(pool: &Pool, weights: &[T], outputs: usize, inputs: usize) -> Result<Self, PackError> {
        for (argument, given) in [("outputs", outputs), ("inputs", inputs)] {
            if given == 0 {
                return Err(KernelError::Unsupported { argument, given: 0, rule: "at least 1" }.into());
            }
        }
        require_length("weights", outputs * inputs, weights.len())?;
        let units = inputs.div_ceil(Self::UNIT);
        let panels = outputs.div_ceil(PANEL);
        let panel_elements = units * PANEL * Self::UNIT;
        let mut words = HugeArray::zeroed(panels * panel_elements).map_err(PackError::Memory)?;
        let target = SharedOutput::new(&mut words);
        pool.parallel_for(panels, |panel| {
            // SAFETY: every panel is written once.
            let target = unsafe { target.part(panel * panel_elements, panel_elements) };
            let first = panel * PANEL;
            for output in first..(first + PANEL).min(outputs) {
                let row = &weights[output * inputs..][..inputs];
                for (unit, values) in row.chunks(Self::UNIT).enumerate() {
                    target[(unit * PANEL + output - first) * Self::UNIT..][..values.len()].copy_from_slice(values);
                }
            }
        })?;
        Ok(Self { words, outputs, inputs })
    }

    /// Outputs, without padding.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Inputs, without padding.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Inputs with the padding that rows must have, too.
    pub fn padded_inputs(&self) -> usize {
        self.inputs.next_multiple_of(Self::UNIT)
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<T>()
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    pub(crate) fn panel(&self, panel: usize) -> &[T] {
        let elements = self.padded_inputs() * PANEL;
        &self.words[panel * elements..][..elements]
    }
}
