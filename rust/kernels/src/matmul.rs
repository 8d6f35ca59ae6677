//! Products of rows with packed weights: `output = input weights^T + bias`, for one row or thousands, from one layout.
//!
//! - [`panels`]: the layout, one for every format
//! - [`tiles`]: rows as products read them
//! - [`micro`]: the register-blocked product of a tile of rows with one panel, over any arithmetic
//! - [`sweep`]: which panels and tiles a chunk computes
//! - [`dense`]: weights in f32 and bf16
//! - [`bytes`]: weights of 8 bits with rows that are quantized on the way
//! - [`nibbles`]: weights of 4 bits in groups, with such rows
//!
//! Each output is one chain of additions in the order of its inputs, so its bits depend neither on the rows beside it nor
//! on threads.

pub mod bytes;
pub mod dense;
mod micro;
pub mod nibbles;
mod panels;
mod sweep;
mod tiles;

pub use panels::PackError;
pub use tiles::MatmulScratch;
