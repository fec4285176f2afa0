//! The gate: whether a candidate is published.
//!
//! Owns the decision and its statistics. Never proposes anything, and is the only part of the
//! search that looks at D_gate.

mod verdict;

pub use verdict::{Arm, Comparison, Verdict};
