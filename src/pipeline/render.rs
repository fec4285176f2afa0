//! One sample into its place in a batch: load, flip, policy, cutout, normalise and convert.
//!
//! Owns the compiled recipe; `load` gives the pixels to begin with. The last step is one table
//! look-up per byte that normalises, converts and reorders at once, straight into the memory of the
//! batch.

use half::{bf16, f16};

use crate::augment::{PreparedPolicy, Scratch, cutout_box};
use crate::dataset::{Content, ImageKind, Label, LabelKind, Sample, SplitInfo};
use crate::image::Image;
use crate::image::decode::{DecodeLimits, DecodeOptions};
use crate::image::geometry::flip_horizontal;
use crate::random::{Purpose, SampleRng, mix64};

use super::distort::{erase, jitter};
use super::load::{LoadError, LoadScratch, Loading, Source};
use super::mix::mix_pair;
use super::recipe::{Dtype, Erase, Exif, Jitter, Layout, Mix, Recipe, RecipeError};
use super::shared::SharedImage;

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
    image: Image,
    load: LoadScratch,
    augment: Scratch,
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
    table: Table,
}

/// What each byte becomes, per channel.
#[derive(Debug)]
enum Table {
    U8,
    Half(Vec<[u16; 256]>),
    F32(Vec<[f32; 256]>),
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
            table: Table::new(recipe.dtype, &norms),
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
        let image = &mut scratch.image;
        image.clone_from(loaded);
        if self.hflip && key.rng(Purpose::Flip).coin() {
            flip_horizontal(image);
        }
        if let Some(own) = &self.jitter {
            jitter(image, own, &mut key.rng(Purpose::Jitter));
        }
        if !policy.is_identity() {
            policy.augment(image, &mut scratch.augment, &mut key.rng(Purpose::Policy));
        }
        if self.cutout > 1 {
            let mut rng = key.rng(Purpose::Cutout);
            let centre_y = rng.below(to_u32(image.height)) as usize;
            let centre_x = rng.below(to_u32(image.width)) as usize;
            cutout_box(image, centre_x, centre_y, self.cutout, self.fill);
        }
        if let Some(own) = &self.erase {
            erase(image, own, self.fill, &mut key.rng(Purpose::Erase));
        }
        self.write(image, out);
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

    /// Normalises, converts and reorders `image` into `out`, one look-up per byte.
    fn write(&self, image: &Image, out: &mut [u8]) {
        debug_assert_eq!(out.len(), self.shape.image_bytes(), "an image fills its place");
        let planar = self.shape.layout == Layout::Nchw;
        match (&self.table, planar) {
            (Table::U8, false) => out.copy_from_slice(&image.data),
            (Table::U8, true) => write_planes(image, out, |_, byte| [byte]),
            (Table::Half(table), false) => {
                write_pixels(image, out, |c, byte| table[c][usize::from(byte)].to_ne_bytes());
            }
            (Table::Half(table), true) => {
                write_planes(image, out, |c, byte| table[c][usize::from(byte)].to_ne_bytes());
            }
            (Table::F32(table), false) => {
                write_pixels(image, out, |c, byte| table[c][usize::from(byte)].to_ne_bytes());
            }
            (Table::F32(table), true) => {
                write_planes(image, out, |c, byte| table[c][usize::from(byte)].to_ne_bytes());
            }
        }
    }
}

impl Table {
    /// `((x / 255) − mean) / std` in f32, in this order; f16 and bf16 round that to nearest even.
    fn new(dtype: Dtype, norms: &[(f32, f32)]) -> Self {
        let tables = norms.iter().map(|&(mean, std)| {
            std::array::from_fn::<f32, 256, _>(|byte| {
                let byte = u8::try_from(byte).expect("an index below 256");
                (f32::from(byte) / 255.0 - mean) / std
            })
        });
        match dtype {
            Dtype::U8 => Self::U8,
            Dtype::F32 => Self::F32(tables.collect()),
            Dtype::F16 => {
                Self::Half(tables.map(|t| t.map(|value| f16::from_f32(value).to_bits())).collect())
            }
            Dtype::Bf16 => {
                Self::Half(tables.map(|t| t.map(|value| bf16::from_f32(value).to_bits())).collect())
            }
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

/// Interleaved output: element (row, column, channel) in the image's own order.
#[inline]
fn write_pixels<const N: usize>(
    image: &Image,
    out: &mut [u8],
    value: impl Fn(usize, u8) -> [u8; N],
) {
    let channels = image.channels;
    let pixels = image.data.chunks_exact(channels);
    for (pixel, bytes) in pixels.zip(out.chunks_exact_mut(N * channels)) {
        for (channel, (&byte, element)) in pixel.iter().zip(bytes.chunks_exact_mut(N)).enumerate() {
            element.copy_from_slice(&value(channel, byte));
        }
    }
}

/// Planar output: all rows of one channel, then the next channel.
#[inline]
fn write_planes<const N: usize>(
    image: &Image,
    out: &mut [u8],
    value: impl Fn(usize, u8) -> [u8; N],
) {
    let n_pixels = image.width * image.height;
    let channels = image.channels;
    for (channel, plane) in out.chunks_exact_mut(n_pixels * N).enumerate() {
        let bytes = image.data[channel..].iter().step_by(channels);
        for (&byte, element) in bytes.zip(plane.chunks_exact_mut(N)) {
            element.copy_from_slice(&value(channel, byte));
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
