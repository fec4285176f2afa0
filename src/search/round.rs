//! What a round leaves in the journal, for the store's evidence and the report.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::algorithm::{TrainingValue, Trial};
use super::gate::Verdict;

/// CPU time and image passes of one part of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cost {
    /// Seconds of CPU time.
    pub cpu_seconds: f64,
    /// Image passes: forward 1, an image of a training step 3.
    pub passes: u64,
}

/// A finished round; unit `round/N` of the journal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RoundRecord {
    /// From 1.
    pub round: u32,
    /// `ranged`, `structured` or `fast-autoaugment`.
    pub algorithm: String,
    /// The candidate, in the form of policy files.
    pub candidate: Value,
    /// Reference of the policy that was to be beaten, such as `fashion-mnist@1`.
    pub incumbent: String,
    /// What the algorithm's own trainings said, if it trains.
    pub training_value: Option<TrainingValue>,
    /// Everything that was tried.
    pub trials: Vec<Trial>,
    /// What else the algorithm tells.
    pub details: Value,
    /// The gate's; `None` if the candidate was not put to it.
    pub verdict: Option<Verdict>,
    /// Published as this version; `None` if kept.
    pub version: Option<u64>,
    /// Published, or kept and why, in one sentence.
    pub summary: String,
    /// By part: `folds`, `affinity`, `proposals`, `gate`. What an earlier round paid for is not
    /// counted again.
    pub costs: BTreeMap<String, Cost>,
    /// What the paper's algorithm would cost on the same data, from its image passes and the
    /// seconds per pass that this search measured, fold trainings included.
    pub paper_cost: Cost,
}

/// A trained fold model; unit `fold/K` of the journal, K from 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FoldRecord {
    /// Mean training loss of the last epoch, in nats.
    pub train_loss: f64,
    /// Accuracy on clean D_A, in [0, 1].
    pub accuracy: f64,
    /// SHA-256 of the checkpoint's weights, in hexadecimal digits.
    pub weights: String,
}
