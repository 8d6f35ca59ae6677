//! CPU kernels of the worker. This file is the map; every noun has a file.
//!
//! - [`dispatch`]: instruction level, detected once, forceable downward
//! - [`pool`]: persistent threads that share one loop at a time
//! - [`disk_region`], [`disk_thread`]: the disk tier's file, and who moves blocks to and from it
//! - [`element`]: f32 and bf16
//! - [`host_region`]: the host tier's blocks, with checksums
//! - [`huge_pages`]: memory for arrays read at random places, taken as it is touched
//! - [`kv_format`]: what keys and values are stored as
//! - [`kv_region`]: geometry of the paged KV region, validated slots
//! - [`mapping`]: files that processes map together
//! - [`matmul`]: products of rows with packed weights, one layout for all phases
//! - [`paged_attention`]: causal attention over paged KV for mixed batches
//! - [`row_source`]: where products take their rows from
//! - [`rope_cache`]: query/key norms, rotary embedding and KV write in one pass
//! - [`rank_channel`]: messages from one rank of a host to another
//! - [`rank_memory`]: sums and gathers among the ranks of one host
//! - [`norm`], [`activation`], [`embedding`]: the row-wise parts of a layer
//! - [`sampler`]: tokens from logits, independent of batch and machine
//! - [`reference`](mod@reference): the same results in plain scalar Rust, for tests
//! - [`touch_ahead`]: makes pages of blocks before they are written
//! - [`error`]: why a call was refused

#![expect(
    clippy::inline_always,
    reason = "generic code is compiled for an instruction level only where it is inlined into that level's entry"
)]

pub mod activation;
pub mod disk_region;
pub mod disk_thread;
pub mod dispatch;
pub mod element;
pub mod embedding;
pub mod error;
pub mod host_region;
pub mod huge_pages;
pub mod kv_format;
pub mod kv_region;
pub mod mapping;
pub mod matmul;
pub mod norm;
pub mod paged_attention;
pub mod pool;
pub mod rank_channel;
pub mod rank_memory;
pub mod rank_parts;
mod rank_wait;
pub mod reference;
pub mod rope_cache;
pub mod rounding;
pub mod row_source;
mod rows;
pub mod sampler;
mod scratch;
mod shared_output;
mod simd;
pub mod touch_ahead;
