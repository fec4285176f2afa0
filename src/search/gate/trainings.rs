//! The trainings of one test, as units of the ledger.
//!
//! Owns their keys, seeds and outcomes. Never decides anything.
//!
//! A unit's key is `train/searched/POLICY_ID/SEED_INDEX`, the index from 0: it names neither round
//! nor role, so that a policy is trained once however often it is tested.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Contender, GateSettings};
use crate::random::mix64;
use crate::search::error::SearchError;
use crate::search::lab::{Evaluation, Lab, LabError, TrainOn, Training};
use crate::search::ledger::Ledger;

/// What became of a training; the value of its unit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// It was judged on the clean images of D_gate.
    Evaluated(Evaluation),
    /// Its loss became no number; the lab's message.
    Diverged(String),
}

/// See the module.
pub(super) struct Trainings<'a> {
    lab: &'a dyn Lab,
    ledger: &'a Ledger,
    settings: &'a GateSettings,
    contenders: &'a [Contender<'a>],
}

impl<'a> Trainings<'a> {
    pub(super) fn new(
        lab: &'a dyn Lab,
        ledger: &'a Ledger,
        settings: &'a GateSettings,
        contenders: &'a [Contender<'a>],
    ) -> Self {
        let total = contenders.len() as u64 * u64::from(settings.n_seeds);
        ledger.begin_stage("gate", total);
        Self { lab, ledger, settings, contenders }
    }

    pub(super) fn n_contenders(&self) -> usize {
        self.contenders.len()
    }

    /// The outcomes of these seeds (indices from 0), seed by seed, each in the order of contenders.
    pub(super) fn train(&self, seeds: Range<u32>) -> Result<Vec<Outcome>, SearchError> {
        let jobs: Vec<(u32, &Contender<'_>)> =
            seeds.flat_map(|seed| self.contenders.iter().map(move |arm| (seed, arm))).collect();
        self.ledger.parallel(&jobs, |&(seed_idx, contender)| {
            let n_seeds = self.settings.n_seeds;
            self.ledger.part(&format!("{}, seed {} of {n_seeds}", contender.role, seed_idx + 1));
            let key = format!("train/searched/{}/{seed_idx}", contender.policy.id());
            let training = Training {
                on: TrainOn::Searched,
                policy: contender.policy,
                seed: mix64(mix64(self.settings.seed) ^ u64::from(seed_idx)),
            };
            let outcome =
                self.ledger.unit(&key, self.lab.passes(TrainOn::Searched), || {
                    match self.lab.train(&training) {
                        Ok(evaluation) => Ok(Outcome::Evaluated(evaluation)),
                        Err(error @ LabError::Diverged { .. }) => {
                            Ok(Outcome::Diverged(error.to_string()))
                        }
                        Err(error) => Err(error.into()),
                    }
                })?;
            self.ledger.step();
            Ok(outcome)
        })
    }

    /// Images that one seed's models were judged on; 0 if none was.
    ///
    /// # Errors
    /// The models were judged on different numbers of images, or on fewer than two.
    pub(super) fn n_images(outcomes: &[Outcome]) -> Result<usize, SearchError> {
        let mut counts = outcomes.iter().filter_map(|outcome| match outcome {
            Outcome::Evaluated(evaluation) => Some(evaluation.right.len()),
            Outcome::Diverged(_) => None,
        });
        let n_images = counts.next().unwrap_or(0);
        if let Some(other) = counts.find(|&other| other != n_images) {
            return Err(SearchError::Unfit(format!(
                "the gate's models were judged on {n_images} and on {other} images; move the \
                 search's journal away to start afresh"
            )));
        }
        if n_images == 1 {
            return Err(SearchError::Unfit(
                "D_gate has a single image, which shows no spread; set gate_images to 1000 or more"
                    .into(),
            ));
        }
        Ok(n_images)
    }

    /// The error for a rival, which nothing can be compared with any more. Seeds from 1.
    pub(super) fn rival_diverged(&self, idx: usize, seed: u32, why: &str) -> SearchError {
        SearchError::Unfit(format!(
            "the gate cannot compare with {}: its training with seed {seed} diverged ({why})",
            self.contenders[idx].words
        ))
    }
}
