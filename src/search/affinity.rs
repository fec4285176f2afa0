//! The affinity table: what a clean fold model loses when held-out images are augmented, by
//! operation and strength.
//!
//! Owns the table and how it is measured. It is measured once per fold model and kept in the
//! journal: later rounds reuse it.
//!
//! *Source*: affinity is the drop of accuracy of a model trained without augmentation, on augmented
//! held-out data (R. Gontijo-Lopes et al., "Affinity and Diversity", arXiv 2002.08973).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::SearchError;
use super::lab::{Change, Lab, Score};
use super::ledger::Ledger;
use crate::augment::PreparedPolicy;
use crate::policy::{Magnitude, Op, OpStep, OpsProfile, SubPolicy};

/// What the strengths mean: TrivialAugment-wide's ranges, with a random sign where there is one.
pub const PROFILE: OpsProfile = OpsProfile::TrivialWide;
/// Strengths of operations that have one: those of TrivialAugment's 31 steps that are tenths, and
/// the two lowest, because a tenth of a rotation is 13.5° already.
pub const STRENGTHS: [f64; 12] =
    [1.0 / 30.0, 2.0 / 30.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// One operation at one strength.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// λ of [`PROFILE`]; 1 for an operation that has no strength.
    pub strength: f64,
    /// Accuracy lost against the clean images, in points (0.01), by fold. Below zero: won.
    pub drop_by_fold: Vec<f64>,
    /// Loss gained against the clean images, in nats: mean over folds.
    pub loss_gain: f64,
    /// How much the images change.
    pub change: Change,
}

impl Cell {
    /// Accuracy lost, in points: mean over folds.
    pub fn drop(&self) -> f64 {
        self.drop_by_fold.iter().sum::<f64>() / self.drop_by_fold.len().max(1) as f64
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AffinityTable {
    /// Mean score of the clean images: mean over folds.
    pub clean: Score,
    /// By operation, ascending in strength.
    pub rows: BTreeMap<Op, Vec<Cell>>,
}

/// What is measured on one fold for one operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct FoldCell {
    score: Score,
    change: Change,
}

/// Strengths at which an operation is measured.
pub fn strengths(op: Op) -> Vec<f64> {
    if !op.has_magnitude() {
        return vec![1.0];
    }
    STRENGTHS.to_vec()
}

/// Image passes that a table costs.
pub fn passes(lab: &dyn Lab) -> u64 {
    let n_cells: u64 = Op::ALL.iter().map(|&op| strengths(op).len() as u64).sum();
    (0..lab.n_folds()).map(|fold| (n_cells + 1) * lab.n_held_out(fold) as u64).sum()
}

impl AffinityTable {
    /// Measures the table, or takes what is known of it from the ledger.
    ///
    /// # Errors
    /// A sample cannot be read, or the journal not written.
    pub fn measure(lab: &dyn Lab, ledger: &Ledger) -> Result<Self, SearchError> {
        let folds: Vec<usize> = (0..lab.n_folds()).collect();
        let jobs: Vec<(Op, usize)> =
            Op::ALL.iter().flat_map(|&op| folds.iter().map(move |&fold| (op, fold))).collect();
        ledger.begin_stage("affinity", jobs.len() as u64);
        let clean = ledger.parallel(&folds, |&fold| {
            let n = lab.n_held_out(fold);
            ledger.unit(&format!("affinity/{fold}/clean"), n as u64, || {
                let scores = lab.score(fold, 0..n, &PreparedPolicy::default(), 1)?;
                Ok(Score::mean(&scores))
            })
        })?;
        let measured = ledger.parallel(&jobs, |&(op, fold)| {
            ledger.part(&format!("{}, fold {}", op.name(), fold + 1));
            let n = lab.n_held_out(fold);
            let strengths = strengths(op);
            let passes = (strengths.len() * n) as u64;
            let cells = ledger.unit(&format!("affinity/{fold}/{}", op.name()), passes, || {
                strengths.iter().map(|&strength| measure_cell(lab, fold, op, strength)).collect()
            })?;
            ledger.step();
            Ok::<Vec<FoldCell>, SearchError>(cells)
        })?;
        let rows = Op::ALL.iter().zip(measured.chunks(folds.len()));
        let rows = rows.map(|(&op, by_fold)| (op, row(op, by_fold, &clean))).collect();
        Ok(Self { clean: Score::mean(&clean), rows })
    }

    /// The largest strength up to which every strength costs at most `budget` points, between the
    /// measured ones by linear interpolation; `None` if the lowest costs more already, or if the
    /// operation changes nothing.
    pub fn reach(&self, op: Op, budget: f64) -> Option<f64> {
        let row = self.rows.get(&op)?;
        if row.iter().all(|cell| cell.change.changed == 0.0) {
            return None;
        }
        let mut reached: Option<(f64, f64)> = None;
        for cell in row {
            let drop = cell.drop();
            if drop > budget {
                let (strength, at) = reached?;
                let share = ((budget - at) / (drop - at)).clamp(0.0, 1.0);
                return Some(strength + share * (cell.strength - strength));
            }
            reached = Some((cell.strength, drop));
        }
        reached.map(|(strength, _)| strength)
    }
}

fn measure_cell(
    lab: &dyn Lab,
    fold: usize,
    op: Op,
    strength: f64,
) -> Result<FoldCell, SearchError> {
    let magnitude = Magnitude::Fixed(strength);
    let steps = vec![OpStep { op, probability: 1.0, magnitude }];
    let policy = PreparedPolicy::from_parts(PROFILE, 1, &[SubPolicy { weight: 1.0, ops: steps }]);
    let images = 0..lab.n_held_out(fold);
    let scores = lab.score(fold, images.clone(), &policy, 1)?;
    let change = lab.change(fold, images, &policy, 1)?;
    Ok(FoldCell { score: Score::mean(&scores), change })
}

/// An operation's cells from its measurements by fold.
fn row(op: Op, by_fold: &[Vec<FoldCell>], clean: &[Score]) -> Vec<Cell> {
    let mean = |idx: usize, value: &dyn Fn(&FoldCell, &Score) -> f64| {
        let values = by_fold.iter().zip(clean).map(|(cells, clean)| value(&cells[idx], clean));
        values.sum::<f64>() / by_fold.len() as f64
    };
    let cell = |(idx, strength): (usize, f64)| Cell {
        strength,
        drop_by_fold: by_fold
            .iter()
            .zip(clean)
            .map(|(cells, clean)| 100.0 * (clean.accuracy - cells[idx].score.accuracy))
            .collect(),
        loss_gain: mean(idx, &|cell, clean| cell.score.loss - clean.loss),
        change: Change {
            changed: mean(idx, &|cell, _| cell.change.changed),
            distance: mean(idx, &|cell, _| cell.change.distance),
        },
    };
    strengths(op).into_iter().enumerate().map(cell).collect()
}
