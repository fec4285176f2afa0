//! A pair's loss and change as functions of its two probabilities, and which probabilities are
//! best.
//!
//! Owns the bilinear surface, the terms on which a candidate is accepted, and its price. Never
//! measures anything.
//!
//! Each operation is applied or not, independently: every mean over images is
//! `(1−p)(1−q) none + p(1−q) A + (1−p)q B + pq AB`, exactly. Four measurements give all
//! probabilities, which a grid then searches at no further cost.
//!
//! # What is best
//!
//! Least loss is identity; least loss above a floor of diversity is the weakest distortion that the
//! floor lets pass, and tells nothing about the data. What helps training is change that a clean
//! model hardly minds, since the data varies in it. So the loss may grow up to a budget b, and
//! within it a candidate's *price* is the loss per change,
//!
//! ```text
//! price = (b + max(0, loss gain)) / mean distance.
//! ```
//!
//! An operation whose cost grows with the square of its strength s and whose distance grows with s
//! is cheapest exactly where it uses the budget up: (b + c s²) / s is least at c s² = b. One that
//! costs nothing is pushed as far as it costs nothing. Without the b in the numerator the weakest
//! strength would be the cheapest.

use super::objective::{Affinity, Floor, Measured};
use crate::search::lab::{Change, Score};

/// Steps of each probability.
const N_PROBABILITIES: u32 = 10;

/// What `structured` looks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aim {
    /// The least loss per change within the budget.
    #[default]
    Price,
    /// The least loss, as the paper: a control that shows what it leads to.
    LeastLoss,
}

/// On which terms a candidate is accepted, and how it is ranked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) aim: Aim,
    /// Loss that may be gained, in nats; above zero.
    pub(super) budget: f64,
    /// `None`: any change will do.
    pub(super) floor: Option<Floor>,
}

impl Terms {
    fn admits(&self, affinity: Affinity, change: Change) -> bool {
        affinity.loss_gain <= self.budget && self.floor.is_none_or(|floor| floor.admits(change))
    }

    fn price(&self, affinity: Affinity, change: Change) -> f64 {
        match self.aim {
            Aim::Price => (self.budget + affinity.loss_gain.max(0.0)) / change.distance.max(1e-9),
            Aim::LeastLoss => affinity.loss_gain,
        }
    }
}

/// The best probabilities of a pair, and what they give as the mean over folds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Best {
    /// Of the first and the second operation.
    pub(super) probabilities: [f64; 2],
    /// What is minimised; see the module.
    pub(super) price: f64,
    pub(super) affinity: Affinity,
    pub(super) change: Change,
    /// Folds on which the terms hold.
    pub(super) n_folds: usize,
}

/// The probabilities with the least price of those at which the terms hold on the mean and on
/// `n_needed` folds; the first ones among equals. `None` if there are none.
pub(super) fn best(folds: &[[Measured; 4]], terms: &Terms, n_needed: usize) -> Option<Best> {
    let grid = 0..=N_PROBABILITIES;
    let probability = |step| f64::from(step) / f64::from(N_PROBABILITIES);
    let all = grid.clone().flat_map(|p| grid.clone().map(move |q| [p, q].map(probability)));
    let accepted = all.filter_map(|probabilities| at(folds, terms, probabilities, n_needed));
    accepted.reduce(|best, other| if other.price < best.price { other } else { best })
}

fn at(
    folds: &[[Measured; 4]],
    terms: &Terms,
    probabilities: [f64; 2],
    n_needed: usize,
) -> Option<Best> {
    let n = folds.len().max(1) as f64;
    let (mut affinity, mut change) = (Affinity::default(), Change::default());
    let mut n_folds = 0;
    for corners in folds {
        let mixed = mixed(corners, probabilities);
        let on_fold = mixed.against(&corners[0]);
        n_folds += usize::from(terms.admits(on_fold, mixed.change));
        affinity.loss_gain += on_fold.loss_gain / n;
        affinity.drop += on_fold.drop / n;
        change.changed += mixed.change.changed / n;
        change.distance += mixed.change.distance / n;
    }
    let price = terms.price(affinity, change);
    let holds = n_folds >= n_needed && terms.admits(affinity, change);
    holds.then_some(Best { probabilities, price, affinity, change, n_folds })
}

/// The four corners (none, A, B, A then B), mixed by the probabilities of A and B.
fn mixed(corners: &[Measured; 4], [p, q]: [f64; 2]) -> Measured {
    let weights = [(1.0 - p) * (1.0 - q), p * (1.0 - q), (1.0 - p) * q, p * q];
    let mix = |value: fn(&Measured) -> f64| {
        // A weight of zero leaves out what may be infinite.
        let terms = corners.iter().zip(weights).filter(|(_, weight)| *weight > 0.0);
        terms.map(|(corner, weight)| weight * value(corner)).sum::<f64>()
    };
    Measured {
        score: Score {
            loss: mix(|corner| corner.score.loss),
            accuracy: mix(|corner| corner.score.accuracy),
        },
        change: Change {
            changed: mix(|corner| corner.change.changed),
            distance: mix(|corner| corner.change.distance),
        },
    }
}

/// What a pair's corners are before both operations were measured together: losses add up, changes
/// are independent.
pub(super) fn predicted(clean: Measured, first: Measured, second: Measured) -> [Measured; 4] {
    let sum = |value: fn(&Measured) -> f64| value(&first) + value(&second) - value(&clean);
    let either = |a: f64, b: f64| 1.0 - (1.0 - a) * (1.0 - b);
    let both = Measured {
        score: Score {
            loss: sum(|corner| corner.score.loss),
            accuracy: sum(|corner| corner.score.accuracy),
        },
        change: Change {
            changed: either(first.change.changed, second.change.changed),
            distance: either(first.change.distance, second.change.distance),
        },
    };
    [clean, first, second, both]
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "the grid's probabilities are exact quotients")]
mod tests {
    use super::*;

    fn measured(loss: f64, changed: f64, distance: f64) -> Measured {
        Measured {
            score: Score { loss, accuracy: 1.0 - loss },
            change: Change { changed, distance },
        }
    }

    const FLOOR: Floor = Floor { changed: 0.7, distance: 0.01 };

    fn terms(aim: Aim, floor: Option<Floor>) -> Terms {
        Terms { aim, budget: 0.2, floor }
    }

    fn corners(a: Measured, b: Measured) -> [Measured; 4] {
        predicted(measured(0.1, 0.0, 0.0), a, b)
    }

    #[test]
    fn the_surface_is_bilinear() {
        let corners = corners(measured(0.3, 1.0, 0.2), measured(0.5, 0.5, 0.1));
        for (step, corner) in corners.iter().enumerate() {
            let at_corner = [(step % 2) as f64, (step / 2) as f64];
            assert_eq!(mixed(&corners, at_corner), *corner);
        }
        let middle = mixed(&corners, [0.5, 0.5]);
        let mean = corners.iter().map(|corner| corner.score.loss).sum::<f64>() / 4.0;
        assert!((middle.score.loss - mean).abs() < 1e-12);
    }

    #[test]
    fn least_loss_is_identity_without_a_floor_and_the_weakest_change_with_one() {
        let folds = [corners(measured(0.3, 1.0, 0.2), measured(0.5, 1.0, 0.3))];
        let bare = best(&folds, &terms(Aim::LeastLoss, None), 1).unwrap();
        assert_eq!(bare.probabilities, [0.0, 0.0]);
        // Seven in ten images get the cheap operation, and none the other: just the floor.
        let floored = best(&folds, &terms(Aim::LeastLoss, Some(FLOOR)), 1).unwrap();
        assert_eq!(floored.probabilities, [0.7, 0.0]);
        assert!((floored.change.changed - 0.7).abs() < 1e-12);
    }

    #[test]
    fn the_price_pushes_what_is_free_and_adds_what_is_cheap() {
        let terms = terms(Aim::Price, Some(FLOOR));
        let free = [corners(measured(0.1, 1.0, 0.2), measured(0.5, 1.0, 0.3))];
        let found = best(&free, &terms, 1).unwrap();
        // The other one costs more loss per change than the free one has to carry of the budget.
        assert_eq!(found.probabilities, [1.0, 0.0]);
        let both = [corners(measured(0.1, 1.0, 0.2), measured(0.29, 1.0, 0.9))];
        let found = best(&both, &terms, 1).unwrap();
        assert_eq!(found.probabilities, [1.0, 1.0]);
        assert!((found.affinity.loss_gain - 0.19).abs() < 1e-9, "{found:?}");
        // The cheapest of strengths whose cost is c s² is the one that costs the budget.
        let strengths = (1..=20).map(|step| f64::from(step) / 10.0);
        let price = |s: f64| {
            let folds = [corners(measured(0.1 + 0.2 * s * s, 1.0, 0.1 * s), Measured::default())];
            terms.price(Affinity { loss_gain: 0.2 * s * s, drop: 0.0 }, folds[0][1].change)
        };
        let cheapest = strengths.min_by(|a, b| price(*a).total_cmp(&price(*b))).unwrap();
        assert_eq!(cheapest, 1.0);
    }

    #[test]
    fn terms_must_hold_on_enough_folds() {
        let good = corners(measured(0.15, 1.0, 0.2), measured(0.1, 0.0, 0.0));
        let bad = corners(measured(0.9, 1.0, 0.2), measured(0.1, 0.0, 0.0));
        let terms = terms(Aim::Price, Some(FLOOR));
        let found = best(&[good, good, good, good, bad], &terms, 4).unwrap();
        assert_eq!((found.probabilities[0], found.n_folds), (1.0, 4));
        assert_eq!(best(&[good, good, good, bad, bad], &terms, 4), None);
        assert_eq!(best(&[bad], &terms, 1), None);
        let endless = corners(measured(f64::MAX, 1.0, 0.5), measured(f64::MAX, 1.0, 0.5));
        assert_eq!(best(&[endless], &terms, 1), None);
    }
}
