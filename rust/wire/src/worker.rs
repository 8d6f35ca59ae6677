//! What an engine says to a worker and what the worker answers: one configuration, then one delta and one result per
//! step. A worker that misses a base step, or whose step raised, waits for a snapshot: it holds nothing that cannot be
//! rebuilt.
//! Knows nothing of devices or of how a step is computed.

use crate::field::{codes, record};
use crate::frame::messages;
use llmscale_types::{Delta, DiskReport, EngineLimits, Epoch, HostBlockId, StepId, StepResult};

/// From an engine to a worker.
#[derive(Clone, PartialEq, Debug)]
pub enum ToWorker {
    /// Load the model; the first frame.
    Configure(Configure),
    /// Compute this.
    Step(Delta),
    /// Finish what is running and exit.
    Stop,
}

/// From a worker to an engine.
#[derive(Clone, PartialEq, Debug)]
pub enum FromWorker {
    /// The model is loaded and the KV region is there.
    Ready(Ready),
    /// What a step gave.
    Result(StepResult),
    /// A step builds on one that this worker has not seen; it passes over every step until a snapshot comes.
    NeedSnapshot(NeedSnapshot),
    /// A step raised, or the worker cannot go on.
    Failed(Failed),
    /// What has become of transfers between the host tier and the disk.
    Disk(DiskReport),
}

messages!(ToWorker { Configure = 0 (Configure), Step = 1 (Delta), Stop = 2 });
messages!(FromWorker {
    Ready = 0 (Ready),
    Result = 1 (StepResult),
    NeedSnapshot = 2 (NeedSnapshot),
    Failed = 3 (Failed),
    Disk = 4 (DiskReport),
});

/// Number format of weights and KV.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    /// As the checkpoint says, as far as the device can.
    Auto,
    /// 32-bit floats.
    Float32,
    /// 16-bit floats with 8 exponent bits.
    Bfloat16,
    /// 16-bit floats with 5 exponent bits.
    Float16,
}

/// What a worker loads and how large its buffers are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Configure {
    /// The incarnation that this worker will be; its frames carry it.
    pub epoch: Epoch,
    /// Where the model lies.
    pub model_folder: String,
    /// Number format.
    pub dtype: Dtype,
    /// Sizes; `total_blocks` is the most that the worker may take.
    pub limits: EngineLimits,
}

/// A worker that can compute.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ready {
    /// Its incarnation.
    pub epoch: Epoch,
    /// Its process.
    pub pid: u32,
    /// KV blocks that it has room for.
    pub total_blocks: u32,
    /// Layers that it runs.
    pub layers: u32,
    /// Kernels, dispatch level, dtype, quantization and parallel degrees in one string.
    pub numerics: String,
    /// Time that loading took.
    pub loading_ns: u64,
    /// Which incarnation of the host tier's memory it has found: what an earlier worker has put there is there still if it
    /// is the same.
    pub host_memory: u64,
    /// The same of the disk tier's files, which outlive nodes.
    pub disk_files: u64,
}

/// A gap in the steps, or a step whose copies cannot be made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NeedSnapshot {
    /// The worker's incarnation.
    pub epoch: Epoch,
    /// The step that could not be applied.
    pub step: StepId,
    /// The last step that was; `None` if none was.
    pub last: Option<StepId>,
    /// Blocks of the host tier that do not hold what they should.
    pub bad_host_blocks: Vec<HostBlockId>,
}

/// Where a worker failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureCode {
    /// The configuration cannot be met.
    Configuration,
    /// The model folder cannot be served.
    Model,
    /// Memory ran out.
    Memory,
    /// A step raised an error.
    Step,
    /// A frame could not be read or applied.
    Protocol,
    /// Anything else.
    Internal,
}

/// What went wrong on a worker: the last words of one that cannot go on, or the step that raised on one that passes over
/// every step until a snapshot comes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failed {
    /// The worker's incarnation.
    pub epoch: Epoch,
    /// The step that raised, if the worker lives on.
    pub step: Option<StepId>,
    /// Where it failed.
    pub code: FailureCode,
    /// What happened, for people; at most `max_text_bytes`.
    pub message: String,
}

codes!(Dtype { Auto = 0, Float32 = 1, Bfloat16 = 2, Float16 = 3 });
record!(Configure { epoch: Epoch, model_folder: String, dtype: Dtype, limits: EngineLimits });
record!(Ready {
    epoch: Epoch,
    pid: u32,
    total_blocks: u32,
    layers: u32,
    numerics: String,
    loading_ns: u64,
    host_memory: u64,
    disk_files: u64,
});
record!(NeedSnapshot { epoch: Epoch, step: StepId, last: Option<StepId>, bad_host_blocks: Vec<HostBlockId> });
codes!(FailureCode { Configuration = 0, Model = 1, Memory = 2, Step = 3, Protocol = 4, Internal = 5 });
record!(Failed { epoch: Epoch, step: Option<StepId>, code: FailureCode, message: String });
