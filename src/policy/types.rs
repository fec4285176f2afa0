//! The one policy type for all methods, always valid once constructed.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Op, OpsProfile};

/// How strong an operation is, in the profile's λ ∈ [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Magnitude {
    /// Always this λ.
    Fixed(f64),
    /// λ drawn uniformly from `[lo, hi]` for each sample.
    Range(f64, f64),
}

/// One operation of a sub-policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpStep {
    /// What is applied.
    pub op: Op,
    /// With this probability, in [0, 1].
    pub probability: f64,
    /// At this strength.
    pub magnitude: Magnitude,
}

/// A short sequence of operations, applied in order. Empty means identity.
#[derive(Clone, Debug, PartialEq)]
pub struct SubPolicy {
    /// Relative weight among the policy's sub-policies, above zero.
    pub weight: f64,
    /// At most [`crate::limits::SUB_POLICY_OPS_MAX`] operations.
    pub ops: Vec<OpStep>,
}

/// Weighted sub-policies; immutable; identified by a content hash.
///
/// *Invariants* (checked by [`Policy::new`]): at least one sub-policy; weights finite and above
/// zero; probabilities and magnitudes in [0, 1]; ranges ordered; `draws` at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    name: String,
    ops_profile: OpsProfile,
    draws: u32,
    sub_policies: Arc<[SubPolicy]>,
    provenance: Map<String, Value>,
}

/// SHA-256 of a policy's canonical form, cut to 16 bytes: profile, draws, weights and operations;
/// neither name nor provenance.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyId(pub [u8; 16]);

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyId({self})")
    }
}

/// Why a policy is refused. Every message names the place in the policy.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A value breaks an invariant; the text names sub-policy and operation.
    #[error("policy '{name}': {problem}")]
    Invalid {
        /// The policy's name, or the file's.
        name: String,
        /// Place and cure.
        problem: String,
    },
}

impl Policy {
    /// Name for people; not part of the identity.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the magnitudes mean.
    pub fn ops_profile(&self) -> OpsProfile {
        self.ops_profile
    }

    /// How many sub-policies are drawn and applied in turn, per sample.
    pub fn draws(&self) -> u32 {
        self.draws
    }

    /// The weighted sub-policies.
    pub fn sub_policies(&self) -> &[SubPolicy] {
        &self.sub_policies
    }

    /// Where the policy comes from; free form.
    pub fn provenance(&self) -> &Map<String, Value> {
        &self.provenance
    }
}
