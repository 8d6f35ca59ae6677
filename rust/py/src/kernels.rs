//! The door to the CPU kernels: one object per worker with its threads, its level and its number format. Memory comes in
//! as (address, elements) of contiguous tensors that the caller owns for the length of the call; shapes are checked by the
//! kernels before the first write. The GIL is released while they compute.
#![expect(unsafe_code, reason = "tensors of torch are reached by address")]

use crate::column_sampler;
use crate::detach::detached;
use crate::error;
use llmscale_executor::linear::Processor;
use llmscale_kernels::dispatch::Level;
use llmscale_kernels::element::{Bf16, Element};
use llmscale_kernels::kv_format::KvFormat;
use llmscale_kernels::kv_region::{KvRegionShape, SlotMapping};
use llmscale_kernels::paged_attention::{AttentionBatch, AttentionPlan, AttentionShape};
use llmscale_kernels::pool::Pool;
use llmscale_kernels::rope_cache::{HeadNorms, RopeCacheInput, RotaryTable, rope_and_cache};
use llmscale_kernels::{activation, embedding, error::KernelError, norm};
use pyo3::prelude::*;
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

/// A contiguous tensor: address of its first element and number of elements.
pub(crate) type Memory = (usize, usize);

/// Number format of activations, weights and KV.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Dtype {
    Float32,
    Bfloat16,
}

impl Dtype {
    pub(crate) fn parse(name: &str) -> PyResult<Self> {
        match name {
            "float32" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::Bfloat16),
            other => Err(error::config(format!("the CPU kernels compute in float32 or bfloat16, not {other:?}"))),
        }
    }

    fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
        }
    }
}

/// What the layers of one step share.
struct Step {
    positions: Vec<i32>,
    slots: SlotMapping,
    attention: AttentionPlan,
}

/// The CPU kernels of one worker. Thread-safe, but one step at a time: `begin_step` replaces the step of all threads.
#[pyclass(frozen, name = "CpuKernels", module = "llmscale._core")]
pub(crate) struct CpuKernels {
    pub(crate) pool: Pool,
    pub(crate) level: Level,
    dtype: Dtype,
    step: Mutex<Option<Step>>,
}

impl CpuKernels {
    /// Where native programs compute.
    pub(crate) fn processor(&self) -> Processor<'_> {
        Processor { pool: &self.pool, level: self.level }
    }
}

/// Views memory as elements.
///
/// # Safety
/// The memory holds `elements` initialized values of `T`, is aligned for it, and is not written during `'a`.
pub(crate) unsafe fn view<'a, T>((address, elements): Memory) -> &'a [T] {
    if elements == 0 {
        return &[];
    }
    assert!(address != 0 && address.is_multiple_of(align_of::<T>()), "a tensor has no such address: {address:#x}");
    // SAFETY: by this function's contract; the address is neither null nor misaligned.
    unsafe { std::slice::from_raw_parts(address as *const T, elements) }
}

/// Views memory as elements that may be written.
///
/// # Safety
/// As [`view`], and nothing else reads or writes the memory during `'a`.
pub(crate) unsafe fn view_mut<'a, T>((address, elements): Memory) -> &'a mut [T] {
    if elements == 0 {
        return &mut [];
    }
    assert!(address != 0 && address.is_multiple_of(align_of::<T>()), "a tensor has no such address: {address:#x}");
    // SAFETY: by this function's contract; the address is neither null nor misaligned.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, elements) }
}

/// Runs one of two instances of a generic function without the GIL and maps its error.
macro_rules! by_dtype {
    ($self:ident, $py:ident, $function:ident ( $($argument:expr),* $(,)? )) => {
        detached($py, || match $self.dtype {
            Dtype::Float32 => $self.$function::<f32>($($argument),*),
            Dtype::Bfloat16 => $self.$function::<Bf16>($($argument),*),
        }).map_err(|error| error::kernel(&error))
    };
}

#[pymethods]
impl CpuKernels {
    /// `threads` defaults to what the process may use; `level` to the value of `LLMSCALE_CPU_LEVEL`, else to the best.
    #[new]
    #[pyo3(signature = (dtype, *, threads = None, level = None))]
    fn new(dtype: &str, threads: Option<usize>, level: Option<&str>) -> PyResult<Self> {
        let level = Level::from_environment(level).map_err(|error| error::config(error.to_string()))?;
        let pool = match threads {
            None => Pool::with_available_parallelism()?,
            Some(threads) => {
                let none = || error::config("threads is 0, the least is 1; raise it".to_owned());
                Pool::new(NonZeroUsize::new(threads.min(1_024)).ok_or_else(none)?)?
            }
        };
        Ok(Self { pool, level, dtype: Dtype::parse(dtype)?, step: Mutex::new(None) })
    }

    /// Name of the instruction level in use.
    #[getter]
    fn level(&self) -> &'static str {
        self.level.name()
    }

    /// Threads in use, the caller's included.
    #[getter]
    fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Takes the rows of a step: int32 tensors as in `StepInputs`. `region` is (blocks, layers, kv heads, block tokens,
    /// head dimension).
    #[pyo3(signature = (region, query_heads, softmax_scale, window_tokens, positions, slot_mapping, query_start,
        sequence_lengths, table_offsets, block_tables))]
    #[expect(clippy::too_many_arguments, reason = "the columns of a step")]
    fn begin_step(
        &self,
        py: Python<'_>,
        region: (usize, usize, usize, usize, usize),
        query_heads: usize,
        softmax_scale: f32,
        window_tokens: Option<u32>,
        positions: Memory,
        slot_mapping: Memory,
        query_start: Memory,
        sequence_lengths: Memory,
        table_offsets: Memory,
        block_tables: Memory,
    ) -> PyResult<()> {
        let (blocks, layers, kv_heads, block_tokens, head_dim) = region;
        let format = KvFormat::Activations;
        let region = KvRegionShape { blocks, layers, kv_heads, block_tokens, head_dim, format };
        let shape = AttentionShape { query_heads, softmax_scale, window_tokens, region };
        detached(py, || {
            // SAFETY: the caller holds these tensors, which the mirror writes only between steps.
            let batch = unsafe {
                AttentionBatch {
                    query_start: view(query_start),
                    sequence_lengths: view(sequence_lengths),
                    table_offsets: view(table_offsets),
                    block_tables: view(block_tables),
                }
            };
            // SAFETY: as above.
            let (positions, slots) = unsafe { (view::<i32>(positions), view::<i32>(slot_mapping)) };
            let step = Step {
                positions: positions.to_vec(),
                slots: SlotMapping::new(region, slots)?,
                attention: AttentionPlan::new(&shape, &batch, self.pool.threads())?,
            };
            *self.step.lock().unwrap_or_else(PoisonError::into_inner) = Some(step);
            Ok(())
        })
        .map_err(|error: KernelError| error::kernel(&error))
    }

    /// `out[t] = table[ids[t]]`.
    fn embed(&self, py: Python<'_>, ids: Memory, table: Memory, hidden: usize, out: Memory) -> PyResult<()> {
        by_dtype!(self, py, run_embed(ids, table, hidden, out))
    }

    /// `out = x / sqrt(mean(x^2) + epsilon) * weight` over rows of the weight's length.
    fn rms_norm(&self, py: Python<'_>, x: Memory, weight: Memory, epsilon: f32, out: Memory) -> PyResult<()> {
        by_dtype!(self, py, run_rms_norm(x, weight, epsilon, out))
    }

    /// `residual += x; out = rms_norm(residual)`.
    fn add_rms_norm(
        &self,
        py: Python<'_>,
        x: Memory,
        residual: Memory,
        weight: Memory,
        epsilon: f32,
        out: Memory,
    ) -> PyResult<()> {
        by_dtype!(self, py, run_add_rms_norm(x, residual, weight, epsilon, out))
    }

    /// `out = silu(gate) * up`, gate first in each row of `gate_up`.
    fn silu_mul(&self, py: Python<'_>, gate_up: Memory, inner: usize, out: Memory) -> PyResult<()> {
        by_dtype!(self, py, run_silu_mul(gate_up, inner, out))
    }

    /// Norms and rotates query and key heads of `qkv`; queries go to `query`, keys and values to the step's slots.
    /// `norms` is (query weight, key weight, epsilon).
    #[pyo3(signature = (layer, qkv, query_heads, cosines, sines, rotary_dim, norms, query, kv_region))]
    #[expect(clippy::too_many_arguments, reason = "the operands of one fused kernel")]
    fn rotate_and_store(
        &self,
        py: Python<'_>,
        layer: usize,
        qkv: Memory,
        query_heads: usize,
        cosines: Memory,
        sines: Memory,
        rotary_dim: usize,
        norms: Option<(Memory, Memory, f32)>,
        query: Memory,
        kv_region: Memory,
    ) -> PyResult<()> {
        let rotation = (cosines, sines, rotary_dim);
        by_dtype!(self, py, run_rotate(layer, qkv, query_heads, rotation, norms, query, kv_region))
    }

    /// Causal attention of the step's rows in one layer.
    fn attend(&self, py: Python<'_>, layer: usize, query: Memory, kv_region: Memory, out: Memory) -> PyResult<()> {
        by_dtype!(self, py, run_attend(layer, query, kv_region, out))
    }

    /// Samples a row of `logits`, `[rows, vocabulary]`, for each entry of the 13 int32 `columns` of a packed step with its four
    /// lists of `changes`, and leaves the results in `drawn`, which has entries for `max_rows` rows.
    #[expect(clippy::too_many_arguments, reason = "what to sample, how, and where to")]
    fn sample_columns(
        &self,
        py: Python<'_>,
        logits: Memory,
        vocabulary: usize,
        columns: Vec<Memory>,
        changes: Vec<Memory>,
        drawn: Memory,
        max_rows: usize,
    ) -> PyResult<()> {
        let logits = (logits, self.dtype, vocabulary);
        detached(py, || column_sampler::sample(self, logits, &columns, &changes, (drawn, max_rows)))
    }

    /// Bytes per element.
    #[getter]
    fn element_bytes(&self) -> usize {
        self.dtype.size()
    }
}

// SAFETY of every function below: the addresses are those of contiguous torch tensors of the object's dtype, which the
// executor holds during the call and which no other thread touches, because one worker runs one step at a time; outputs
// do not overlap inputs (the executor's buffers are distinct).
impl CpuKernels {
    fn run_embed<T: Element>(&self, ids: Memory, table: Memory, hidden: usize, out: Memory) -> Result<(), KernelError> {
        // SAFETY: see above.
        let (ids, table, out) = unsafe { (view::<i32>(ids), view::<T>(table), view_mut::<T>(out)) };
        embedding::gather_rows(&self.pool, table, hidden, ids, out)
    }

    fn run_rms_norm<T: Element>(
        &self,
        x: Memory,
        weight: Memory,
        epsilon: f32,
        out: Memory,
    ) -> Result<(), KernelError> {
        // SAFETY: see above.
        let (x, weight, out) = unsafe { (view::<T>(x), view::<T>(weight), view_mut::<T>(out)) };
        norm::rms_norm(&self.pool, self.level, x, weight, epsilon, out)
    }

    fn run_add_rms_norm<T: Element>(
        &self,
        x: Memory,
        residual: Memory,
        weight: Memory,
        epsilon: f32,
        out: Memory,
    ) -> Result<(), KernelError> {
        // SAFETY: see above.
        let (x, residual) = unsafe { (view::<T>(x), view_mut::<T>(residual)) };
        // SAFETY: see above.
        let (weight, out) = unsafe { (view::<T>(weight), view_mut::<T>(out)) };
        norm::add_rms_norm(&self.pool, self.level, x, residual, weight, epsilon, out)
    }

    fn run_silu_mul<T: Element>(&self, gate_up: Memory, inner: usize, out: Memory) -> Result<(), KernelError> {
        // SAFETY: see above.
        let (gate_up, out) = unsafe { (view::<T>(gate_up), view_mut::<T>(out)) };
        activation::silu_and_multiply(&self.pool, self.level, gate_up, inner, out)
    }

    #[expect(clippy::too_many_arguments, reason = "the operands of one fused kernel")]
    fn run_rotate<T: Element>(
        &self,
        layer: usize,
        qkv: Memory,
        query_heads: usize,
        (cosines, sines, rotary_dim): (Memory, Memory, usize),
        norms: Option<(Memory, Memory, f32)>,
        query: Memory,
        kv_region: Memory,
    ) -> Result<(), KernelError> {
        let step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        let step = step.as_ref().ok_or(NO_STEP)?;
        // SAFETY: see above.
        let (qkv, query, kv_region) = unsafe { (view::<T>(qkv), view_mut::<T>(query), view_mut::<T>(kv_region)) };
        // SAFETY: see above.
        let norms = norms.map(|(query, key, epsilon)| unsafe {
            HeadNorms { query: view::<T>(query), key: view::<T>(key), epsilon }
        });
        // SAFETY: see above; the tables are float32 whatever the dtype.
        let table = unsafe { RotaryTable { cosines: view(cosines), sines: view(sines), rotary_dim } };
        let input =
            RopeCacheInput { qkv, query_heads, positions: &step.positions, table, norms, slots: &step.slots, layer };
        rope_and_cache(&self.pool, self.level, &input, query, kv_region)
    }

    fn run_attend<T: Element>(
        &self,
        layer: usize,
        query: Memory,
        kv_region: Memory,
        out: Memory,
    ) -> Result<(), KernelError> {
        let step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        let step = step.as_ref().ok_or(NO_STEP)?;
        // SAFETY: see above.
        let (query, kv_region, out) = unsafe { (view::<T>(query), view::<T>(kv_region), view_mut::<T>(out)) };
        step.attention.run(&self.pool, self.level, layer, query, kv_region, out)
    }
}

const NO_STEP: KernelError =
    KernelError::Unsupported { argument: "step", given: 0, rule: "begin_step before the layers of a step" };
