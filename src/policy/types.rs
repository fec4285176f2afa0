//! The one policy type for all methods, always valid once constructed.
//!
//! Owns the invariants and the identity. Never reads or writes files (`format` and `store` do).

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Op, OpsProfile, PolicyError};
use crate::limits;

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
/// zero, and so is their sum; probabilities and magnitudes in [0, 1]; ranges ordered; `draws` at
/// least 1; no more of anything than [`crate::limits`] allows.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    name: String,
    ops_profile: OpsProfile,
    draws: u32,
    sub_policies: Arc<[SubPolicy]>,
    provenance: Map<String, Value>,
}

/// SHA-256 of a policy's canonical form, cut to 16 bytes: profile, draws, weights and operations;
/// neither name nor provenance. [`Policy::id`] has the bytes.
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

impl PolicyId {
    /// The id of 32 hexadecimal digits, as [`fmt::Display`] writes them.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

/// Start of the canonical form; another layout gets another number.
const CANONICAL_MAGIC: &[u8] = b"fastaa-policy-1\0";

impl Policy {
    /// Checks every invariant. Sub-policies and operations are counted from 1 in messages.
    ///
    /// # Errors
    /// The first value that breaks an invariant, with its place and what would be right.
    pub fn new(
        name: impl Into<String>,
        ops_profile: OpsProfile,
        draws: u32,
        sub_policies: Vec<SubPolicy>,
        provenance: Map<String, Value>,
    ) -> Result<Self, PolicyError> {
        let name = name.into();
        check_name(&name)?;
        match check(draws, &sub_policies) {
            Ok(()) => {
                Ok(Self { name, ops_profile, draws, sub_policies: sub_policies.into(), provenance })
            }
            Err(problem) => Err(PolicyError::Invalid { name, problem }),
        }
    }

    /// The same policy under another name; its id stays.
    ///
    /// # Errors
    /// An empty or too long name, or one with control characters.
    pub fn with_name(&self, name: impl Into<String>) -> Result<Self, PolicyError> {
        let name = name.into();
        check_name(&name)?;
        Ok(Self { name, ..self.clone() })
    }

    /// The content's identity: equal content has an equal id, whatever its name, provenance or
    /// the formatting of its file.
    ///
    /// SHA-256, cut to its first 16 bytes, of (integers and f64 bits are little-endian):
    ///
    /// | bytes | content |
    /// |---|---|
    /// | 16 | `fastaa-policy-1` and a zero byte |
    /// | 1 | profile: 0 `fastaa`, 1 `torchvision`, 2 `trivial-wide` |
    /// | 4 | draws |
    /// | 4 | number of sub-policies; then for each, in order: |
    /// | 8 | weight, as f64 bits |
    /// | 4 | number of operations; then for each, in order: |
    /// | 1 | operation id |
    /// | 8 | probability, as f64 bits |
    /// | 1 | 0: fixed magnitude, 1: range |
    /// | 8 or 16 | λ, or λ_lo and λ_hi, as f64 bits |
    ///
    /// Minus zero counts as zero. Weights are hashed as they are, not normalised: pixels are a
    /// function of the id, and a draw by weights `[1, 2]` need not round as one by `[3, 6]` does.
    pub fn id(&self) -> PolicyId {
        let mut bytes = CANONICAL_MAGIC.to_vec();
        bytes.push(match self.ops_profile {
            OpsProfile::Fastaa => 0,
            OpsProfile::Torchvision => 1,
            OpsProfile::TrivialWide => 2,
        });
        bytes.extend(self.draws.to_le_bytes());
        push_count(&mut bytes, self.sub_policies.len());
        for sub_policy in self.sub_policies.iter() {
            push_f64(&mut bytes, sub_policy.weight);
            bytes.extend(canonical_ops(&sub_policy.ops));
        }
        let digest = Sha256::digest(&bytes);
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        PolicyId(id)
    }

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

/// The operations' part of the canonical form: equal bytes mean the same operations.
pub(super) fn canonical_ops(ops: &[OpStep]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + ops.len() * 26);
    push_count(&mut bytes, ops.len());
    for step in ops {
        bytes.push(step.op as u8);
        push_f64(&mut bytes, step.probability);
        match step.magnitude {
            Magnitude::Fixed(level) => {
                bytes.push(0);
                push_f64(&mut bytes, level);
            }
            Magnitude::Range(lo, hi) => {
                bytes.push(1);
                push_f64(&mut bytes, lo);
                push_f64(&mut bytes, hi);
            }
        }
    }
    bytes
}

fn push_count(bytes: &mut Vec<u8>, count: usize) {
    let count =
        u32::try_from(count).expect("limits.rs keeps the counts of a policy far below 2^32");
    bytes.extend(count.to_le_bytes());
}

fn push_f64(bytes: &mut Vec<u8>, value: f64) {
    // Adding zero turns minus zero into zero and changes nothing else.
    bytes.extend((value + 0.0).to_bits().to_le_bytes());
}

fn check_name(name: &str) -> Result<(), PolicyError> {
    let problem = if name.trim().is_empty() {
        "the name is empty; give the policy a name"
    } else if name.len() > limits::NAME_BYTES_MAX {
        "the name is longer than 128 bytes; shorten it"
    } else if name.chars().any(char::is_control) {
        "the name holds control characters; use printable text"
    } else {
        return Ok(());
    };
    let shown = name.chars().filter(|char| !char.is_control()).take(40).collect();
    Err(PolicyError::Invalid { name: shown, problem: problem.to_owned() })
}

fn check(draws: u32, sub_policies: &[SubPolicy]) -> Result<(), String> {
    if draws == 0 || draws > limits::POLICY_DRAWS_MAX {
        return Err(format!(
            "draws is {draws}, but a sample gets 1 to {} sub-policies; most policies want 1",
            limits::POLICY_DRAWS_MAX
        ));
    }
    if sub_policies.is_empty() {
        return Err("no sub-policies, but there must be at least one; use the built-in policy \
                    'none' for no augmentation"
            .to_owned());
    }
    if sub_policies.len() > limits::SUB_POLICIES_MAX {
        return Err(format!(
            "{} sub-policies are over the limit of {}; keep the best ones",
            sub_policies.len(),
            limits::SUB_POLICIES_MAX
        ));
    }
    for (index, sub_policy) in sub_policies.iter().enumerate() {
        check_sub_policy(sub_policy).map_err(|(op_place, problem)| {
            format!("sub-policy {}{op_place}: {problem}", index + 1)
        })?;
    }
    let total: f64 = sub_policies.iter().map(|sub_policy| sub_policy.weight).sum();
    if !total.is_finite() {
        return Err("the weights add up to more than an f64 holds; scale them down".to_owned());
    }
    Ok(())
}

/// The error is the place within the sub-policy, and the problem there.
fn check_sub_policy(sub_policy: &SubPolicy) -> Result<(), (String, String)> {
    let weight = sub_policy.weight;
    if !(weight.is_finite() && weight > 0.0) {
        let problem =
            format!("weight {weight} is not a finite number above 0; remove it or give it one");
        return Err((String::new(), problem));
    }
    if sub_policy.ops.len() > limits::SUB_POLICY_OPS_MAX {
        let problem = format!(
            "{} operations are over the limit of {}; split the sub-policy",
            sub_policy.ops.len(),
            limits::SUB_POLICY_OPS_MAX
        );
        return Err((String::new(), problem));
    }
    for (index, step) in sub_policy.ops.iter().enumerate() {
        check_step(step)
            .map_err(|problem| (format!(", op {} ('{}')", index + 1, step.op.name()), problem))?;
    }
    Ok(())
}

fn check_step(step: &OpStep) -> Result<(), String> {
    let unit = 0.0..=1.0;
    if !unit.contains(&step.probability) {
        return Err(format!(
            "probability {} is not in [0, 1]; give a number from 0 (never) to 1 (always)",
            step.probability
        ));
    }
    let outside = |level: f64| {
        format!("magnitude {level} is not in [0, 1]; give λ, a position in the op's range")
    };
    match step.magnitude {
        Magnitude::Fixed(level) if !unit.contains(&level) => Err(outside(level)),
        Magnitude::Range(lo, _) if !unit.contains(&lo) => Err(outside(lo)),
        Magnitude::Range(_, hi) if !unit.contains(&hi) => Err(outside(hi)),
        Magnitude::Range(lo, hi) if lo > hi => {
            Err(format!("magnitude range [{lo}, {hi}] runs backwards; write [{hi}, {lo}]"))
        }
        Magnitude::Fixed(_) | Magnitude::Range(..) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(op: Op, probability: f64, magnitude: Magnitude) -> OpStep {
        OpStep { op, probability, magnitude }
    }

    fn policy(draws: u32, sub_policies: Vec<SubPolicy>) -> Result<Policy, PolicyError> {
        Policy::new("p", OpsProfile::Fastaa, draws, sub_policies, Map::new())
    }

    fn two_ops(weight: f64, second: OpStep) -> SubPolicy {
        SubPolicy { weight, ops: vec![step(Op::Invert, 1.0, Magnitude::Fixed(0.0)), second] }
    }

    fn check_refused(draws: u32, sub_policies: Vec<SubPolicy>, expected: &str) {
        let error = policy(draws, sub_policies).unwrap_err().to_string();
        assert!(error.contains(expected), "expected '{expected}' in '{error}'");
    }

    #[test]
    fn each_broken_invariant_is_named_with_its_place() {
        let good = || two_ops(1.0, step(Op::Rotate, 0.5, Magnitude::Range(0.2, 0.2)));
        assert!(policy(1, vec![good()]).is_ok());
        for (probability, shown) in [(1.5, "1.5"), (-0.1, "-0.1"), (f64::NAN, "NaN")] {
            let bad = two_ops(1.0, step(Op::Rotate, probability, Magnitude::Fixed(0.5)));
            let expected = format!(
                "policy 'p': sub-policy 3, op 2 ('Rotate'): probability {shown} is not in [0, 1]"
            );
            check_refused(1, vec![good(), good(), bad], &expected);
        }
        for (magnitude, expected) in [
            (Magnitude::Fixed(1.01), "magnitude 1.01 is not in [0, 1]"),
            (Magnitude::Fixed(f64::NAN), "magnitude NaN is not in [0, 1]"),
            (Magnitude::Range(-0.5, 0.5), "magnitude -0.5 is not in [0, 1]"),
            (Magnitude::Range(0.0, f64::INFINITY), "magnitude inf is not in [0, 1]"),
            (Magnitude::Range(0.9, 0.1), "range [0.9, 0.1] runs backwards; write [0.1, 0.9]"),
        ] {
            let bad = two_ops(1.0, step(Op::ShearX, 0.5, magnitude));
            check_refused(1, vec![bad], "sub-policy 1, op 2 ('ShearX')");
            let bad = two_ops(1.0, step(Op::ShearX, 0.5, magnitude));
            check_refused(1, vec![bad], expected);
        }
        for (weight, shown) in [(0.0, "0"), (-1.0, "-1"), (f64::NAN, "NaN"), (1.0 / 0.0, "inf")] {
            let bad = SubPolicy { weight, ops: vec![] };
            check_refused(1, vec![good(), bad], &format!("sub-policy 2: weight {shown} is not"));
        }
        let huge = || SubPolicy { weight: f64::MAX, ops: vec![] };
        check_refused(1, vec![huge(), huge()], "add up to more than an f64 holds");
        check_refused(0, vec![good()], "draws is 0, but a sample gets 1 to 16");
        check_refused(17, vec![good()], "draws is 17");
        check_refused(1, vec![], "no sub-policies");
        let empty = || SubPolicy { weight: 1.0, ops: vec![] };
        let many = std::iter::repeat_with(empty).take(limits::SUB_POLICIES_MAX + 1).collect();
        check_refused(1, many, "10001 sub-policies are over the limit of 10000");
        let long = SubPolicy {
            weight: 1.0,
            ops: vec![step(Op::Invert, 1.0, Magnitude::Fixed(0.0)); limits::SUB_POLICY_OPS_MAX + 1],
        };
        check_refused(1, vec![long], "sub-policy 1: 17 operations are over the limit of 16");
    }

    #[test]
    fn names_are_short_printable_and_not_empty() {
        let named = |name: &str| {
            let sub_policies = vec![SubPolicy { weight: 1.0, ops: vec![] }];
            Policy::new(name, OpsProfile::Fastaa, 1, sub_policies, Map::new())
        };
        assert!(named(&"x".repeat(limits::NAME_BYTES_MAX)).is_ok());
        for bad in ["", " ", "a\nb", &"x".repeat(limits::NAME_BYTES_MAX + 1)] {
            let error = named(bad).unwrap_err().to_string();
            assert!(error.contains("the name "), "{error}");
        }
    }

    #[test]
    fn the_id_is_the_hash_of_the_documented_bytes() {
        let sub_policies = vec![
            SubPolicy {
                weight: 2.0,
                ops: vec![
                    step(Op::Rotate, 0.5, Magnitude::Fixed(0.25)),
                    step(Op::Cutout, 1.0, Magnitude::Range(0.0, 1.0)),
                ],
            },
            SubPolicy { weight: 1.0, ops: vec![] },
        ];
        let policy =
            Policy::new("any", OpsProfile::TrivialWide, 3, sub_policies, Map::new()).unwrap();
        let f64_bytes = |value: f64| value.to_bits().to_le_bytes();
        let mut bytes = b"fastaa-policy-1\0".to_vec();
        bytes.extend([2, 3, 0, 0, 0, 2, 0, 0, 0]);
        bytes.extend(f64_bytes(2.0));
        bytes.extend([2, 0, 0, 0, 4]);
        bytes.extend(f64_bytes(0.5));
        bytes.push(0);
        bytes.extend(f64_bytes(0.25));
        bytes.push(14);
        bytes.extend(f64_bytes(1.0));
        bytes.push(1);
        bytes.extend(f64_bytes(0.0));
        bytes.extend(f64_bytes(1.0));
        bytes.extend(f64_bytes(1.0));
        bytes.extend([0, 0, 0, 0]);
        assert_eq!(policy.id().0[..], Sha256::digest(&bytes)[..16]);
    }

    #[test]
    fn the_id_depends_on_content_alone() {
        let with = |weight, probability, magnitude, profile, draws| {
            let sub_policies =
                vec![SubPolicy { weight, ops: vec![step(Op::Rotate, probability, magnitude)] }];
            Policy::new("p", profile, draws, sub_policies, Map::new()).unwrap()
        };
        let fixed = Magnitude::Fixed;
        let base = with(1.0, 0.0, fixed(0.5), OpsProfile::Fastaa, 1);
        assert_eq!(base.id(), with(1.0, -0.0, fixed(0.5), OpsProfile::Fastaa, 1).id());
        assert_eq!(base.id(), base.with_name("other").unwrap().id());
        for other in [
            with(2.0, 0.0, fixed(0.5), OpsProfile::Fastaa, 1),
            with(1.0, 0.1, fixed(0.5), OpsProfile::Fastaa, 1),
            with(1.0, 0.0, fixed(0.6), OpsProfile::Fastaa, 1),
            with(1.0, 0.0, Magnitude::Range(0.5, 0.5), OpsProfile::Fastaa, 1),
            with(1.0, 0.0, fixed(0.5), OpsProfile::Torchvision, 1),
            with(1.0, 0.0, fixed(0.5), OpsProfile::Fastaa, 2),
        ] {
            assert_ne!(base.id(), other.id());
        }
    }

    #[test]
    fn ids_are_read_back_from_their_text() {
        let id = PolicyId([0xAB, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xFF]);
        assert_eq!(PolicyId::from_hex(&id.to_string()), Some(id));
        for bad in ["", "ab", &"g".repeat(32), &"é".repeat(16), &"+1".repeat(16)] {
            assert_eq!(PolicyId::from_hex(bad), None, "{bad}");
        }
    }
}
