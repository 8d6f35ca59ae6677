//! The door to the native executor: a program is built layer by layer from tuples that say where tensors lie, and then runs
//! steps of whoever owns a mirror. Nothing of a model passes through Python but its description.
#![expect(unsafe_code, reason = "arrays of a step are reached by address")]

use crate::detach::detached;
use crate::error;
use crate::kernels::{CpuKernels, Dtype, Memory, view};
use llmscale_executor::description::{
    AttentionDescription, BlockDescription, LinearDescription, ModelShape, NormDescription, ProgramLimits,
    RopeDescription, WeightSource,
};
use llmscale_executor::error::LoadError;
use llmscale_executor::fp8::Fp8Scales;
use llmscale_executor::program::{Program, ProgramBuilder, StepRows};
use llmscale_executor::source::{Stack, Stored, Tensor, TensorFile};
use llmscale_executor::turned::{Packing, TurnedPart};
use llmscale_kernels::element::Bf16;
use llmscale_kernels::error::KernelError;
use llmscale_kernels::kv_format::KvFormat;
use llmscale_kernels::paged_attention::AttentionBatch;
use llmscale_scheduler::{Mirror, StepCounts};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Files that stay open while a program is built: a checkpoint may have thousands, a process a thousand descriptors.
const MAX_OPEN_FILES: usize = 16;

/// (path, first byte, format, rows, columns)
type TensorPlace = (String, u64, String, usize, usize);
type StackPlaces = Vec<TensorPlace>;
/// (weight, epsilon)
type NormPlace = (StackPlaces, f32);
/// (scheme, its stacks, bias, inputs, inputs of a group)
type LinearPlace = (String, Vec<StackPlaces>, Option<StackPlaces>, usize, usize);

/// Something for each number format.
enum Either<A, B> {
    Float32(A),
    Bfloat16(B),
}

/// Calls one expression for the program or builder of whichever format.
macro_rules! for_either {
    ($either:expr, $found:ident => $result:expr) => {
        match $either {
            Either::Float32($found) => $result,
            Either::Bfloat16($found) => $result,
        }
    };
}

type Builder = Either<ProgramBuilder<f32>, ProgramBuilder<Bf16>>;
type Programs = Either<Program<f32>, Program<Bf16>>;

/// A program that is being built.
#[pyclass(frozen, name = "ProgramBuilder", module = "llmscale._core")]
pub(crate) struct PyProgramBuilder {
    state: Mutex<Building>,
}

struct Building {
    /// None once it is finished.
    builder: Option<Builder>,
    files: Vec<(String, Arc<TensorFile>)>,
}

#[pymethods]
impl PyProgramBuilder {
    /// `shape` is (hidden, vocabulary, layers, kv heads, head dimension), `limits` are (step tokens, samples, tokens of a
    /// sequence, KV blocks, tokens of a block). `kv_dtype` is "auto", the format of the activations, or "int8".
    #[new]
    fn new(
        dtype: &str,
        shape: (usize, usize, usize, usize, usize),
        limits: (usize, usize, usize, usize, usize),
        kv_dtype: &str,
    ) -> PyResult<Self> {
        let (hidden, vocabulary, layers, kv_heads, head_dim) = shape;
        let shape = ModelShape { hidden, vocabulary, layers, kv_heads, head_dim };
        let (max_step_tokens, max_samples, max_sequence_tokens, blocks, block_tokens) = limits;
        let kv_format = match kv_dtype {
            "auto" => KvFormat::Activations,
            "int8" => KvFormat::Bytes,
            other => return Err(error::config(format!("kv_dtype is {other:?}, it must be auto or int8"))),
        };
        let limits =
            ProgramLimits { max_step_tokens, max_samples, max_sequence_tokens, blocks, block_tokens, kv_format };
        let builder = match Dtype::parse(dtype)? {
            Dtype::Float32 => Either::Float32(ProgramBuilder::new(shape, limits)),
            Dtype::Bfloat16 => Either::Bfloat16(ProgramBuilder::new(shape, limits)),
        };
        Ok(Self { state: Mutex::new(Building { builder: Some(builder), files: Vec::new() }) })
    }

    /// Reads and packs the next layer. Raises `ModelError` for files that cannot be read or do not fit.
    #[expect(clippy::too_many_arguments, reason = "the parts of a layer")]
    #[pyo3(signature = (kernels, *, attention_norm, query_heads, head_norms, window_tokens, frequencies, qkv, output,
        mlp_norm, gate_up, down))]
    fn block(
        &self,
        py: Python<'_>,
        kernels: &CpuKernels,
        attention_norm: NormPlace,
        query_heads: usize,
        head_norms: Option<(NormPlace, NormPlace)>,
        window_tokens: Option<u32>,
        frequencies: Vec<f32>,
        qkv: LinearPlace,
        output: LinearPlace,
        mlp_norm: NormPlace,
        gate_up: LinearPlace,
        down: LinearPlace,
    ) -> PyResult<()> {
        let load = || {
            let mut building = self.lock();
            let head_norms = match head_norms {
                None => None,
                Some((query, key)) => Some((building.norm(query)?, building.norm(key)?)),
            };
            let description = BlockDescription {
                attention_norm: building.norm(attention_norm)?,
                attention: AttentionDescription {
                    query_heads,
                    head_norms,
                    window_tokens,
                    rope: RopeDescription { frequencies },
                    qkv: building.linear(qkv)?,
                    output: building.linear(output)?,
                },
                mlp_norm: building.norm(mlp_norm)?,
                gate_up: building.linear(gate_up)?,
                down: building.linear(down)?,
            };
            for_either!(building.unfinished()?, builder => builder.block(kernels.processor(), &description))
        };
        detached(py, load).map_err(|problem| error::load(&problem))
    }

    /// Reads norm, head and embedding (None: it is the head's table), and makes the KV region. Raises `ModelError`, and
    /// `MemoryError` where there is no room.
    fn finish(
        &self,
        py: Python<'_>,
        kernels: &CpuKernels,
        norm: NormPlace,
        head: LinearPlace,
        embedding: Option<StackPlaces>,
    ) -> PyResult<PyNativeProgram> {
        let finish = || {
            let mut building = self.lock();
            let (norm, head) = (building.norm(norm)?, building.linear(head)?);
            let embedding = embedding.map(|places| building.stack(places)).transpose()?;
            building.unfinished()?;
            let on = kernels.processor();
            match building.builder.take().expect("it is not finished, as the line above says") {
                Either::Float32(builder) => builder.finish(on, &norm, &head, embedding.as_ref()).map(Either::Float32),
                Either::Bfloat16(builder) => builder.finish(on, &norm, &head, embedding.as_ref()).map(Either::Bfloat16),
            }
        };
        let program = detached(py, finish).map_err(|problem| error::load(&problem))?;
        Ok(PyNativeProgram { program: Mutex::new(program) })
    }
}

impl PyProgramBuilder {
    fn lock(&self) -> MutexGuard<'_, Building> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Building {
    fn unfinished(&mut self) -> Result<&mut Builder, LoadError> {
        self.builder.as_mut().ok_or_else(|| LoadError::Shape("the program is finished; build another one".into()))
    }

    fn file(&mut self, path: &str) -> Result<Arc<TensorFile>, LoadError> {
        if let Some((_, file)) = self.files.iter().find(|(known, _)| known == path) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(TensorFile::open(path)?);
        if self.files.len() == MAX_OPEN_FILES {
            self.files.remove(0);
        }
        self.files.push((path.to_owned(), Arc::clone(&file)));
        Ok(file)
    }

    fn stack(&mut self, places: StackPlaces) -> Result<Stack, LoadError> {
        let mut parts = Vec::with_capacity(places.len());
        for (path, begin, format, rows, columns) in places {
            let stored = match format.as_str() {
                "F32" => Stored::F32,
                "BF16" => Stored::Bf16,
                "F16" => Stored::F16,
                "I8" => Stored::I8,
                "I32" | "U32" => Stored::I32,
                "F8_E4M3" => Stored::F8,
                other => return Err(LoadError::Shape(format!("numbers stored as {other:?} cannot be read"))),
            };
            parts.push(Tensor { file: self.file(&path)?, begin, stored, rows, columns });
        }
        Stack::new(parts)
    }

    fn norm(&mut self, (weight, epsilon): NormPlace) -> Result<NormDescription, LoadError> {
        Ok(NormDescription { weight: self.stack(weight)?, epsilon })
    }

    fn linear(&mut self, (scheme, stacks, bias, inputs, group): LinearPlace) -> Result<LinearDescription, LoadError> {
        let given = stacks.len();
        let stacks: Result<Vec<Stack>, LoadError> = stacks.into_iter().map(|places| self.stack(places)).collect();
        let stacks = stacks?;
        let bias = bias.map(|places| self.stack(places)).transpose()?;
        if let Some(packing) = packing_of(&scheme) {
            let parts = turned_parts(stacks)?;
            let weight = WeightSource::TurnedNibbles { parts, packing, inputs, group };
            return Ok(LinearDescription { weight, bias });
        }
        let mut stacks = stacks.into_iter();
        if let Some(kind) = fp8_scales_of(&scheme, group) {
            let codes = stacks.next().ok_or_else(|| LoadError::Shape("a weight in e4m3 without codes".into()))?;
            return Ok(LinearDescription { weight: WeightSource::Fp8 { codes, scales: stacks.collect(), kind }, bias });
        }
        let weight = match (scheme.as_str(), stacks.next(), stacks.next(), stacks.next()) {
            ("dense", Some(stack), None, None) => WeightSource::Dense(stack),
            ("int8", Some(stack), None, None) => WeightSource::MadeBytes(stack),
            ("int8-stored", Some(codes), Some(scales), None) => WeightSource::StoredBytes { codes, scales },
            ("int4", Some(stack), None, None) => WeightSource::MadeNibbles { stack, group, symmetric: true },
            ("int4-zeros", Some(stack), None, None) => WeightSource::MadeNibbles { stack, group, symmetric: false },
            ("int4-stored", Some(codes), Some(scales), zeros) => {
                WeightSource::StoredNibbles { codes, scales, zeros, inputs, group }
            }
            (other, ..) => return Err(LoadError::Shape(format!("there is no scheme {other:?} of {given} stacks"))),
        };
        Ok(LinearDescription { weight, bias })
    }
}

/// How codes are packed that are stored inputs first; none for other schemes.
fn packing_of(scheme: &str) -> Option<Packing> {
    match scheme {
        "int4-gptq" => Some(Packing::Gptq(1)),
        "int4-gptq-v2" => Some(Packing::Gptq(0)),
        "int4-awq" => Some(Packing::Awq),
        _ => None,
    }
}

/// What shares a scale of e4m3; none for other schemes.
fn fp8_scales_of(scheme: &str, group: usize) -> Option<Fp8Scales> {
    match scheme {
        "fp8-tensor" => Some(Fp8Scales::Tensor),
        "fp8-channel" => Some(Fp8Scales::Channel),
        "fp8-block" => Some(Fp8Scales::Block(group)),
        _ => None,
    }
}

/// Codes, scales and zero points of each tensor in turn.
fn turned_parts(stacks: Vec<Stack>) -> Result<Vec<TurnedPart>, LoadError> {
    let given = stacks.len();
    let mut stacks = stacks.into_iter();
    let mut parts = Vec::with_capacity(given / 3);
    while let Some(codes) = stacks.next() {
        let (Some(scales), Some(zeros)) = (stacks.next(), stacks.next()) else {
            return Err(LoadError::Shape(format!("{given} tensors are not codes, scales and zero points of some")));
        };
        parts.push(TurnedPart { codes, scales, zeros });
    }
    Ok(parts)
}

/// A model that is ready to run on the processor. One step at a time.
#[pyclass(frozen, name = "NativeProgram", module = "llmscale._core")]
pub(crate) struct PyNativeProgram {
    program: Mutex<Programs>,
}

#[pymethods]
impl PyNativeProgram {
    /// (address, elements) of the logits of the last step, valid until the next one.
    #[getter]
    fn logits(&self) -> Memory {
        for_either!(&*self.lock(), program => memory(program.logits()))
    }

    /// (address, bytes) of the KV region, valid as long as this object lives.
    #[getter]
    fn region(&self) -> Memory {
        for_either!(&*self.lock(), program => program.region())
    }

    /// Runs a step of int32 arrays: token ids, positions, slots, query starts, sequence lengths, table offsets, block tables
    /// and sampling rows, as in `StepInputs`. Raises `WorkerError` for arrays that contradict themselves.
    fn forward(&self, py: Python<'_>, kernels: &CpuKernels, arrays: [Memory; 8]) -> PyResult<()> {
        // SAFETY: the caller holds these contiguous int32 arrays, which nobody writes during the call.
        let arrays = arrays.map(|memory| unsafe { view::<i32>(memory) });
        let [
            token_ids,
            positions,
            slot_mapping,
            query_start,
            sequence_lengths,
            table_offsets,
            block_tables,
            sample_rows,
        ] = arrays;
        let batch = AttentionBatch { query_start, sequence_lengths, table_offsets, block_tables };
        let step = StepRows { token_ids, positions, slot_mapping, batch, sample_rows };
        detached(py, || self.run(kernels, &step)).map_err(|problem| error::kernel(&problem))
    }

    /// Memory of the packed weights.
    #[getter]
    fn weight_bytes(&self) -> usize {
        for_either!(&*self.lock(), program => program.weight_bytes())
    }
}

fn memory<T>(values: &[T]) -> Memory {
    (values.as_ptr() as usize, values.len())
}

impl PyNativeProgram {
    fn lock(&self) -> MutexGuard<'_, Programs> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the mirror's step, without the GIL.
    pub(crate) fn compute(&self, kernels: &CpuKernels, mirror: &Mirror, counts: StepCounts) -> Result<(), KernelError> {
        let buffers = mirror.buffers();
        let (rows, sequences) = (counts.rows as usize, counts.sequences as usize);
        let step = StepRows {
            token_ids: &buffers.token_ids[..rows],
            positions: &buffers.positions[..rows],
            slot_mapping: &buffers.slot_mapping[..rows],
            batch: AttentionBatch {
                query_start: &buffers.query_start[..=sequences],
                sequence_lengths: &buffers.sequence_lengths[..sequences],
                table_offsets: &buffers.table_offsets[..sequences],
                block_tables: &buffers.block_tables,
            },
            sample_rows: &buffers.sample_rows[..counts.samples as usize],
        };
        self.run(kernels, &step)
    }

    fn run(&self, kernels: &CpuKernels, step: &StepRows<'_>) -> Result<(), KernelError> {
        for_either!(&mut *self.lock(), program => program.forward(kernels.processor(), step))
    }
}
