//! Which CPUs a thread may run on, asked and set through the operating system.
//! Linux only; elsewhere every function reports `Unsupported`. O(CPUs). Knows nothing of loops or chunks.

use std::io;
use std::thread::JoinHandle;

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the affinity calls of the C library")]
mod system {
    use super::{JoinHandle, io};
    use std::os::unix::thread::JoinHandleExt;

    const SET_BYTES: usize = size_of::<libc::cpu_set_t>();

    fn empty_set() -> libc::cpu_set_t {
        // SAFETY: the set is an array of bits, and zeros are the empty set.
        unsafe { core::mem::zeroed() }
    }

    fn set_of(cpu: usize) -> libc::cpu_set_t {
        let mut set = empty_set();
        // SAFETY: the CPU came from a set of the same size.
        unsafe { libc::CPU_SET(cpu, &mut set) };
        set
    }

    /// The CPUs that the calling thread may use, in ascending order.
    pub(in crate::pool) fn allowed_cpus() -> io::Result<Vec<usize>> {
        let mut set = empty_set();
        // SAFETY: the set is as large as its size says; 0 is the calling thread.
        if unsafe { libc::sched_getaffinity(0, SET_BYTES, &raw mut set) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the numbers are within the set.
        Ok((0..8 * SET_BYTES).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect())
    }

    /// Keeps the calling thread on one CPU.
    pub(in crate::pool) fn pin_current_thread(cpu: usize) -> io::Result<()> {
        let set = set_of(cpu);
        // SAFETY: as in `allowed_cpus`.
        if unsafe { libc::sched_setaffinity(0, SET_BYTES, &raw const set) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Keeps a running thread on one CPU.
    pub(in crate::pool) fn pin_worker(worker: &JoinHandle<()>, cpu: usize) -> io::Result<()> {
        let set = set_of(cpu);
        // SAFETY: the handle belongs to a thread that has not been joined.
        match unsafe { libc::pthread_setaffinity_np(worker.as_pthread_t(), SET_BYTES, &raw const set) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::{JoinHandle, io};

    pub(in crate::pool) fn allowed_cpus() -> io::Result<Vec<usize>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in crate::pool) fn pin_current_thread(_: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in crate::pool) fn pin_worker(_: &JoinHandle<()>, _: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

pub(super) use system::{allowed_cpus, pin_current_thread, pin_worker};
