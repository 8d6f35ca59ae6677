//! The Python module `llmscale._core`: names only. Each door is one file beside this one.

pub mod measure;

mod buffer;
mod detach;
mod error;
mod kernels;
mod sampling;

use pyo3::prelude::*;

/// The compiled core of llmscale. Private: the package re-exports what users need.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::buffer::Int32Buffer;
    #[pymodule_export]
    use crate::kernels::CpuKernels;
    #[pymodule_export]
    use crate::sampling::PySampling;
}
