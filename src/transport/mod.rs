//! Wire messages, slabs and leases, the stream server, the Rust client.
//!
//! Owns everything between a finished batch and a training process. Never looks into pixels.

pub mod wire;
