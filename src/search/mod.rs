//! The policy search. So far: what it will compute with, its search spaces and its proposers.
//!
//! Owns everything of tch (feature `torch`). Never touches a stream.

pub mod proposer;
pub mod space;
#[cfg(feature = "torch")]
mod torch;

/// What the search can compute with, in words (`libtorch 2.11.0, 2 threads`), or `None` if this
/// program was built without the feature `torch`.
pub fn backend() -> Option<String> {
    #[cfg(feature = "torch")]
    return Some(torch::describe());
    #[cfg(not(feature = "torch"))]
    None
}
