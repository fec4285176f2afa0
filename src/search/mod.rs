//! The policy search. So far: its folds, its journal, and what it will compute with.
//!
//! Owns everything of tch (feature `torch`). Never touches a stream.

mod folds;
#[cfg(test)]
mod folds_tests;
mod journal;
mod journal_scan;
#[cfg(test)]
mod journal_tests;
#[cfg(feature = "torch")]
mod torch;

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
