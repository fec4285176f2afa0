//! PNG, WebP, BMP and PNM by the `image` crate, with the colours that Pillow gives.
//!
//! | file | here, as Pillow's `convert("RGB")` or `convert("L")` |
//! |---|---|
//! | gray of 1, 2, 4 bits | spread over 0..255 |
//! | 16-bit gray (PNG) | cut off at 255 ([`from_gray_16`]) |
//! | other 16-bit channels | their high byte |
//! | palette | its colours |
//! | alpha, transparent colours | dropped: the colour below stays |
//!
//! Of an animation, the first frame.

use std::io::Cursor;

use image::codecs::bmp::BmpDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::pnm::PnmDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{ColorType, ImageDecoder, ImageError, ImageResult, Limits};

use super::super::Image;
use super::{DecodeError, DecodeLimits, Format};

/// Room for tables and for what inflating takes, beside the pixels, in bytes.
const WORKING_BYTES: u64 = 64 << 20;

/// A file's decoder, its header read.
pub(super) fn open<'a>(
    format: Format,
    bytes: &'a [u8],
    limits: &DecodeLimits,
) -> Result<Box<dyn ImageDecoder + 'a>, DecodeError> {
    let reader = Cursor::new(bytes);
    let opened: ImageResult<Box<dyn ImageDecoder + 'a>> = match format {
        Format::Png => {
            // 8 bytes a pixel: the most that PNG has.
            let mut decoder_limits = Limits::default();
            decoder_limits.max_alloc = Some(limits.max_pixels.saturating_mul(8) + WORKING_BYTES);
            PngDecoder::with_limits(reader, decoder_limits).map(|decoder| Box::new(decoder) as _)
        }
        Format::Webp => WebPDecoder::new(reader).map(|decoder| Box::new(decoder) as _),
        Format::Bmp => BmpDecoder::new(reader).map(|decoder| Box::new(decoder) as _),
        Format::Pnm => PnmDecoder::new(reader).map(|decoder| Box::new(decoder) as _),
        Format::Jpeg => unreachable!("libjpeg-turbo decodes JPEG"),
    };
    opened.map_err(|error| damaged(&error))
}

/// The orientation that the file's EXIF data names, if any.
pub(super) fn orientation(decoder: &mut dyn ImageDecoder) -> Orientation {
    // Damage in metadata is no reason to refuse an image: Pillow does not either.
    decoder.orientation().unwrap_or(Orientation::NoTransforms)
}

/// Decodes into `image`, whose channels are 1 if the file is gray, else 3. `buffer` is scratch.
pub(super) fn decode(
    decoder: Box<dyn ImageDecoder + '_>,
    buffer: &mut Vec<u8>,
    image: &mut Image,
) -> Result<(), DecodeError> {
    let (width, height) = decoder.dimensions();
    let color = decoder.color_type();
    let n_bytes = usize::try_from(decoder.total_bytes())
        .map_err(|_| DecodeError::damaged("larger than this machine's address space"))?;
    buffer.clear();
    buffer.resize(n_bytes, 0);
    decoder.read_image(buffer).map_err(|error| damaged(&error))?;
    let channels = if color.has_color() { 3 } else { 1 };
    image.width = width as usize;
    image.height = height as usize;
    image.channels = channels;
    image.data.clear();
    match color {
        ColorType::L8 | ColorType::Rgb8 => std::mem::swap(&mut image.data, buffer),
        ColorType::La8 => image.data.extend(buffer.as_chunks::<2>().0.iter().map(|p| p[0])),
        ColorType::Rgba8 => {
            image.data.extend(buffer.as_chunks::<4>().0.iter().flat_map(|p| [p[0], p[1], p[2]]));
        }
        ColorType::L16 => image.data.extend(words(buffer).map(from_gray_16)),
        ColorType::La16 => image.data.extend(words(buffer).step_by(2).map(high_byte)),
        ColorType::Rgb16 => image.data.extend(words(buffer).map(high_byte)),
        ColorType::Rgba16 => {
            let color_words = words(buffer).enumerate().filter(|(at, _)| at % 4 != 3);
            image.data.extend(color_words.map(|(_, word)| high_byte(word)));
        }
        other => return Err(DecodeError::damaged(format!("pixels of kind {other:?}"))),
    }
    Ok(())
}

fn words(buffer: &[u8]) -> impl Iterator<Item = u16> {
    buffer.as_chunks::<2>().0.iter().map(|&bytes| u16::from_ne_bytes(bytes))
}

fn high_byte(word: u16) -> u8 {
    word.to_be_bytes()[0]
}

/// A 16-bit gray value as Pillow converts its mode `I;16`: cut off at 255, so that all but the
/// darkest become white. What torchvision's `ImageFolder` shows, if hardly what is wanted.
fn from_gray_16(word: u16) -> u8 {
    u8::try_from(word).unwrap_or(u8::MAX)
}

fn damaged(error: &ImageError) -> DecodeError {
    DecodeError::damaged(error.to_string())
}
