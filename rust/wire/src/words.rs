//! How the words that all crates share look on the wire: plan, results, outputs, sampling, refusals, limits.
//! Field order here is the protocol; docs/wire.md states it and the golden bytes hold it. Knows nothing of messages.

use crate::error::WireError;
use crate::field::{Field, codes, record};
use crate::reader::Reader;
use crate::writer::Writer;
use llmscale_types::error::QueueUnit;
use llmscale_types::{
    Admission, Attempt, BlockCopy, BlockId, Chunk, Class, CopyDirection, Delta, DiskBlockId, DiskDirection, DiskReport,
    DiskTransfer, Duration, EngineLimits, Epoch, FinishReason, Finished, GroupId, HostBlockId, Outputs, Refusal,
    RequestId, RowError, Sampling, Slot, StepId, StepResult, Token, TokenLogprobs,
};

codes!(Class { Interactive = 0, Standard = 1, Batch = 2, Background = 3 });
codes!(FinishReason {
    Stop = 0,
    Length = 1,
    Aborted = 2,
    Deadline = 3,
    Poisoned = 4,
    NotANumber = 5,
    NothingToSample = 6,
});
codes!(RowError { NotANumber = 0, NothingToSample = 1 });
codes!(QueueUnit { Requests = 0, Tokens = 1, LiveRequests = 2 });

record!(Sampling {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    seed: u64,
    choice: u32,
    logprobs: Option<u32>,
    logit_bias: Vec<(Token, f32)>,
    max_tokens: u32,
    min_tokens: u32,
    stop_tokens: Vec<Token>,
    ignore_eos: bool,
});

record!(TokenLogprobs { chosen: f32, top: Vec<(Token, f32)> });

record!(Finished { request: RequestId, attempt: Attempt, reason: FinishReason, output_tokens: u32 });

record!(Outputs {
    step: StepId,
    requests: Vec<RequestId>,
    attempts: Vec<Attempt>,
    indexes: Vec<u32>,
    tokens: Vec<Token>,
    logprobs: Vec<(u32, TokenLogprobs)>,
    cached: Vec<(u32, u32)>,
    finished: Vec<Finished>,
});

record!(Chunk { slot: Slot, start_tokens: u32, tokens: u32 });

record!(Admission {
    slot: Slot,
    context: Vec<Token>,
    prompt_tokens: u32,
    computed_tokens: u32,
    blocks: Vec<BlockId>,
    sampling: Sampling,
});

codes!(CopyDirection { Offload = 0, Restore = 1 });
record!(BlockCopy { direction: CopyDirection, block: BlockId, host: HostBlockId, tag: u64 });

codes!(DiskDirection { Write = 0, Read = 1 });
record!(DiskTransfer { number: u64, direction: DiskDirection, host: HostBlockId, disk: DiskBlockId, tag: u64 });
record!(DiskReport {
    epoch: Epoch,
    through: u64,
    failed: Vec<u64>,
    refused: bool,
    read_blocks: u32,
    read_ns: u64,
    waits: u32,
});

record!(Delta {
    epoch: Epoch,
    step: StepId,
    base: StepId,
    group: GroupId,
    decodes: bool,
    leave: Vec<Slot>,
    admit: Vec<Admission>,
    append_slots: Vec<Slot>,
    append_blocks: Vec<BlockId>,
    chunks: Vec<Chunk>,
    copies: Vec<BlockCopy>,
    transfers: Vec<DiskTransfer>,
});

record!(StepResult {
    epoch: Epoch,
    step: StepId,
    slots: Vec<Slot>,
    tokens: Vec<Token>,
    logprobs: Vec<(Slot, TokenLogprobs)>,
    errors: Vec<(Slot, RowError)>,
    elapsed_ns: u64,
    waited_ns: u64,
    copied_ns: u64,
});

record!(EngineLimits {
    block_tokens: u32,
    total_blocks: u32,
    host_blocks: u32,
    max_sequences: u32,
    max_step_tokens: u32,
    max_sequence_tokens: u32,
    max_waiting_sequences: u32,
    max_steps_in_flight: u32,
    groups: u32,
    eos_tokens: Vec<Token>,
    vocabulary: u32,
    disk_blocks: u32,
});

/// A refusal is an array: its code, then the numbers of that code.
impl Field for Refusal {
    const LEAST_BYTES: usize = 2;

    fn write(&self, output: &mut Writer<'_>) {
        match *self {
            Self::QueueFull { queued, limit, unit, retry_after } => {
                output.array(5);
                output.unsigned(0);
                queued.write(output);
                limit.write(output);
                unit.write(output);
                retry_after.write(output);
            }
            Self::TooLong { needed, limit } => numbers(output, &[1, needed, limit]),
            Self::EmptyPrompt => numbers(output, &[2]),
            Self::UnknownToken { given, limit } => numbers(output, &[3, given, limit]),
            Self::BadSampling => numbers(output, &[4]),
            Self::Duplicate => numbers(output, &[5]),
            Self::Draining => numbers(output, &[6]),
        }
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        let given = input.array()?;
        if given == 0 {
            return Err(WireError::FieldCount { record: "Refusal", given, expected: 1 });
        }
        let code = input.unsigned()?;
        let expected = match code {
            0 => 5,
            1 | 3 => 3,
            2 | 4..=6 => 1,
            given => return Err(WireError::UnknownCode { what: "Refusal", given }),
        };
        if given != expected {
            return Err(WireError::FieldCount { record: "Refusal", given, expected });
        }
        Ok(match code {
            0 => Self::QueueFull {
                queued: Field::read(input)?,
                limit: Field::read(input)?,
                unit: Field::read(input)?,
                retry_after: Duration::read(input)?,
            },
            1 => Self::TooLong { needed: Field::read(input)?, limit: Field::read(input)? },
            2 => Self::EmptyPrompt,
            3 => Self::UnknownToken { given: Field::read(input)?, limit: Field::read(input)? },
            4 => Self::BadSampling,
            5 => Self::Duplicate,
            _ => Self::Draining,
        })
    }
}

fn numbers(output: &mut Writer<'_>, values: &[u64]) {
    output.array(values.len());
    for &value in values {
        output.unsigned(value);
    }
}
