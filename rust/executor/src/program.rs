//! A whole model on a processor: embedding, layers, head, the KV region and the buffers of a step. A step is one call.
//! Every kernel gives a row the same bits whatever lies beside it, so the program does, for any chunks and threads.
//! A program is built layer by layer, so that whoever builds it can tell how far it is. It does not know who plans steps
//! or who samples.

use crate::block::{Activations, Block, Norm, StepPlace, Widths};
use crate::description::{BlockDescription, LinearDescription, ModelShape, NormDescription, ProgramLimits};
use crate::error::LoadError;
use crate::kv_store::KvStore;
use crate::linear::{Linear, Processor};
use crate::rope::RopeTable;
use crate::source::Stack;
use llmscale_kernels::element::Element;
use llmscale_kernels::embedding::gather_rows;
use llmscale_kernels::error::KernelError;
use llmscale_kernels::huge_pages::{HugeArray, Number};
use llmscale_kernels::kv_region::{KvRegionShape, SlotMapping};
use llmscale_kernels::paged_attention::{AttentionBatch, AttentionPlan, AttentionShape};
use llmscale_kernels::pool::Pool;
use std::sync::{Arc, Mutex, PoisonError};

/// The rows of a step as index arrays; see `StepInputs` of the worker.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// One id per row.
    pub token_ids: &'a [i32],
    /// Absolute position of every row.
    pub positions: &'a [i32],
    /// KV slot of every row.
    pub slot_mapping: &'a [i32],
    /// Sequences and their blocks.
    pub batch: AttentionBatch<'a>,
    /// Rows that sample, in the order of the logits.
    pub sample_rows: &'a [i32],
}

/// Where embeddings come from.
#[derive(Debug)]
enum Table<T> {
    /// Of its own, `vocabulary x hidden`.
    Plain(HugeArray<T>),
    /// The head's.
    Tied,
}

/// A program that is being built.
#[derive(Debug)]
pub struct ProgramBuilder<T> {
    shape: ModelShape,
    limits: ProgramLimits,
    blocks: Vec<Block<T>>,
    /// Tables by their frequencies: layers mostly share one.
    ropes: Vec<(Vec<f32>, Arc<RopeTable>)>,
}

impl<T: Element + Number> ProgramBuilder<T> {
    /// Without a layer yet.
    pub fn new(shape: ModelShape, limits: ProgramLimits) -> Self {
        Self { shape, limits, blocks: Vec::with_capacity(shape.layers), ropes: Vec::new() }
    }

    /// Reads and packs the next layer.
    pub fn block(&mut self, on: Processor<'_>, description: &BlockDescription) -> Result<(), LoadError> {
        let frequencies = &description.attention.rope.frequencies;
        let found = self.ropes.iter().find(|(known, _)| known == frequencies).map(|(_, table)| Arc::clone(table));
        let rope = found.unwrap_or_else(|| {
            let table = Arc::new(RopeTable::new(frequencies, self.limits.max_sequence_tokens));
            self.ropes.push((frequencies.clone(), Arc::clone(&table)));
            table
        });
        self.blocks.push(Block::load(on, &self.shape, description, rope)?);
        Ok(())
    }

    /// Reads norm, head and embedding, and makes the KV region. Without a table of its own the embedding is the head's.
    pub fn finish(
        self,
        on: Processor<'_>,
        norm: &NormDescription,
        head: &LinearDescription,
        embedding: Option<&Stack>,
    ) -> Result<Program<T>, LoadError> {
        let Self { shape, limits, blocks, .. } = self;
        if blocks.len() != shape.layers {
            return Err(LoadError::Shape(format!(
                "{} layers were given, the model has {}",
                blocks.len(),
                shape.layers
            )));
        }
        let norm = Norm::load(norm, shape.hidden)?;
        let head = Linear::load(on, head)?;
        if (head.outputs(), head.inputs()) != (shape.vocabulary, shape.hidden) {
            let message = format!("the head is {} x {}", head.outputs(), head.inputs());
            return Err(LoadError::Shape(message));
        }
        let table = match embedding {
            Some(stack) => Table::Plain(read_table(on.pool, &shape, stack)?),
            None if head.is_table() => Table::Tied,
            None => return Err(LoadError::Shape("a head of four bits cannot be the embedding too".into())),
        };
        let region_shape = KvRegionShape {
            blocks: limits.blocks,
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            block_tokens: limits.block_tokens,
            head_dim: shape.head_dim,
            format: limits.kv_format,
        };
        let region = KvStore::new(&region_shape)?;
        let widest = blocks.iter().map(Block::widths).fold(Widths::default(), Widths::max);
        Ok(Program {
            shape,
            activations: Activations::new(limits.max_step_tokens, shape.hidden, widest),
            logits: vec![T::default(); limits.max_samples * shape.vocabulary],
            samples: 0,
            limits,
            blocks,
            norm,
            head,
            table,
            region_shape,
            region,
        })
    }
}

/// Rows of the embedding as they are stored.
fn read_table<T: Element + Number>(pool: &Pool, shape: &ModelShape, stack: &Stack) -> Result<HugeArray<T>, LoadError> {
    const ROWS: usize = 256;
    if (stack.rows(), stack.columns()) != (shape.vocabulary, shape.hidden) {
        return Err(LoadError::Shape(format!("the embedding is {} x {}", stack.rows(), stack.columns())));
    }
    let what = "the embedding";
    let table = HugeArray::zeroed(shape.vocabulary * shape.hidden);
    let mut table = table.map_err(|problem| LoadError::Memory { what, problem })?;
    let chunks = Mutex::new(table.chunks_mut(ROWS * shape.hidden).enumerate());
    let failure = Mutex::new(None);
    pool.parallel_for(shape.vocabulary.div_ceil(ROWS), |_| {
        let next = chunks.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some((chunk, rows)) = next else { return };
        if let Err(problem) = stack.read(chunk * ROWS, rows) {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
        }
    })?;
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(problem) => Err(LoadError::File { path: what.into(), problem }),
        None => Ok(table),
    }
}

/// A model, ready to run.
#[derive(Debug)]
pub struct Program<T> {
    shape: ModelShape,
    limits: ProgramLimits,
    table: Table<T>,
    blocks: Vec<Block<T>>,
    norm: Norm<T>,
    head: Linear<T>,
    region_shape: KvRegionShape,
    region: KvStore<T>,
    activations: Activations<T>,
    logits: Vec<T>,
    /// Rows of logits that are there.
    samples: usize,
}

impl<T: Element + Number> Program<T> {
    /// Logits `[samples, vocabulary]` of the last step.
    pub fn logits(&self) -> &[T] {
        &self.logits[..self.samples * self.shape.vocabulary]
    }

    /// Address and bytes of the KV region.
    pub fn region(&self) -> (usize, usize) {
        self.region.place()
    }

    /// Memory of the weights that are packed.
    pub fn weight_bytes(&self) -> usize {
        let table = if let Table::Plain(table) = &self.table { table.len() * size_of::<T>() } else { 0 };
        table + self.head.bytes() + self.blocks.iter().map(Block::bytes).sum::<usize>()
    }

    /// Runs a step: writes the rows' keys and values, and leaves the logits of the rows that sample.
    ///
    /// # Errors
    /// Index arrays that contradict themselves or leave the region or the vocabulary. Nothing has been written then.
    pub fn forward(&mut self, on: Processor<'_>, step: &StepRows<'_>) -> Result<(), KernelError> {
        self.samples = 0;
        let count = step.token_ids.len();
        self.require_room(step)?;
        if count == 0 {
            return Ok(());
        }
        let slots = SlotMapping::new(self.region_shape, step.slot_mapping)?;
        let plans = self.plans(on, step)?;
        self.region.reached(step.slot_mapping);
        self.embed(on, step.token_ids)?;
        let last = self.blocks.len() - 1;
        for (layer, block) in self.blocks.iter().enumerate() {
            let plan =
                &plans.iter().find(|(window, _)| *window == block.window_tokens).expect("every window has one").1;
            let place = StepPlace { positions: step.positions, slots: &slots, plan };
            block.attend(on, place, layer, layer > 0, &mut self.region, &mut self.activations)?;
            if layer == last {
                // Nobody reads other rows any more.
                keep_rows(&mut self.activations, block.widths().query, self.shape.hidden, step.sample_rows);
                block.finish(on, step.sample_rows.len(), &mut self.activations)?;
            } else {
                block.finish(on, count, &mut self.activations)?;
            }
        }
        self.sample(on, step.sample_rows.len())
    }

    fn require_room(&self, step: &StepRows<'_>) -> Result<(), KernelError> {
        let rows = step.token_ids.len();
        for (argument, given, most) in [
            ("token_ids", rows, self.limits.max_step_tokens),
            ("sample_rows", step.sample_rows.len(), self.limits.max_samples),
        ] {
            if given > most {
                let rule = "at most as many as the program was made for";
                return Err(KernelError::Unsupported { argument, given: given as i64, rule });
            }
        }
        for (argument, given) in [("positions", step.positions.len()), ("slot_mapping", step.slot_mapping.len())] {
            if given != rows {
                return Err(KernelError::Length { argument, required: rows, given });
            }
        }
        for (position, &row) in step.sample_rows.iter().enumerate() {
            if usize::try_from(row).is_ok_and(|row| row < rows) {
                continue;
            }
            let (value, limit) = (i64::from(row), rows as i64);
            return Err(KernelError::OutOfRange { argument: "sample_rows", position, value, limit });
        }
        Ok(())
    }

    /// A plan for each window that layers have.
    fn plans(&self, on: Processor<'_>, step: &StepRows<'_>) -> Result<Vec<(Option<u32>, AttentionPlan)>, KernelError> {
        let mut plans: Vec<(Option<u32>, AttentionPlan)> = Vec::new();
        for block in &self.blocks {
            if plans.iter().any(|(window, _)| *window == block.window_tokens) {
                continue;
            }
            let shape = AttentionShape {
                query_heads: block.widths().query / self.shape.head_dim,
                softmax_scale: (self.shape.head_dim as f64).powf(-0.5) as f32,
                window_tokens: block.window_tokens,
                region: self.region_shape,
            };
            plans.push((block.window_tokens, AttentionPlan::new(&shape, &step.batch, on.pool.threads())?));
        }
        Ok(plans)
    }

    fn embed(&mut self, on: Processor<'_>, ids: &[i32]) -> Result<(), KernelError> {
        let out = &mut self.activations.residual[..ids.len() * self.shape.hidden];
        match &self.table {
            Table::Plain(table) => gather_rows(on.pool, table, self.shape.hidden, ids, out),
            Table::Tied => self.head.gather(on, ids, out),
        }
    }

    /// Norm and head for the rows that are left.
    fn sample(&mut self, on: Processor<'_>, samples: usize) -> Result<(), KernelError> {
        let Activations { residual, delta, scratch, .. } = &mut self.activations;
        let elements = samples * self.shape.hidden;
        let normed = self.norm.rows(Some(&delta[..elements]), &mut residual[..elements])?;
        let logits = &mut self.logits[..samples * self.shape.vocabulary];
        self.head.apply(on, scratch, &normed, logits)?;
        self.samples = samples;
        Ok(())
    }
}

/// Moves some rows of the stream and of the heads to the front, in this order.
fn keep_rows<T: Element>(rows: &mut Activations<T>, query_width: usize, hidden: usize, kept: &[i32]) {
    let take = |from: &[T], to: &mut [T], width: usize| {
        for (target, &row) in to.chunks_exact_mut(width).zip(kept) {
            target.copy_from_slice(&from[row as usize * width..][..width]);
        }
    };
    // What these two held is not needed any more.
    take(&rows.heads, &mut rows.query, query_width);
    take(&rows.residual, &mut rows.delta, hidden);
    core::mem::swap(&mut rows.heads, &mut rows.query);
    core::mem::swap(&mut rows.residual, &mut rows.delta);
}
