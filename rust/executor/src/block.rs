//! One layer, ready to run: `x += attention(norm(x)); x += mlp(norm(x))`. What a part gives is added to the stream by the
//! norm of the next one, and norms and activations are made row by row while the product behind them packs its rows.
//! Linear in the rows but for attention, which is the kernels'. It does not know its neighbours: the stream and what is to
//! be added to it are in the caller's buffers.

use crate::description::{BlockDescription, ModelShape, NormDescription};
use crate::error::LoadError;
use crate::kv_store::KvStore;
use crate::linear::{Linear, Processor};
use crate::rope::RopeTable;
use llmscale_kernels::activation::GatedRows;
use llmscale_kernels::element::Element;
use llmscale_kernels::error::KernelError;
use llmscale_kernels::kv_region::SlotMapping;
use llmscale_kernels::matmul::MatmulScratch;
use llmscale_kernels::norm::NormedRows;
use llmscale_kernels::paged_attention::AttentionPlan;
use llmscale_kernels::rope_cache::{HeadNorms, RopeCacheInput};
use std::sync::Arc;

/// An RMS norm with its weight.
#[derive(Debug)]
pub(crate) struct Norm<T> {
    weight: Vec<T>,
    epsilon: f32,
}

impl<T: Element> Norm<T> {
    pub(crate) fn load(description: &NormDescription, width: usize) -> Result<Self, LoadError> {
        let weight: Vec<T> = description.weight.read_all()?;
        if weight.len() != width {
            return Err(LoadError::Shape(format!("a norm of {} elements for rows of {width}", weight.len())));
        }
        Ok(Self { weight, epsilon: description.epsilon })
    }

    /// The rows `norm(residual)`, after `delta` was added to the stream if there is one.
    pub(crate) fn rows<'a>(
        &'a self,
        delta: Option<&'a [T]>,
        residual: &'a mut [T],
    ) -> Result<NormedRows<'a, T>, KernelError> {
        NormedRows::new(delta, residual, &self.weight, self.epsilon)
    }
}

/// The memory of a step's rows; every array has room for the largest step.
#[derive(Debug)]
pub(crate) struct Activations<T> {
    pub(crate) residual: Vec<T>,
    pub(crate) delta: Vec<T>,
    pub(crate) qkv: Vec<T>,
    pub(crate) query: Vec<T>,
    pub(crate) heads: Vec<T>,
    pub(crate) gate_up: Vec<T>,
    pub(crate) scratch: MatmulScratch,
}

impl<T: Element> Activations<T> {
    pub(crate) fn new(rows: usize, hidden: usize, widest: Widths) -> Self {
        let room = |width: usize| vec![T::default(); rows * width];
        Self {
            residual: room(hidden),
            delta: room(hidden),
            qkv: room(widest.qkv),
            query: room(widest.query),
            heads: room(widest.query),
            gate_up: room(2 * widest.inner),
            scratch: MatmulScratch::default(),
        }
    }
}

/// Elements of rows inside a layer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Widths {
    pub(crate) qkv: usize,
    pub(crate) query: usize,
    pub(crate) inner: usize,
}

impl Widths {
    pub(crate) fn max(self, other: Self) -> Self {
        Self { qkv: self.qkv.max(other.qkv), query: self.query.max(other.query), inner: self.inner.max(other.inner) }
    }
}

/// What the layers of one step share.
#[derive(Clone, Copy)]
pub(crate) struct StepPlace<'a> {
    pub(crate) positions: &'a [i32],
    pub(crate) slots: &'a SlotMapping,
    pub(crate) plan: &'a AttentionPlan,
}

/// One layer.
#[derive(Debug)]
pub(crate) struct Block<T> {
    attention_norm: Norm<T>,
    query_heads: usize,
    head_dim: usize,
    head_norms: Option<(Norm<T>, Norm<T>)>,
    pub(crate) window_tokens: Option<u32>,
    rope: Arc<RopeTable>,
    qkv: Linear<T>,
    output: Linear<T>,
    mlp_norm: Norm<T>,
    gate_up: Linear<T>,
    down: Linear<T>,
}

impl<T: Element> Block<T> {
    pub(crate) fn load(
        on: Processor<'_>,
        shape: &ModelShape,
        description: &BlockDescription,
        rope: Arc<RopeTable>,
    ) -> Result<Self, LoadError> {
        let attention = &description.attention;
        let head_norms = match &attention.head_norms {
            None => None,
            Some((query, key)) => Some((Norm::load(query, shape.head_dim)?, Norm::<T>::load(key, shape.head_dim)?)),
        };
        let block = Self {
            attention_norm: Norm::load(&description.attention_norm, shape.hidden)?,
            query_heads: attention.query_heads,
            head_dim: shape.head_dim,
            head_norms,
            window_tokens: attention.window_tokens,
            rope,
            qkv: Linear::load(on, &attention.qkv)?,
            output: Linear::load(on, &attention.output)?,
            mlp_norm: Norm::load(&description.mlp_norm, shape.hidden)?,
            gate_up: Linear::load(on, &description.gate_up)?,
            down: Linear::load(on, &description.down)?,
        };
        block.check(shape)?;
        Ok(block)
    }

    fn check(&self, shape: &ModelShape) -> Result<(), LoadError> {
        let Widths { qkv, query, inner } = self.widths();
        let wanted = [
            ("qkv", &self.qkv, (query + 2 * shape.kv_heads * shape.head_dim, shape.hidden)),
            ("output", &self.output, (shape.hidden, query)),
            ("gate and up", &self.gate_up, (2 * inner, shape.hidden)),
            ("down", &self.down, (shape.hidden, inner)),
        ];
        for (name, linear, (outputs, inputs)) in wanted {
            if (linear.outputs(), linear.inputs()) != (outputs, inputs) {
                let given = format!("{} x {}", linear.outputs(), linear.inputs());
                return Err(LoadError::Shape(format!(
                    "{name} is {given}, the model's shape needs {outputs} x {inputs}"
                )));
            }
        }
        assert_eq!(qkv, self.qkv.outputs());
        Ok(())
    }

    pub(crate) fn widths(&self) -> Widths {
        Widths { qkv: self.qkv.outputs(), query: self.query_heads * self.head_dim, inner: self.down.inputs() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.qkv.bytes() + self.output.bytes() + self.gate_up.bytes() + self.down.bytes()
    }

    /// Norm, projection, rotation and attention: leaves the heads' results of `rows` rows in `heads`.
    pub(crate) fn attend(
        &self,
        on: Processor<'_>,
        step: StepPlace<'_>,
        layer: usize,
        has_delta: bool,
        region: &mut KvStore<T>,
        rows: &mut Activations<T>,
    ) -> Result<(), KernelError> {
        let count = step.positions.len();
        let hidden = self.qkv.inputs();
        let Widths { qkv: qkv_width, query: query_width, .. } = self.widths();
        let delta = has_delta.then_some(&rows.delta[..count * hidden]);
        let normed = self.attention_norm.rows(delta, &mut rows.residual[..count * hidden])?;
        let qkv = &mut rows.qkv[..count * qkv_width];
        self.qkv.apply(on, &mut rows.scratch, &normed, qkv)?;
        let input = RopeCacheInput {
            qkv,
            query_heads: self.query_heads,
            positions: step.positions,
            table: self.rope.view(),
            norms: self.head_norms.as_ref().map(|(query, key)| HeadNorms {
                query: &query.weight,
                key: &key.weight,
                epsilon: query.epsilon,
            }),
            slots: step.slots,
            layer,
        };
        let query = &mut rows.query[..count * query_width];
        region.append(on, &input, query)?;
        region.attend(on, step.plan, layer, query, &mut rows.heads[..count * query_width])
    }

    /// The rest of the layer for the first `count` rows of `heads`: leaves in `delta` what is to be added to the stream.
    pub(crate) fn finish(&self, on: Processor<'_>, count: usize, rows: &mut Activations<T>) -> Result<(), KernelError> {
        let hidden = self.output.outputs();
        let Widths { query: query_width, inner: inner_width, .. } = self.widths();
        let (residual, delta) = (&mut rows.residual[..count * hidden], &mut rows.delta[..count * hidden]);
        self.output.apply(on, &mut rows.scratch, &rows.heads[..count * query_width], delta)?;
        let gate_up = &mut rows.gate_up[..count * 2 * inner_width];
        self.gate_up.apply(on, &mut rows.scratch, &self.mlp_norm.rows(Some(delta), residual)?, gate_up)?;
        self.down.apply(on, &mut rows.scratch, &GatedRows::new(gate_up, inner_width)?, delta)
    }
}
