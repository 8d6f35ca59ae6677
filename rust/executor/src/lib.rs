//! The native executor: runs a model's layers over one step, in one call, on the CPU kernels.
//!
//! - [`description`]: a model as plain data: shapes, constants, and where every tensor lies
//! - [`source`]: reads rows of tensors from files, whatever format they are stored in
//! - [`linear`]: a projection with its weight packed in one of the schemes
//! - [`nibbles`]: weights of four bits on their way from files
//! - [`fp8`]: weights of e4m3, which become dense
//! - [`turned`]: weights of four bits that are stored inputs first
//! - [`block`]: one layer, ready to run
//! - [`program`]: the whole model, its KV region and its buffers
//! - [`kv_memory`]: memory of keys and values, taken as it is written
//! - [`kv_store`]: the KV region in one of its formats
//! - [`rope`]: the table of cosines and sines
//! - [`error`]: why a model could not be made ready
//!
//! It knows neither schedules nor sampling, and no architecture by name.

pub mod block;
pub mod description;
pub mod error;
pub mod fp8;
pub mod kv_memory;
mod kv_store;
pub mod linear;
mod nibbles;
pub mod program;
pub mod rope;
pub mod source;
pub mod turned;
