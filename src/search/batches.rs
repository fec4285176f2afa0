//! Batches for the search, in its own process: the streams' rendering without the streams.
//!
//! Owns a reusable buffer. Uses the same recipe, policy and keys as the worker threads of the
//! daemon, so that what the search measures is what a trainer would get. Knows nothing of tch.

use std::sync::Arc;

use crate::augment::PreparedPolicy;
use crate::dataset::{DatasetError, Label, Split};
use crate::pipeline::recipe::{Dtype, Layout, Recipe, RecipeError};
use crate::pipeline::render::{CompiledRecipe, OutputShape, RenderScratch, SampleKey};

/// Why there is no batch.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// A sample cannot be read.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The recipe does not fit the dataset.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The labels are no classes.
    #[error("sample {sample_idx} has a vector label; the search needs one class per sample")]
    NoClass {
        /// Which.
        sample_idx: u64,
    },
}

/// Makes batches of f32 images in NCHW order.
#[derive(Debug)]
pub struct BatchMaker {
    split: Arc<dyn Split>,
    recipe: CompiledRecipe,
    seed: u64,
    scratch: RenderScratch,
    bytes: Vec<u8>,
}

/// One batch, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostBatch {
    /// `[n, channels, height, width]`, packed.
    pub images: Vec<f32>,
    /// `[n]`.
    pub labels: Vec<i64>,
}

impl BatchMaker {
    /// For samples of `split` under `recipe`, whose dtype and layout are overridden.
    ///
    /// # Errors
    /// The recipe does not fit the split.
    pub fn new(split: Arc<dyn Split>, recipe: &Recipe, seed: u64) -> Result<Self, BatchError> {
        let recipe = Recipe { dtype: Dtype::F32, layout: Layout::Nchw, ..recipe.clone() };
        let recipe = CompiledRecipe::new(&recipe, split.info())?;
        let (scratch, bytes) = (RenderScratch::default(), Vec::new());
        Ok(Self { split, recipe, seed, scratch, bytes })
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
            let sample = self.split.sample(sample_idx)?;
            let key = SampleKey { seed: self.seed, epoch, sample_idx };
            self.recipe.render(&sample, policy, key, &mut self.scratch, place);
            match sample.label {
                Label::Class(class) => labels.push(class),
                Label::Vector(_) => return Err(BatchError::NoClass { sample_idx }),
            }
        }
        let floats = self.bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_ne_bytes(bytes));
        Ok(HostBatch { images: floats.collect(), labels })
    }
}
