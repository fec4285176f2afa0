//! Policies as data: types, operation table, file formats, built-in policies, the versioned store.
//!
//! Owns what a policy *is*. Never touches pixels and never draws random numbers (`augment` does).

mod op;
mod types;

pub use op::{Op, OpsProfile};
pub use types::{Magnitude, OpStep, Policy, PolicyError, PolicyId, SubPolicy};
