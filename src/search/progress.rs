//! How far a search is, as plain data: what the worker tells, and what status pages show.
//!
//! Owns the shapes. Append-only, with defaults: an older daemon may read a newer worker.

use serde::{Deserialize, Serialize};

/// One line of the worker's output, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// How far it is; often.
    Progress(Progress),
    /// Something for the log.
    Note {
        /// One sentence.
        text: String,
    },
    /// A round ended.
    Round(RoundOutcome),
    /// The search failed. The exit code says whether a new start would fail in the same way.
    Failed {
        /// What is wrong, with place and cure.
        message: String,
    },
    /// All rounds are done.
    Finished,
}

/// How far a search is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Name of the dataset.
    pub dataset: String,
    /// `ranged`, `structured`, `fast-autoaugment`.
    pub algorithm: String,
    /// From 1.
    pub round: u32,
    /// Rounds to do; 0: as long as the budget lasts.
    pub n_rounds: u32,
    /// What is being done, in words: `fold training`, `affinity`, `trials`, `gate`.
    pub stage: String,
    /// Which part of it, such as `fold 2` or `trial 57 of 200`.
    pub part: String,
    /// Units done in this stage.
    pub done: u64,
    /// Units of this stage.
    pub total: u64,
    /// The best value found in this round so far, in words.
    pub best: String,
    /// Image passes done in this round (a training step's image counts three).
    pub round_passes: u64,
    /// Image passes of this round, as far as is known.
    pub round_passes_total: u64,
    /// Left of this round at the present rate; `None` if not known yet.
    pub eta_seconds: Option<f64>,
    /// CPU time spent in this search so far, in seconds, training included.
    pub cpu_seconds: f64,
    /// GPU time spent in this search so far, in seconds.
    pub gpu_seconds: f64,
    /// Whether the models compute on a GPU.
    pub is_on_gpu: bool,
    /// Of today (UTC).
    pub seconds_today: f64,
    /// Set while the day's budget is used up.
    pub is_out_of_budget: bool,
}

/// How a round ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RoundOutcome {
    /// From 1.
    pub round: u32,
    /// Version in the store if a policy was published, else `None`.
    pub version: Option<u64>,
    /// Published, or kept and why, in one sentence.
    pub summary: String,
    /// CPU time of the round, in seconds.
    pub cpu_seconds: f64,
}
