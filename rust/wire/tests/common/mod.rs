//! Arbitrary messages that keep the codec's bounds.

#![allow(dead_code, reason = "each test file uses its own part")]

mod disk;

use llmscale_types::{
    Admission, Attempt, BlockCopy, BlockId, Chunk, Class, CopyDirection, Delta, Duration, EngineLimits, Epoch,
    FinishReason, Finished, GroupId, HostBlockId, NodeId, Outputs, PrefixKey, Refusal, RequestId, RowError, Sampling,
    Slot, StepId, StepResult, TokenLogprobs, error::QueueUnit,
};
use llmscale_wire::{
    Abort, Configure, Dtype, Failed, FailureCode, FromNode, FromWorker, GiveBack, Hello, KvAsk, KvChanges, KvSnapshot,
    ModelIdentity, ModelRef, NeedSnapshot, NodeLimits, NodeOutputs, NodeState, Ping, Pong, Ready, Recall, RejectCode,
    Rejected, Status, Submit, ToNode, ToWorker, VersionRange, Welcome,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// Numbers of every width on the wire, not only the widest.
fn number() -> impl Strategy<Value = u32> {
    (any::<u32>(), 0_u32..32).prop_map(|(value, shift)| value >> shift)
}

fn long_number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0_u32..64).prop_map(|(value, shift)| value >> shift)
}

/// Every float but NaN, which is not equal to itself.
fn float() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("comparable", |value| !value.is_nan())
}

fn name() -> impl Strategy<Value = String> {
    "\\PC{0,60}"
}

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,600}"
}

fn digest() -> impl Strategy<Value = [u8; 32]> {
    any::<[u8; 32]>()
}

fn class() -> impl Strategy<Value = Class> {
    select(Class::ALL.to_vec())
}

fn sampling() -> impl Strategy<Value = Sampling> {
    (
        (float(), number(), float(), float(), float(), float(), float()),
        (long_number(), number(), option::of(0_u32..=20), vec((number(), float()), 0..20)),
        (number(), number(), vec(number(), 0..20), any::<bool>()),
    )
        .prop_map(|(shape, key, end)| Sampling {
            temperature: shape.0,
            top_k: shape.1,
            top_p: shape.2,
            min_p: shape.3,
            repetition_penalty: shape.4,
            presence_penalty: shape.5,
            frequency_penalty: shape.6,
            seed: key.0,
            choice: key.1,
            logprobs: key.2,
            logit_bias: key.3,
            max_tokens: end.0,
            min_tokens: end.1,
            stop_tokens: end.2,
            ignore_eos: end.3,
        })
}

fn logprobs() -> impl Strategy<Value = TokenLogprobs> {
    (float(), vec((number(), float()), 0..=20)).prop_map(|(chosen, top)| TokenLogprobs { chosen, top })
}

fn finished() -> impl Strategy<Value = Finished> {
    let reasons = vec![
        FinishReason::Stop,
        FinishReason::Length,
        FinishReason::Aborted,
        FinishReason::Deadline,
        FinishReason::Poisoned,
        FinishReason::NotANumber,
        FinishReason::NothingToSample,
    ];
    (long_number(), number(), select(reasons), number()).prop_map(|(request, attempt, reason, output_tokens)| {
        Finished { request: RequestId(request), attempt: Attempt(attempt), reason, output_tokens }
    })
}

fn outputs() -> impl Strategy<Value = Outputs> {
    let row = (long_number(), number(), number(), number());
    let row = (row, option::weighted(0.2, logprobs()), option::weighted(0.2, number()));
    (long_number(), vec(row, 0..40), vec(finished(), 0..8)).prop_map(|(step, rows, finished)| {
        let mut outputs = Outputs { step: StepId(step), finished, ..Outputs::default() };
        for (index, ((request, attempt, position, token), logprobs, cached)) in rows.into_iter().enumerate() {
            outputs.requests.push(RequestId(request));
            outputs.attempts.push(Attempt(attempt));
            outputs.indexes.push(position);
            outputs.tokens.push(token);
            outputs.logprobs.extend(logprobs.map(|logprobs| (index as u32, logprobs)));
            outputs.cached.extend(cached.map(|cached| (index as u32, cached)));
        }
        outputs
    })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    let unit = select(vec![QueueUnit::Requests, QueueUnit::Tokens, QueueUnit::LiveRequests]);
    prop_oneof![
        (long_number(), long_number(), unit, long_number()).prop_map(|(queued, limit, unit, retry_after)| {
            Refusal::QueueFull { queued, limit, unit, retry_after: Duration(retry_after) }
        }),
        (long_number(), long_number()).prop_map(|(needed, limit)| Refusal::TooLong { needed, limit }),
        (long_number(), long_number()).prop_map(|(given, limit)| Refusal::UnknownToken { given, limit }),
        select(vec![Refusal::EmptyPrompt, Refusal::BadSampling, Refusal::Duplicate, Refusal::Draining]),
    ]
}

fn versions() -> impl Strategy<Value = VersionRange> {
    (any::<u8>(), any::<u8>()).prop_map(|(low, high)| VersionRange { low, high })
}

fn model() -> impl Strategy<Value = ModelRef> {
    (name(), option::of(name()), option::of(name())).prop_map(|(name, revision, adapter)| ModelRef {
        name,
        revision,
        adapter,
    })
}

fn submit() -> impl Strategy<Value = Submit> {
    (
        (long_number(), number(), digest(), class()),
        vec(number(), 0..80),
        any::<prop::sample::Index>(),
        sampling(),
        option::of(long_number()),
    )
        .prop_map(|((request, attempt, namespace, class), context, split, sampling, remaining)| Submit {
            suspect: request % 2 == 1,
            request: RequestId(request),
            attempt: Attempt(attempt),
            namespace,
            class,
            prompt_tokens: split.index(context.len() + 1) as u32,
            context,
            sampling,
            remaining: remaining.map(Duration),
        })
}

/// Any message of a front.
pub(crate) fn to_node() -> impl Strategy<Value = ToNode> {
    prop_oneof![
        (versions(), name(), name(), option::of(model()))
            .prop_map(|(versions, front, fleet, model)| ToNode::Hello(Hello { versions, front, fleet, model })),
        submit().prop_map(ToNode::Submit),
        (long_number(), number(), option::of(number())).prop_map(|(request, attempt, at_token)| {
            ToNode::Abort(Abort { request: RequestId(request), attempt: Attempt(attempt), at_token })
        }),
        (long_number(), number()).prop_map(|(request, attempt)| {
            ToNode::Recall(Recall { request: RequestId(request), attempt: Attempt(attempt) })
        }),
        long_number().prop_map(|nonce| ToNode::Ping(Ping { nonce })),
        Just(ToNode::Goodbye),
        long_number().prop_map(|from| ToNode::KvAsk(KvAsk { from })),
    ]
}

fn incarnation() -> impl Strategy<Value = (NodeId, Epoch)> {
    (long_number(), long_number()).prop_map(|(node, epoch)| (NodeId(node), Epoch(epoch)))
}

fn welcome() -> impl Strategy<Value = Welcome> {
    (
        any::<u8>(),
        incarnation(),
        (name(), name(), option::of(name()), digest(), digest(), name()),
        [number(), number(), number(), number(), number(), number()],
        vec(number(), 0..8),
    )
        .prop_map(|(version, (node, epoch), model, limits, eos_tokens)| Welcome {
            version,
            node,
            epoch,
            model: ModelIdentity {
                name: model.0,
                revision: model.1,
                adapter: model.2,
                weights_digest: model.3,
                tokenizer_digest: model.4,
                numerics: model.5,
            },
            limits: NodeLimits {
                vocabulary: limits[0],
                max_sequence_tokens: limits[1],
                max_sequences: limits[2],
                max_waiting_sequences: limits[3],
                total_blocks: limits[4],
                block_tokens: limits[5],
                eos_tokens,
            },
        })
}

fn status() -> impl Strategy<Value = Status> {
    let states = vec![NodeState::Starting, NodeState::Ready, NodeState::Recovering, NodeState::Draining];
    (
        incarnation(),
        select(states),
        [number(), number(), number(), number()],
        [(); 21].map(|()| long_number()),
        option::of(number()),
    )
        .prop_map(|((node, epoch), state, counts, totals, worker_pid)| Status {
            node,
            epoch,
            state,
            running: counts[0],
            waiting: counts[1],
            queued_tokens: totals[0],
            predicted_backlog_ns: totals[1],
            free_blocks: counts[2],
            steps: totals[2],
            preemptions: totals[3],
            prefix_queries: totals[4],
            prefix_hits: totals[5],
            offloaded_blocks: totals[6],
            restored_blocks: totals[7],
            bad_host_blocks: totals[8],
            worker_restarts: counts[3],
            worker_pid,
            step_ns: totals[9],
            stage_wait_ns: totals[10],
            kv_changes: totals[11],
            disk_written_blocks: totals[12],
            disk_read_blocks: totals[13],
            bad_disk_blocks: totals[14],
            failed_disk_writes: totals[15],
            disk_waits: totals[16],
            lost_disk_records: totals[17],
            predicted_step_ns: totals[18],
            step_error_ns: totals[19],
            paced_steps: totals[20],
        })
}

fn prefix_key() -> impl Strategy<Value = PrefixKey> {
    long_number().prop_map(PrefixKey)
}

/// Any message of a node.
pub(crate) fn from_node() -> impl Strategy<Value = FromNode> {
    let codes = vec![
        RejectCode::UnsupportedVersion,
        RejectCode::WrongFleet,
        RejectCode::WrongModel,
        RejectCode::TooManyFronts,
        RejectCode::Malformed,
        RejectCode::NotGreeted,
    ];
    prop_oneof![
        welcome().prop_map(FromNode::Welcome),
        (incarnation(), outputs()).prop_map(|((node, epoch), outputs)| FromNode::Outputs(NodeOutputs {
            node,
            epoch,
            outputs
        })),
        (incarnation(), long_number(), number(), option::of(refusal())).prop_map(
            |((node, epoch), request, attempt, refusal)| {
                let (request, attempt) = (RequestId(request), Attempt(attempt));
                let suspect = request.0 % 2 == 1;
                FromNode::GiveBack(GiveBack { node, epoch, request, attempt, refusal, suspect })
            }
        ),
        status().prop_map(FromNode::Status),
        (incarnation(), long_number()).prop_map(|((node, epoch), nonce)| FromNode::Pong(Pong { node, epoch, nonce })),
        (incarnation(), long_number(), any::<bool>(), vec(vec(prefix_key(), 0..4), 0..5)).prop_map(
            |((node, epoch), number, cleared, runs)| {
                let (lengths, keys) = (runs.iter().map(|run| run.len() as u32).collect(), runs.concat());
                FromNode::KvChanges(KvChanges { node, epoch, number, cleared, runs: lengths, keys })
            }
        ),
        (incarnation(), long_number(), vec(prefix_key(), 0..6)).prop_map(|((node, epoch), number, keys)| {
            FromNode::KvSnapshot(KvSnapshot { node, epoch, number, keys })
        }),
        (select(codes), text(), versions()).prop_map(|(code, message, versions)| FromNode::Rejected(Rejected {
            code,
            message,
            versions
        })),
    ]
}

pub(crate) fn admission() -> impl Strategy<Value = Admission> {
    (
        number(),
        vec(number(), 1..60),
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        vec(number(), 0..8),
        sampling(),
    )
        .prop_map(|(slot, context, prompt, computed, blocks, sampling)| Admission {
            slot: Slot(slot),
            prompt_tokens: prompt.index(context.len() + 1) as u32,
            computed_tokens: computed.index(context.len()) as u32,
            context,
            blocks: blocks.into_iter().map(BlockId).collect(),
            sampling,
        })
}

fn delta() -> impl Strategy<Value = Delta> {
    let chunk = (number(), 0_u32..1 << 23, 0_u32..1 << 23).prop_map(|(slot, start_tokens, tokens)| Chunk {
        slot: Slot(slot),
        start_tokens,
        tokens,
    });
    let directions = select(vec![CopyDirection::Offload, CopyDirection::Restore]);
    let copy = (directions, number(), number(), long_number()).prop_map(|(direction, block, host, tag)| BlockCopy {
        direction,
        block: BlockId(block),
        host: HostBlockId(host),
        tag,
    });
    (
        (long_number(), long_number(), long_number(), number(), any::<bool>()),
        vec(number(), 0..20),
        vec(admission(), 0..4),
        vec((number(), number()), 0..40),
        vec(chunk, 0..10),
        vec(copy, 0..10),
    )
        .prop_map(|((epoch, step, base, group, decodes), leave, admit, append, chunks, copies)| Delta {
            epoch: Epoch(epoch),
            step: StepId(step),
            base: StepId(base),
            group: GroupId(group),
            decodes,
            leave: leave.into_iter().map(Slot).collect(),
            admit,
            append_slots: append.iter().map(|(slot, _)| Slot(*slot)).collect(),
            append_blocks: append.iter().map(|(_, block)| BlockId(*block)).collect(),
            chunks,
            transfers: disk::transfers_like(&copies),
            copies,
        })
}

/// Limits of an engine that pass their own check.
fn engine_limits() -> impl Strategy<Value = EngineLimits> {
    (2_u32..=10, 1_u32..=16_384, 2_u32..=1 << 21, number(), vec(number(), 0..5)).prop_map(
        |(shift, max_sequences, max_sequence_tokens, more, eos_tokens)| EngineLimits {
            block_tokens: 1 << shift,
            total_blocks: max_sequence_tokens.saturating_add(more).min(EngineLimits::MAX_TOTAL_BLOCKS),
            host_blocks: more.min(EngineLimits::MAX_HOST_BLOCKS),
            max_sequences,
            max_step_tokens: max_sequences.saturating_add(more),
            max_sequence_tokens,
            max_waiting_sequences: more.clamp(1, 65_536),
            max_steps_in_flight: 2,
            groups: 1,
            eos_tokens,
            vocabulary: more.max(1),
            disk_blocks: if more == 0 { 0 } else { more.min(EngineLimits::MAX_DISK_BLOCKS) },
        },
    )
}

/// Any message of an engine.
pub(crate) fn to_worker() -> impl Strategy<Value = ToWorker> {
    let dtypes = vec![Dtype::Auto, Dtype::Float32, Dtype::Bfloat16, Dtype::Float16];
    prop_oneof![
        (long_number(), text(), select(dtypes), engine_limits()).prop_map(|(epoch, model_folder, dtype, limits)| {
            ToWorker::Configure(Configure { epoch: Epoch(epoch), model_folder, dtype, limits })
        }),
        delta().prop_map(ToWorker::Step),
        Just(ToWorker::Stop),
    ]
}

fn step_result() -> impl Strategy<Value = StepResult> {
    let row = (number(), number(), option::weighted(0.2, logprobs()));
    let errors = select(vec![RowError::NotANumber, RowError::NothingToSample]);
    (long_number(), long_number(), vec(row, 0..40), vec((number(), errors), 0..5), long_number()).prop_map(
        |(epoch, step, rows, errors, elapsed_ns)| StepResult {
            epoch: Epoch(epoch),
            step: StepId(step),
            slots: rows.iter().map(|row| Slot(row.0)).collect(),
            tokens: rows.iter().map(|row| row.1).collect(),
            logprobs: rows.into_iter().filter_map(|row| row.2.map(|logprobs| (Slot(row.0), logprobs))).collect(),
            errors: errors.into_iter().map(|(slot, error)| (Slot(slot), error)).collect(),
            elapsed_ns,
            waited_ns: elapsed_ns / 2,
            copied_ns: elapsed_ns / 3,
        },
    )
}

/// Any message of a worker.
pub(crate) fn from_worker() -> impl Strategy<Value = FromWorker> {
    let codes = vec![
        FailureCode::Configuration,
        FailureCode::Model,
        FailureCode::Memory,
        FailureCode::Step,
        FailureCode::Protocol,
        FailureCode::Internal,
    ];
    prop_oneof![
        (long_number(), number(), number(), number(), name(), long_number(), long_number(), long_number()).prop_map(
            |(epoch, pid, total_blocks, layers, numerics, loading_ns, host_memory, disk_files)| {
                let epoch = Epoch(epoch);
                FromWorker::Ready(Ready {
                    epoch,
                    pid,
                    total_blocks,
                    layers,
                    numerics,
                    loading_ns,
                    host_memory,
                    disk_files,
                })
            }
        ),
        step_result().prop_map(FromWorker::Result),
        disk::report().prop_map(FromWorker::Disk),
        (long_number(), long_number(), option::of(long_number()), vec(number(), 0..5)).prop_map(
            |(epoch, step, last, bad)| {
                let bad_host_blocks = bad.into_iter().map(HostBlockId).collect();
                let (epoch, step, last) = (Epoch(epoch), StepId(step), last.map(StepId));
                FromWorker::NeedSnapshot(NeedSnapshot { epoch, step, last, bad_host_blocks })
            }
        ),
        (long_number(), option::of(long_number()), select(codes), text()).prop_map(|(epoch, step, code, message)| {
            FromWorker::Failed(Failed { epoch: Epoch(epoch), step: step.map(StepId), code, message })
        }),
    ]
}
