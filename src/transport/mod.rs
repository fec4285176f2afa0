//! Wire messages, slabs and leases, the stream server, the Rust client.
//!
//! Owns everything between a finished batch and a training process. Never looks into pixels, and
//! does not know datasets or policies by name: a [`provider::StreamProvider`] does.
//!
//! Two threads: `hello` owns the Unix sockets and notices deaths; `event_loop` owns the ZeroMQ
//! sockets and the state of every session. They speak through one bounded queue.

pub mod client;
pub mod provider;
pub mod server;
pub mod wire;

mod event_loop;
mod gpu_slab;
mod hello;
mod live;
mod opener;
mod request;
mod session;
mod slab;
mod slot;
mod waker;
mod welcome;
mod window;
mod windows;

#[cfg(test)]
mod session_tests;
