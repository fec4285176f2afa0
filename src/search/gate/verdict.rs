//! What the gate decided, and all that it decided it from: plain data for store, status and report.

use serde::{Deserialize, Serialize};

/// One of the policies that were trained with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// `candidate`, `incumbent`, `none` or `trivial-wide`.
    pub role: String,
    /// The policy's own name.
    pub policy: String,
    /// Its identity, in hexadecimal digits.
    pub policy_id: String,
    /// Clean accuracy on D_gate in [0, 1], by seed; a diverged training counts as 0.
    pub accuracy: Vec<f64>,
}

/// The candidate against one rival.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The rival's role.
    pub rival: String,
    /// Mean gain of the candidate in accuracy, in points (0.01).
    pub gain: f64,
    /// Lower bound of the gain at the level spent, in points.
    pub lower: f64,
    /// Lower and upper end of the two-sided 95 % interval, in points; for people, decides nothing.
    pub interval: (f64, f64),
    /// Standard error from the training seeds, in points.
    pub se_seeds: f64,
    /// Standard error from the images of D_gate, in points.
    pub se_images: f64,
    /// Degrees of freedom of the two together.
    pub degrees: f64,
}

/// The gate's decision. The default is "kept, not tested".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether the lower bound is above zero against every rival.
    pub is_better: bool,
    /// The decision and its reason, in one sentence.
    pub reason: String,
    /// Number of this test among those of the whole search, from 1.
    pub test: u32,
    /// One-sided level that this test spends.
    pub alpha: f64,
    /// Images of D_gate.
    pub n_images: u64,
    /// Pairs of trainings that were done.
    pub n_seeds: u32,
    /// Pairs that were allowed for.
    pub n_seeds_max: u32,
    /// The smallest gain that this test would have seen with a probability of 80 %, in points.
    pub detectable_gain: f64,
    /// Every policy that was trained with; the candidate first.
    pub arms: Vec<Arm>,
    /// Against each rival.
    pub comparisons: Vec<Comparison>,
}
