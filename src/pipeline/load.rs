//! From a sample's content to the pixels that augmentation begins with: decode, crop, resize.
//!
//! Owns the choice of how much of an encoded image is decoded. The choice depends on the image and
//! the drawn crop alone, never on who else reads the sample: a part and the same part of a whole
//! image are equal, so a decode may be shared; a reduced one differs, and is never taken from a
//! whole one nor replaced by it.

use crate::dataset::{Pixels, RawImage};
use crate::image::decode::{Area, DecodeError, DecodeOptions, Decoder, Opened, Placed, reduction};
use crate::image::geometry::{Layout as PixelOrder, crop_into};
use crate::image::planar::read::RawPixels;
use crate::image::resize::{Frame, Scaler};
use crate::image::{CropRect, Image, channels};

use super::place::{Placement, TooSmall, place};
use super::recipe::{Crop, Decode};
use super::shared::SharedImage;
use crate::random::SampleRng;

/// Why a sample's pixels cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The image cannot be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It is too small for the crop.
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
}

/// Where a sample's pixels come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Pixels in the dataset.
    Raw(RawImage<'a>),
    /// An image file.
    Encoded(&'a [u8]),
    /// A whole image that was decoded for several streams.
    Shared(&'a SharedImage),
}

/// How a recipe loads samples.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loading {
    pub(super) crop: Crop,
    pub(super) decode: Decode,
    pub(super) options: DecodeOptions,
}

/// Decoders and buffers; one per thread.
#[derive(Debug, Default)]
pub(super) struct LoadScratch {
    decoder: Decoder,
    scaler: Scaler,
    source: Image,
    buffer: Vec<u8>,
}

impl Loading {
    /// Loads a sample into `out`; `rng` is its stream for the crop.
    pub(super) fn load(
        &self,
        source: Source<'_>,
        rng: SampleRng,
        scratch: &mut LoadScratch,
        out: &mut Image,
    ) -> Result<(), LoadError> {
        match source {
            Source::Raw(raw) => {
                self.load_raw(raw, rng, scratch, out)?;
                channels::convert(out, self.options.channels, &mut scratch.buffer);
                Ok(())
            }
            Source::Encoded(bytes) => self.load_encoded(bytes, rng, scratch, out),
            Source::Shared(shared) => {
                let size = (shared.image.width, shared.image.height);
                let placement = place(&self.crop, size, rng)?;
                let whole = Placed { x: 0, y: 0, reduce: 1 };
                finish(&shared.image, whole, placement, &mut scratch.scaler, out);
                Ok(())
            }
        }
    }

    /// Pixels that need no loading: a part of a raw image, to be read where it lies.
    pub(super) fn as_it_is<'a>(
        &self,
        source: Source<'a>,
        rng: SampleRng,
    ) -> Result<Option<(RawPixels<'a>, CropRect)>, LoadError> {
        let Source::Raw(raw) = source else { return Ok(None) };
        let RawImage { width, height, channels, .. } = raw;
        let (bytes, layout) = raw_bytes(raw);
        match place(&self.crop, (width, height), rng)? {
            Placement::Take(rect) if channels == self.options.channels => {
                Ok(Some((RawPixels { bytes, layout, width, height, channels }, rect)))
            }
            _ => Ok(None),
        }
    }

    /// Whether the sample's pixels, under this crop, are those of its whole image's decode.
    pub(super) fn takes_whole(&self, shared: &SharedImage, rng: SampleRng) -> bool {
        let size = (shared.image.width, shared.image.height);
        let Ok(placement) = place(&self.crop, size, rng) else { return true };
        !shared.is_reducible || self.reduction(&placement, reduction) == 1
    }

    /// Whether a whole decode, shared with `n_others`, costs less than what each decodes alone.
    pub(super) fn should_share(
        &self,
        (width, height): (usize, usize),
        is_reducible: bool,
        n_others: usize,
        rng: SampleRng,
    ) -> bool {
        let Ok(placement) = place(&self.crop, (width, height), rng) else { return false };
        if is_reducible && self.reduction(&placement, reduction) > 1 {
            return false;
        }
        let area = match placement {
            Placement::Take(rect) => inside(rect, (width, height)),
            Placement::Resize { area, .. } => Some(area),
        };
        let Some(area) = area else { return false };
        // Reading the code of all rows down to the crop's last costs about half of decoding them.
        let alone = (area.y + area.height) * width + area.width * area.height;
        2 * width * height <= alone.saturating_mul(n_others + 1)
    }

    fn load_raw(
        &self,
        raw: RawImage<'_>,
        rng: SampleRng,
        scratch: &mut LoadScratch,
        out: &mut Image,
    ) -> Result<(), LoadError> {
        let RawImage { width, height, channels, .. } = raw;
        let (bytes, order) = raw_bytes(raw);
        let placement = place(&self.crop, (width, height), rng)?;
        if let Placement::Take(rect) = placement {
            crop_into(bytes, order, width, height, channels, rect, out);
            return Ok(());
        }
        let whole = CropRect { x: 0, y: 0, width, height };
        crop_into(bytes, order, width, height, channels, whole, &mut scratch.source);
        let placed = Placed { x: 0, y: 0, reduce: 1 };
        finish(&scratch.source, placed, placement, &mut scratch.scaler, out);
        Ok(())
    }

    fn load_encoded(
        &self,
        bytes: &[u8],
        rng: SampleRng,
        scratch: &mut LoadScratch,
        out: &mut Image,
    ) -> Result<(), LoadError> {
        let LoadScratch { decoder, scaler, source, .. } = scratch;
        let mut opened = decoder.open(bytes, self.options)?;
        let placement = place(&self.crop, opened.size(), rng)?;
        let placed = self.decode(&mut opened, &placement, source)?;
        finish(source, placed, placement, scaler, out);
        Ok(())
    }

    fn decode(
        &self,
        opened: &mut Opened<'_>,
        placement: &Placement,
        out: &mut Image,
    ) -> Result<Placed, LoadError> {
        let area = match placement {
            Placement::Take(rect) => inside(*rect, opened.size()),
            Placement::Resize { area, .. } => Some(*area),
        };
        if self.decode == Decode::Partial
            && let Some(area) = area
        {
            let reduce = self.reduction(placement, |area, size| opened.reduction(area, size));
            return Ok(opened.decode_area(area, reduce, out)?);
        }
        opened.decode(out)?;
        Ok(Placed { x: 0, y: 0, reduce: 1 })
    }

    /// By how much the decoder reduces, by `of` an area and the size that it is resized to.
    fn reduction(
        &self,
        placement: &Placement,
        of: impl Fn(Area, (usize, usize)) -> usize,
    ) -> usize {
        match *placement {
            Placement::Resize { area, size, .. } if self.decode == Decode::Partial => {
                of(area, size)
            }
            _ => 1,
        }
    }
}

fn raw_bytes(raw: RawImage<'_>) -> (&[u8], PixelOrder) {
    match raw.pixels {
        Pixels::Hwc(bytes) => (bytes, PixelOrder::Hwc),
        Pixels::Chw(bytes) => (bytes, PixelOrder::Chw),
    }
}

/// The part of a rectangle that lies in an image.
fn inside(rect: CropRect, (width, height): (usize, usize)) -> Option<Area> {
    let span = |start: i64, len: usize, side: usize| {
        let len = i64::try_from(len).ok()?;
        let first = usize::try_from(start.max(0)).ok()?;
        let end = usize::try_from(start.checked_add(len)?).ok()?.min(side);
        (first < end).then(|| (first, end - first))
    };
    let (x, part_width) = span(rect.x, rect.width, width)?;
    let (y, part_height) = span(rect.y, rect.height, height)?;
    Some(Area { x, y, width: part_width, height: part_height })
}

/// From decoded pixels to the placement's: `placed` says which part of the source they are.
fn finish(
    decoded: &Image,
    placed: Placed,
    placement: Placement,
    scaler: &mut Scaler,
    out: &mut Image,
) {
    let take = |image: &Image, rect: CropRect, out: &mut Image| {
        let Image { width, height, channels, data } = image;
        crop_into(data, PixelOrder::Hwc, *width, *height, *channels, rect, out);
    };
    match placement {
        Placement::Take(rect) => {
            let offset = |start: i64, part: usize| start - i64::try_from(part).unwrap_or(i64::MAX);
            let (x, y) = (offset(rect.x, placed.x), offset(rect.y, placed.y));
            take(decoded, CropRect { x, y, ..rect }, out);
        }
        Placement::Resize { area, size, crop } => {
            let reduce = placed.reduce as f64;
            let frame = Frame {
                x: area.x as f64 / reduce - placed.x as f64,
                y: area.y as f64 / reduce - placed.y as f64,
                width: area.width as f64 / reduce,
                height: area.height as f64 / reduce,
            };
            match crop {
                None => scaler.resize(decoded, frame, size, out),
                Some(rect) => scaler.resize_part(decoded, frame, size, rect, out),
            }
        }
    }
}
