//! Times the scheduler in steady decode, for `bench scheduler`: what planning and completing one step costs on one core,
//! how large its delta is, and what hashing of filled blocks costs beside it.

use crate::detach::detached;
use llmscale_scheduler::{Actions, Event, FirstComeFirstServed, Replica};
use llmscale_types::{
    Attempt, Chunk, Class, Delta, EngineLimits, Epoch, FrontId, RequestId, Sampling, SequenceKey, Slot, StepResult,
    Submission, Time,
};
use llmscale_wire::{CodecLimits, ToWorker, encode};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::time::Instant;

/// (plan, complete, hashing) in nanoseconds and the delta's size in bytes, per decoding step of `running` sequences.
#[pyfunction]
pub(crate) fn measure_steady_decode(py: Python<'_>, running: u32, steps: u32) -> Vec<(u64, u64, u64, u64)> {
    let measured = detached(py, || steady_decode(running, steps));
    measured.iter().map(|step| (step.plan_ns, step.complete_ns, step.hashing_ns, step.delta_bytes)).collect()
}

/// One measured step.
#[derive(Clone, Copy, Debug)]
pub struct SteadyStep {
    /// Planning, in nanoseconds.
    pub plan_ns: u64,
    /// Completing, in nanoseconds.
    pub complete_ns: u64,
    /// Hashing and registering the blocks that the step filled, in nanoseconds; off the critical path.
    pub hashing_ns: u64,
    /// Size of the delta on the wire, in bytes.
    pub delta_bytes: u64,
}

/// Runs `steps` decoding steps of `running` sequences and returns what each cost, after as many steps of warm-up as fill
/// one block.
pub fn steady_decode(running: u32, steps: u32) -> Vec<SteadyStep> {
    let output = steps + 256;
    let limits = EngineLimits {
        host_blocks: 0,
        disk_blocks: 0,
        block_tokens: 32,
        total_blocks: running * (output / 32 + 8),
        max_sequences: running,
        max_step_tokens: running * 2,
        max_sequence_tokens: output + 64,
        max_waiting_sequences: running,
        max_steps_in_flight: 2,
        groups: 1,
        eos_tokens: vec![2, 3],
        vocabulary: 32_000,
    };
    let mut replica =
        Replica::new(limits, [1; 32], Box::new(FirstComeFirstServed)).expect("the sizes above fit together");
    let mut out = Actions::default();
    let fits = replica.on_event(Time(0), Event::WorkerUp { epoch: Epoch(1), host_memory: 0, disk_files: 0 }, &mut out);
    assert!(fits, "a fresh worker fits");
    for request in 0..running {
        // Lengths are spread so that about one sequence in 32 fills a block in each step.
        let context = (0..=request % 32).map(|at| 10 + (request * 7 + at) % 30_000).collect::<Vec<_>>();
        let submission = Submission {
            key: SequenceKey { front: FrontId(0), request: RequestId(u64::from(request)), attempt: Attempt(1) },
            namespace: [2; 32],
            class: Class::Standard,
            prompt_tokens: context.len() as u32,
            context,
            sampling: Sampling { max_tokens: output, ..Sampling::default() },
            deadline: None,
            suspect: false,
        };
        let _ = replica.on_event(Time(0), Event::Submit(Box::new(submission)), &mut out);
    }
    let mut measured = Vec::new();
    let mut rows: Vec<Slot> = Vec::new();
    let mut lengths: BTreeMap<Slot, u32> = BTreeMap::new();
    let mut step = 0;
    while measured.len() < steps as usize {
        let started = Instant::now();
        let planned = replica.plan(&mut out);
        let plan_ns = started.elapsed().as_nanos() as u64;
        assert!(planned, "steady decode always has a step to plan");
        let delta = out.execute.take().expect("a planned step has a delta");
        lengths.extend(delta.admit.iter().map(|admission| (admission.slot, admission.context.len() as u32)));
        let ends = |chunk: &&Chunk| chunk.start_tokens + chunk.tokens == lengths[&chunk.slot];
        let finished_prompts: Vec<Slot> = delta.chunks.iter().filter(ends).map(|chunk| chunk.slot).collect();
        let decoding = if delta.decodes { rows.clone() } else { Vec::new() };
        let slots: Vec<Slot> = decoding.into_iter().chain(finished_prompts.iter().copied()).collect();
        rows.extend(finished_prompts);
        let tokens = slots.iter().map(|slot| 10 + (slot.0 * 31 + step) % 30_000).collect();
        step += 1;
        let delta_bytes = encoded_bytes(&delta);
        let result = StepResult {
            epoch: delta.epoch,
            step: delta.step,
            slots,
            tokens,
            logprobs: Vec::new(),
            errors: Vec::new(),
            elapsed_ns: 1,
            waited_ns: 0,
            copied_ns: 0,
        };
        out.clear();
        let started = Instant::now();
        let fits = replica.on_event(Time(0), Event::StepDone(result), &mut out);
        let complete_ns = started.elapsed().as_nanos() as u64;
        assert!(fits, "a result fits its step");
        out.clear();
        let started = Instant::now();
        while replica.housekeeping(64) {}
        let hashing_ns = started.elapsed().as_nanos() as u64;
        if rows.len() == running as usize && delta.chunks.is_empty() && step > 64 {
            measured.push(SteadyStep { plan_ns, complete_ns, hashing_ns, delta_bytes });
        }
    }
    measured
}

fn encoded_bytes(delta: &Delta) -> u64 {
    let message = ToWorker::Step(delta.clone());
    encode(&message, &CodecLimits::default()).expect("a steady delta is within the frame limit").len() as u64
}
