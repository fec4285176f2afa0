//! Encoded images: what a file's header says, and its pixels, whole or in part.
//!
//! Owns formats, colours and limits. The results are Pillow's, byte for byte
//! (`tests/python/test_images.py`): of `convert("RGB")` for three channels, of `convert("L")` for
//! one. JPEG is libjpeg-turbo's, PNG, WebP, BMP and PNM are the `image` crate's.
//!
//! **Limits**: sizes are read from headers and refused before memory is taken for pixels.
//!
//! **Parts**: of a JPEG, the blocks that a crop needs are decoded, and reduced by the inverse DCT
//! where the crop is to become smaller anyway. A part that is not reduced equals that part of the
//! whole image bit for bit.

mod exif;
mod jpeg;
mod raster;

use image::metadata::Orientation;

use super::{Image, PADDED, channels};
use crate::limits;
use jpeg::{Jpeg, OpenJpeg, Part};

/// Formats, by their first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Format {
    Jpeg,
    Png,
    Webp,
    Bmp,
    Pnm,
}

impl Format {
    /// The format that the first bytes of a file tell.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0xFF, 0xD8, 0xFF, ..] => Some(Self::Jpeg),
            [0x89, b'P', b'N', b'G', ..] => Some(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::Webp),
            [b'B', b'M', ..] => Some(Self::Bmp),
            [b'P', b'1'..=b'7', ..] => Some(Self::Pnm),
            _ => None,
        }
    }
}

/// What is refused before memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeLimits {
    /// Most rows, and most columns.
    pub max_side: u64,
    /// Most rows times columns.
    pub max_pixels: u64,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { max_side: limits::IMAGE_SIDE_MAX.into(), max_pixels: limits::IMAGE_PIXELS_DEFAULT }
    }
}

/// How images are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeOptions {
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// Whether images are turned as their EXIF orientation says.
    pub turn: bool,
    /// What is refused.
    pub limits: DecodeLimits,
}

/// Why an image cannot be had. Messages are in words, without the file's name, which the caller
/// knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// None of the formats.
    #[error("not an image of a known format (JPEG, PNG, WebP, BMP, PNM): {found}")]
    UnknownFormat {
        /// What its beginning looks like.
        found: String,
    },
    /// A header or data that make no sense.
    #[error("damaged or cut off: {what}")]
    Damaged {
        /// What the decoder says.
        what: String,
    },
    /// Larger than allowed.
    #[error(
        "{width}x{height} pixels, but at most {max_side} a side and {max_pixels} in all are \
         allowed; if the image is no bomb, raise images.max_side or images.max_pixels in the \
         daemon's configuration"
    )]
    TooLarge {
        /// Columns.
        width: u64,
        /// Rows.
        height: u64,
        /// The limit.
        max_side: u64,
        /// The limit.
        max_pixels: u64,
    },
}

impl DecodeError {
    fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }
}

/// An area of an image, within it. Not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Left edge.
    pub x: usize,
    /// Top edge.
    pub y: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// Where a decoded part lies in its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Left edge of the part, in pixels of the reduced image.
    pub x: usize,
    /// Top edge.
    pub y: usize,
    /// The image is reduced to 1/`reduce`: 1, 2, 4 or 8.
    pub reduce: usize,
}

/// Buffers that are reused from image to image, and the decompressor of the last JPEG; one per
/// thread.
#[derive(Debug, Default)]
pub struct Decoder {
    jpeg: Option<Jpeg>,
    buffer: Vec<u8>,
    unturned: Image,
}

/// A file whose header was read and is within the limits.
#[derive(Debug)]
pub struct Opened<'a> {
    /// The decompressor, its header read; `None` for other formats.
    jpeg: Option<OpenJpeg<'a>>,
    buffer: &'a mut Vec<u8>,
    unturned: &'a mut Image,
    bytes: &'a [u8],
    format: Format,
    options: DecodeOptions,
    orientation: Orientation,
    stored: (usize, usize),
    is_gray: bool,
    is_reducible: bool,
}

impl Decoder {
    /// Reads a file's header.
    ///
    /// # Errors
    /// An unknown format, a damaged header, or a size beyond the limits.
    pub fn open<'a>(
        &'a mut self,
        bytes: &'a [u8],
        options: DecodeOptions,
    ) -> Result<Opened<'a>, DecodeError> {
        let format = Format::of(bytes)
            .ok_or_else(|| DecodeError::UnknownFormat { found: describe(bytes) })?;
        let Self { jpeg, buffer, unturned } = self;
        let mut opened = None;
        let (stored, orientation, is_gray, is_reducible) = if format == Format::Jpeg {
            let jpeg = opened.insert(jpeg.insert(Jpeg::new()?).open(bytes)?);
            let orientation = if options.turn { exif::of_jpeg(bytes) } else { None };
            let is_reducible = jpeg.is_reducible();
            let is_gray = jpeg.color == jpeg::Color::Gray;
            ((jpeg.width, jpeg.height), orientation, is_gray, is_reducible)
        } else {
            let mut decoder = raster::open(format, bytes, &options.limits)?;
            let (width, height) = decoder.dimensions();
            let orientation = options.turn.then(|| raster::orientation(&mut *decoder));
            let is_gray = !decoder.color_type().has_color();
            ((width as usize, height as usize), orientation, is_gray, false)
        };
        let orientation = orientation.unwrap_or(Orientation::NoTransforms);
        check_size(stored, &options.limits)?;
        Ok(Opened {
            jpeg: opened,
            buffer,
            unturned,
            bytes,
            format,
            options,
            orientation,
            stored,
            is_gray,
            is_reducible,
        })
    }
}

impl Opened<'_> {
    /// Columns and rows of the image as it is shown: after it was turned.
    pub fn size(&self) -> (usize, usize) {
        let (width, height) = self.stored;
        if exif::swaps_sides(self.orientation) { (height, width) } else { (width, height) }
    }

    /// Whether the file has no colours.
    pub fn is_gray(&self) -> bool {
        self.is_gray
    }

    /// Whether [`Self::decode_area`] can do with less than the whole.
    pub fn has_parts(&self) -> bool {
        self.format == Format::Jpeg && self.orientation == Orientation::NoTransforms
    }

    /// Whether the decoder can reduce it.
    pub fn is_reducible(&self) -> bool {
        self.has_parts() && self.is_reducible
    }

    /// As [`reduction`]; 1 for what cannot be reduced.
    pub fn reduction(&self, area: Area, size: (usize, usize)) -> usize {
        if self.is_reducible() { reduction(area, size) } else { 1 }
    }

    /// Decodes the whole image.
    ///
    /// # Errors
    /// The file is damaged or cut off.
    pub fn decode(&mut self, out: &mut Image) -> Result<(), DecodeError> {
        let (width, height) = self.stored;
        if self.orientation == Orientation::NoTransforms {
            self.decode_stored(Area { x: 0, y: 0, width, height }, 1, false, out)?;
            return Ok(());
        }
        let mut unturned = std::mem::take(self.unturned);
        let whole = Area { x: 0, y: 0, width, height };
        let decoded = self.decode_stored(whole, 1, false, &mut unturned);
        if decoded.is_ok() {
            exif::turn(&unturned, self.orientation, out);
        }
        *self.unturned = unturned;
        decoded.map(|_| ())
    }

    /// Decodes at least `area` (in pixels of the image as it is shown), reduced to 1/`reduce`,
    /// which [`Self::reduction`] gave. A colour image may come [`PADDED`].
    ///
    /// # Errors
    /// The file is damaged or cut off.
    pub fn decode_area(
        &mut self,
        area: Area,
        reduce: usize,
        out: &mut Image,
    ) -> Result<Placed, DecodeError> {
        if !self.has_parts() {
            self.decode(out)?;
            return Ok(Placed { x: 0, y: 0, reduce: 1 });
        }
        let (x, y) = (area.x / reduce, area.y / reduce);
        let width = (area.x + area.width).div_ceil(reduce) - x;
        let height = (area.y + area.height).div_ceil(reduce) - y;
        let is_padded = self.options.channels == 3;
        self.decode_stored(Area { x, y, width, height }, reduce, is_padded, out)
    }

    /// Decodes an area of the (reduced) image as it is stored, in the colours wanted.
    fn decode_stored(
        &mut self,
        area: Area,
        reduce: usize,
        is_padded: bool,
        out: &mut Image,
    ) -> Result<Placed, DecodeError> {
        let Some(jpeg) = &mut self.jpeg else {
            let decoder = raster::open(self.format, self.bytes, &self.options.limits)?;
            raster::decode(decoder, self.buffer, out)?;
            channels::convert(out, self.options.channels, self.buffer);
            return Ok(Placed { x: 0, y: 0, reduce: 1 });
        };
        let Area { x, y, width, height } = area;
        let wanted = Part { x, y, width, height };
        let (part, pixel_bytes) = jpeg.decode_part(wanted, reduce, is_padded, &mut out.data)?;
        (out.width, out.height) = (part.width, part.height);
        out.channels = pixel_bytes;
        if jpeg.color == jpeg::Color::Cmyk {
            channels::from_inverted_cmyk(out);
        }
        if out.channels != PADDED {
            channels::convert(out, self.options.channels, self.buffer);
        }
        Ok(Placed { x: part.x, y: part.y, reduce })
    }
}

/// The largest of 1, 2, 4 and 8 by which `area` can be reduced, so that it still has at least
/// `width` × `height` pixels.
pub fn reduction(area: Area, (width, height): (usize, usize)) -> usize {
    let is_enough = |by: usize| area.width >= width * by && area.height >= height * by;
    [8, 4, 2].into_iter().find(|by| is_enough(*by)).unwrap_or(1)
}

fn check_size((width, height): (usize, usize), limits: &DecodeLimits) -> Result<(), DecodeError> {
    let (width, height) = (width as u64, height as u64);
    let DecodeLimits { max_side, max_pixels } = *limits;
    if width == 0 || height == 0 {
        return Err(DecodeError::damaged(format!("{width}x{height} pixels")));
    }
    if width.max(height) > max_side || width.saturating_mul(height) > max_pixels {
        return Err(DecodeError::TooLarge { width, height, max_side, max_pixels });
    }
    Ok(())
}

/// What bytes of no known format look like, in words.
fn describe(bytes: &[u8]) -> String {
    match bytes {
        [] => "it is empty".to_owned(),
        [b'G', b'I', b'F', b'8', ..] => "it is a GIF".to_owned(),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => "it is a TIFF".to_owned(),
        _ => {
            let first: Vec<String> = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
            format!("its first bytes are {}", first.join(" "))
        }
    }
}
