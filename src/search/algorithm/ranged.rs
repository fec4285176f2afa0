//! `ranged`: TrivialAugment with ranges learned from the data.
//!
//! Density matching gives, by operation and strength, what a clean fold model loses on augmented
//! D_A (the [affinity table](crate::search::affinity)). Each operation's range is cut where it
//! costs more than a budget τ; operations that break the budget at the lowest strength, or that
//! change nothing, are left out; what is left is drawn uniformly. Three numbers remain: τ, the
//! draws, and the share of the identity. They are set by *training value*: short trainings on D_M,
//! paired over candidates by fold and seed, judged on clean images. A small τ suits short
//! schedules, a large one long schedules: no table could tell.
//!
//! Owns the three numbers' search. Trials are proposed one after the other, in view of all finished
//! ones, also those of earlier rounds; the best few are trained again on other folds and compared
//! with the incumbent there, so that the luckiest draw is not taken for the best.
//!
//! *Invariant*: the candidate only has strengths at which a clean model loses at most τ points.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Algorithm, Context, Proposal, TrainingValue, Trial};
use crate::policy::{self, Magnitude, Op, OpStep, Policy, PolicyError, SubPolicy};
use crate::random::mix64;
use crate::search::affinity::{AffinityTable, PROFILE};
use crate::search::error::SearchError;
use crate::search::lab::{Evaluation, Lab, LabError, TrainOn, Training};
use crate::search::proposer::{Proposer, Tpe, TpeSettings};
use crate::search::space::{Coordinate, Dimension, Kind, Point, Space};

/// Budgets τ that are searched, in points of accuracy.
const BUDGET: (f64, f64) = (1.0, 40.0);
/// Shares of the identity that are searched.
const IDENTITY: (f64, f64) = (0.0, 0.6);
/// Sub-policies drawn per image: 1 or 2.
const DRAWS: (f64, f64) = (1.0, 3.0);
/// What the first round tries first, as (τ, draws, share of the identity): the budgets that did
/// best on different schedules, and a stronger form.
const DESIGN: [(f64, f64, f64); 4] =
    [(8.0, 1.0, 0.1), (20.0, 1.0, 0.1), (3.0, 1.0, 0.1), (20.0, 2.0, 0.3)];
/// Told apart from the seeds of the gate's trainings.
const SEED_TAG: u64 = 0x7261_6e67_6564;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Ranged {
    /// Trials of a round.
    pub n_trials: u64,
    /// Trainings of each trial, each on another fold and with another seed.
    pub n_pairs: usize,
    /// Trials of a round that are trained again.
    pub n_finalists: usize,
    /// Further trainings of each of them, and as many of the incumbent.
    pub n_final_pairs: usize,
}

impl Default for Ranged {
    fn default() -> Self {
        Self { n_trials: 8, n_pairs: 2, n_finalists: 2, n_final_pairs: 2 }
    }
}

/// The three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// τ: most points of accuracy that a strength may cost a clean model.
    pub budget: f64,
    /// Sub-policies drawn per image.
    pub draws: u32,
    /// Share of the identity among them.
    pub identity: f64,
}

/// A finished trial, as the journal keeps it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Finished {
    point: Point,
    /// Share of clean images that were classified wrong; `None`: no operation fits, or a training
    /// diverged.
    error: Option<f64>,
}

impl Shape {
    /// The policy of this shape, or `None` if no operation stays within the budget.
    ///
    /// # Errors
    /// A name that a policy cannot have.
    pub fn policy(&self, table: &AffinityTable, name: &str) -> Result<Option<Policy>, PolicyError> {
        let reach = |op: Op| table.reach(op, self.budget).map(|reach| (op, round_to(reach, 1e3)));
        let kept: Vec<(Op, f64)> = Op::ALL.into_iter().filter_map(reach).collect();
        if kept.is_empty() {
            return Ok(None);
        }
        let weight = (1.0 - self.identity) / kept.len() as f64;
        let mut sub_policies = Vec::new();
        if self.identity > 0.0 {
            sub_policies.push(SubPolicy { weight: self.identity, ops: Vec::new() });
        }
        sub_policies.extend(kept.into_iter().map(|(op, reach)| {
            let magnitude = if op.has_magnitude() {
                Magnitude::Range(0.0, reach)
            } else {
                Magnitude::Fixed(0.0)
            };
            SubPolicy { weight, ops: vec![OpStep { op, probability: 1.0, magnitude }] }
        }));
        let provenance = Map::from_iter([
            ("kind".to_owned(), Value::from("ranged")),
            ("budget_points".to_owned(), Value::from(self.budget)),
        ]);
        Policy::new(name, PROFILE, self.draws, sub_policies, provenance).map(Some)
    }

    fn from_point(point: &Point) -> Self {
        let real = |idx: usize| match point.0.get(idx) {
            Some(Coordinate::Real(value)) => *value,
            _ => 0.0,
        };
        Self {
            budget: round_to(real(0).exp(), 1e2),
            draws: if real(1) < 2.0 { 1 } else { 2 },
            identity: round_to(real(2), 1e2),
        }
    }

    fn to_point((budget, draws, identity): (f64, f64, f64)) -> Point {
        Point(vec![
            Coordinate::Real(budget.ln()),
            Coordinate::Real(draws),
            Coordinate::Real(identity),
        ])
    }

    fn text(&self) -> String {
        let Self { budget, draws, identity } = self;
        let unit = if *draws == 1 { "draw" } else { "draws" };
        format!("budget {budget} points, {draws} {unit}, identity {identity}")
    }
}

/// Half away from zero, to so many parts of one: for people who read policies.
fn round_to(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

fn space() -> Space {
    let dimension = |name: &str, (lo, hi): (f64, f64)| Dimension {
        name: name.to_owned(),
        kind: Kind::Continuous { lo, hi },
        parent: None,
    };
    Space::new(vec![
        dimension("log_budget", (BUDGET.0.ln(), BUDGET.1.ln())),
        dimension("draws", DRAWS),
        dimension("identity", IDENTITY),
    ])
    .expect("three ordered ranges")
}

impl Algorithm for Ranged {
    fn name(&self) -> &'static str {
        "ranged"
    }

    fn passes(&self, lab: &dyn Lab) -> u64 {
        let n_again = (self.n_finalists + 1) * self.n_final_pairs + self.n_pairs;
        let n_trainings = self.n_trials * self.n_pairs as u64 + n_again as u64;
        n_trainings * lab.passes(TrainOn::Fold(0))
    }

    fn propose(&self, context: &Context<'_>) -> Result<Proposal, SearchError> {
        let ledger = context.ledger;
        ledger.begin_stage("trials", self.n_trials + self.n_finalists as u64 + 1);
        let history = self.run_trials(context)?;
        let finalists = self.finalists(context, &history)?;
        let later = self.n_pairs..self.n_pairs + self.n_final_pairs;
        let mut results = Vec::new();
        for shape in &finalists {
            ledger.part(&format!("again: {}", shape.text()));
            let policy = shape.policy(context.affinity, context.name)?;
            let policy = policy.expect("finalists have operations");
            results.push((mean_error(train(context, &policy, later.clone())?), policy, shape));
            ledger.step();
        }
        ledger.part("again: the incumbent");
        let incumbent = mean_error(train(context, context.incumbent, later)?);
        ledger.step();
        let best = results
            .into_iter()
            .filter_map(|(error, policy, shape)| Some((error?, policy, shape)))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        let trials = trials(&history);
        let Some((error, policy, shape)) = best else {
            let details = json!({ "note": "no operation stays within any budget that was tried" });
            return Ok(Proposal { policy: policy::none(), training_value: None, trials, details });
        };
        let training_value = incumbent
            .map(|incumbent| TrainingValue { candidate: 1.0 - error, incumbent: 1.0 - incumbent });
        ledger.best(format!("{}, clean accuracy {:.2} %", shape.text(), 100.0 * (1.0 - error)));
        let details = json!({ "shape": shape, "trials_in_all_rounds": history.len() });
        Ok(Proposal { policy, training_value, trials, details })
    }
}

impl Ranged {
    /// All finished trials, of earlier rounds first; runs those of this round.
    fn run_trials(&self, context: &Context<'_>) -> Result<Vec<Finished>, SearchError> {
        let ledger = context.ledger;
        // Few trials: fit on all there are as soon as the proposer finds them enough.
        let settings = TpeSettings { n_startup: DESIGN.len(), ..TpeSettings::SCALARS };
        let proposer = Tpe::new(space(), context.seed, settings)
            .map_err(|error| SearchError::Unfit(error.to_string()))?;
        let mut history: Vec<Finished> = Vec::new();
        for round in 1..=context.round {
            for trial in 0..self.n_trials {
                let number = history.len() as u64;
                let key = format!("round-{round}/trial/{trial}");
                if let Some(finished) = ledger.finished(&key)? {
                    history.push(finished);
                    continue;
                }
                let design = usize::try_from(number).ok().and_then(|idx| DESIGN.get(idx));
                let point = match design {
                    Some(&numbers) => Shape::to_point(numbers),
                    None => proposer.propose(&losses(&history), number),
                };
                let shape = Shape::from_point(&point);
                ledger.part(&format!("trial {} of {}: {}", trial + 1, self.n_trials, shape.text()));
                let policy = shape.policy(context.affinity, context.name)?;
                let error = match &policy {
                    Some(policy) => mean_error(train(context, policy, 0..self.n_pairs)?),
                    None => None,
                };
                let finished = ledger.unit(&key, 0, || Ok(Finished { point, error }))?;
                history.push(finished);
                ledger.step();
            }
        }
        Ok(history)
    }

    /// The best shapes of all rounds, without those that make the same policy.
    fn finalists(
        &self,
        context: &Context<'_>,
        history: &[Finished],
    ) -> Result<Vec<Shape>, SearchError> {
        let mut sorted: Vec<(f64, Shape)> = history
            .iter()
            .filter_map(|finished| Some((finished.error?, Shape::from_point(&finished.point))))
            .collect();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut ids, mut shapes) = (Vec::new(), Vec::new());
        for (_, shape) in sorted {
            let Some(policy) = shape.policy(context.affinity, context.name)? else { continue };
            if !ids.contains(&policy.id()) && shapes.len() < self.n_finalists {
                ids.push(policy.id());
                shapes.push(shape);
            }
        }
        Ok(shapes)
    }
}

/// Trains under a policy, once per pair; `None` for a training that diverged.
fn train(
    context: &Context<'_>,
    policy: &Policy,
    pairs: std::ops::Range<usize>,
) -> Result<Vec<Option<Evaluation>>, SearchError> {
    let pairs: Vec<usize> = pairs.collect();
    context.ledger.parallel(&pairs, |&pair| {
        let fold = pair % context.lab.n_folds();
        let on = TrainOn::Fold(fold);
        let key = format!("train/fold-{fold}/{}/{pair}", policy.id());
        let seed = mix64(mix64(context.seed ^ SEED_TAG).wrapping_add(pair as u64));
        context.ledger.unit(&key, context.lab.passes(on), || {
            match context.lab.train(&Training { on, policy, seed }) {
                Ok(evaluation) => Ok(Some(evaluation)),
                Err(LabError::Diverged { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    })
}

/// Share of wrong images, over all trainings; `None` if one diverged.
fn mean_error(evaluations: Vec<Option<Evaluation>>) -> Option<f64> {
    let n = evaluations.len().max(1) as f64;
    let errors: Option<Vec<f64>> =
        evaluations.iter().map(|one| Some(1.0 - one.as_ref()?.accuracy())).collect();
    Some(errors?.iter().sum::<f64>() / n)
}

fn losses(history: &[Finished]) -> Vec<(Point, f64)> {
    let loss = |finished: &Finished| finished.error.unwrap_or(f64::INFINITY);
    history.iter().map(|finished| (finished.point.clone(), loss(finished))).collect()
}

fn trials(history: &[Finished]) -> Vec<Trial> {
    let trial = |(number, finished): (u64, &Finished)| Trial {
        fold: None,
        trial: number,
        loss: finished.error.unwrap_or(1.0),
        what: Shape::from_point(&finished.point).text(),
    };
    (0..).zip(history).map(trial).collect()
}

#[cfg(test)]
#[path = "ranged_tests.rs"]
mod tests;
