//! Core errors to the exception tree of `llmscale.errors`: one exhaustive match per error type, no catch-all.

use llmscale_executor::error::LoadError;
use llmscale_kernels::error::KernelError;
use llmscale_types::{LimitError, Refusal};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Why a worker cannot go on, in words. Whoever holds a lock says it so: making an exception takes the GIL, or gives it to
/// others for a moment, and one of them may wait for that lock with the GIL in hand.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) String);

impl Refused {
    /// In the words of an error of the core.
    pub(crate) fn of(error: &impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

impl From<Refused> for PyErr {
    fn from(Refused(message): Refused) -> Self {
        worker(message)
    }
}

/// Makes an exception of the named class of `llmscale.errors`.
fn exception(class: &str, message: String, keywords: &[(&str, f64)]) -> PyErr {
    Python::attach(|py| {
        let made = (|| {
            let class = py.import("llmscale.errors")?.getattr(class)?;
            let named = PyDict::new(py);
            for (name, value) in keywords {
                named.set_item(name, value)?;
            }
            class.call((message,), Some(&named))
        })();
        // An import that fails is an error of the installation and is shown as such.
        made.map_or_else(|error| error, PyErr::from_value)
    })
}

/// A field outside its bounds.
pub(crate) fn limit(error: &LimitError) -> PyErr {
    exception("InvalidField", error.to_string(), &[])
}

/// A setting outside its bounds.
pub(crate) fn config(message: String) -> PyErr {
    exception("ConfigError", message, &[])
}

/// A worker that cannot go on.
pub(crate) fn worker(message: String) -> PyErr {
    exception("WorkerError", message, &[])
}

/// A request that is not taken.
pub(crate) fn refusal(refusal: &Refusal) -> PyErr {
    let message = refusal.to_string();
    match refusal {
        Refusal::QueueFull { retry_after, .. } => {
            exception("Overloaded", message, &[("retry_after_seconds", retry_after.0 as f64 / 1e6)])
        }
        Refusal::TooLong { .. } => exception("RequestTooLong", message, &[]),
        Refusal::EmptyPrompt | Refusal::UnknownToken { .. } | Refusal::BadSampling => {
            exception("InvalidField", message, &[])
        }
        Refusal::Duplicate | Refusal::Draining => exception("Unavailable", message, &[]),
    }
}

/// A kernel that was called with buffers that do not fit: a bug of the executor.
pub(crate) fn kernel(error: &KernelError) -> PyErr {
    worker(error.to_string())
}

/// A model that the native executor cannot make ready.
pub(crate) fn load(problem: &LoadError) -> PyErr {
    match problem {
        LoadError::File { .. } | LoadError::Shape(_) | LoadError::Kernel(_) => {
            exception("InvalidCheckpoint", problem.to_string(), &[])
        }
        LoadError::Memory { .. } => PyMemoryError::new_err(problem.to_string()),
    }
}

/// Nothing can take the request now.
pub(crate) fn unavailable(message: String) -> PyErr {
    exception("Unavailable", message, &[])
}

/// The model is not served.
pub(crate) fn unknown_model(message: String) -> PyErr {
    exception("UnknownModel", message, &[])
}
