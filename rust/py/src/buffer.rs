//! Flat int32 buffers of a mirror, exported by the buffer protocol so that Python wraps them once and reads every step
//! without a copy. The memory belongs to the mirror, which the buffer's owner keeps alive and never moves or resizes.
#![expect(unsafe_code, reason = "the buffer protocol hands out raw memory")]

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{c_int, c_void};

/// A view of int32 entries, valid as long as its owner lives; contents change with every step.
#[pyclass(frozen, name = "Int32Buffer", module = "llmscale._core")]
pub(crate) struct Int32Buffer {
    owner: Py<PyAny>,
    address: *const i32,
    shape: [ffi::Py_ssize_t; 1],
    stride: [ffi::Py_ssize_t; 1],
}

// SAFETY: the pointer is only handed on to the buffer protocol; the owner is `Py`, which is Send and Sync, and keeps the
// memory alive. Contents are written by the owner between steps and read by the executor within one.
unsafe impl Send for Int32Buffer {}
// SAFETY: see above; the object itself is never changed after its construction.
unsafe impl Sync for Int32Buffer {}

impl Int32Buffer {
    /// Wraps memory of `owner` that stays where it is for the owner's whole life.
    pub(crate) fn new(owner: Py<PyAny>, memory: &[i32]) -> Self {
        Self { owner, address: memory.as_ptr(), shape: [memory.len() as ffi::Py_ssize_t], stride: [4] }
    }
}

#[pymethods]
impl Int32Buffer {
    fn __len__(&self) -> usize {
        self.shape[0] as usize
    }

    /// Whose memory this is.
    #[getter]
    fn owner(&self, py: Python<'_>) -> Py<PyAny> {
        self.owner.clone_ref(py)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view was given"));
        }
        let this = slf.get();
        // SAFETY: `view` is a valid Py_buffer of the caller. All pointers stored in it point into `this`, which `obj`
        // keeps alive until the view is released, and into the owner's memory, which `this` keeps alive.
        unsafe {
            (*view).buf = this.address as *mut c_void;
            (*view).len = this.shape[0] * 4;
            // Writable by name only: torch warns about read-only memory at every start, and executors never write it.
            (*view).readonly = 0;
            (*view).itemsize = 4;
            (*view).format = if flags & ffi::PyBUF_FORMAT == ffi::PyBUF_FORMAT {
                c"i".as_ptr().cast_mut()
            } else {
                std::ptr::null_mut()
            };
            (*view).ndim = 1;
            (*view).shape = this.shape.as_ptr().cast_mut();
            (*view).strides = this.stride.as_ptr().cast_mut();
            (*view).suboffsets = std::ptr::null_mut();
            (*view).internal = std::ptr::null_mut();
            (*view).obj = slf.into_any().into_ptr();
        }
        Ok(())
    }
}
