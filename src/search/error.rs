//! Why a search stops.

use super::folds::FoldError;
use super::journal::JournalError;
use super::lab::LabError;
use crate::policy::PolicyError;

/// Every message names the place and the cure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError {
    /// The journal cannot be opened or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The split cannot be folded.
    #[error(transparent)]
    Folds(#[from] FoldError),
    /// A measurement failed.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A policy is refused, or the store fails.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A unit's value cannot be written as JSON or read back.
    #[error(
        "the value of '{key}' in the search's journal is none of this program's ({source}); move \
         the journal away to start afresh"
    )]
    Value {
        /// Of the unit.
        key: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The search cannot work with these settings or this dataset.
    #[error("{0}")]
    Unfit(String),
}
