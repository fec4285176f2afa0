//! What differs between two policies, for people and machines.
//!
//! Owns the comparison and its text. Never judges which policy is better.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::types::canonical_ops;
use super::{Magnitude, Op, OpStep, Policy, SubPolicy, format};

/// A sub-policy whose operations are in both policies, with another weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Reweighted {
    /// Its operations.
    pub ops: Vec<OpStep>,
    /// Weight in the first policy.
    pub from: f64,
    /// Weight in the second policy.
    pub to: f64,
}

/// How often an operation is applied to a sample, on average: draws × Σ share × Σ probability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OpUse {
    /// Which operation.
    pub op: Op,
    /// Applications per sample under the first policy.
    pub from: f64,
    /// Applications per sample under the second policy.
    pub to: f64,
}

/// What differs from a first policy to a second.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyDiff {
    /// Names of the profiles, if they differ.
    pub ops_profile: Option<(&'static str, &'static str)>,
    /// Draws per sample, if they differ.
    pub draws: Option<(u32, u32)>,
    /// Sub-policies only in the second policy, in its order.
    pub added: Vec<SubPolicy>,
    /// Sub-policies only in the first policy, in its order.
    pub removed: Vec<SubPolicy>,
    /// Sub-policies in both, with different weights.
    pub reweighted: Vec<Reweighted>,
    /// Sub-policies in both, with equal weights.
    pub n_unchanged: usize,
    /// Use of each operation that occurs in either policy, by operation id.
    pub op_use: Vec<OpUse>,
}

/// Compares two policies. Sub-policies are matched by their operations; one that occurs k times
/// is matched k times, those of equal weight first. Their order does not count.
pub fn diff(from: &Policy, to: &Policy) -> PolicyDiff {
    // The sub-policies not matched yet, by operations; in file order within each.
    let mut open: BTreeMap<Vec<u8>, Vec<usize>> = BTreeMap::new();
    for (index, sub_policy) in from.sub_policies().iter().enumerate() {
        open.entry(canonical_ops(&sub_policy.ops)).or_default().push(index);
    }
    let mut n_unchanged = 0;
    let mut unmatched = Vec::new();
    for sub_policy in to.sub_policies() {
        let key = canonical_ops(&sub_policy.ops);
        let candidates = open.entry(key.clone()).or_default();
        let same_weight = candidates.iter().position(|&index| {
            from.sub_policies()[index].weight.to_bits() == sub_policy.weight.to_bits()
        });
        if let Some(position) = same_weight {
            candidates.remove(position);
            n_unchanged += 1;
        } else {
            unmatched.push((key, sub_policy));
        }
    }
    let mut reweighted = Vec::new();
    let mut added = Vec::new();
    for (key, sub_policy) in unmatched {
        let candidates = open.entry(key).or_default();
        if candidates.is_empty() {
            added.push(sub_policy.clone());
        } else {
            let before = &from.sub_policies()[candidates.remove(0)];
            let (from, to) = (before.weight, sub_policy.weight);
            reweighted.push(Reweighted { ops: sub_policy.ops.clone(), from, to });
        }
    }
    let mut left: Vec<usize> = open.into_values().flatten().collect();
    left.sort_unstable();
    let (profile_from, profile_to) = (from.ops_profile().name(), to.ops_profile().name());
    PolicyDiff {
        ops_profile: (profile_from != profile_to).then_some((profile_from, profile_to)),
        draws: (from.draws() != to.draws()).then_some((from.draws(), to.draws())),
        added,
        removed: left.into_iter().map(|index| from.sub_policies()[index].clone()).collect(),
        reweighted,
        n_unchanged,
        op_use: op_use(from, to),
    }
}

fn op_use(from: &Policy, to: &Policy) -> Vec<OpUse> {
    let (before, after) = (applications(from), applications(to));
    Op::ALL
        .into_iter()
        .map(|op| OpUse { op, from: before[op as usize], to: after[op as usize] })
        .filter(|op_use| op_use.from > 0.0 || op_use.to > 0.0)
        .collect()
}

/// Average applications per sample, by operation id.
fn applications(policy: &Policy) -> [f64; 15] {
    let total: f64 = policy.sub_policies().iter().map(|sub_policy| sub_policy.weight).sum();
    let mut sums = [0.0; 15];
    for sub_policy in policy.sub_policies() {
        let share = sub_policy.weight / total * f64::from(policy.draws());
        for step in &sub_policy.ops {
            sums[step.op as usize] += share * step.probability;
        }
    }
    sums
}

impl PolicyDiff {
    /// Whether the two policies have the same content, the order of sub-policies aside.
    pub fn is_empty(&self) -> bool {
        self.ops_profile.is_none()
            && self.draws.is_none()
            && self.added.is_empty()
            && self.removed.is_empty()
            && self.reweighted.is_empty()
    }

    /// As JSON; operations look as in policy files.
    pub fn to_json(&self) -> Value {
        let sub_policies = |list: &[SubPolicy]| -> Vec<Value> {
            list.iter().map(format::sub_policy_to_value).collect()
        };
        let reweighted: Vec<Value> = self
            .reweighted
            .iter()
            .map(|change| {
                let ops = format::ops_to_value(&change.ops);
                serde_json::json!({"ops": ops, "from": change.from, "to": change.to})
            })
            .collect();
        serde_json::json!({
            "ops_profile": self.ops_profile.map(|(from, to)| [from, to]),
            "draws": self.draws.map(|(from, to)| [from, to]),
            "added": sub_policies(&self.added),
            "removed": sub_policies(&self.removed),
            "reweighted": reweighted,
            "n_unchanged": self.n_unchanged,
            "op_use": self.op_use,
        })
    }
}

/// `Rotate p=0.50 λ=0.30, then Invert p=1.00`; `identity` for no operation.
pub fn ops_text(ops: &[OpStep]) -> String {
    if ops.is_empty() {
        return "identity".to_owned();
    }
    let steps: Vec<String> = ops
        .iter()
        .map(|step| {
            let head = format!("{} p={:.2}", step.op.name(), step.probability);
            match step.magnitude {
                _ if !step.op.has_magnitude() => head,
                Magnitude::Fixed(level) => format!("{head} λ={level:.2}"),
                Magnitude::Range(lo, hi) => format!("{head} λ={lo:.2}–{hi:.2}"),
            }
        })
        .collect();
    steps.join(", then ")
}

impl fmt::Display for PolicyDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return write!(f, "no difference: {} sub-policies in both", self.n_unchanged);
        }
        if let Some((from, to)) = self.ops_profile {
            writeln!(f, "ops_profile: {from} -> {to}")?;
        }
        if let Some((from, to)) = self.draws {
            writeln!(f, "draws: {from} -> {to}")?;
        }
        writeln!(
            f,
            "sub-policies: {} removed, {} added, {} reweighted, {} unchanged",
            self.removed.len(),
            self.added.len(),
            self.reweighted.len(),
            self.n_unchanged
        )?;
        for sub_policy in &self.removed {
            writeln!(f, "- {} × {}", sub_policy.weight, ops_text(&sub_policy.ops))?;
        }
        for sub_policy in &self.added {
            writeln!(f, "+ {} × {}", sub_policy.weight, ops_text(&sub_policy.ops))?;
        }
        for change in &self.reweighted {
            writeln!(f, "~ {} -> {} × {}", change.from, change.to, ops_text(&change.ops))?;
        }
        write!(f, "applications per sample:")?;
        for op_use in &self.op_use {
            let OpUse { op, from, to } = op_use;
            write!(f, "\n  {:<12} {from:.4} -> {to:.4} ({:+.4})", op.name(), to - from)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::policy::{OpsProfile, builtin};

    fn policy(draws: u32, rows: &[(f64, Op, f64)]) -> Policy {
        let sub_policies = rows
            .iter()
            .map(|&(weight, op, probability)| {
                let magnitude = Magnitude::Fixed(0.5);
                SubPolicy { weight, ops: vec![OpStep { op, probability, magnitude }] }
            })
            .collect();
        Policy::new("p", OpsProfile::Fastaa, draws, sub_policies, Map::new()).unwrap()
    }

    #[test]
    fn sub_policies_are_matched_by_operations_however_often_they_occur() {
        let from =
            policy(1, &[(1.0, Op::Rotate, 0.5), (2.0, Op::Rotate, 0.5), (1.0, Op::Invert, 1.0)]);
        let to =
            policy(2, &[(2.0, Op::Rotate, 0.5), (3.0, Op::Rotate, 0.5), (3.0, Op::Color, 0.25)]);
        let diff = diff(&from, &to);
        assert_eq!(diff.draws, Some((1, 2)));
        assert_eq!(diff.ops_profile, None);
        assert_eq!(diff.n_unchanged, 1);
        assert_eq!(diff.added, to.sub_policies()[2..]);
        assert_eq!(diff.removed, from.sub_policies()[2..]);
        let [change] = diff.reweighted.as_slice() else { panic!("{:?}", diff.reweighted) };
        assert_eq!((change.from, change.to), (1.0, 3.0));
        let uses: Vec<_> = diff.op_use.iter().map(|u| (u.op, u.from, u.to)).collect();
        assert_eq!(
            uses,
            [
                (Op::Rotate, 0.375, 0.625),
                (Op::Invert, 0.25, 0.0),
                (Op::Color, 0.0, 2.0 * 0.375 * 0.25)
            ]
        );
        let text = diff.to_string();
        assert!(text.contains("1 removed, 1 added, 1 reweighted, 1 unchanged"), "{text}");
        assert!(text.contains("- 1 × Invert p=1.00\n"), "{text}");
        assert!(text.contains("~ 1 -> 3 × Rotate p=0.50 λ=0.50\n"), "{text}");
        assert_eq!(diff.to_json()["added"][0]["ops"][0][0], "Color");
    }

    #[test]
    fn order_alone_is_no_difference_and_profiles_are_one() {
        let from = policy(1, &[(1.0, Op::Rotate, 0.5), (2.0, Op::Invert, 0.5)]);
        let to = policy(1, &[(2.0, Op::Invert, 0.5), (1.0, Op::Rotate, 0.5)]);
        assert!(diff(&from, &to).is_empty());
        let trivial = builtin::trivial_wide();
        let diff = diff(&from, &trivial);
        assert_eq!(diff.ops_profile, Some(("fastaa", "trivial-wide")));
        assert!(diff.to_string().contains("+ 1 × identity\n"), "{diff}");
    }
}
