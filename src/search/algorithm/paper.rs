//! `fast-autoaugment`: Algorithm 1 of the paper, faithfully.
//!
//! Owns the loop over folds, rounds and trials. Never scores sub-policies apart, never asks for
//! diversity and never compares folds: that is `structured`.
//!
//! For each fold k and each t in 0..T: B trials, each a policy of five sub-policies that TPE
//! proposes and the fold's clean model scores on augmented D_A; the N best of each (k, t) are
//! united over all k and t.
//!
//! | | paper | published code | here |
//! |---|---|---|---|
//! | K, B, N | 5, 200, 10 per (k, t) | the same | the same; K is configured |
//! | T | 2 | 1 | 2 |
//! | folds | K disjoint | 5 splits 60/40, D_A overlap | K disjoint |
//! | fold models | no policy | the published answer by default | no policy |
//! | minimised | loss of D_A | error of the best of 5 draws (1) | mean loss, M = 5 draws |
//! | around the policy | as in training | crop, flip, cutout 16 | the recipe's crop, flip |
//! | random draws | | of each candidate its own | common to all candidates |
//! | proposals | TPE (HyperOpt) | HyperOpt, 80 in flight (2) | TPE, none in flight (3) |
//! | TPE | | one density per dimension (4) | [`TpeSettings::POLICIES`] (5) |
//! | duplicates | | by names, within one trial | exact ones, over all |
//! | weights | equal | equal | equal |
//!
//! 1. Its loss is one number per batch, divided by the number of images: noise.
//! 2. So that proposals 21 to 80 are fitted on two or three trials that have no result yet.
//! 3. A proposal knows all earlier trials of its (k, t).
//! 4. ⌈√n / 4⌉ trials are good: 4 of 200.
//! 5. Levels are fitted per operation, and equal slots share what was seen.
//!
//! TPE sits at settings of this program because with the crate's own it does not beat random search
//! here (`benches/proposer.rs`). [`ProposerKind::Random`] is the control.
//!
//! *Invariants*: a proposal is fitted on finished trials of its own (k, t) only; chains (k, t) run
//! side by side and don't see each other, so that the result is one for any number of threads.
//!
//! *Source*: S. Lim et al., "Fast AutoAugment", arXiv 1905.00397, Algorithm 1; `search.py` of
//! kakaobrain/fast-autoaugment.

use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use super::{Algorithm, Context, Proposal, Trial};
use crate::augment::PreparedPolicy;
use crate::policy::{OpsProfile, Policy, SubPolicy};
use crate::random::mix64;
use crate::search::error::SearchError;
use crate::search::lab::{Lab, Score};
use crate::search::proposer::{Proposer, RandomSearch, Tpe, TpeSettings};
use crate::search::space::{Point, PolicySpace};

/// Who proposes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProposerKind {
    /// Multivariate TPE.
    #[default]
    Tpe,
    /// Uniformly at random: the control.
    Random,
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paper {
    /// T: searches per fold.
    pub n_rounds: u32,
    /// B: trials of each.
    pub n_trials: u64,
    /// N: policies that each one gives.
    pub n_best: usize,
    /// M: draws per image.
    pub n_draws: u32,
    /// Who proposes.
    pub proposer: ProposerKind,
}

impl Default for Paper {
    fn default() -> Self {
        Self {
            n_rounds: 2,
            n_trials: 200,
            n_best: 10,
            n_draws: 5,
            proposer: ProposerKind::default(),
        }
    }
}

/// One search: (k, t).
#[derive(Clone, Copy, Debug)]
struct Chain {
    fold: usize,
    round: u32,
}

/// A finished trial, as in the journal: with its point, so that going on costs no proposals.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Tried {
    point: Point,
    /// `None` if it is no finite number.
    loss: Option<f64>,
    accuracy: f64,
}

impl Tried {
    fn loss(&self) -> f64 {
        self.loss.unwrap_or(f64::INFINITY)
    }
}

impl Algorithm for Paper {
    fn name(&self) -> &'static str {
        "fast-autoaugment"
    }

    fn passes(&self, lab: &dyn Lab) -> u64 {
        let per_image = u64::from(self.n_rounds) * self.n_trials * u64::from(self.n_draws);
        (0..lab.n_folds()).map(|fold| per_image * lab.n_held_out(fold) as u64).sum()
    }

    fn propose(&self, context: &Context<'_>) -> Result<Proposal, SearchError> {
        let folds = 0..context.lab.n_folds();
        let chains: Vec<Chain> = (0..self.n_rounds)
            .flat_map(|round| folds.clone().map(move |fold| Chain { fold, round }))
            .collect();
        context.ledger.begin_stage("trials", chains.len() as u64 * self.n_trials);
        let space = PolicySpace::paper();
        let found =
            context.ledger.parallel(&chains, |&chain| self.search(context, &space, chain))?;
        let (mut sub_policies, mut n_duplicates) = (Vec::new(), 0);
        for tried in &found {
            for tried in best(tried, self.n_best) {
                for sub_policy in sub_policies_of(&space, &tried.point)? {
                    if sub_policies.contains(&sub_policy) {
                        n_duplicates += 1;
                    } else {
                        sub_policies.push(sub_policy);
                    }
                }
            }
        }
        if sub_policies.is_empty() {
            let message = "no trial gave a finite loss, so there is no candidate; look for broken \
                           images with 'fastaa-ctl dataset verify'";
            return Err(SearchError::Unfit(message.to_owned()));
        }
        let details = json!({
            "folds": context.lab.n_folds(),
            "rounds": self.n_rounds,
            "trials": self.n_trials,
            "best": self.n_best,
            "draws": self.n_draws,
            "proposer": match self.proposer {
                ProposerKind::Tpe => "tpe",
                ProposerKind::Random => "random",
            },
            "duplicates": n_duplicates,
        });
        let profile = OpsProfile::Fastaa;
        let policy = Policy::new(context.name, profile, 1, sub_policies, Map::new())?;
        let trials = self.trials(&space, &chains, &found)?;
        Ok(Proposal { policy, training_value: None, trials, details })
    }
}

impl Paper {
    /// One (k, t): trial after trial.
    fn search(
        &self,
        context: &Context<'_>,
        space: &PolicySpace,
        chain: Chain,
    ) -> Result<Vec<Tried>, SearchError> {
        let Chain { fold, round } = chain;
        let n_images = context.lab.n_held_out(fold);
        let passes = n_images as u64 * u64::from(self.n_draws);
        let proposer = self.proposer(context, space, chain)?;
        let mut history: Vec<(Point, f64)> = Vec::new();
        let mut done: Vec<Tried> = Vec::new();
        for trial in 0..self.n_trials {
            context.ledger.part(&format!("fold {}, trial {}", fold + 1, trial + 1));
            let key = context.key(&format!("trial/{fold}/{round}/{trial}"));
            let tried: Tried = context.ledger.unit(&key, passes, || {
                let point = proposer.propose(&history, trial);
                let sub_policies = sub_policies_of(space, &point)?;
                let policy = PreparedPolicy::from_parts(OpsProfile::Fastaa, 1, &sub_policies);
                let scores = context.lab.score(fold, 0..n_images, &policy, self.n_draws)?;
                let Score { loss, accuracy } = Score::mean(&scores);
                Ok(Tried { point, loss: Some(loss).filter(|loss| loss.is_finite()), accuracy })
            })?;
            if history.iter().all(|(_, loss)| tried.loss() < *loss) {
                context.ledger.best(format!("loss {:.4} on fold {}", tried.loss(), fold + 1));
            }
            history.push((tried.point.clone(), tried.loss()));
            done.push(tried);
            context.ledger.step();
        }
        Ok(done)
    }

    fn proposer(
        &self,
        context: &Context<'_>,
        space: &PolicySpace,
        chain: Chain,
    ) -> Result<Box<dyn Proposer>, SearchError> {
        let place = u64::from(context.round) << 40 | (chain.fold as u64) << 32;
        let seed = mix64(context.seed ^ mix64(place | u64::from(chain.round)));
        let space = space.space().clone();
        Ok(match self.proposer {
            ProposerKind::Tpe => Box::new(
                Tpe::new(space, seed, TpeSettings::POLICIES)
                    .map_err(|error| SearchError::Unfit(error.to_string()))?,
            ),
            ProposerKind::Random => Box::new(RandomSearch::new(space, seed)),
        })
    }

    /// All trials, for the report: round t of a fold follows round t − 1.
    fn trials(
        &self,
        space: &PolicySpace,
        chains: &[Chain],
        found: &[Vec<Tried>],
    ) -> Result<Vec<Trial>, SearchError> {
        let mut trials = Vec::new();
        for (chain, found) in chains.iter().zip(found) {
            let first = u64::from(chain.round) * self.n_trials;
            for (trial, tried) in (first..).zip(found) {
                let what = in_words(&sub_policies_of(space, &tried.point)?);
                // JSON has no infinity.
                let loss = tried.loss.unwrap_or(f64::MAX);
                trials.push(Trial { fold: Some(chain.fold), trial, loss, what });
            }
        }
        Ok(trials)
    }
}

/// The N with the least loss, the earlier one first among equals; those without a loss never.
fn best(tried: &[Tried], n_best: usize) -> Vec<&Tried> {
    let mut sorted: Vec<&Tried> = tried.iter().filter(|tried| tried.loss.is_some()).collect();
    sorted.sort_by(|a, b| a.loss().total_cmp(&b.loss()));
    sorted.truncate(n_best);
    sorted
}

fn sub_policies_of(space: &PolicySpace, point: &Point) -> Result<Vec<SubPolicy>, SearchError> {
    space.sub_policies(point).map_err(|error| {
        let message = format!("a trial of the search's journal: {error}; move the journal away");
        SearchError::Unfit(message)
    })
}

/// Names of the operations: `Rotate Invert, ShearX Cutout`.
fn in_words(sub_policies: &[SubPolicy]) -> String {
    let names = |sub_policy: &SubPolicy| {
        let names: Vec<&str> = sub_policy.ops.iter().map(|step| step.op.name()).collect();
        names.join(" ")
    };
    sub_policies.iter().map(names).collect::<Vec<_>>().join(", ")
}
