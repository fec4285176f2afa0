//! What the control socket says of the search and of what runs report.
//!
//! Owns the JSON shapes; append-only, with defaults, as all of `messages`. They mirror what the
//! search worker tells: `control` knows nothing of the search itself.

use serde::{Deserialize, Serialize};

/// Where the search is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchReport {
    /// `disabled`, `waiting`, `starting`, `running`, `paused`, `out-of-budget`, `backing-off`,
    /// `failed` or `finished`; empty from a daemon that knows no search.
    pub state: String,
    /// Why, in words; empty where the state says it all.
    pub reason: String,
    /// Name of the dataset.
    pub dataset: String,
    /// The worker's process, if one runs.
    pub pid: Option<u32>,
    /// Crashes of the worker, after each of which it is started again.
    pub restarts: u64,
    /// Lines of the worker's output that were no events.
    pub bad_lines: u64,
    /// Compute per day, in seconds; 0: no limit.
    pub budget_seconds: u64,
    /// What the worker told last; `None` before it told anything.
    pub progress: Option<SearchProgressReport>,
    /// Outcomes of the rounds, oldest first.
    pub rounds: Vec<SearchRoundReport>,
    /// What the worker and the daemon noted, oldest first.
    pub notes: Vec<String>,
}

/// How far a search is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchProgressReport {
    /// `ranged`, `structured`, `fast-autoaugment`.
    pub algorithm: String,
    /// From 1.
    pub round: u32,
    /// Rounds to do; 0: as long as the budget lasts.
    pub n_rounds: u32,
    /// What is being done, in words.
    pub stage: String,
    /// Which part of it.
    pub part: String,
    /// Units done in this stage.
    pub done: u64,
    /// Units of this stage.
    pub total: u64,
    /// The best value found in this round so far, in words.
    pub best: String,
    /// Image passes done in this round.
    pub round_passes: u64,
    /// Image passes of this round, as far as is known.
    pub round_passes_total: u64,
    /// Left of this round at the present rate, in seconds; `None` if not known yet.
    pub eta_seconds: Option<f64>,
    /// CPU time spent in this search so far, in seconds.
    pub cpu_seconds: f64,
    /// GPU time spent in this search so far, in seconds.
    pub gpu_seconds: f64,
    /// Compute of today (UTC), in seconds.
    pub seconds_today: f64,
}

/// How a round of the search ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchRoundReport {
    /// From 1.
    pub round: u32,
    /// Version in the store if a policy was published, else `None`.
    pub version: Option<u64>,
    /// Published, or kept and why, in one sentence.
    pub summary: String,
    /// CPU time of the round, in seconds.
    pub cpu_seconds: f64,
}

/// What became of a reported metric.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MetricReport {
    /// Reference of the policy that was taken back because of it, if one was.
    pub rolled_back: Option<String>,
    /// The version that is active since then.
    pub active_version: Option<u64>,
}
