//! The policy search: its parts so far. Nothing in the daemon runs them yet.
//!
//! Owns folds, journal, proposers, fold models and everything of tch (feature `torch`). Never
//! touches a stream.

pub mod batches;
mod folds;
#[cfg(test)]
mod folds_tests;
mod journal;
mod journal_scan;
#[cfg(test)]
mod journal_tests;
pub mod proposer;
pub mod space;
#[cfg(feature = "torch")]
pub mod torch;

pub use folds::{ClassCounts, Fold, FoldError, FoldOptions, FoldPlan, FoldSummary, plan_folds};
pub use journal::{Journal, JournalError, JournalHeader, JournalTail, OpenedJournal};

/// What the search can compute with, in words (`libtorch 2.11.0, 2 threads`), or `None` if this
/// program was built without the feature `torch`.
pub fn backend() -> Option<String> {
    #[cfg(feature = "torch")]
    return Some(torch::describe());
    #[cfg(not(feature = "torch"))]
    None
}
