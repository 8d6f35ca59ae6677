//! The door for a gateway: the front's thread, submissions, what arrives for readers.

use crate::error;
use crate::front_status::PyFrontStatus;
use crate::request::{Delivery, class, fleet_secret, logprob_row, namespace, parse_address};
use crate::sampling::PySampling;
use llmscale_engine::{Arrival, FrontConfig, FrontHandle, NodeAddress};
use llmscale_front::{FrontEvent, FrontOptions, HealthOptions, HedgeOptions, NewRequest, SubmitError};
use llmscale_net::{AllowList, ClientKeys, Context, KeyPair, PublicKey};
use llmscale_types::{Duration, FrontLimits, RequestId};
use pyo3::prelude::*;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Owns every request's life: queues, places, continues elsewhere, ends exactly once. Thread-safe; never blocks.
#[pyclass(frozen, name = "Front", module = "llmscale._core")]
pub(crate) struct PyFront {
    handle: Mutex<Option<Arc<FrontHandle>>>,
    secret: [u8; 32],
}

#[pymethods]
impl PyFront {
    /// Connects to `nodes` (addresses) in the background. `key_file` is this front's own CURVE pair and `node_key` the
    /// public key of the nodes; both are needed for nodes beyond this machine. A node that says nothing for
    /// `max_node_silence_us` is lost; nodes report four times a second. A replica that answers badly is left alone for
    /// `ejection_us` the first time. With `hedging`, requests whose first token is late are tried at a second replica.
    #[new]
    #[pyo3(signature = (nodes, *, name = "gateway", fleet = "llmscale", max_queued_requests = None,
        max_queued_tokens = None, max_live_requests = None, max_node_silence_us = 1_750_000,
        ejection_us = 5_000_000, hedging = false, key_file = None, node_key = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments, named by the caller")]
    fn new(
        nodes: Vec<String>,
        name: &str,
        fleet: &str,
        max_queued_requests: Option<u32>,
        max_queued_tokens: Option<u64>,
        max_live_requests: Option<u32>,
        max_node_silence_us: u64,
        ejection_us: u64,
        hedging: bool,
        key_file: Option<&str>,
        node_key: Option<&str>,
    ) -> PyResult<Self> {
        let text = |error: &dyn std::fmt::Display| error::config(error.to_string());
        let keys = match (key_file, node_key) {
            (None, None) => None,
            (Some(path), Some(server)) => {
                let own = KeyPair::load(Path::new(path)).map_err(|error| text(&error))?;
                let server: PublicKey = server.parse().map_err(|error| text(&error))?;
                Some(ClientKeys { own, server })
            }
            _ => return Err(error::config("key_file and node_key belong together: set both or neither".to_owned())),
        };
        let nodes = nodes.iter().map(|node| Ok(NodeAddress { address: parse_address(node)?, keys: keys.clone() }));
        let nodes = nodes.collect::<PyResult<Vec<_>>>()?;
        let defaults = FrontLimits::default();
        let limits = FrontLimits {
            max_queued_requests: max_queued_requests.unwrap_or(defaults.max_queued_requests),
            max_queued_tokens: max_queued_tokens.unwrap_or(defaults.max_queued_tokens),
            max_live_requests: max_live_requests.unwrap_or(defaults.max_live_requests),
            ..defaults
        };
        let usual = HealthOptions::default();
        let ejection = Duration(ejection_us);
        let health = HealthOptions { ejection, max_ejection: usual.max_ejection.max(ejection), ..usual };
        let hedging = hedging.then(HedgeOptions::default);
        let secret = fleet_secret(fleet, keys.as_ref().map(|keys| &keys.server));
        let config = FrontConfig {
            name: name.to_owned(),
            fleet: fleet.to_owned(),
            options: FrontOptions { limits, health, hedging, ..FrontOptions::default() },
            secret,
            max_node_silence: Duration(max_node_silence_us),
        };
        let context = Context::new(AllowList::default(), 1).map_err(|error| text(&error))?;
        let handle = FrontHandle::start(config, &context, &nodes).map_err(|error| text(&error))?;
        Ok(Self { handle: Mutex::new(Some(Arc::new(handle))), secret })
    }

    /// An eventfd that is readable when `take` has something.
    fn fileno(&self) -> PyResult<i32> {
        Ok(self.handle()?.reader().descriptor())
    }

    /// Takes a request and returns its number. Raises `Overloaded`, `RequestTooLong`, `UnknownModel`, `Unavailable` or
    /// `InvalidField`; nothing was started then.
    #[pyo3(signature = (tenant, model, prompt, sampling, *, priority = "standard", timeout_us = None, detached = false))]
    #[expect(clippy::too_many_arguments, reason = "a request's parts")]
    fn submit(
        &self,
        tenant: &str,
        model: String,
        prompt: Vec<u32>,
        sampling: &PySampling,
        priority: &str,
        timeout_us: Option<u64>,
        detached: bool,
    ) -> PyResult<u64> {
        let handle = self.handle()?;
        let new = NewRequest {
            namespace: namespace(&self.secret, &[tenant, &model]),
            model,
            class: class(priority)?,
            prompt,
            // Named where the replicas are known.
            prefix: Arc::default(),
            sampling: sampling.0.clone(),
            deadline: timeout_us.map(|span| handle.now() + Duration(span)),
            detached,
        };
        Ok(handle.submit(new).map_err(|error| submit_error(&error))?.0)
    }

    /// Ends a request. With `at_token`, its first that many output tokens are the answer and it ends as stopped.
    #[pyo3(signature = (request, at_token = None))]
    fn cancel(&self, request: u64, at_token: Option<u32>) -> PyResult<()> {
        self.handle()?.event(FrontEvent::Cancel { request: RequestId(request), at_token });
        Ok(())
    }

    /// Everything that arrived since the last call, at most one delivery per request, in order of arrival.
    fn take(&self) -> PyResult<Vec<Delivery>> {
        let handle = self.handle()?;
        let arrivals = handle.take();
        for arrival in &arrivals {
            if arrival.end.is_none() {
                // Whoever takes tokens keeps them: the bound on slow readers is the gateway's own.
                let up_to_index = arrival.index + arrival.tokens.len() as u32;
                handle.event(FrontEvent::Read { request: arrival.request, up_to_index });
            }
        }
        Ok(arrivals.into_iter().map(delivery).collect())
    }

    /// The queue and the replicas now.
    fn status(&self) -> PyResult<PyFrontStatus> {
        let handle = self.handle()?;
        Ok(PyFrontStatus::new(&handle.status(), handle.now()))
    }

    /// Says goodbye to the nodes and ends the thread. Afterwards every other call raises Unavailable.
    fn close(&self, py: Python<'_>) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        crate::detach::detached(py, || drop(handle));
    }
}

impl PyFront {
    fn handle(&self) -> PyResult<Arc<FrontHandle>> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        handle.clone().ok_or_else(|| error::unavailable("the front is closed".to_owned()))
    }
}

fn submit_error(error: &SubmitError) -> PyErr {
    match error {
        SubmitError::Refused(refusal) => error::refusal(refusal),
        SubmitError::InvalidField(limit) => error::limit(limit),
        SubmitError::UnknownModel { .. } => error::unknown_model(error.to_string()),
        SubmitError::Unavailable { .. } => error::unavailable(error.to_string()),
    }
}

fn delivery(arrival: Arrival) -> Delivery {
    let Arrival { request, index, so_far, tokens, logprobs, end } = arrival;
    let (finish_reason, output_tokens) = end.map_or((None, 0), |(reason, output)| (Some(reason.label()), output));
    Delivery {
        request: request.0,
        index,
        tokens,
        logprobs: (!logprobs.is_empty()).then(|| logprobs.iter().map(logprob_row).collect()),
        finish_reason,
        cached_tokens: so_far.cached_tokens,
        output_tokens,
        restarts: so_far.restarts,
    }
}
