//! Everything that calls libtorch: fold models, their training, their scores.
//!
//! Owns tch. The rest of the search sees plain numbers. Deterministic: one thread count, seeds from
//! the caller, no work whose amount depends on time.

mod fold_model;
mod sgd;
mod small_cnn;

pub use fold_model::{FoldModel, FoldTraining, Score};

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
    /// The checkpoint cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Version and threads of the libtorch that this process has loaded.
pub(super) fn describe() -> String {
    let n_threads = tch::get_num_threads();
    let unit = if n_threads == 1 { "thread" } else { "threads" };
    let cuda = if tch::Cuda::is_available() { "CUDA" } else { "CPU only" };
    format!("libtorch {LIBTORCH_VERSION}, {cuda}, {n_threads} {unit}")
}
