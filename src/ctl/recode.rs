//! What `dataset pack` makes of images on the way: smaller, of another quality, or pixels.
//!
//! Owns no files: a [`Recoded`] split reads another one and converts each sample when it is asked.

use std::cell::RefCell;
use std::sync::Arc;

use crate::dataset::{
    Content, DatasetError, ImageKind, Label, Pixels, RawImage, Sample, Split, SplitInfo,
};
use crate::image::decode::{DecodeLimits, DecodeOptions, Decoder};
use crate::image::geometry::{Layout, crop_into};
use crate::image::resize::{Frame, Scaler};
use crate::image::{CropRect, Image, encode};

/// Quality of images that are encoded anew, unless another is asked for.
const QUALITY_DEFAULT: u8 = 90;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recoding {
    /// Longest side; larger images are shrunk.
    pub(super) max_side: Option<u32>,
    /// JPEG quality; encodes all images anew.
    pub(super) quality: Option<u8>,
    /// Pixels instead of image files.
    pub(super) raw: bool,
}

/// A split whose images are converted when they are read.
#[derive(Debug)]
struct Recoded {
    inner: Arc<dyn Split>,
    recoding: Recoding,
    turn: bool,
    info: SplitInfo,
}

#[derive(Default)]
struct Scratch {
    decoder: Decoder,
    scaler: Scaler,
    file: Vec<u8>,
    image: Image,
    resized: Image,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The split as it is to be packed.
///
/// # Errors
/// Its first image cannot be decoded, which decides the shape of raw ones.
pub(super) fn recoded(
    inner: Arc<dyn Split>,
    recoding: Recoding,
) -> Result<Arc<dyn Split>, DatasetError> {
    let turn = match inner.info().images {
        ImageKind::Encoded { turns_by_exif } => turns_by_exif,
        ImageKind::Raw { .. } => false,
    };
    let info = inner.info().clone();
    let mut split = Recoded { inner, recoding, turn, info };
    split.info.images = if recoding.raw {
        let mut scratch = Scratch::default();
        split.load(0, &mut scratch)?;
        let Image { width, height, channels, .. } = scratch.image;
        ImageKind::Raw { height, width, channels }
    } else {
        // What is encoded anew is turned already; what is not is as it was.
        ImageKind::Encoded { turns_by_exif: turn }
    };
    Ok(Arc::new(split))
}

impl Recoded {
    /// Decodes and shrinks a sample into `scratch.image`; gives whether it had to be shrunk.
    fn load(&self, sample_idx: u64, scratch: &mut Scratch) -> Result<bool, DatasetError> {
        let Scratch { decoder, scaler, file, image, resized } = scratch;
        let sample = self.inner.sample(sample_idx, file)?;
        match sample.content {
            Content::Raw(raw) => copy(raw, image),
            Content::Encoded(bytes) => {
                let limits = DecodeLimits::default();
                let options = DecodeOptions { channels: 3, turn: self.turn, limits };
                let decoded =
                    decoder.open(bytes, options).and_then(|mut opened| opened.decode(image));
                decoded.map_err(|error| DatasetError::BadImage {
                    path: self.inner.sample_name(sample_idx),
                    what: error.to_string(),
                })?;
            }
        }
        let longest = image.width.max(image.height);
        let Some(max_side) = self.recoding.max_side.map(|side| side as usize) else {
            return Ok(false);
        };
        if longest <= max_side {
            return Ok(false);
        }
        let shrunk = |side: usize| ((side * max_side + longest / 2) / longest).max(1);
        let (width, height) = (image.width as f64, image.height as f64);
        let size = (shrunk(image.width), shrunk(image.height));
        scaler.resize(image, Frame { x: 0.0, y: 0.0, width, height }, size, resized);
        std::mem::swap(image, resized);
        Ok(true)
    }
}

fn copy(raw: RawImage<'_>, image: &mut Image) {
    let RawImage { width, height, channels, .. } = raw;
    let (bytes, layout) = match raw.pixels {
        Pixels::Hwc(bytes) => (bytes, Layout::Hwc),
        Pixels::Chw(bytes) => (bytes, Layout::Chw),
    };
    let whole = CropRect { x: 0, y: 0, width, height };
    crop_into(bytes, layout, width, height, channels, whole, image);
}

impl Split for Recoded {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let label = self.inner.label(sample_idx)?;
        let shape = SCRATCH.with_borrow_mut(|scratch| {
            let is_shrunk = self.load(sample_idx, scratch)?;
            let Image { width, height, channels, ref data } = scratch.image;
            if self.recoding.raw {
                buffer.clone_from(data);
                return Ok(Some([width, height, channels]));
            }
            let is_raw = matches!(self.inner.info().images, ImageKind::Raw { .. });
            if !is_shrunk && !is_raw && self.recoding.quality.is_none() {
                let whole = self.inner.sample(sample_idx, &mut scratch.file)?;
                if let Content::Encoded(bytes) = whole.content {
                    buffer.clear();
                    buffer.extend_from_slice(bytes);
                }
                return Ok(None);
            }
            let quality = self.recoding.quality.unwrap_or(QUALITY_DEFAULT);
            *buffer = encode::jpeg(&scratch.image, quality).map_err(|what| {
                DatasetError::BadImage { path: self.inner.sample_name(sample_idx), what }
            })?;
            Ok::<_, DatasetError>(None)
        })?;
        let content = match shape {
            None => Content::Encoded(buffer),
            Some([width, height, channels]) => {
                Content::Raw(RawImage { width, height, channels, pixels: Pixels::Hwc(buffer) })
            }
        };
        Ok(Sample { content, label })
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        self.inner.label(sample_idx)
    }

    fn sample_name(&self, sample_idx: u64) -> String {
        self.inner.sample_name(sample_idx)
    }
}
