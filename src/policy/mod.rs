//! Policies as data: types, operation table, file formats, built-in policies, the versioned store.
//!
//! Owns what a policy *is*. Never touches pixels and never draws random numbers (`augment` does).

mod builtin;
mod builtin_tables;
mod diff;
mod error;
mod format;
mod op;
mod pins;
mod store;
mod store_files;
mod store_head;
mod store_lock;
mod timestamp;
mod types;

pub use builtin::{
    BUILTIN_NAMES, builtin, is_path, load_reference, none, randaugment, trivial_wide,
};
pub use diff::{OpUse, PolicyDiff, Reweighted, diff, ops_text};
pub use error::PolicyError;
pub(crate) use error::suggestion;
pub use format::{from_value, load_file, parse_text, to_list_text, to_text, to_value};
pub use op::{Op, OpsProfile};
pub use pins::EpochPins;
pub use store::{
    ListedVersion, PolicyStore, PolicyVersion, Published, ResolvedPolicy, StoredReference,
};
pub use store_head::{Head, HistoryEntry, HistoryKind};
pub use timestamp::rfc3339_utc;
pub use types::{Magnitude, OpStep, Policy, PolicyId, SubPolicy};
