//! Batches for the search, in its own process: the streams' rendering without the streams.
//!
//! Owns a reusable buffer. Uses the same recipe, policy and keys as the worker threads of the
//! daemon, so that what the search measures is what a trainer would get. Knows nothing of tch.

use std::sync::Arc;

use crate::augment::PreparedPolicy;
use crate::dataset::{DatasetError, ImageKind, Label, Split, SplitInfo};
use crate::image::decode::DecodeLimits;
use crate::pipeline::load::LoadError;
use crate::pipeline::recipe::{Crop, Dtype, Layout, Recipe, RecipeError};
use crate::pipeline::render::{CompiledRecipe, OutputShape, RenderScratch, SampleKey};

use super::lab::Change;

/// Why there is no batch.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// A sample cannot be read.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The recipe does not fit the dataset.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A sample's image cannot be decoded.
    #[error("{name}: {source}")]
    Load {
        /// What the sample is called.
        name: String,
        /// Why.
        #[source]
        source: LoadError,
    },
    /// The labels are no classes.
    #[error("sample {sample_idx} has a vector label; the search needs one class per sample")]
    NoClass {
        /// Which.
        sample_idx: u64,
    },
}

/// Makes batches of f32 images in NHWC order, in which convolutions are fastest.
#[derive(Debug)]
pub struct BatchMaker {
    split: Arc<dyn Split>,
    recipe: CompiledRecipe,
    /// The same in bytes, not normalised.
    byte_recipe: CompiledRecipe,
    seed: u64,
    scratch: RenderScratch,
    bytes: Vec<u8>,
    /// Of samples that are files of their own.
    file: Vec<u8>,
}

/// One batch, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostBatch {
    /// `[n, height, width, channels]`, packed.
    pub images: Vec<f32>,
    /// `[n]`.
    pub labels: Vec<i64>,
}

impl BatchMaker {
    /// For samples of `split` under `recipe`, whose dtype and layout are overridden, without
    /// mixtures, and with one view of each.
    ///
    /// # Errors
    /// The recipe does not fit the split.
    pub fn new(
        split: Arc<dyn Split>,
        recipe: &Recipe,
        limits: DecodeLimits,
        seed: u64,
    ) -> Result<Self, BatchError> {
        let compiled = |dtype| {
            let layout = Layout::Nhwc;
            let recipe = Recipe { dtype, layout, mix: None, views: 1, ..recipe.clone() };
            CompiledRecipe::new(&recipe, split.info(), limits)
        };
        let (recipe, byte_recipe) = (compiled(Dtype::F32)?, compiled(Dtype::U8)?);
        let scratch = RenderScratch::default();
        let (bytes, file) = (Vec::new(), Vec::new());
        Ok(Self { split, recipe, byte_recipe, seed, scratch, bytes, file })
    }

    /// For clean images: the recipe's shape and normalisation, but nothing random. No flip, no
    /// cutout; of a `pad` crop the middle, which is the whole image where sizes are equal; of
    /// random parts, the middle of the image resized to 8/7 of their size (256 for 224). Padding
    /// that cannot be the same on both sides (an odd difference of sizes, or an image that is no
    /// square) is placed by a draw that belongs to the sample: the same at every evaluation.
    ///
    /// # Errors
    /// The recipe does not fit the split.
    pub fn clean(
        split: Arc<dyn Split>,
        recipe: &Recipe,
        limits: DecodeLimits,
    ) -> Result<Self, BatchError> {
        let crop = clean_crop(recipe.crop, split.info());
        let recipe =
            Recipe { crop, hflip: false, cutout: 0, jitter: None, erase: None, ..recipe.clone() };
        Self::new(split, &recipe, limits, 0)
    }

    /// Shape of the images.
    pub fn shape(&self) -> &OutputShape {
        self.recipe.shape()
    }

    /// The batch of these samples. `epoch` keys the draws: the same (seed, epoch, sample) draws the
    /// same crop, flip and policy words for every policy, which pairs the candidates of a search.
    ///
    /// # Errors
    /// A sample cannot be read, or has no class.
    pub fn batch(
        &mut self,
        sample_idxs: &[u64],
        epoch: u64,
        policy: &PreparedPolicy,
    ) -> Result<HostBatch, BatchError> {
        let sample_bytes = self.recipe.shape().pixel_bytes();
        self.bytes.resize(sample_idxs.len() * sample_bytes, 0);
        let mut labels = Vec::with_capacity(sample_idxs.len());
        let places = self.bytes.chunks_exact_mut(sample_bytes);
        for (&sample_idx, place) in sample_idxs.iter().zip(places) {
            let sample = self.split.sample(sample_idx, &mut self.file)?;
            let key = SampleKey { seed: self.seed, epoch, sample_idx };
            let rendered = self.recipe.render(&sample, policy, key, &mut self.scratch, place);
            rendered.map_err(|source| load_error(&*self.split, sample_idx, source))?;
            match sample.label {
                Label::Class(class) => labels.push(class),
                Label::Vector(_) => return Err(BatchError::NoClass { sample_idx }),
            }
        }
        let floats = self.bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_ne_bytes(bytes));
        Ok(HostBatch { images: floats.collect(), labels })
    }

    /// How much `policy` changes these samples, as the mean over `n_draws` draws: each image is
    /// compared, in bytes, with the same crop, flip and cutout of the same sample without it. The
    /// draws are those of [`Self::batch`] in the epochs `0..n_draws`.
    ///
    /// # Errors
    /// A sample cannot be read.
    pub fn change(
        &mut self,
        sample_idxs: &[u64],
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Change, BatchError> {
        let none = PreparedPolicy::default();
        let image_bytes = self.byte_recipe.shape().pixel_bytes();
        self.bytes.resize(2 * image_bytes, 0);
        let (plain, changed) = self.bytes.split_at_mut(image_bytes);
        let (mut n_changed, mut difference_sum) = (0u64, 0u64);
        for epoch in 0..u64::from(n_draws) {
            for &sample_idx in sample_idxs {
                let sample = self.split.sample(sample_idx, &mut self.file)?;
                let key = SampleKey { seed: self.seed, epoch, sample_idx };
                for (policy, out) in [(&none, &mut *plain), (policy, &mut *changed)] {
                    let rendered =
                        self.byte_recipe.render(&sample, policy, key, &mut self.scratch, out);
                    rendered.map_err(|source| load_error(&*self.split, sample_idx, source))?;
                }
                let pairs = plain.iter().zip(changed.iter());
                let difference: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
                n_changed += u64::from(difference > 0);
                difference_sum += difference;
            }
        }
        let n_images = (sample_idxs.len() as u64 * u64::from(n_draws)).max(1) as f64;
        Ok(Change {
            changed: n_changed as f64 / n_images,
            distance: difference_sum as f64 / (255.0 * image_bytes as f64 * n_images),
        })
    }
}

fn load_error(split: &dyn Split, sample_idx: u64, source: LoadError) -> BatchError {
    BatchError::Load { name: split.sample_name(sample_idx), source }
}

fn clean_crop(crop: Crop, info: &SplitInfo) -> Crop {
    let size = match crop {
        Crop::Pad { size, .. } => size,
        Crop::RandomResized { size, .. } => {
            return Crop::Center { size, resize: Some(size.saturating_mul(8).div_ceil(7)) };
        }
        Crop::None | Crop::Center { .. } => return crop,
    };
    let ImageKind::Raw { height, width, .. } = info.images else {
        return Crop::Center { size, resize: None };
    };
    let side = u32::try_from(height.min(width)).unwrap_or(u32::MAX);
    if size <= side {
        return Crop::Center { size, resize: None };
    }
    Crop::Pad { size, pad: (size - side).div_ceil(2) }
}
