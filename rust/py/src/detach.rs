//! The one place where the GIL is released: for calls that compute or wait longer than about 100 us.

use pyo3::prelude::*;

/// Runs `work` without the GIL.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(work)
}
