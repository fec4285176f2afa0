//! `structured`: density matching on sub-policies, without the paper's weaknesses.
//!
//! Owns the course of a round: singles, pairs, halvings, the policy. Never trains anything.
//!
//! 1. The 19 operations of the folded space at five strengths each (three have none): *singles*,
//!    83 of them, on the first images of every fold.
//! 2. Pairs of two different operations, predicted from the singles (losses add up, changes are
//!    independent); the best of them, with quotas per operation, are measured together.
//! 3. Two halvings: a quarter of the pairs goes on and sees more images. Where the probabilities
//!    are best follows from four corners, of which only one is new (`structured_surface`).
//! 4. The finalists are scored again on images that no earlier stage saw, by the models of all
//!    folds. A sub-policy stays only if there are probabilities with which it keeps the budget and
//!    the floor of diversity on ⌈4K/5⌉ folds and on the mean.
//! 5. Of these, at most 64, with weights in proportion to 1 / price, so balanced that no operation
//!    has more than half of the weight.
//!
//! | | paper | here |
//! |---|---|---|
//! | a trial | five sub-policies, one number | one sub-policy, four corners |
//! | probabilities | 10 searched dimensions | follow from the corners |
//! | levels | mirrored and dead ones too | strengths of the folded space |
//! | minimised | loss | loss per change within a budget, above a floor |
//! | images | all of D_A for each trial | 100, 400 and all the rest, for a quarter each |
//! | folds | each by itself | all of them score every candidate |
//! | result | 500 equal sub-policies | ≤ 64, weighted |
//!
//! For K = 5 folds of 800 images a round costs at most 0.98 M image passes, a paper's round 8.0 M.
//! The affinity table (0.49 M there) is not counted in either; only its median distance and its
//! rate of nats per point are used. Its strengths cannot be: TrivialAugment's ranges merge the two
//! directions of the enhancers, and shift by pixels where `fastaa` shifts by shares of the width.
//!
//! The grid is another one in each of the first eight rounds: the lab's images and random words are
//! always the same, so that the same grid would end at the same policy.
//!
//! *Invariant*: stages follow one another, and within a stage nothing depends on anything measured
//! in it. So the result is one for any number of threads.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::objective::{self, Floor};
use super::paper::ProposerKind;
use super::structured_corners::{Corner, Corners, GridOp, N_PARTS, Pair, part};
use super::structured_mix::{choose, weights};
pub use super::structured_surface::Aim;
use super::structured_surface::{Best, Terms, best, predicted};
use super::{Algorithm, Context, Proposal, Trial};
use crate::policy::{Op, OpStep, OpsProfile, Policy, SubPolicy, ops_text};
use crate::random::mix64;
use crate::search::error::SearchError;
use crate::search::lab::Lab;
use crate::search::proposer::{Proposer, RandomSearch, Tpe, TpeSettings};
use crate::search::space::{
    Coordinate, Dimension, Direction, FoldedOp, Kind, Parent, Point, Space,
};

/// Most sub-policies in a policy of this algorithm.
pub const SUB_POLICIES_MAX: usize = 64;
/// Of the pairs, 1 in so many goes on to the next stage.
const KEPT_OF: usize = 4;
/// Of five folds, on so many must a finalist keep the terms.
const FOLDS_NEEDED_OF_FIVE: usize = 4;
/// Trials that are proposed from the same history, if a proposer is asked.
const BATCH: usize = 64;
/// Sub-policies with less weight are left out: nobody would meet them.
const WEIGHT_MIN: f64 = 1e-4;

/// Where the pairs come from. The grid is the default because it finds cheaper policies for as many
/// passes than TPE does, and TPE than random pairs (`benches/search_cost.rs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pairs {
    /// All pairs of the grid, ordered by what the singles predict. One order of the two operations
    /// each (geometry before colours; the other way round in even rounds): two orders would spend
    /// the trials twice on one prediction.
    #[default]
    Grid,
    /// A proposer asked for pairs, 64 at a time.
    Proposed(ProposerKind),
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Structured {
    /// Pairs that are measured in the first stage.
    pub n_pairs: usize,
    /// Where they come from.
    pub pairs: Pairs,
    /// Accuracy that a sub-policy may cost a clean model, in points; converted to nats by the
    /// affinity table. A range from nothing up to a cut at 15 points costs 5 on average, if costs
    /// grow with the square of the strength.
    pub budget_points: f64,
    /// What is looked for.
    pub aim: Aim,
    /// Whether sub-policies below [`Floor`] are refused; `false` is a control.
    pub has_floor: bool,
}

impl Default for Structured {
    fn default() -> Self {
        Self {
            n_pairs: 1536,
            pairs: Pairs::default(),
            budget_points: 5.0,
            aim: Aim::default(),
            has_floor: true,
        }
    }
}

/// A pair with its best probabilities.
#[derive(Clone, Copy, Debug)]
struct Ranked {
    pair: Pair,
    best: Best,
}

impl Ranked {
    /// What is left of the pair where a probability is zero.
    fn steps(&self) -> Vec<OpStep> {
        let steps = self.pair.iter().zip(self.best.probabilities);
        let steps = steps.map(|(op, probability)| op.with_probability(probability));
        steps.filter(|step| step.probability > 0.0).collect()
    }

    fn ops(&self) -> Vec<Op> {
        self.steps().iter().map(|step| step.op).collect()
    }
}

impl Algorithm for Structured {
    fn name(&self) -> &'static str {
        "structured"
    }

    /// An upper bound: fewer pairs may be fit than are allowed for.
    fn passes(&self, lab: &dyn Lab) -> u64 {
        let n_singles = GridOp::all(1).len();
        let (n_second, n_last) = (self.n_pairs / KEPT_OF, self.n_finalists());
        let last = 1 + n_last + n_singles.min(2 * n_last);
        let n_corners = [1 + n_singles + self.n_pairs, 1 + n_singles + n_second, last];
        let passes = |fold| {
            let parts = n_corners.iter().enumerate();
            parts.map(|(idx, n)| n * part(lab, fold, idx).len()).sum::<usize>() as u64
        };
        (0..lab.n_folds()).map(passes).sum()
    }

    fn propose(&self, context: &Context<'_>) -> Result<Proposal, SearchError> {
        let terms = self.terms(context);
        let mut corners = Corners::new(context)?;
        let mut singles = vec![Corner::Clean];
        singles.extend(GridOp::all(context.round).into_iter().map(Corner::One));
        for part in 0..N_PARTS - 1 {
            corners.measure(&format!("singles-{part}"), &singles, part)?;
        }
        let (pairs, trials) = match self.pairs {
            Pairs::Grid => {
                let pairs = self.grid_pairs(context.round, &corners, &terms);
                let both: Vec<Corner> = pairs.iter().map(|&pair| Corner::Two(pair)).collect();
                corners.measure("pairs-0", &both, 0)?;
                let trials = pairs.iter().map(|&pair| trial(&corners, &terms, pair)).collect();
                (pairs, trials)
            }
            Pairs::Proposed(kind) => self.proposed_pairs(context, &mut corners, &terms, kind)?,
        };
        let second = halved(&corners, &terms, &pairs, 1, self.n_pairs / KEPT_OF);
        let both: Vec<Corner> = second.iter().map(|&pair| Corner::Two(pair)).collect();
        corners.measure("pairs-1", &both, 1)?;
        let last = halved(&corners, &terms, &second, 2, self.n_finalists());
        let needed: Vec<Corner> = last.iter().flat_map(|&pair| Corner::of(pair)).collect();
        corners.measure("finalists", &needed, N_PARTS - 1)?;
        let finalists = self.accepted(context, &corners, &terms, &last)?;
        context.ledger.best(format!(
            "{} sub-policies, the best one {:.4} nats for a distance of {:.3}",
            finalists.len(),
            finalists[0].best.affinity.loss_gain,
            finalists[0].best.change.distance
        ));
        let policy = policy(context.name, &finalists)?;
        let details = self.details(&terms, [pairs.len(), second.len(), last.len()], &finalists);
        let trials = (0..).zip(trials).map(|(trial, found)| Trial { trial, ..found }).collect();
        Ok(Proposal { policy, training_value: None, trials, details })
    }
}

impl Structured {
    fn n_finalists(&self) -> usize {
        self.n_pairs / KEPT_OF / KEPT_OF
    }

    fn terms(&self, context: &Context<'_>) -> Terms {
        let budget = self.budget_points * objective::nats_per_point(context.affinity);
        let floor = self.has_floor.then(|| Floor::new(context.affinity));
        Terms { aim: self.aim, budget, floor }
    }

    /// The pairs of the grid that the singles say are best.
    fn grid_pairs(&self, round: u32, corners: &Corners<'_>, terms: &Terms) -> Vec<Pair> {
        let mut grid = GridOp::all(round);
        if round.is_multiple_of(2) {
            grid.reverse();
        }
        let clean = corners.pooled(Corner::Clean, 0..N_PARTS - 1);
        let single = |&op: &GridOp| (op, corners.pooled(Corner::One(op), 0..N_PARTS - 1));
        let singles: Vec<_> = grid.iter().map(single).collect();
        let mut ranked = Vec::new();
        for (idx, &(first, alone)) in singles.iter().enumerate() {
            for &(second, other) in &singles[idx + 1..] {
                if first.op() != second.op() {
                    let found = best(&[predicted(clean, alone, other)], terms, 1);
                    ranked.extend(found.map(|best| Ranked { pair: [first, second], best }));
                }
            }
        }
        kept(ranked, self.n_pairs)
    }

    /// Pairs that a proposer asks for, batch after batch; each batch knows all earlier ones.
    fn proposed_pairs(
        &self,
        context: &Context<'_>,
        corners: &mut Corners<'_>,
        terms: &Terms,
        kind: ProposerKind,
    ) -> Result<(Vec<Pair>, Vec<Trial>), SearchError> {
        let space = pair_space();
        let seed = mix64(context.seed ^ mix64(u64::from(context.round)));
        let proposer: Box<dyn Proposer> = match kind {
            ProposerKind::Random => Box::new(RandomSearch::new(space, seed)),
            ProposerKind::Tpe => Box::new(
                Tpe::new(space, seed, TpeSettings::POLICIES)
                    .map_err(|error| SearchError::Unfit(error.to_string()))?,
            ),
        };
        let mut history: Vec<(Point, f64)> = Vec::new();
        let (mut pairs, mut trials) = (Vec::new(), Vec::new());
        let all: Vec<u64> = (0..self.n_pairs as u64).collect();
        for batch in all.chunks(BATCH) {
            let points =
                context.ledger.parallel(batch, |&trial| Ok(proposer.propose(&history, trial)))?;
            let proposed: Vec<Option<Pair>> =
                points.iter().map(|point| pair_of(point, context.round)).collect();
            let both: Vec<Corner> = proposed.iter().flatten().map(|&p| Corner::Two(p)).collect();
            corners.measure(&format!("pairs-0/{}", batch[0]), &both, 0)?;
            for (point, pair) in points.into_iter().zip(proposed) {
                let found = pair.map(|pair| trial(corners, terms, pair));
                let loss = found.as_ref().map_or(f64::INFINITY, |found| found.loss);
                history.push((point, loss));
                trials.extend(found);
                pairs.extend(pair);
            }
        }
        pairs.sort_unstable();
        pairs.dedup();
        Ok((pairs, trials))
    }

    /// The finalists that keep the terms on enough folds, on images that decided nothing so far;
    /// each set of operations and strengths once.
    fn accepted(
        &self,
        context: &Context<'_>,
        corners: &Corners<'_>,
        terms: &Terms,
        pairs: &[Pair],
    ) -> Result<Vec<Ranked>, SearchError> {
        let n_needed = (FOLDS_NEEDED_OF_FIVE * context.lab.n_folds()).div_ceil(5);
        let ranked = pairs.iter().filter_map(|&pair| {
            let folds = corners.by_fold(pair, N_PARTS - 1..N_PARTS);
            best(&folds, terms, n_needed).map(|best| Ranked { pair, best })
        });
        // By operations and strengths, whatever the probabilities; the cheapest one stays.
        let mut distinct: BTreeMap<Vec<GridOp>, Ranked> = BTreeMap::new();
        for found in ranked {
            let used = found.pair.into_iter().zip(found.best.probabilities);
            let used: Vec<GridOp> = used.filter(|(_, p)| *p > 0.0).map(|(op, _)| op).collect();
            let known = distinct.entry(used).or_insert(found);
            if found.best.price < known.best.price {
                *known = found;
            }
        }
        if distinct.is_empty() {
            return Err(SearchError::Unfit(format!(
                "no pair of operations changes enough of the images and costs at most {} points \
                 on {n_needed} of {} folds; a model that knows the data better would tolerate \
                 more: raise search.fold_epochs, or search with algorithm = \"ranged\"",
                self.budget_points,
                context.lab.n_folds()
            )));
        }
        let ranked = sorted(distinct.into_values().collect());
        let ops: Vec<Vec<Op>> = ranked.iter().map(Ranked::ops).collect();
        Ok(choose(&ops, SUB_POLICIES_MAX).into_iter().map(|idx| ranked[idx]).collect())
    }

    fn details(&self, terms: &Terms, n_pairs: [usize; 3], finalists: &[Ranked]) -> Value {
        let finalists: Vec<Value> = finalists
            .iter()
            .map(|found| {
                json!({
                    "what": ops_text(&found.steps()),
                    "price": found.best.price,
                    "loss_gain": found.best.affinity.loss_gain,
                    "drop": found.best.affinity.drop,
                    "change": found.best.change,
                    "folds": found.best.n_folds,
                })
            })
            .collect();
        json!({
            "budget_points": self.budget_points,
            "budget_nats": terms.budget,
            "changed_min": terms.floor.map(|floor| floor.changed),
            "distance_min": terms.floor.map(|floor| floor.distance),
            "pairs_by_stage": n_pairs,
            "sub_policies": finalists,
        })
    }
}

/// The report's line of a pair after the first stage.
fn trial(corners: &Corners<'_>, terms: &Terms, pair: Pair) -> Trial {
    let found = best(&[pooled(corners, pair, 1)], terms, 1);
    // JSON has no infinity.
    let loss = found.map_or(f64::MAX, |found| found.price);
    let what = pair.map(GridOp::in_words).join(", ");
    Trial { fold: None, trial: 0, loss, what }
}

fn pooled(corners: &Corners<'_>, pair: Pair, n_parts: usize) -> [super::objective::Measured; 4] {
    Corner::of(pair).map(|corner| corners.pooled(corner, 0..n_parts))
}

/// The best `n` of the pairs by all images seen so far.
fn halved(
    corners: &Corners<'_>,
    terms: &Terms,
    pairs: &[Pair],
    n_parts: usize,
    n: usize,
) -> Vec<Pair> {
    let ranked = pairs.iter().filter_map(|&pair| {
        let found = best(&[pooled(corners, pair, n_parts)], terms, 1);
        found.map(|best| Ranked { pair, best })
    });
    kept(ranked.collect(), n)
}

/// At most `n`, with the quotas of [`choose`].
fn kept(ranked: Vec<Ranked>, n: usize) -> Vec<Pair> {
    let ranked = sorted(ranked);
    let ops: Vec<Vec<Op>> = ranked.iter().map(Ranked::ops).collect();
    choose(&ops, n).into_iter().map(|idx| ranked[idx].pair).collect()
}

/// Cheapest first.
fn sorted(mut ranked: Vec<Ranked>) -> Vec<Ranked> {
    ranked.sort_by(|a, b| a.best.price.total_cmp(&b.best.price).then_with(|| a.pair.cmp(&b.pair)));
    ranked
}

/// The policy of the accepted ones.
fn policy(name: &str, finalists: &[Ranked]) -> Result<Policy, SearchError> {
    let ops: Vec<Vec<Op>> = finalists.iter().map(Ranked::ops).collect();
    // Prices can be negative only where the least loss is sought: then all are worth the same.
    let worth = |found: &Ranked| match found.best.price {
        price if price > 0.0 => 1.0 / price,
        _ => 1.0,
    };
    let worth: Vec<f64> = finalists.iter().map(worth).collect();
    let weights = weights(&ops, &worth);
    let sub_policies = finalists
        .iter()
        .zip(weights)
        .map(|(found, weight)| SubPolicy { weight, ops: found.steps() });
    let sub_policies = sub_policies.filter(|sub_policy| sub_policy.weight >= WEIGHT_MIN);
    let policy = Policy::new(name, OpsProfile::Fastaa, 1, sub_policies.collect(), Map::new())?;
    Ok(policy)
}

/// Two operations with their strengths; probabilities need no search.
fn pair_space() -> Space {
    let n_options = FoldedOp::ALL.len();
    let has_none = |option: &usize| FoldedOp::ALL[*option].direction == Direction::NoLevel;
    let unused_for: Vec<usize> = (0..n_options).filter(has_none).collect();
    let dimensions = (0..2).flat_map(|place| {
        let parent = Parent { dimension: 2 * place, unused_for: unused_for.clone() };
        let named =
            |what: &str, kind, parent| Dimension { name: format!("{what}_{place}"), kind, parent };
        [
            named("op", Kind::Categorical { n_options }, None),
            named("level", Kind::Continuous { lo: 0.0, hi: 1.0 }, Some(parent)),
        ]
    });
    Space::new(dimensions.collect()).expect("each level's parent comes just before it")
}

/// The pair of the grid next to a point; none for an operation with itself.
fn pair_of(point: &Point, round: u32) -> Option<Pair> {
    let op = |two: &[Coordinate]| match two {
        [Coordinate::Option(option), Coordinate::Real(level)] => {
            Some(GridOp::near(*option, *level, round))
        }
        [Coordinate::Option(option), _] => Some(GridOp::near(*option, 1.0, round)),
        _ => None,
    };
    let mut ops = point.0.chunks(2).map(op);
    let (first, second) = (ops.next()??, ops.next()??);
    (first.op() != second.op()).then_some([first, second])
}
