//! Batches that are finished where the consumer computes: the workers load, crop and mirror, and
//! what the policy does happens there.
//!
//! Owns the split of a recipe into the two halves, which together give the bytes of the whole.
//! Knows no device: [`FinishOnDevice`] does.

use std::fmt::Debug;

use crate::augment::PreparedPolicy;
use crate::gpu::FinishPlace;

use super::recipe::{Dtype, Layout, Recipe};
use super::render::{CompiledRecipe, OutputShape};

/// The second half of a recipe, on a device.
pub trait FinishOnDevice: Send + Sync + Debug {
    /// Both halves.
    fn whole(&self) -> &CompiledRecipe;

    /// Of the finished batch.
    fn shape(&self) -> &OutputShape {
        self.whole().shape()
    }

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
/// two, since mixtures are made of finished samples, or has no second half.
pub fn loading_half(recipe: &Recipe) -> Option<Recipe> {
    let loading = Recipe {
        policy: "none".to_owned(),
        jitter: None,
        erase: None,
        cutout: 0,
        normalize: None,
        dtype: Dtype::U8,
        layout: Layout::Nchw,
        ..recipe.clone()
    };
    (recipe.mix.is_none() && loading != *recipe).then_some(loading)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::recipe::Mix;

    #[test]
    fn recipes_are_cut_where_there_are_two_halves() {
        let whole = Recipe { cutout: 8, policy: "trivial-wide".to_owned(), ..Recipe::default() };
        let half = loading_half(&whole).expect("has two");
        assert_eq!((half.cutout, half.policy.as_str(), half.dtype), (0, "none", Dtype::U8));
        assert_eq!(half.crop, whole.crop);
        assert_eq!(loading_half(&half), None, "nothing is left to do");
        let mixed = Recipe { mix: Some(Mix::default()), ..whole };
        assert_eq!(loading_half(&mixed), None, "mixtures are made last");
    }
}
