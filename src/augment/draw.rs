//! Which operations of a policy an image gets, and how strong: all of its random choices.
//!
//! # The order of random words
//!
//! A determinism contract: another implementation that follows it gets the same choices. Let S
//! be the number of operations of the policy's longest sub-policy. Each of the policy's draws
//! uses 1 + 5 S words of the sample's [`Purpose::Policy`](crate::random::Purpose) stream,
//! whatever is chosen, so that draw d starts at word d (1 + 5 S):
//!
//! | word | use |
//! |---|---|
//! | 0 | the sub-policy: the first whose cumulative weight exceeds `unit` × total weight |
//! | 1 + 5 s | slot s: the operation is applied if `unit` < probability |
//! | 2 + 5 s | its magnitude, lo + `unit` × (hi − lo); used up by a fixed magnitude too |
//! | 3 + 5 s | its sign: negative if the word's top bit is set and the operation has a sign |
//! | 4 + 5 s, 5 + 5 s | Cutout's centre: `unit` × width, `unit` × height |
//!
//! Slots beyond a shorter sub-policy's end use their words for nothing.

use super::resolve::{Action, resolve};
use crate::policy::{Magnitude, Op, OpStep, OpsProfile, Policy, SubPolicy};
use crate::random::SampleRng;

/// Random words that each operation slot uses.
pub const WORDS_PER_SLOT: usize = 5;

/// A policy made ready for drawing: cumulative weights, operations in one row. Immutable; share
/// it in an `Arc`.
#[derive(Clone, Debug)]
pub struct PreparedPolicy {
    profile: OpsProfile,
    draws: u32,
    /// Most operations in a sub-policy.
    n_slots: usize,
    /// `cumulative_weights[i]` is the weight of sub-policies `0..=i`.
    cumulative_weights: Vec<f64>,
    /// Sub-policy i's operations are `ops[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
    ops: Vec<OpStep>,
}

/// One operation that an image gets, independent of the image's size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawnOp {
    /// What.
    pub op: Op,
    /// How strong, in the profile's λ.
    pub lambda: f64,
    /// With the sign flipped; false for operations without a sign.
    pub negative: bool,
    /// Centre of a Cutout, as fractions of width and height, in [0, 1).
    pub cutout_centre: (f64, f64),
}

impl DrawnOp {
    /// What this operation does to an image of `width` × `height` pixels.
    ///
    /// Cutout's centre can be anywhere in the image. (The published code draws it from
    /// (1, width], by a slip in a call to numpy.)
    pub fn action(&self, profile: OpsProfile, width: usize, height: usize) -> Action {
        let centre = (self.cutout_centre.0 * width as f64, self.cutout_centre.1 * height as f64);
        resolve(self.op, profile, self.lambda, self.negative, (width, height), centre)
    }
}

/// The identity: nothing is ever drawn.
impl Default for PreparedPolicy {
    fn default() -> Self {
        Self::from_parts(OpsProfile::default(), 1, &[])
    }
}

impl PreparedPolicy {
    /// Prepares a policy.
    pub fn new(policy: &Policy) -> Self {
        Self::from_parts(policy.ops_profile(), policy.draws(), policy.sub_policies())
    }

    /// Prepares what a policy consists of. Without sub-policies nothing is ever drawn.
    pub fn from_parts(profile: OpsProfile, draws: u32, sub_policies: &[SubPolicy]) -> Self {
        let mut total = 0.0;
        let mut starts = vec![0];
        let mut cumulative_weights = Vec::with_capacity(sub_policies.len());
        let mut ops = Vec::new();
        for sub_policy in sub_policies {
            total += sub_policy.weight;
            cumulative_weights.push(total);
            ops.extend_from_slice(&sub_policy.ops);
            starts.push(ops.len());
        }
        let n_slots = sub_policies.iter().map(|sub| sub.ops.len()).max().unwrap_or(0);
        Self { profile, draws, n_slots, cumulative_weights, starts, ops }
    }

    /// What the magnitudes mean.
    pub fn ops_profile(&self) -> OpsProfile {
        self.profile
    }

    /// Whether the policy can never change an image: no sub-policy has an operation.
    pub fn is_identity(&self) -> bool {
        self.ops.is_empty()
    }

    /// Random words that one image uses.
    pub fn words(&self) -> usize {
        if self.cumulative_weights.is_empty() {
            return 0;
        }
        self.draws as usize * (1 + WORDS_PER_SLOT * self.n_slots)
    }

    /// Fills `out` with the operations for one image, in the order in which they are applied.
    ///
    /// Uses exactly [`words`](Self::words) words of `rng`; see the module for their order.
    pub fn draw_into(&self, rng: &mut SampleRng, out: &mut Vec<DrawnOp>) {
        out.clear();
        let Some(&total) = self.cumulative_weights.last() else { return };
        for _ in 0..self.draws {
            let target = rng.unit() * total;
            let chosen = self.cumulative_weights.partition_point(|&weight| weight <= target);
            let chosen = chosen.min(self.cumulative_weights.len() - 1);
            let ops = &self.ops[self.starts[chosen]..self.starts[chosen + 1]];
            for step in ops {
                out.extend(draw_slot(step, self.profile, rng));
            }
            for _ in 0..WORDS_PER_SLOT * (self.n_slots - ops.len()) {
                rng.next_u32();
            }
        }
    }
}

fn draw_slot(step: &OpStep, profile: OpsProfile, rng: &mut SampleRng) -> Option<DrawnOp> {
    let applied = rng.unit() < step.probability;
    let position = rng.unit();
    let lambda = match step.magnitude {
        Magnitude::Fixed(lambda) => lambda,
        Magnitude::Range(lo, hi) => (lo + position * (hi - lo)).min(hi),
    };
    let negative = rng.coin() && profile.has_random_sign(step.op);
    let cutout_centre = (rng.unit(), rng.unit());
    applied.then_some(DrawnOp { op: step.op, lambda, negative, cutout_centre })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    fn step(op: Op, probability: f64, magnitude: Magnitude) -> OpStep {
        OpStep { op, probability, magnitude }
    }

    fn rng(sample: u64) -> SampleRng {
        SampleRng::new(11, 0, sample, Purpose::Policy)
    }

    fn words(sample: u64) -> Vec<u32> {
        let mut rng = rng(sample);
        (0..64).map(|_| rng.next_u32()).collect()
    }

    fn unit(word: u32) -> f64 {
        f64::from(word >> 8) / f64::from(1 << 24)
    }

    /// Two sub-policies of one and two operations; both draws must follow the module's table.
    #[test]
    fn words_are_used_in_the_documented_order_whatever_is_chosen() {
        let short = vec![step(Op::Cutout, 0.5, Magnitude::Fixed(0.25))];
        let long = vec![
            step(Op::Rotate, 0.4, Magnitude::Range(0.2, 0.6)),
            step(Op::Invert, 0.9, Magnitude::Fixed(0.0)),
        ];
        let subs = [
            SubPolicy { weight: 1.0, ops: short.clone() },
            SubPolicy { weight: 3.0, ops: long.clone() },
        ];
        let prepared = PreparedPolicy::from_parts(OpsProfile::Fastaa, 2, &subs);
        assert_eq!(prepared.words(), 22);
        let mut out = Vec::new();
        let mut seen = [0; 2];
        for sample in 0..200 {
            let mut used = rng(sample);
            prepared.draw_into(&mut used, &mut out);
            let words = words(sample);
            assert_eq!(used.next_u32(), words[22], "the number of words is fixed");
            let mut expected = Vec::new();
            for draw in 0..2 {
                let words = &words[draw * 11..][..11];
                let chosen = usize::from(unit(words[0]) * 4.0 >= 1.0);
                seen[chosen] += 1;
                for (slot, step) in [&short, &long][chosen].iter().enumerate() {
                    let words = &words[1 + 5 * slot..][..5];
                    if unit(words[0]) >= step.probability {
                        continue;
                    }
                    expected.push(DrawnOp {
                        op: step.op,
                        lambda: match step.magnitude {
                            Magnitude::Fixed(lambda) => lambda,
                            Magnitude::Range(lo, hi) => lo + unit(words[1]) * (hi - lo),
                        },
                        negative: step.op == Op::Rotate && words[2] >> 31 == 1,
                        cutout_centre: (unit(words[3]), unit(words[4])),
                    });
                }
            }
            assert_eq!(out, expected);
        }
        assert!(seen.iter().all(|&n| n > 50), "{seen:?}");
    }

    #[test]
    fn probability_zero_never_and_one_always_applies() {
        for (probability, expected) in [(0.0, 0), (1.0, 1)] {
            let ops = vec![step(Op::Invert, probability, Magnitude::Fixed(0.0))];
            let subs = [SubPolicy { weight: 1.0, ops }];
            let prepared = PreparedPolicy::from_parts(OpsProfile::Fastaa, 1, &subs);
            let mut out = Vec::new();
            for sample in 0..500 {
                prepared.draw_into(&mut rng(sample), &mut out);
                assert_eq!(out.len(), expected);
            }
        }
    }

    #[test]
    fn sub_policies_are_drawn_by_weight() {
        let weights = [0.5, 2.0, 1.0, 4.5];
        let subs: Vec<_> = weights
            .iter()
            .zip([Op::ShearX, Op::ShearY, Op::Invert, Op::Cutout])
            .map(|(&weight, op)| SubPolicy {
                weight,
                ops: vec![step(op, 1.0, Magnitude::Fixed(0.5))],
            })
            .collect();
        let prepared = PreparedPolicy::from_parts(OpsProfile::Torchvision, 1, &subs);
        let mut counts = [0_u32; 4];
        let mut out = Vec::new();
        for sample in 0..8000 {
            prepared.draw_into(&mut rng(sample), &mut out);
            let chosen = subs.iter().position(|sub| sub.ops[0].op == out[0].op);
            counts[chosen.unwrap()] += 1;
        }
        // Chi-squared with 3 degrees of freedom: 16.3 is the 0.1 % point; the draw is fixed.
        let chi2: f64 = weights
            .iter()
            .zip(counts)
            .map(|(weight, n)| (f64::from(n) - weight * 1000.0).powi(2) / (weight * 1000.0))
            .sum();
        assert!(chi2 < 16.3, "chi-squared {chi2}, counts {counts:?}");
    }

    #[test]
    fn an_identity_policy_draws_nothing() {
        for subs in [vec![], vec![SubPolicy { weight: 1.0, ops: vec![] }]] {
            let prepared = PreparedPolicy::from_parts(OpsProfile::Fastaa, 3, &subs);
            assert!(prepared.is_identity());
            let (mut used, mut out) = (rng(0), Vec::new());
            prepared.draw_into(&mut used, &mut out);
            assert!(out.is_empty());
            assert_eq!(used.next_u32(), words(0)[prepared.words()]);
        }
    }
}
