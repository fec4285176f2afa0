//! `fastaa-loaderd`: one daemon per host that memory-maps image datasets and streams
//! policy-augmented batches to training processes.
//!
//! Modules are listed from the bottom up. A module imports only those above it in this list;
//! `tests/tidy.rs` holds the exact table. The module `ctl` is no part of the library: only
//! `src/bin/fastaa-ctl.rs` compiles it. `tensor` lies in the folder of `augment`, but is no part of
//! that module, which the program compiles as well: it must not need libtorch.

pub mod limits;
pub mod random;

pub mod gpu;

pub mod dataset;
pub mod image;
pub mod policy;

pub mod augment;
#[cfg(feature = "torch")]
#[path = "augment/tensor/mod.rs"]
pub mod tensor;

pub mod pipeline;

pub mod transport;

pub mod search;

pub mod idle;

pub mod config;
pub mod control;

pub mod daemon;
