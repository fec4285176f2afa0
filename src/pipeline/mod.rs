//! From sample indices to finished batches: epoch order, batch plans, recipes, worker threads.
//!
//! Owns the order in which samples are visited and the bytes of a batch, which it writes into
//! memory that somebody lends. Knows nothing of sockets, sessions or who reads the batch.
//!
//! **Invariant**: a sample's bytes depend on (dataset, recipe, seed, epoch, sample, policy) alone;
//! nothing that makes them reads a clock, a thread id or a shared generator.

mod ahead;
mod distort;
pub mod gaps;
pub mod load;
mod mix;
pub mod on_device;
pub mod order;
mod place;
pub mod plan;
pub mod recipe;
mod recipe_override;
mod recipe_parts;
pub mod render;
pub mod sample;
pub mod shared;
#[cfg(feature = "torch")]
pub mod tensor_finish;
pub mod workers;
mod write;
