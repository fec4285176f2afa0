//! A whole batch by the tensor path: pixels to the device as bytes, everything after crop and
//! decode there.
//!
//! The bytes are those of [`CompiledRecipe::render`], sample for sample: draws, loading and steps
//! are the same code, and the tensor path equals the other bit for bit (`tests/tensor_batch.rs`).
//! Raw images that need no resizing go to the device whole, and are cropped and mirrored there.
//!
//! Owns no device memory beyond a call, and no choice of device.

use tch::{Device, Kind, TchError, Tensor};

use crate::augment::PreparedPolicy;
use crate::dataset::{Content, Sample};
use crate::image::geometry::Layout as PixelOrder;
use crate::image::planar::Planes;
use crate::image::planar::read::RawPixels;
use crate::image::sources::Sources;
use crate::image::{CropRect, Image};
use crate::tensor::{Finish, augment, gather};

use super::load::{LoadError, Source};
use super::recipe::{Dtype, Layout};
use super::render::{CompiledRecipe, RenderScratch, SampleKey};

/// Why a batch cannot be made on the device.
#[derive(Debug, thiserror::Error)]
pub enum TensorBatchError {
    /// One of its samples cannot be loaded.
    #[error("sample {place} of the batch: {error}")]
    Sample {
        /// Its place in the batch.
        place: usize,
        /// What is wrong with it.
        error: LoadError,
    },
    /// The device has no memory left, or another problem.
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
    /// The recipe mixes samples, which the tensor path does not.
    #[error("mix is not made on the device; leave it out of the recipe, or augment on the CPU")]
    Mix,
}

/// A recipe made ready for a device.
#[derive(Debug)]
pub struct TensorRecipe {
    finish: Finish,
    device: Device,
}

/// The images of a batch on their way to the device: all bytes, in order, and where the pixels of
/// each come from if they are raw.
#[derive(Default)]
struct Upload {
    bytes: Vec<u8>,
    sources: Vec<Sources>,
    /// Order, columns and rows of raw images.
    raw: Option<(PixelOrder, i64, i64)>,
}

impl TensorRecipe {
    /// # Errors
    /// The recipe mixes samples, or the device has no memory left.
    pub fn new(recipe: &CompiledRecipe, device: Device) -> Result<Self, TensorBatchError> {
        if recipe.mixes() {
            return Err(TensorBatchError::Mix);
        }
        let shape = recipe.shape();
        let kind = match shape.dtype {
            Dtype::U8 => Kind::Uint8,
            Dtype::F16 => Kind::Half,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::F32 => Kind::Float,
        };
        let channels_last = shape.layout == Layout::Nhwc;
        let finish = Finish::new(&recipe.values(), kind, channels_last, device)?;
        Ok(Self { finish, device })
    }

    /// The images of all samples, each with its key: `[n * views, channels, height, width]`, or
    /// `[n * views, height, width, channels]`, of the recipe's dtype, on the device.
    ///
    /// # Errors
    /// A sample cannot be loaded, or the device has no memory left.
    pub fn render(
        &self,
        recipe: &CompiledRecipe,
        samples: &[(Sample<'_>, SampleKey)],
        policy: &PreparedPolicy,
        scratch: &mut RenderScratch,
    ) -> Result<Tensor, TensorBatchError> {
        let shape = recipe.shape();
        let mut upload = Upload::default();
        let mut steps = Vec::new();
        for (place, (sample, key)) in samples.iter().enumerate() {
            for view in 0..shape.views as u64 {
                let key = key.of_view(view);
                let loaded = upload.push(recipe, sample.content, key, scratch);
                loaded.map_err(|error| TensorBatchError::Sample { place, error })?;
                steps.push(recipe.steps(policy, key));
            }
        }
        let images = upload.images(recipe, self.device)?;
        Ok(self.finish.run(&augment(&images, &steps)?)?)
    }
}

impl Upload {
    /// Adds one image: raw and whole, or loaded and mirrored.
    fn push(
        &mut self,
        recipe: &CompiledRecipe,
        content: Content<'_>,
        key: SampleKey,
        scratch: &mut RenderScratch,
    ) -> Result<(), LoadError> {
        let source = match content {
            Content::Raw(image) => Source::Raw(image),
            Content::Encoded(bytes) => Source::Encoded(bytes),
        };
        let flip = recipe.flips(key);
        if let Some((raw, rect)) = recipe.as_it_is(source, key)? {
            self.bytes.extend_from_slice(raw.bytes);
            self.raw = Some((raw.layout, to_i64(raw.width), to_i64(raw.height)));
            self.sources.push(Sources::of_crop(rect, flip, (raw.width, raw.height)));
            return Ok(());
        }
        let (mut loaded, mut planes) = (Image::default(), Planes::default());
        recipe.load(source, key, scratch, &mut loaded)?;
        let whole = CropRect { x: 0, y: 0, width: loaded.width, height: loaded.height };
        RawPixels::from(&loaded).read(whole, flip, &mut planes);
        self.bytes.extend_from_slice(&planes.data);
        Ok(())
    }

    /// All images, cropped: u8, `[n, channels, height, width]`.
    fn images(&self, recipe: &CompiledRecipe, device: Device) -> Result<Tensor, TchError> {
        let shape = recipe.shape();
        let channels = to_i64(shape.channels);
        let bytes = Tensor::f_from_slice(&self.bytes)?.f_to_device(device)?;
        match self.raw {
            None => bytes.f_view([-1, channels, to_i64(shape.height), to_i64(shape.width)]),
            Some((order, width, height)) => {
                let whole = match order {
                    PixelOrder::Chw => bytes.f_view([-1, channels, height, width])?,
                    PixelOrder::Hwc => {
                        bytes.f_view([-1, height, width, channels])?.f_permute([0, 3, 1, 2])?
                    }
                };
                gather(&whole, &self.sources, (shape.width, shape.height))
            }
        }
    }
}

fn to_i64(side: usize) -> i64 {
    i64::try_from(side).expect("image sides are at most limits::IMAGE_SIDE_MAX")
}
