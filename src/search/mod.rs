//! The policy search.
//!
//! Owns folds, journal, proposers, fold models and everything of tch (feature `torch`), the three
//! algorithms and the gate. Never touches a stream: a policy that passed the gate reaches the
//! streams through the policy store.
//!
//! The parts, from the bottom up: [`lab`] measures; [`ledger`] remembers what was measured;
//! [`affinity`] and [`algorithm`] find a candidate; the gate decides; the engine runs rounds of it.

pub mod affinity;
pub mod algorithm;
pub mod batches;
pub mod engine;
mod error;
mod folds;
#[cfg(test)]
mod folds_tests;
pub mod gate;
pub mod gpu_clock;
mod journal;
mod journal_scan;
#[cfg(test)]
mod journal_tests;
pub mod lab;
pub mod ledger;
pub mod progress;
pub mod proposer;
pub mod report;
pub mod round;
pub mod space;
#[cfg(feature = "torch")]
pub mod torch;

pub use error::SearchError;
pub use folds::{ClassCounts, Fold, FoldError, FoldOptions, FoldPlan, FoldSummary, plan_folds};
pub use journal::{
    Journal, JournalError, JournalHeader, JournalRecords, JournalTail, OpenedJournal, read_records,
};

/// What the search can compute with, in words (`libtorch 2.11.0, 2 threads`), or `None` if this
/// program was built without the feature `torch`.
pub fn backend() -> Option<String> {
    #[cfg(feature = "torch")]
    return Some(torch::describe());
    #[cfg(not(feature = "torch"))]
    None
}
