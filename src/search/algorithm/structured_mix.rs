//! Which candidates go on together, and with what weights: no operation may take everything over.
//!
//! Owns quotas and weights. Never looks at images or losses.

use std::collections::BTreeMap;

use crate::policy::Op;

/// Largest share of the weight that goes to sub-policies with one operation, unless nothing else
/// is left. Evenly spread, two of fifteen operations would have 13 % each.
pub(super) const OP_SHARE_MAX: f64 = 0.5;
/// Largest share of the candidates that have the same two operations (at other strengths), unless
/// nothing else is left.
const PAIR_SHARE_MAX: f64 = 1.0 / 16.0;
/// Weights are balanced until no share is off by more.
const TOLERANCE: f64 = 1e-9;
/// Balancing converges in a few dozen passes; where it cannot, shares stay above the cap.
const N_PASSES_MAX: usize = 1000;

/// Of candidates, best first, each with its operations: the indices of at most `n` to keep, best
/// first. Those that would break a quota come after all others.
pub(super) fn choose(candidates: &[Vec<Op>], n: usize) -> Vec<usize> {
    let quota = |share: f64| {
        #[allow(clippy::cast_possible_truncation, reason = "a share of a count, rounded down")]
        let quota = (share * n as f64) as usize;
        quota.max(1)
    };
    let (op_quota, pair_quota) = (quota(OP_SHARE_MAX), quota(PAIR_SHARE_MAX));
    let mut by_op: BTreeMap<Op, usize> = BTreeMap::new();
    let mut by_set: BTreeMap<Vec<Op>, usize> = BTreeMap::new();
    let (mut kept, mut left) = (Vec::new(), Vec::new());
    for (idx, ops) in candidates.iter().enumerate() {
        let mut set = ops.clone();
        set.sort_unstable();
        set.dedup();
        let is_full = by_set.get(&set).is_some_and(|&count| count >= pair_quota)
            || set.iter().any(|op| by_op.get(op).is_some_and(|&count| count >= op_quota));
        if is_full {
            left.push(idx);
            continue;
        }
        for &op in &set {
            *by_op.entry(op).or_default() += 1;
        }
        *by_set.entry(set).or_default() += 1;
        kept.push(idx);
    }
    kept.truncate(n);
    left.truncate(n - kept.len());
    kept.extend(left);
    kept.sort_unstable();
    kept
}

/// Weights with sum 1, in proportion to `worth` (above zero) but for operations over their share:
/// what has them is scaled down until they are within, where that is possible.
pub(super) fn weights(candidates: &[Vec<Op>], worth: &[f64]) -> Vec<f64> {
    let total: f64 = worth.iter().sum();
    let mut weights: Vec<f64> = worth.iter().map(|worth| worth / total).collect();
    for _ in 0..N_PASSES_MAX {
        let over = Op::ALL.into_iter().map(|op| (share(candidates, &weights, op), op));
        let Some((share, op)) =
            over.filter(|(share, _)| is_over(*share)).max_by(|a, b| a.0.total_cmp(&b.0))
        else {
            break;
        };
        // share × factor is OP_SHARE_MAX of the new sum.
        let factor = OP_SHARE_MAX * (1.0 - share) / ((1.0 - OP_SHARE_MAX) * share);
        for (weight, ops) in weights.iter_mut().zip(candidates) {
            *weight *= if ops.contains(&op) { factor } else { 1.0 };
        }
        let total: f64 = weights.iter().sum();
        for weight in &mut weights {
            *weight /= total;
        }
    }
    weights
}

/// An operation in every candidate has no rest to be balanced against.
fn is_over(share: f64) -> bool {
    share > OP_SHARE_MAX + TOLERANCE && share < 1.0 - TOLERANCE
}

/// Share of the weight of those that have an operation.
fn share(candidates: &[Vec<Op>], weights: &[f64], op: Op) -> f64 {
    let having = candidates.iter().zip(weights).filter(|(ops, _)| ops.contains(&op));
    having.map(|(_, weight)| weight).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_give_way_only_when_nothing_else_is_left() {
        let mut candidates = vec![vec![Op::Rotate, Op::Invert]; 8];
        candidates.extend(vec![vec![Op::Rotate, Op::Cutout]; 8]);
        candidates.extend(vec![vec![Op::ShearX]; 4]);
        // 16 places: one of each set, at most eight with Rotate, and then the best of the rest.
        let kept = choose(&candidates, 16);
        assert_eq!(kept.len(), 16);
        assert!(kept.contains(&0) && kept.contains(&8) && kept.contains(&16));
        assert!(kept.is_sorted());
        // Only as many as there are.
        assert_eq!(choose(&candidates[..3], 16), [0, 1, 2]);
        assert_eq!(choose(&[], 16), [0; 0]);
        // Of enough different ones, the quota holds.
        let others = [Op::ShearX, Op::ShearY, Op::Cutout, Op::Color, Op::Posterize];
        let mut many: Vec<Vec<Op>> = others.map(|op| vec![Op::Rotate, op]).to_vec();
        many.extend(others.map(|op| vec![Op::Invert, op]));
        let kept = choose(&many, 4);
        let n_rotate = kept.iter().filter(|&&idx| many[idx].contains(&Op::Rotate)).count();
        assert_eq!((kept.len(), n_rotate), (4, 2));
    }

    #[test]
    fn no_operation_takes_more_than_its_share_of_the_weight() {
        let candidates = vec![
            vec![Op::Rotate, Op::Invert],
            vec![Op::Rotate, Op::Cutout],
            vec![Op::Cutout],
            vec![Op::ShearX],
        ];
        let weights = weights(&candidates, &[5.0, 3.0, 1.0, 1.0]);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(weights.iter().all(|&weight| weight > 0.0));
        for op in Op::ALL {
            assert!(share(&candidates, &weights, op) <= OP_SHARE_MAX + 1e-6, "{op:?}: {weights:?}");
        }
        // Where the cap does not bind, weights are as the worth.
        let even = super::weights(&candidates[2..], &[1.0, 1.0]);
        assert_eq!(even, [0.5, 0.5]);
        let alone = super::weights(&candidates[..2], &[3.0, 1.0]);
        assert!(alone.iter().all(|weight| weight.is_finite() && *weight > 0.0), "{alone:?}");
    }
}
