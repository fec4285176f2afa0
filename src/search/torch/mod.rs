//! Everything that calls libtorch: fold models, their training, their scores.
//!
//! Owns tch. The rest of the search sees plain numbers. Deterministic: one thread count, seeds from
//! the caller, no work whose amount depends on time.

mod device;
mod fold_model;
mod lab;
mod memory;
mod model;
mod net;
mod precision;
mod script;
mod sgd;
mod spec;

pub use device::Processor;
pub use fold_model::{FoldModel, FoldTraining};
pub use lab::{LabOptions, TorchLab};
pub use memory::{check_memory, memory_needed};
pub use precision::Precision;
pub use spec::ModelSpec;

pub use super::lab::Score;

/// The libtorch that tch 0.24 demands; its build script refuses any other.
const LIBTORCH_VERSION: &str = "2.11.0";

/// Why a fold model cannot be trained or scored.
#[derive(Debug, thiserror::Error)]
pub enum TorchError {
    /// libtorch says no.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A batch cannot be made.
    #[error(transparent)]
    Batch(#[from] super::batches::BatchError),
    /// The loss is no number any more.
    #[error(
        "the loss of the fold model became {loss} in step {step}; lower the learning rate, or look \
         for broken images with 'fastaa-ctl dataset verify'"
    )]
    NotFinite {
        /// NaN or infinite.
        loss: f64,
        /// Of the training.
        step: u64,
    },
    /// The checkpoint belongs to another model.
    #[error("the checkpoint has no fitting tensor '{tensor}'; it belongs to another model")]
    ForeignCheckpoint {
        /// What is missing.
        tensor: String,
    },
    /// No model has this name.
    #[error(
        "fold model '{name}': {problem}; use small-cnn, wrn-40-2, wrn-28-10 or resnet18, or the \
         path of a TorchScript file (.pt, .pth or .ts)"
    )]
    UnknownModel {
        /// What was given.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A TorchScript file cannot be used.
    #[error("fold model {path}: {problem}")]
    Script {
        /// The file.
        path: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// Nothing can be learned.
    #[error("a fold model cannot be trained on {n_samples} sample(s); it needs at least 2")]
    TooFewSamples {
        /// How many there are.
        n_samples: usize,
    },
    /// The host has too little memory.
    #[error(
        "{what} need about {needed_mib} MiB of memory, but {available_mib} MiB are available; \
         choose a smaller search.model, a smaller crop, or fewer search.threads"
    )]
    Memory {
        /// Which models.
        what: String,
        /// The estimate.
        needed_mib: u64,
        /// What the host, or the control group, still allows.
        available_mib: u64,
    },
    /// The GPU cannot be used.
    #[error(
        "no GPU can be used: {problem}; write search.device = \"cpu\" to search on the \
         processors"
    )]
    Cuda {
        /// What is missing.
        problem: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Makes this process compute each unit on one torch thread. Call it once, before anything else of
/// torch: results don't depend on the number of units that run side by side.
pub fn use_one_thread() {
    tch::set_num_threads(1);
    tch::set_num_interop_threads(1);
}

/// Gives this thread the process's number of torch threads. OpenMP counts per thread: one that was
/// never told would use all cores in its first convolutions, and sum in another order.
fn share_threads() {
    tch::set_num_threads(tch::get_num_threads());
}

/// Version and threads of the libtorch that this process has loaded.
pub(super) fn describe() -> String {
    let n_threads = tch::get_num_threads();
    let unit = if n_threads == 1 { "thread" } else { "threads" };
    format!("libtorch {LIBTORCH_VERSION}, {n_threads} {unit}")
}
