//! Batches that are finished where the consumer computes: the workers load, crop and mirror, and
//! what the policy does happens there.
//!
//! Owns the split of a recipe into the two halves, which together give the bytes of the whole.
//! Knows no device: [`FinishOnDevice`] does.

use std::fmt::Debug;

use crate::augment::PreparedPolicy;
use crate::gpu::FinishPlace;

use super::recipe::{Dtype, Layout, Recipe};
use super::render::OutputShape;

/// The second half of a recipe, on a device.
pub trait FinishOnDevice: Send + Sync + Debug {
    /// Of the finished batch.
    fn shape(&self) -> &OutputShape;

    /// Queues the work on the images of `samples` (indices as the slot has them, a skipped one as
    /// `-1 - index`), each with its views, which lie at the place's source, `[n, channels, height,
    /// width]` of u8. Finished, they are to lie at its target.
    ///
    /// # Errors
    /// In words: the device has no memory left, or another problem.
    fn finish(
        &self,
        policy: &PreparedPolicy,
        epoch: u64,
        samples: &[i64],
        place: FinishPlace,
    ) -> Result<(), String>;
}

/// What the workers do of a recipe whose rest is done on a device; `None` if it cannot be cut in
/// two: mixtures are made of finished samples.
pub fn loading_half(recipe: &Recipe) -> Option<Recipe> {
    recipe.mix.is_none().then(|| Recipe {
        policy: "none".to_owned(),
        jitter: None,
        erase: None,
        cutout: 0,
        normalize: None,
        dtype: Dtype::U8,
        layout: Layout::Nchw,
        ..recipe.clone()
    })
}
