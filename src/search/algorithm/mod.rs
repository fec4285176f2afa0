//! How a round finds its candidate: three algorithms behind one interface.
//!
//! Owns what all of them are given and what they give back. They never decide what is published:
//! the gate does.

#[cfg(test)]
mod density_tests;
pub mod objective;
pub mod paper;
mod ranged;
pub mod structured;
mod structured_corners;
mod structured_mix;
mod structured_surface;

pub use paper::{Paper, ProposerKind};
pub use ranged::{Ranged, Shape};
pub use structured::Structured;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::affinity::AffinityTable;
use super::error::SearchError;
use super::lab::Lab;
use super::ledger::Ledger;
use crate::policy::Policy;

/// What an algorithm works with.
pub struct Context<'a> {
    /// Measures.
    pub lab: &'a dyn Lab,
    /// Remembers.
    pub ledger: &'a Ledger,
    /// Keys everything random in the search.
    pub seed: u64,
    /// From 1. Keys of this round's units begin with `round-N/`, so that a later round tries anew.
    pub round: u32,
    /// The policy to beat.
    pub incumbent: &'a Policy,
    /// What each operation costs a clean model, by strength.
    pub affinity: &'a AffinityTable,
    /// Name that the candidate gets, such as `fashion-mnist-r1`.
    pub name: &'a str,
}

impl Context<'_> {
    /// The key of a unit of this round.
    pub fn key(&self, rest: &str) -> String {
        format!("round-{}/{rest}", self.round)
    }
}

/// One evaluated proposal, for the report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trial {
    /// On which fold, if on one.
    pub fold: Option<usize>,
    /// In the order of evaluation within its fold, from 0.
    pub trial: u64,
    /// What the algorithm minimises: a loss in nats, or an error rate.
    pub loss: f64,
    /// What was tried, in a few words.
    pub what: String,
}

/// Training value on samples that are neither trained on nor in D_gate, as mean accuracies over
/// the same seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingValue {
    /// Of the candidate, in [0, 1].
    pub candidate: f64,
    /// Of the incumbent, in [0, 1].
    pub incumbent: f64,
}

/// What an algorithm found.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// The candidate.
    pub policy: Policy,
    /// If the algorithm trains: what it expects. A candidate that is not even here better than the
    /// incumbent is not put to the gate.
    pub training_value: Option<TrainingValue>,
    /// Everything that was tried.
    pub trials: Vec<Trial>,
    /// Anything else worth knowing, for the evidence in the store.
    pub details: Value,
}

/// See the module.
pub trait Algorithm: Sync {
    /// As in the configuration.
    fn name(&self) -> &'static str;

    /// Image passes of a round, the affinity table and the gate not counted.
    fn passes(&self, lab: &dyn Lab) -> u64;

    /// Finds a candidate.
    ///
    /// # Errors
    /// A measurement fails, or no candidate is fit.
    fn propose(&self, context: &Context<'_>) -> Result<Proposal, SearchError>;
}
