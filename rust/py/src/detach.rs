//! The one place where the GIL is released: for calls that compute or wait longer than about 100 us.

use crate::error::Refused;
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};

/// Runs `work` without the GIL.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(work)
}

/// Asks what a lock guards. An exception of it is made when the lock is free again.
pub(crate) fn asked<L, T>(guarded: &Mutex<L>, ask: impl FnOnce(&mut L) -> Result<T, Refused>) -> PyResult<T> {
    let answer = ask(&mut guarded.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(answer?)
}

/// The same without the GIL. It locks inside: whoever waits for the lock with the GIL in hand would wait for ever.
pub(crate) fn asked_detached<L: Send, T: Send>(
    py: Python<'_>,
    guarded: &Mutex<L>,
    ask: impl FnOnce(&mut L) -> Result<T, Refused> + Send,
) -> PyResult<T> {
    let answer = detached(py, || ask(&mut guarded.lock().unwrap_or_else(PoisonError::into_inner)));
    Ok(answer?)
}
