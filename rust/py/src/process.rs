//! What processes ask of the operating system about their family: to end with a parent, to take in orphans.
#![expect(unsafe_code, reason = "prctl and getppid have no safe binding in the standard library")]

use crate::error;
use pyo3::prelude::*;

/// Makes the kernel kill this process when the parent dies, however it dies; `gently` with SIGTERM, for one that has
/// something to remove. `parent` is the parent that the caller expects: if another process has adopted this one
/// meanwhile, the parent is dead already and `WorkerError` is raised.
#[pyfunction]
#[pyo3(signature = (parent, *, gently = false))]
pub(crate) fn end_with_parent(parent: i32, gently: bool) -> PyResult<()> {
    let signal = if gently { libc::SIGTERM } else { libc::SIGKILL };
    // SAFETY: PR_SET_PDEATHSIG takes a signal number by value and touches no memory.
    let set = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) };
    if set != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: getppid has no arguments and cannot fail.
    let now = unsafe { libc::getppid() };
    if now == parent { Ok(()) } else { Err(error::worker(format!("the parent process {parent} is gone"))) }
}

/// Makes this process the parent of its descendants whose own parent has ended, instead of the first process of the
/// system: it can then wait for them, and they may end with it.
#[pyfunction]
pub(crate) fn adopt_orphans() -> PyResult<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER takes a flag by value and touches no memory.
    let set = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1 as libc::c_ulong) };
    if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}
