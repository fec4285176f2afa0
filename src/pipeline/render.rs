//! One sample into its place in a batch: load, flip, policy, cutout, normalise and convert.
//!
//! Owns the compiled recipe; `load` gives the pixels to begin with, `write` puts the finished ones
//! into the memory of the batch.

use crate::augment::{Canvas, DrawnOp, PreparedPolicy, Step, cutout_area};
use crate::dataset::{Content, ImageKind, Label, LabelKind, Sample, SplitInfo};
use crate::image::decode::{DecodeLimits, DecodeOptions};
use crate::image::planar::read::RawPixels;
use crate::image::{CropRect, Image};
use crate::random::{Purpose, SampleRng, mix64};

use super::distort::{erase, jitter};
use super::load::{LoadError, LoadScratch, Loading, Source};
use super::mix::mix_pair;
use super::recipe::{Dtype, Erase, Exif, Jitter, Layout, Mix, Recipe, RecipeError};
use super::shared::SharedImage;
use super::write::Writer;

/// Parts of a slot start at a multiple of this, in bytes: a cache line, and enough for any SIMD.
const PART_ALIGN: usize = 64;
/// Slots start at a multiple of this, in bytes: the largest page of any host, so that a slot can be
/// mapped alone.
const SLOT_ALIGN: usize = 64 * 1024;

/// Shape of a batch's samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputShape {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
    /// Views of a sample; 1: a sample is one image.
    pub views: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Element order.
    pub layout: Layout,
    /// What the labels are.
    pub labels: LabelKind,
}

impl OutputShape {
    /// Bytes of one sample's pixels.
    pub fn pixel_bytes(&self) -> usize {
        self.views * self.image_bytes()
    }

    /// Bytes of one image's pixels.
    pub fn image_bytes(&self) -> usize {
        self.height * self.width * self.channels * self.dtype.bytes()
    }

    /// Pixels of one image.
    pub fn n_pixels(&self) -> usize {
        self.height * self.width
    }

    /// Bytes of one sample's label.
    pub fn label_bytes(&self) -> usize {
        match self.labels {
            LabelKind::Class { .. } => size_of::<i64>(),
            LabelKind::Vector { len } => len as usize * size_of::<f32>(),
        }
    }
}

/// Where the parts of a batch lie in its slot:
///
/// | part | from byte | bytes |
/// |---|---|---|
/// | pixels | 0 | `batch_size * pixel_bytes` |
/// | labels | `labels_offset` | `batch_size * label_bytes` |
/// | indices | `indices_offset` | `batch_size * 8` |
///
/// Pixels come first because they are what is read most and want the best alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotLayout {
    /// Where labels start.
    pub labels_offset: usize,
    /// Where indices start.
    pub indices_offset: usize,
    /// Bytes of the whole slot.
    pub slot_bytes: usize,
}

impl SlotLayout {
    /// The layout for batches of at most `batch_size` samples; `None` if it overflows.
    pub fn new(shape: &OutputShape, batch_size: usize) -> Option<Self> {
        let aligned = |bytes: usize, align: usize| bytes.checked_next_multiple_of(align);
        let labels_offset = aligned(shape.pixel_bytes().checked_mul(batch_size)?, PART_ALIGN)?;
        let labels = shape.label_bytes().checked_mul(batch_size)?;
        let indices_offset = aligned(labels_offset.checked_add(labels)?, PART_ALIGN)?;
        let end = indices_offset.checked_add(batch_size.checked_mul(size_of::<i64>())?)?;
        Some(Self { labels_offset, indices_offset, slot_bytes: aligned(end, SLOT_ALIGN)? })
    }
}

/// Memory that a worker thread reuses from sample to sample.
#[derive(Debug, Default)]
pub struct RenderScratch {
    loaded: Image,
    load: LoadScratch,
    canvas: Canvas,
    drawing: Drawing,
}

/// What one image gets, and scratch space for drawing it.
#[derive(Debug, Default)]
struct Drawing {
    drawn: Vec<DrawnOp>,
    steps: Vec<Step>,
}

/// A recipe made ready for the samples of one split.
#[derive(Debug)]
pub struct CompiledRecipe {
    loading: Loading,
    hflip: bool,
    cutout: usize,
    jitter: Option<Jitter>,
    erase: Option<Erase>,
    mix: Option<Mix>,
    /// The mean, rounded to a byte: what cutout fills with, so that it is about 0 after
    /// normalisation and the same in every dtype.
    fill: [u8; 3],
    shape: OutputShape,
    /// Mean and standard deviation of each channel, in units of 255.
    #[cfg(feature = "torch")]
    norms: Vec<(f32, f32)>,
    writer: Writer,
}

/// What a sample's random draws are keyed by.
#[derive(Clone, Copy, Debug)]
pub struct SampleKey {
    /// The stream's seed.
    pub seed: u64,
    /// The epoch.
    pub epoch: u64,
    /// The sample's index in the split.
    pub sample_idx: u64,
}

impl SampleKey {
    /// The key of a view: the first has the sample's own, others seeds of their own.
    pub(super) fn of_view(self, view: u64) -> Self {
        match view {
            0 => self,
            _ => Self { seed: mix64(self.seed ^ mix64(view)), ..self },
        }
    }

    fn rng(self, purpose: Purpose) -> SampleRng {
        SampleRng::new(self.seed, self.epoch, self.sample_idx, purpose)
    }
}

impl CompiledRecipe {
    /// Compiles `recipe` for the samples that `info` describes; encoded images beyond `limits` are
    /// refused.
    ///
    /// # Errors
    /// The recipe does not fit the samples.
    pub fn new(
        recipe: &Recipe,
        info: &SplitInfo,
        limits: DecodeLimits,
    ) -> Result<Self, RecipeError> {
        recipe.validate()?;
        let (height, width) = recipe.output_size(info)?;
        let channels = recipe.output_channels(info);
        let norms = recipe.channel_norms(channels)?;
        let turn = match (recipe.exif, info.images) {
            (Exif::Source, ImageKind::Encoded { turns_by_exif }) => turns_by_exif,
            (exif, _) => exif == Exif::Apply,
        };
        let mut fill = [0; 3];
        for (byte, (mean, _)) in fill.iter_mut().zip(&norms) {
            *byte = to_byte(*mean * 255.0);
        }
        Ok(Self {
            loading: Loading {
                crop: recipe.crop,
                decode: recipe.decode,
                options: DecodeOptions { channels, turn, limits },
            },
            hflip: recipe.hflip,
            cutout: recipe.cutout as usize,
            jitter: recipe.jitter,
            erase: recipe.erase,
            mix: recipe.mix,
            fill,
            shape: OutputShape {
                height,
                width,
                channels,
                views: recipe.views as usize,
                dtype: recipe.dtype,
                layout: recipe.layout,
                labels: recipe.output_labels(info)?,
            },
            writer: Writer::new(recipe.dtype, recipe.layout, &norms),
            #[cfg(feature = "torch")]
            norms,
        })
    }

    /// Shape of the samples that this recipe makes.
    pub fn shape(&self) -> &OutputShape {
        &self.shape
    }

    /// How encoded samples are decoded.
    pub fn decode_options(&self) -> DecodeOptions {
        self.loading.options
    }

    /// All that loaded images depend on beside the split, how it is decoded and the seed.
    pub fn crop_key(&self) -> String {
        let Loading { crop, decode, options: _ } = &self.loading;
        format!("{crop:?} {decode:?}")
    }

    /// Whether this sample's pixels are those of its whole image's decode, so that `shared` gives
    /// the same bytes as the file.
    pub fn can_share(&self, shared: &SharedImage, key: SampleKey) -> bool {
        let views = 0..self.shape.views as u64;
        let takes_whole =
            |view| self.loading.takes_whole(shared, key.of_view(view).rng(Purpose::Crop));
        views.into_iter().all(takes_whole)
    }

    /// Whether a whole decode of an image of `size`, shared with `n_others`, costs less than what
    /// each would decode alone; never if this sample's pixels would differ.
    pub fn should_share(
        &self,
        size: (usize, usize),
        is_reducible: bool,
        n_others: usize,
        key: SampleKey,
    ) -> bool {
        self.loading.should_share(size, is_reducible, n_others, key.rng(Purpose::Crop))
    }

    /// Writes one sample's pixels: `out` is exactly [`OutputShape::pixel_bytes`] long.
    ///
    /// # Errors
    /// The image cannot be decoded, or is too small for the crop.
    pub fn render(
        &self,
        sample: &Sample<'_>,
        policy: &PreparedPolicy,
        key: SampleKey,
        scratch: &mut RenderScratch,
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        let source = match sample.content {
            Content::Raw(image) => Source::Raw(image),
            Content::Encoded(bytes) => Source::Encoded(bytes),
        };
        for (view, out) in (0_u64..).zip(out.chunks_exact_mut(self.shape.image_bytes())) {
            self.render_view(source, policy, key.of_view(view), scratch, out)?;
        }
        Ok(())
    }

    /// One view of a sample, from any source; `key` is the view's.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub(super) fn render_view(
        &self,
        source: Source<'_>,
        policy: &PreparedPolicy,
        key: SampleKey,
        scratch: &mut RenderScratch,
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        if let Some((raw, rect)) = self.as_it_is(source, key)? {
            raw.read(rect, self.flips(key), scratch.canvas.start());
            self.finish_canvas(policy, key, &mut scratch.canvas, &mut scratch.drawing, out);
            return Ok(());
        }
        let mut loaded = std::mem::take(&mut scratch.loaded);
        let result = self.load(source, key, scratch, &mut loaded);
        if result.is_ok() {
            self.finish(&loaded, policy, key, scratch, out);
        }
        scratch.loaded = loaded;
        result
    }

    /// The pixels that augmentation begins with: a function of source, crop and key.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub(super) fn load(
        &self,
        source: Source<'_>,
        key: SampleKey,
        scratch: &mut RenderScratch,
        out: &mut Image,
    ) -> Result<(), LoadError> {
        self.loading.load(source, key.rng(Purpose::Crop), &mut scratch.load, out)
    }

    /// All that comes after [`Self::load`].
    pub(super) fn finish(
        &self,
        loaded: &Image,
        policy: &PreparedPolicy,
        key: SampleKey,
        scratch: &mut RenderScratch,
        out: &mut [u8],
    ) {
        let whole = CropRect { x: 0, y: 0, width: loaded.width, height: loaded.height };
        RawPixels::from(loaded).read(whole, self.flips(key), scratch.canvas.start());
        self.finish_canvas(policy, key, &mut scratch.canvas, &mut scratch.drawing, out);
    }

    /// Pixels that need no loading: see [`Loading::as_it_is`].
    fn as_it_is<'a>(
        &self,
        source: Source<'a>,
        key: SampleKey,
    ) -> Result<Option<(RawPixels<'a>, CropRect)>, LoadError> {
        self.loading.as_it_is(source, key.rng(Purpose::Crop))
    }

    /// Whether the image of `key` is mirrored.
    fn flips(&self, key: SampleKey) -> bool {
        self.hflip && key.rng(Purpose::Flip).coin()
    }

    /// All that comes after crop and flip.
    fn finish_canvas(
        &self,
        policy: &PreparedPolicy,
        key: SampleKey,
        canvas: &mut Canvas,
        steps: &mut Drawing,
        out: &mut [u8],
    ) {
        debug_assert_eq!(out.len(), self.shape.image_bytes(), "an image fills its place");
        self.draw(policy, key, canvas.size(), steps);
        for step in &steps.steps {
            canvas.run(step);
        }
        self.writer.write(canvas, out);
    }

    /// What is done to the image of `key` after crop and flip.
    #[cfg(feature = "torch")]
    pub(super) fn steps(&self, policy: &PreparedPolicy, key: SampleKey) -> Vec<Step> {
        let mut drawing = Drawing::default();
        self.draw(policy, key, (self.shape.width, self.shape.height), &mut drawing);
        drawing.steps
    }

    /// What each byte becomes in each channel, before it is rounded to the dtype.
    #[cfg(feature = "torch")]
    pub(super) fn values(&self) -> Vec<[f32; 256]> {
        let is_u8 = self.shape.dtype == Dtype::U8;
        self.norms.iter().map(|&norm| super::write::values(norm, is_u8)).collect()
    }

    /// What is done to the sample of `key`, an image of `size` (columns, rows), after crop and
    /// flip.
    fn draw(
        &self,
        policy: &PreparedPolicy,
        key: SampleKey,
        size: (usize, usize),
        Drawing { drawn, steps }: &mut Drawing,
    ) {
        steps.clear();
        if let Some(own) = &self.jitter {
            jitter(own, &mut key.rng(Purpose::Jitter), steps);
        }
        if !policy.is_identity() {
            policy.steps_into(size, &mut key.rng(Purpose::Policy), drawn, steps);
        }
        if self.cutout > 1 {
            let mut rng = key.rng(Purpose::Cutout);
            let centre_y = rng.below(to_u32(size.1)) as usize;
            let centre_x = rng.below(to_u32(size.0)) as usize;
            steps.push(Step::Fill(cutout_area(centre_x, centre_y, self.cutout), self.fill));
        }
        if let Some(own) = &self.erase
            && let Some(area) = erase(own, size, &mut key.rng(Purpose::Erase))
        {
            steps.push(Step::Fill(area, self.fill));
        }
    }

    /// Whether pairs of samples are mixed.
    pub fn mixes(&self) -> bool {
        self.mix.is_some()
    }

    /// Mixes two samples that lie side by side in a batch; `key` is that of the first.
    pub fn mix(&self, key: SampleKey, pixels: [&mut [u8]; 2], labels: [&mut [u8]; 2]) {
        if let Some(mix) = &self.mix {
            mix_pair(mix, &self.shape, &mut key.rng(Purpose::Mix), pixels, labels);
        }
    }
}

/// Writes one sample's label: `out` is exactly [`OutputShape::label_bytes`] long.
pub fn write_label(label: Label<'_>, out: &mut [u8]) {
    match label {
        Label::Class(class) if out.len() == size_of::<i64>() => {
            out.copy_from_slice(&class.to_ne_bytes());
        }
        Label::Class(class) => {
            out.fill(0);
            let place = usize::try_from(class).unwrap_or(usize::MAX);
            if let Some(bytes) = out.as_chunks_mut::<4>().0.get_mut(place) {
                *bytes = 1.0_f32.to_ne_bytes();
            }
        }
        Label::Vector(values) => {
            for (bytes, value) in out.chunks_exact_mut(size_of::<f32>()).zip(values) {
                bytes.copy_from_slice(&value.to_ne_bytes());
            }
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "clamped to the range of a byte first")]
fn to_byte(value: f32) -> u8 {
    value.round_ties_even().clamp(0.0, 255.0) as u8
}

fn to_u32(side: usize) -> u32 {
    u32::try_from(side).expect("image sides are at most limits::IMAGE_SIDE_MAX")
}
