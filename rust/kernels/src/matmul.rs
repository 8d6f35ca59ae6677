//! Products of rows with packed weights: `output = input weights^T + bias`, for one row or thousands, from one layout.
//!
//! - [`panels`]: the layout, one for every format
//! - [`micro`]: the register-blocked product of some rows with one panel, over any arithmetic
//! - [`sweep`]: which panels and rows a chunk computes
//! - [`dense`]: weights in f32 and bf16
//! - [`bytes`]: weights of 8 bits with rows that are quantized on the way
//!
//! Each output is one chain of additions in the order of its inputs, so its bits depend neither on the rows beside it nor
//! on threads.

pub mod bytes;
pub mod dense;
mod micro;
mod panels;
mod sweep;

pub use panels::PackError;
