//! What the doors for requests share: classes by name, namespaces of cache keys, deliveries to Python.

use crate::error;
use llmscale_net::PublicKey;
use llmscale_types::{Class, FinishReason, Outputs, RequestId, TokenLogprobs};
use pyo3::prelude::*;
use std::collections::BTreeMap;

/// Log probability of the chosen token, and the best tokens with theirs.
pub(crate) type LogprobRow = (f32, Vec<(u32, f32)>);

/// The class of a name.
pub(crate) fn class(name: &str) -> PyResult<Class> {
    match name {
        "interactive" => Ok(Class::Interactive),
        "standard" => Ok(Class::Standard),
        "batch" => Ok(Class::Batch),
        "background" => Ok(Class::Background),
        other => {
            Err(error::config(format!("priority is {other:?}, it must be interactive, standard, batch or background")))
        }
    }
}

/// What keys prefixes in a fleet: all who know its name and the nodes' public key have the same, so that a prompt is named
/// alike at every gateway and node. It only keeps names of different fleets apart; what may be shared is decided by the
/// namespace, and what is shared by comparing ids.
pub(crate) fn fleet_secret(fleet: &str, nodes: Option<&PublicKey>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("llmscale 2026-11 names of prefixes in a fleet");
    hasher.update(&(fleet.len() as u64).to_le_bytes());
    hasher.update(fleet.as_bytes());
    if let Some(key) = nodes {
        hasher.update(key.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Separates what may share KV blocks: keyed over tenant, model, revision and adapter, each with its length, so that no
/// two different lists of names give the same bytes.
pub(crate) fn namespace(secret: &[u8; 32], names: &[&str]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(secret);
    for name in names {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// The wire's row as Python sees it.
pub(crate) fn logprob_row(row: &TokenLogprobs) -> LogprobRow {
    (row.chosen, row.top.clone())
}

/// Tokens of one request since the last call, and its end if it has ended.
#[pyclass(frozen, name = "Delivery", module = "llmscale._core")]
pub(crate) struct Delivery {
    /// The request.
    #[pyo3(get)]
    pub(crate) request: u64,
    /// Position of the first of these tokens in the output.
    #[pyo3(get)]
    pub(crate) index: u32,
    /// The tokens.
    #[pyo3(get)]
    pub(crate) tokens: Vec<u32>,
    /// One row per token, for requests that asked.
    #[pyo3(get)]
    pub(crate) logprobs: Option<Vec<LogprobRow>>,
    /// Why it ended; `None` while it goes on.
    #[pyo3(get)]
    pub(crate) finish_reason: Option<&'static str>,
    /// Prompt tokens found in the prefix cache; told at least with the first tokens.
    #[pyo3(get)]
    pub(crate) cached_tokens: u32,
    /// Output tokens in all; known at the end.
    #[pyo3(get)]
    pub(crate) output_tokens: u32,
    /// Attempts and worker restarts that the stream has survived.
    #[pyo3(get)]
    pub(crate) restarts: u32,
}

/// A node's state by its name.
pub(crate) fn state_name(state: llmscale_wire::NodeState) -> &'static str {
    match state {
        llmscale_wire::NodeState::Starting => "starting",
        llmscale_wire::NodeState::Ready => "ready",
        llmscale_wire::NodeState::Recovering => "recovering",
        llmscale_wire::NodeState::Draining => "draining",
    }
}

/// An address of an endpoint.
pub(crate) fn parse_address(text: &str) -> PyResult<llmscale_net::Address> {
    text.parse().map_err(|error: llmscale_net::AddressError| error::config(error.to_string()))
}

/// Appends the rows of a frame to the deliveries of their requests.
pub(crate) fn deliver(outputs: &Outputs, deliveries: &mut BTreeMap<RequestId, Delivery>) {
    let mut logprobs = outputs.logprobs.iter().peekable();
    let mut cached = outputs.cached.iter().peekable();
    for (row, &request) in outputs.requests.iter().enumerate() {
        let delivery = deliveries.entry(request).or_insert_with(|| empty(request, outputs.indexes[row]));
        delivery.tokens.push(outputs.tokens[row]);
        if let Some((_, values)) = logprobs.next_if(|(named, _)| *named as usize == row) {
            delivery.logprobs.get_or_insert_default().push(logprob_row(values));
        }
        if let Some(&(_, tokens)) = cached.next_if(|(named, _)| *named as usize == row) {
            delivery.cached_tokens = tokens;
        }
    }
    for finished in &outputs.finished {
        let first = finished.output_tokens;
        let delivery = deliveries.entry(finished.request).or_insert_with(|| empty(finished.request, first));
        delivery.finish_reason = Some(FinishReason::label(finished.reason));
        delivery.output_tokens = finished.output_tokens;
    }
}

fn empty(request: RequestId, index: u32) -> Delivery {
    Delivery {
        request: request.0,
        index,
        tokens: Vec::new(),
        logprobs: None,
        finish_reason: None,
        cached_tokens: 0,
        output_tokens: 0,
        restarts: 0,
    }
}
