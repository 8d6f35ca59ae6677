//! The KV region of a program, in one of its formats. Which one is asked once per layer and not per element: behind this
//! everything is compiled for its format. It does not know which blocks are in use.

use crate::error::LoadError;
use crate::kv_memory::KvMemory;
use crate::linear::Processor;
use llmscale_kernels::element::Element;
use llmscale_kernels::error::KernelError;
use llmscale_kernels::huge_pages::Number;
use llmscale_kernels::kv_format::KvFormat;
use llmscale_kernels::kv_region::KvRegionShape;
use llmscale_kernels::paged_attention::AttentionPlan;
use llmscale_kernels::rope_cache::{RopeCacheInput, rope_and_cache};

/// The memory of a region, by what its rows are.
#[derive(Debug)]
pub(crate) enum KvStore<T> {
    /// In the format of the activations.
    Activations(KvMemory<T>),
    /// Signed bytes with a scale per row.
    Bytes(KvMemory<i8>),
}

impl<T: Element + Number> KvStore<T> {
    /// Reserves it, all zero.
    pub(crate) fn new(shape: &KvRegionShape) -> Result<Self, LoadError> {
        match shape.format {
            KvFormat::Activations => KvMemory::new(shape).map(Self::Activations),
            KvFormat::Bytes => KvMemory::new(shape).map(Self::Bytes),
        }
    }

    /// Address and bytes.
    pub(crate) fn place(&self) -> (usize, usize) {
        match self {
            Self::Activations(region) => (region.as_ptr() as usize, size_of_val(&**region)),
            Self::Bytes(region) => (region.as_ptr() as usize, size_of_val(&**region)),
        }
    }

    /// A step writes these slots.
    pub(crate) fn reached(&self, slots: &[i32]) {
        match self {
            Self::Activations(region) => region.reached(slots),
            Self::Bytes(region) => region.reached(slots),
        }
    }
}

impl<T: Element> KvStore<T> {
    /// See [`rope_and_cache`].
    pub(crate) fn append(
        &mut self,
        on: Processor<'_>,
        input: &RopeCacheInput<'_, T>,
        query: &mut [T],
    ) -> Result<(), KernelError> {
        match self {
            Self::Activations(region) => rope_and_cache(on.pool, on.level, input, query, region),
            Self::Bytes(region) => rope_and_cache(on.pool, on.level, input, query, region),
        }
    }

    /// See [`AttentionPlan::run`].
    pub(crate) fn attend(
        &self,
        on: Processor<'_>,
        plan: &AttentionPlan,
        layer: usize,
        query: &[T],
        output: &mut [T],
    ) -> Result<(), KernelError> {
        match self {
            Self::Activations(region) => plan.run(on.pool, on.level, layer, query, region, output),
            Self::Bytes(region) => plan.run(on.pool, on.level, layer, query, region, output),
        }
    }
}
