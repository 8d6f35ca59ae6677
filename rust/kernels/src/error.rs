//! Why a kernel refused its arguments.
//! Every variant names the argument, the value given and the rule it broke, so that the message alone says what to change.
//! Checks are O(1) or one pass over index arrays and happen before the first write: a refused call has changed nothing.
//! Numerical trouble (a NaN in a row of logits) is not here: it belongs to one row and is reported by the sampler.

use core::fmt;

/// A call that a kernel refused before it wrote anything.
#[derive(Clone, Debug, PartialEq)]
pub enum KernelError {
    /// A buffer holds fewer or more elements than the shapes require.
    Length {
        /// Argument name.
        argument: &'static str,
        /// Elements required by the shapes.
        required: usize,
        /// Elements given.
        given: usize,
    },
    /// An index array holds a value outside its range.
    OutOfRange {
        /// Argument name.
        argument: &'static str,
        /// Position in the index array.
        position: usize,
        /// The value found there.
        value: i64,
        /// First value that is too large.
        limit: i64,
    },
    /// A shape or parameter that no kernel handles.
    Unsupported {
        /// Argument name.
        argument: &'static str,
        /// The value given.
        given: i64,
        /// What is accepted.
        rule: &'static str,
    },
    /// Two rows of one call write the same place.
    Duplicate {
        /// Argument name.
        argument: &'static str,
        /// The value that occurs twice.
        value: i64,
    },
    /// A sampling parameter of one row is outside its range.
    SamplingParameter {
        /// Row of the batch.
        row: usize,
        /// Parameter name.
        parameter: &'static str,
        /// The value given.
        given: f32,
        /// What is accepted.
        rule: &'static str,
    },
    /// A parallel kernel was called from inside a chunk of another one.
    NestedParallelism,
}

impl fmt::Display for KernelError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { argument, required, given } => write!(
                formatter,
                "`{argument}` holds {given} elements, the shapes require {required}. Pass a buffer of that length."
            ),
            Self::OutOfRange { argument, position, value, limit } => write!(
                formatter,
                "`{argument}[{position}]` is {value}, the limit is 0 <= value < {limit}. Correct the index array."
            ),
            Self::Unsupported { argument, given, rule } => {
                write!(formatter, "`{argument}` is {given}, accepted is: {rule}. Change the configuration.")
            }
            Self::Duplicate { argument, value } => write!(
                formatter,
                "`{argument}` holds {value} twice, but each row must write its own place. Give every row its own slot."
            ),
            Self::SamplingParameter { row, parameter, given, rule } => {
                write!(formatter, "`{parameter}` of row {row} is {given}, accepted is: {rule}. Correct the request.")
            }
            Self::NestedParallelism => formatter.write_str(
                "A parallel kernel was called from inside a chunk of another one. Call it from the thread that owns the step.",
            ),
        }
    }
}

impl std::error::Error for KernelError {}

/// Checks that a buffer holds exactly the elements that the shapes require.
pub(crate) fn require_length(argument: &'static str, required: usize, given: usize) -> Result<(), KernelError> {
    if required == given { Ok(()) } else { Err(KernelError::Length { argument, required, given }) }
}

/// Checks that an index lies in `0..limit` and returns it as usize.
pub(crate) fn require_index(
    argument: &'static str,
    position: usize,
    value: i32,
    limit: usize,
) -> Result<usize, KernelError> {
    usize::try_from(value).ok().filter(|&index| index < limit).ok_or(KernelError::OutOfRange {
        argument,
        position,
        value: i64::from(value),
        limit: limit as i64,
    })
}
