//! Why a model could not be made ready. A program that is ready fails only with `KernelError`: on a step that contradicts
//! itself.

use llmscale_kernels::error::KernelError;
use llmscale_kernels::matmul::PackError;

/// A model that could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A tensor's file could not be read.
    #[error("{path} cannot be read: {problem}. Check that the file is whole and readable.")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        problem: std::io::Error,
    },
    /// A tensor or a shape that does not fit the others.
    #[error("{0}")]
    Shape(String),
    /// No memory.
    #[error("there is no memory for {what}: {problem}")]
    Memory {
        /// For what.
        what: &'static str,
        /// What the system said.
        problem: std::io::Error,
    },
    /// Arguments that a kernel refuses.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl From<PackError> for LoadError {
    fn from(error: PackError) -> Self {
        match error {
            PackError::Kernel(error) => Self::Kernel(error),
            PackError::Memory(problem) => Self::Memory { what: "packed weights", problem },
            PackError::Read(problem) if problem.kind() == std::io::ErrorKind::InvalidData => {
                Self::Shape(problem.to_string())
            }
            PackError::Read(problem) => Self::File { path: "a file of weights".into(), problem },
        }
    }
}
