//! The bounds of every message, in one place: lengths of names and columns, columns of one table that must be parallel,
//! counts that must fit each other. Applied before writing and after reading; linear in the columns, no allocation.

use crate::caches::KvChanges;
use crate::error::WireError;
use crate::identity::ModelRef;
use crate::limits::CodecLimits;
use crate::node::{FromNode, Hello, Submit, ToNode, Welcome};
use crate::worker::{Configure, Failed, FromWorker, Ready, ToWorker};
use llmscale_types::{Admission, Delta, LimitError, Outputs, Sampling, StepResult, TokenLogprobs};

/// A message that can be checked.
pub trait Bounds {
    /// Checks everything that `CodecLimits` bounds.
    fn check(&self, limits: &CodecLimits) -> Result<(), WireError>;
}

impl Bounds for ToNode {
    fn check(&self, limits: &CodecLimits) -> Result<(), WireError> {
        match self {
            Self::Hello(hello) => check_hello(hello, limits),
            Self::Submit(submit) => check_submit(submit, limits),
            Self::Abort(_) | Self::Recall(_) | Self::Ping(_) | Self::Goodbye | Self::KvAsk(_) => Ok(()),
        }
    }
}

impl Bounds for FromNode {
    fn check(&self, limits: &CodecLimits) -> Result<(), WireError> {
        match self {
            Self::Welcome(welcome) => check_welcome(welcome, limits),
            Self::Outputs(frame) => check_outputs(&frame.outputs, limits),
            Self::Rejected(rejected) => text("message", &rejected.message, limits),
            Self::KvChanges(changes) => check_changes(changes, limits),
            Self::KvSnapshot(snapshot) => at_most("keys", snapshot.keys.len(), limits.max_rows),
            Self::GiveBack(_) | Self::Status(_) | Self::Pong(_) => Ok(()),
        }
    }
}

impl Bounds for ToWorker {
    fn check(&self, limits: &CodecLimits) -> Result<(), WireError> {
        match self {
            Self::Configure(Configure { model_folder, limits: engine, .. }) => {
                text("model_folder", model_folder, limits)?;
                Ok(engine.check()?)
            }
            Self::Step(delta) => check_delta(delta, limits),
            Self::Stop => Ok(()),
        }
    }
}

impl Bounds for FromWorker {
    fn check(&self, limits: &CodecLimits) -> Result<(), WireError> {
        match self {
            Self::Ready(Ready { numerics, .. }) => name("numerics", numerics, limits),
            Self::Result(result) => check_result(result, limits),
            Self::Failed(Failed { message, .. }) => text("message", message, limits),
            Self::Disk(report) => at_most("failed", report.failed.len(), limits.max_rows),
            Self::NeedSnapshot(_) => Ok(()),
        }
    }
}

fn check_hello(hello: &Hello, limits: &CodecLimits) -> Result<(), WireError> {
    name("front", &hello.front, limits)?;
    name("fleet", &hello.fleet, limits)?;
    if let Some(ModelRef { name: model, revision, adapter }) = &hello.model {
        name("model", model, limits)?;
        optional_name("revision", revision.as_ref(), limits)?;
        optional_name("adapter", adapter.as_ref(), limits)?;
    }
    Ok(())
}

fn check_welcome(welcome: &Welcome, limits: &CodecLimits) -> Result<(), WireError> {
    name("model", &welcome.model.name, limits)?;
    name("revision", &welcome.model.revision, limits)?;
    optional_name("adapter", welcome.model.adapter.as_ref(), limits)?;
    name("numerics", &welcome.model.numerics, limits)?;
    at_most("eos_tokens", welcome.limits.eos_tokens.len(), 64)
}

fn check_changes(changes: &KvChanges, limits: &CodecLimits) -> Result<(), WireError> {
    at_most("keys", changes.keys.len(), limits.max_rows)?;
    at_most("runs", changes.runs.len(), limits.max_rows)?;
    let named: u64 = changes.runs.iter().map(|&keys| u64::from(keys)).sum();
    parallel("keys", changes.keys.len(), usize::try_from(named).unwrap_or(usize::MAX))
}

fn check_submit(submit: &Submit, limits: &CodecLimits) -> Result<(), WireError> {
    at_most("context", submit.context.len(), limits.max_context_tokens)?;
    at_most("prompt_tokens", submit.prompt_tokens as usize, submit.context.len())?;
    check_sampling(&submit.sampling)
}

/// Only what bounds memory; the values are checked against the vocabulary by the engine.
fn check_sampling(sampling: &Sampling) -> Result<(), WireError> {
    at_most("logit_bias", sampling.logit_bias.len(), Sampling::MAX_LOGIT_BIAS)?;
    at_most("stop_tokens", sampling.stop_tokens.len(), Sampling::MAX_STOP_TOKENS)?;
    at_most("logprobs", sampling.logprobs.unwrap_or(0) as usize, Sampling::MAX_LOGPROBS as usize)
}

fn check_outputs(outputs: &Outputs, limits: &CodecLimits) -> Result<(), WireError> {
    let rows = outputs.requests.len();
    at_most("requests", rows, limits.max_rows)?;
    parallel("attempts", outputs.attempts.len(), rows)?;
    parallel("indexes", outputs.indexes.len(), rows)?;
    parallel("tokens", outputs.tokens.len(), rows)?;
    at_most("finished", outputs.finished.len(), limits.max_rows)?;
    some_rows("logprobs", "logprobs row", outputs.logprobs.iter().map(|(row, _)| *row), rows)?;
    some_rows("cached", "cached row", outputs.cached.iter().map(|(row, _)| *row), rows)?;
    outputs.logprobs.iter().try_for_each(|(_, logprobs)| check_logprobs(logprobs))
}

fn check_logprobs(logprobs: &TokenLogprobs) -> Result<(), WireError> {
    at_most("top logprobs", logprobs.top.len(), Sampling::MAX_LOGPROBS as usize)
}

fn check_delta(delta: &Delta, limits: &CodecLimits) -> Result<(), WireError> {
    at_most("leave", delta.leave.len(), limits.max_rows)?;
    at_most("admit", delta.admit.len(), limits.max_rows)?;
    at_most("append_slots", delta.append_slots.len(), limits.max_rows)?;
    parallel("append_blocks", delta.append_blocks.len(), delta.append_slots.len())?;
    at_most("transfers", delta.transfers.len(), Delta::MAX_TRANSFERS)?;
    at_most("chunks", delta.chunks.len(), limits.max_rows)?;
    for chunk in &delta.chunks {
        let end = u64::from(chunk.start_tokens) + u64::from(chunk.tokens);
        LimitError::at_most("end of chunk", end, limits.max_context_tokens as u64)?;
    }
    delta.admit.iter().try_for_each(|admission| check_admission(admission, limits))
}

fn check_admission(admission: &Admission, limits: &CodecLimits) -> Result<(), WireError> {
    let context = admission.context.len();
    at_most("context", context, limits.max_context_tokens)?;
    LimitError::at_least("context", context as u64, 1)?;
    at_most("prompt_tokens", admission.prompt_tokens as usize, context)?;
    // The last position is always computed: its row gives the first token.
    at_most("computed_tokens", admission.computed_tokens as usize, context - 1)?;
    at_most("blocks", admission.blocks.len(), limits.max_context_tokens)?;
    check_sampling(&admission.sampling)
}

fn check_result(result: &StepResult, limits: &CodecLimits) -> Result<(), WireError> {
    let rows = result.slots.len();
    at_most("slots", rows, limits.max_rows)?;
    parallel("tokens", result.tokens.len(), rows)?;
    at_most("logprobs", result.logprobs.len(), rows)?;
    at_most("errors", result.errors.len(), limits.max_rows)?;
    result.logprobs.iter().try_for_each(|(_, logprobs)| check_logprobs(logprobs))
}

fn name(field: &'static str, value: &str, limits: &CodecLimits) -> Result<(), WireError> {
    at_most(field, value.len(), limits.max_name_bytes)
}

fn optional_name(field: &'static str, value: Option<&String>, limits: &CodecLimits) -> Result<(), WireError> {
    value.map_or(Ok(()), |value| name(field, value, limits))
}

fn text(field: &'static str, value: &str, limits: &CodecLimits) -> Result<(), WireError> {
    at_most(field, value.len(), limits.max_text_bytes)
}

fn at_most(field: &'static str, given: usize, limit: usize) -> Result<(), WireError> {
    Ok(LimitError::at_most(field, given as u64, limit as u64)?)
}

fn parallel(column: &'static str, given: usize, expected: usize) -> Result<(), WireError> {
    if given == expected { Ok(()) } else { Err(WireError::ColumnLength { column, given, expected }) }
}

/// A column that names the rows it speaks of.
fn some_rows(
    column: &'static str,
    row: &'static str,
    named: impl ExactSizeIterator<Item = u32> + Clone,
    rows: usize,
) -> Result<(), WireError> {
    at_most(column, named.len(), rows)?;
    ascending(column, named.clone())?;
    // Ascending and at most as many as rows, so there is a last row to compare with.
    named.last().map_or(Ok(()), |last| at_most(row, last as usize, rows - 1))
}

fn ascending(column: &'static str, rows: impl Iterator<Item = u32>) -> Result<(), WireError> {
    let mut last = None;
    for row in rows {
        if last.is_some_and(|last| last >= row) {
            return Err(WireError::NotAscending { column });
        }
        last = Some(row);
    }
    Ok(())
}
