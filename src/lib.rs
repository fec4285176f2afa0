//! `fastaa-loaderd`: one daemon per host that memory-maps image datasets and streams
//! policy-augmented batches to training processes.
//!
//! Modules are listed from the bottom up. A module imports only those above it in this list;
//! `tests/tidy.rs` holds the exact table. The module `ctl` is no part of the library: only
//! `src/bin/fastaa-ctl.rs` compiles it.

pub mod limits;
pub mod random;

pub mod dataset;
pub mod image;
pub mod policy;

pub mod augment;

pub mod pipeline;

pub mod transport;

pub mod search;

pub mod idle;

pub mod config;
pub mod control;

pub mod daemon;
