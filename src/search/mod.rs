//! The policy search: its parts so far. Nothing runs them in the daemon yet.
//!
//! Owns everything of tch (feature `torch`). Never touches a stream.

pub mod batches;
#[cfg(feature = "torch")]
pub mod torch;

/// What the search can compute with, in words (`libtorch 2.11.0, 2 threads`), or `None` if this
/// program was built without the feature `torch`.
pub fn backend() -> Option<String> {
    #[cfg(feature = "torch")]
    return Some(torch::describe());
    #[cfg(not(feature = "torch"))]
    None
}
