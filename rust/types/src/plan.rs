//! The contract between scheduler and workers. A `Delta` names only what changed since its base step; a worker's mirror
//! expands it into the buffers that the executor reads. Sequences in decode take one row in every decoding step of their
//! group without being named, so a steady step costs a few hundred bytes whatever the number of running sequences.

use crate::ids::{BlockId, DiskBlockId, Epoch, GroupId, HostBlockId, Slot, StepId, Token};
use crate::output::TokenLogprobs;
use crate::request::Sampling;
use serde::{Deserialize, Serialize};

/// A sequence enters a slot: everything that a worker needs to know about it until it leaves.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Admission {
    /// The slot it takes; free on the worker by now.
    pub slot: Slot,
    /// All ids known so far: prompt, then what was emitted before.
    pub context: Vec<Token>,
    /// How many of them are prompt.
    pub prompt_tokens: u32,
    /// How many tokens' KV are in its blocks already (prefix hit); always less than the context.
    pub computed_tokens: u32,
    /// Its block table so far.
    pub blocks: Vec<BlockId>,
    /// How to sample.
    pub sampling: Sampling,
}

/// A part of a sequence's context to compute in this step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Chunk {
    /// Whose context.
    pub slot: Slot,
    /// First position.
    pub start_tokens: u32,
    /// How many positions; when they reach the end of the context, the row samples and the sequence decodes from the
    /// group's next decoding step on.
    pub tokens: u32,
}

/// Which way a block's bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CopyDirection {
    /// From the device to the host tier.
    Offload,
    /// From the host tier to the device.
    Restore,
}

/// One block to copy between the tiers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BlockCopy {
    /// Which way.
    pub direction: CopyDirection,
    /// The block on the device.
    pub block: BlockId,
    /// The block on the host.
    pub host: HostBlockId,
    /// Names the content: written beside the bytes on the way out, compared on the way back.
    pub tag: u64,
}

/// Which way a block's bytes go between the host tier and the disk tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DiskDirection {
    /// From the host tier to the disk.
    Write,
    /// From the disk to the host tier.
    Read,
}

/// One block to move between the host tier and the disk tier, beside the steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskTransfer {
    /// Numbers rise from transfer to transfer; every rank makes them in this order.
    pub number: u64,
    /// Which way.
    pub direction: DiskDirection,
    /// The block on the host.
    pub host: HostBlockId,
    /// The block on the disk.
    pub disk: DiskBlockId,
    /// Names the content.
    pub tag: u64,
}

/// What has become of transfers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskReport {
    /// Incarnation that made them.
    pub epoch: Epoch,
    /// Every transfer that was asked for up to this number has ended.
    pub through: u64,
    /// Those of them that failed and were not named before.
    pub failed: Vec<u64>,
    /// Whether the disk took no more, or could not be written.
    pub refused: bool,
    /// Blocks that were read since the last report.
    pub read_blocks: u32,
    /// Time that reading them took.
    pub read_ns: u64,
    /// How often a step's copies waited for a transfer since the last report.
    pub waits: u32,
}

/// One step, as the change from its base step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Delta {
    /// Incarnation of the worker group that this step is for.
    pub epoch: Epoch,
    /// This step.
    pub step: StepId,
    /// The step it builds on; a worker that has not seen it asks for a snapshot. `Delta::NOTHING` for a snapshot: whatever
    /// the worker held before is void, and everything that runs is admitted by this delta and those after it.
    pub base: StepId,
    /// Whose step it is: sequences whose context ends in it decode with this group from then on.
    pub group: GroupId,
    /// Whether the group's sequences in decode take their row in this step.
    pub decodes: bool,
    /// Slots that end before this step: finished, aborted, preempted.
    pub leave: Vec<Slot>,
    /// Sequences that enter before this step.
    pub admit: Vec<Admission>,
    /// Blocks appended to tables: slots and blocks are parallel columns.
    pub append_slots: Vec<Slot>,
    /// See `append_slots`.
    pub append_blocks: Vec<BlockId>,
    /// Prefill work of this step.
    pub chunks: Vec<Chunk>,
    /// Blocks to copy between tiers, in this order, after the steps before and before this step's rows. A step may have
    /// copies and no rows.
    pub copies: Vec<BlockCopy>,
    /// Blocks to move between the host tier and the disk, in this order, from the moment on at which the copies are made.
    /// Nobody waits for them.
    pub transfers: Vec<DiskTransfer>,
}

impl Delta {
    /// Most copies of one delta, so that it fits its frame whatever else it carries.
    pub const MAX_COPIES: usize = 1 << 15;
    /// Most transfers to and from the disk that are under way, and so of one delta.
    pub const MAX_TRANSFERS: usize = 1 << 12;
    /// The base of a snapshot; no step has this number.
    pub const NOTHING: StepId = StepId(0);

    /// Whether it builds on nothing.
    pub fn is_snapshot(&self) -> bool {
        self.base == Self::NOTHING
    }

    /// An empty change, to be filled by a planner.
    pub fn new(epoch: Epoch, step: StepId, base: StepId) -> Self {
        Self {
            epoch,
            step,
            base,
            group: GroupId(0),
            decodes: false,
            leave: Vec::new(),
            admit: Vec::new(),
            append_slots: Vec::new(),
            append_blocks: Vec::new(),
            chunks: Vec::new(),
            copies: Vec::new(),
            transfers: Vec::new(),
        }
    }
}

/// Why one row of a step has no token. It ends that request only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum RowError {
    /// The model returned a logit that is not a number.
    NotANumber,
    /// Every token was suppressed, so none can be drawn.
    NothingToSample,
}

/// What a step produced. `slots` and `tokens` are parallel columns; a slot may repeat when a row yields several tokens.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StepResult {
    /// Incarnation that computed it.
    pub epoch: Epoch,
    /// The step.
    pub step: StepId,
    /// Which slots sampled.
    pub slots: Vec<Slot>,
    /// What they sampled.
    pub tokens: Vec<Token>,
    /// Log probabilities of the slots that asked, in the order of `slots`.
    pub logprobs: Vec<(Slot, TokenLogprobs)>,
    /// Rows that failed.
    pub errors: Vec<(Slot, RowError)>,
    /// Time the step took on the worker.
    pub elapsed_ns: u64,
    /// Of it, what the last stage of a pipeline waited for the stages before it.
    pub waited_ns: u64,
    /// Of it, what the copies between tiers took.
    pub copied_ns: u64,
}
