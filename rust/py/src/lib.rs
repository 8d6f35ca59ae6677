//! The Python module `llmscale._core`: names only. Each door is one file beside this one.
#![expect(clippy::needless_pass_by_value, reason = "what PyO3 extracts from Python's arguments is owned")]

pub mod measure;

mod buffer;
mod column_sampler;
mod detach;
mod device_step;
mod disk_region;
mod engine;
mod error;
mod front;
mod front_status;
mod group_door;
mod host_region;
mod kernels;
mod limits;
mod local;
mod process;
mod program;
mod rank_streams;
mod ranks;
mod request;
mod sample;
mod sampling;
mod step;
mod transport;
mod worker;

use pyo3::prelude::*;

/// The compiled core of llmscale. Private: the package re-exports what users need.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::buffer::Int32Buffer;
    #[pymodule_export]
    use crate::device_step::PyPackedStep;
    #[pymodule_export]
    use crate::disk_region::PyDiskRegion;
    #[pymodule_export]
    use crate::engine::{Engine, PyNodeEvent, PyNodeReport};
    #[pymodule_export]
    use crate::front::PyFront;
    #[pymodule_export]
    use crate::front_status::{PyFrontStatus, PyReplicaStatus};
    #[pymodule_export]
    use crate::group_door::PyGroupDoor;
    #[pymodule_export]
    use crate::host_region::PyHostRegion;
    #[pymodule_export]
    use crate::kernels::CpuKernels;
    #[pymodule_export]
    use crate::limits::PyEngineLimits;
    #[pymodule_export]
    use crate::local::LocalReplica;
    #[pymodule_export]
    use crate::measure::measure_steady_decode;
    #[pymodule_export]
    use crate::process::{adopt_orphans, end_with_parent};
    #[pymodule_export]
    use crate::program::{PyNativeProgram, PyProgramBuilder};
    #[pymodule_export]
    use crate::rank_streams::PyRankStreams;
    #[pymodule_export]
    use crate::ranks::{PyRankChannel, PyRankMemory};
    #[pymodule_export]
    use crate::request::Delivery;
    #[pymodule_export]
    use crate::sampling::PySampling;
    #[pymodule_export]
    use crate::step::PyStepCounts;
    #[pymodule_export]
    use crate::transport::measure_transport;
    #[pymodule_export]
    use crate::worker::{PyWorkerSession, WorkerOrder};
}
