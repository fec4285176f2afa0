//! What a policy costs a clean model, and how much it changes images: affinity and diversity.
//!
//! Owns both measures, the floor below which a policy is refused, and the rate between points of
//! accuracy and nats. Never adds the two measures up: whoever ranks says how.
//!
//! The published code scores an image by the best of five draws, so that four ruined draws cost
//! nothing, and its loss is one number per batch (`search.py`). Here every image counts with the
//! mean over its draws, and all candidates get the same images and random words ([`Lab::score`]).
//!
//! The mean loss alone is least without any augmentation. Hence [`Floor`]: a policy must change
//! most images, and by more than a trace.
//!
//! *Source*: R. Gontijo-Lopes et al., "Affinity and Diversity", arXiv 2002.08973, for keeping the
//! two apart.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::augment::PreparedPolicy;
use crate::search::affinity::{AffinityTable, Cell};
use crate::search::error::SearchError;
use crate::search::lab::{Change, Lab, Score};

/// Share of the images that a policy must change. A sub-policy of the paper's space, drawn
/// uniformly, changes 75 % of them; the collapse to identity shows well below.
pub const CHANGED_MIN: f64 = 0.7;
/// Least mean distance, as a share of what the median operation of the affinity table does at half
/// strength. A fixed distance would not do: pictures on black change less than photographs under
/// equal operations. A tenth is a choice, not a measurement: it keeps out changes that are traces
/// beside what other operations do to the same images.
pub const DISTANCE_SHARE_MIN: f64 = 0.1;
/// Least mean distance whatever the table says: one step of 255, at every value.
pub const DISTANCE_MIN: f64 = 1.0 / 255.0;
/// Where the affinity table's middle is.
const HALF_STRENGTH: f64 = 0.5;
/// Cells that cost less are mostly noise, and say nothing about nats per point.
const RATE_DROP_MIN: f64 = 1.0;
/// Nats per point where no cell costs that much: a guess that only toy data meets.
const RATE_DEFAULT: f64 = 0.03;

/// Diversity below which no policy is accepted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// Least share of changed images, in [0, 1].
    pub changed: f64,
    /// Least mean absolute difference per value, on the scale 0..1.
    pub distance: f64,
}

impl Floor {
    /// The floor for the data that a table was measured on.
    pub fn new(table: &AffinityTable) -> Self {
        let distance = DISTANCE_SHARE_MIN * middle_distance(table);
        Self { changed: CHANGED_MIN, distance: distance.max(DISTANCE_MIN) }
    }

    /// Whether a change is large enough.
    pub fn admits(&self, change: Change) -> bool {
        change.changed >= self.changed && change.distance >= self.distance
    }
}

/// What the median operation changes at half strength (whole strength where there is none), among
/// those that change anything; 0 for an empty table.
pub fn middle_distance(table: &AffinityTable) -> f64 {
    let middle = |cells: &Vec<Cell>| {
        let off = |strength: f64| (strength - HALF_STRENGTH).abs();
        let nearest = cells.iter().min_by(|a, b| off(a.strength).total_cmp(&off(b.strength)));
        nearest.map(|cell| cell.change.distance).filter(|&distance| distance > 0.0)
    };
    let mut distances: Vec<f64> = table.rows.values().filter_map(middle).collect();
    distances.sort_by(f64::total_cmp);
    distances.get(distances.len() / 2).copied().unwrap_or_default()
}

/// Nats of loss that go with a point (0.01) of lost accuracy on this data: Σ loss gained / Σ points
/// lost over the cells that cost a point or more. A budget in points means the same for models
/// whose losses have different scales; losses are less noisy than hits, though, and so decide.
pub fn nats_per_point(table: &AffinityTable) -> f64 {
    let costly = table.rows.values().flatten().filter(|cell| cell.drop() >= RATE_DROP_MIN);
    let (nats, points) = costly
        .fold((0.0, 0.0), |(nats, points), cell| (nats + cell.loss_gain, points + cell.drop()));
    let rate = nats / points;
    if rate.is_finite() && rate > 0.0 { rate } else { RATE_DEFAULT }
}

/// A policy on some images: what the model makes of them, and how much they change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Mean score over images and draws.
    pub score: Score,
    /// Mean change; zero without a policy.
    pub change: Change,
}

impl Measured {
    /// Measures a policy on images of a fold's D_A. A loss that is no finite number counts as the
    /// largest one.
    ///
    /// # Errors
    /// A sample cannot be read.
    pub fn of(
        lab: &dyn Lab,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Self, SearchError> {
        let mut score = Score::mean(&lab.score(fold, images.clone(), policy, n_draws)?);
        if !score.loss.is_finite() {
            score.loss = f64::MAX;
        }
        if policy.is_identity() {
            return Ok(Self { score, change: Change::default() });
        }
        Ok(Self { score, change: lab.change(fold, images, policy, n_draws)? })
    }

    /// The mean of parts, each weighted by its number of images; zero for none.
    pub fn mean(parts: &[(Self, usize)]) -> Self {
        let n_images = parts.iter().map(|(_, n)| *n).sum::<usize>().max(1) as f64;
        let mean = |value: fn(&Self) -> f64| {
            parts.iter().map(|(part, n)| value(part) * (*n as f64 / n_images)).sum()
        };
        Self {
            score: Score {
                loss: mean(|part| part.score.loss),
                accuracy: mean(|part| part.score.accuracy),
            },
            change: Change {
                changed: mean(|part| part.change.changed),
                distance: mean(|part| part.change.distance),
            },
        }
    }

    /// What it costs against the same images without a policy.
    pub fn against(&self, clean: &Self) -> Affinity {
        Affinity {
            loss_gain: self.score.loss - clean.score.loss,
            drop: 100.0 * (clean.score.accuracy - self.score.accuracy),
        }
    }
}

/// What a policy costs a clean model. Below zero: it helps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Affinity {
    /// Loss gained, in nats.
    pub loss_gain: f64,
    /// Accuracy lost, in points (0.01).
    pub drop: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Op;

    fn table(cells: &[(Op, f64, f64, f64, f64)]) -> AffinityTable {
        let mut table = AffinityTable::default();
        for &(op, strength, drop, loss_gain, distance) in cells {
            let change = Change { changed: 1.0, distance };
            let cell = Cell { strength, drop_by_fold: vec![drop], loss_gain, change };
            table.rows.entry(op).or_default().push(cell);
        }
        table
    }

    #[test]
    fn the_floor_follows_the_data_but_never_goes_below_a_step() {
        let dim = table(&[
            (Op::Rotate, 0.1, 0.0, 0.0, 0.01),
            (Op::Rotate, 0.5, 5.0, 0.2, 0.2),
            (Op::Rotate, 1.0, 50.0, 2.0, 0.4),
            (Op::Invert, 1.0, 60.0, 3.0, 0.9),
            // Changes nothing, as on gray images: says nothing about the data.
            (Op::Color, 0.5, 0.0, 0.0, 0.0),
            (Op::Cutout, 0.5, 1.0, 0.1, 0.1),
        ]);
        assert!((middle_distance(&dim) - 0.2).abs() < 1e-12);
        let floor = Floor::new(&dim);
        assert!((floor.distance - 0.02).abs() < 1e-12);
        assert!(floor.admits(Change { changed: 0.7, distance: 0.0201 }));
        assert!(!floor.admits(Change { changed: 0.69, distance: 0.5 }));
        assert!(!floor.admits(Change { changed: 1.0, distance: 0.019 }));
        assert!(!floor.admits(Change { changed: f64::NAN, distance: f64::NAN }));
        let least = Floor { changed: CHANGED_MIN, distance: DISTANCE_MIN };
        assert_eq!(Floor::new(&AffinityTable::default()), least);
    }

    #[test]
    fn nats_per_point_come_from_the_cells_that_cost_something() {
        let cells = [
            (Op::Rotate, 0.1, 0.5, 9.0, 0.1),
            (Op::Rotate, 0.5, 2.0, 0.1, 0.1),
            (Op::Invert, 1.0, 8.0, 0.4, 0.1),
        ];
        assert!((nats_per_point(&table(&cells)) - 0.05).abs() < 1e-12);
        assert!((nats_per_point(&table(&cells[..1])) - RATE_DEFAULT).abs() < 1e-12);
        assert!((nats_per_point(&AffinityTable::default()) - RATE_DEFAULT).abs() < 1e-12);
    }

    #[test]
    fn parts_are_weighted_by_their_images() {
        let part = |loss, accuracy, changed, distance| Measured {
            score: Score { loss, accuracy },
            change: Change { changed, distance },
        };
        let whole = Measured::mean(&[(part(1.0, 1.0, 1.0, 0.4), 1), (part(3.0, 0.0, 0.0, 0.0), 3)]);
        assert_eq!(whole, part(2.5, 0.25, 0.25, 0.1));
        let affinity = whole.against(&part(2.0, 0.5, 0.0, 0.0));
        assert_eq!(affinity, Affinity { loss_gain: 0.5, drop: 25.0 });
        assert_eq!(Measured::mean(&[]), Measured::default());
    }
}
