//! What the control socket says of the search and of what runs report.
//!
//! Owns the JSON shapes; append-only, with defaults, as all of `messages`. They mirror what the
//! search worker tells: `control` knows nothing of the search itself.

use serde::{Deserialize, Serialize};

/// Where the search is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchReport {
    /// `disabled`, `waiting`, `starting`, `running`, `yielding`, `paused`, `out-of-budget`,
    /// `backing-off`, `failed` or `finished`; empty from a daemon that knows no search.
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
    /// Whether the device is idle; `None` if nobody watches (`idle.policy` is not `auto`).
    pub idle: Option<IdleReport>,
}

/// Whether the search may use the device now, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IdleReport {
    /// `run`, `pause` or `evict`.
    pub decision: String,
    /// Why, in words.
    pub reason: String,
    /// How often the search was stopped for others.
    pub yields: u64,
    /// From a consumer's batch to the search's stop, in milliseconds, the last time; `None` before.
    pub yield_ms_last: Option<f64>,
    /// The longest such time.
    pub yield_ms_max: Option<f64>,
    /// The GPU that the search may use; `None` if it uses the processors.
    pub gpu: Option<GpuReport>,
    /// `search run` goes before the decision, until `search resume` or `search pause`.
    pub is_overridden: bool,
    /// What the configuration asks for and cannot be had; else empty.
    pub note: String,
}

/// A GPU as it was at the last look.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuReport {
    /// The driver's lasting name of it.
    pub uuid: String,
    /// Its model.
    pub name: String,
    /// Share of the last sampling time in which any kernel ran, 0..=1.
    pub utilisation: Option<f64>,
    /// Share of its multiprocessors that were busy (from Hopper on), 0..=1.
    pub multiprocessors: Option<f64>,
    /// Bytes.
    pub memory_free: Option<u64>,
    /// Bytes.
    pub memory_total: Option<u64>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Watts.
    pub power_watts: Option<f64>,
    /// Processes of others on it.
    pub others: Vec<u32>,
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
