//! Resizing, antialiased bilinear, by `fast_image_resize`.
//!
//! Differs from Pillow's `resize(…, BILINEAR)`, which torchvision's transforms of Pillow images
//! use, by at most 1 in any byte where images become smaller or little larger, and by at most 2 in
//! any case (`tests/python/test_images.py`).

use fast_image_resize::images::{CroppedImage, Image as View, ImageRef};
use fast_image_resize::{FilterType, IntoImageView, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::geometry::{Layout, crop_into};
use super::{CropRect, Image, PADDED};

/// Pixels of the result that the bilinear filter reaches, and one for rounding.
const MARGIN: usize = 2;

/// Resizes images; keeps its buffers. One per thread.
#[derive(Debug, Default)]
pub struct Scaler {
    resizer: Resizer,
    wide: Image,
}

/// The part of an image to be resized, in pixels, and possibly not whole ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frame {
    /// Left edge.
    pub x: f64,
    /// Top edge.
    pub y: f64,
    /// Columns.
    pub width: f64,
    /// Rows.
    pub height: f64,
}

impl Scaler {
    /// Resizes `frame` of `src` to `width` × `height`. Pixels outside the frame have no part in it.
    ///
    /// # Panics
    /// If the frame is empty or not in the image.
    pub fn resize(
        &mut self,
        src: &Image,
        frame: Frame,
        (width, height): (usize, usize),
        dst: &mut Image,
    ) {
        let view = view_of(src);
        // The frame's whole pixels: what the filter may look at.
        let (left, top) = (frame.x.floor(), frame.y.floor());
        let span = |start: f64, len: f64, first: f64, side: usize| {
            let first_pixel = to_usize(first);
            to_usize((start + len).ceil() - first).min(side - first_pixel)
        };
        let area_width = span(frame.x, frame.width, left, src.width);
        let area_height = span(frame.y, frame.height, top, src.height);
        let corner = (to_u32(to_usize(left)), to_u32(to_usize(top)));
        let area = (to_u32(area_width), to_u32(area_height));
        let view = CroppedImage::new(&view, corner.0, corner.1, area.0, area.1);
        let view = view.expect("the frame is in the image");
        let (x, y) = (frame.x - left, frame.y - top);
        let frame_width = frame.width.min(area_width as f64 - x);
        let frame_height = frame.height.min(area_height as f64 - y);
        let part = Frame { x, y, width: frame_width, height: frame_height };
        self.run(&view, src.channels, part, (width, height), dst);
    }

    /// The part `rect` of what [`Self::resize`] makes of `frame` at `size`, without making the rest
    /// of it: the memory that it takes is that of the part. The whole of `src` must be the frame.
    ///
    /// # Panics
    /// If the part is empty or not in the resized image.
    pub fn resize_part(
        &mut self,
        src: &Image,
        frame: Frame,
        size: (usize, usize),
        rect: CropRect,
        dst: &mut Image,
    ) {
        // With what the filter sees beyond the part's edges: it does not look out of its frame.
        let x = wider(rect.x, rect.width, size.0);
        let y = wider(rect.y, rect.height, size.1);
        let scaled =
            |start: f64, len: f64, (first, n): (usize, usize), size: usize, side: usize| {
                let scale = len / size as f64;
                let part = (n as f64 * scale).min(side as f64);
                // Rounding must not lead beyond the image's edge.
                ((start + first as f64 * scale).clamp(0.0, side as f64 - part), part)
            };
        let (left, width) = scaled(frame.x, frame.width, x, size.0, src.width);
        let (top, height) = scaled(frame.y, frame.height, y, size.1, src.height);
        let part = Frame { x: left, y: top, width, height };
        let mut wide = std::mem::take(&mut self.wide);
        self.run(&view_of(src), src.channels, part, (x.1, y.1), &mut wide);
        let offset = |start: i64, first: usize| start - i64::from(to_u32(first));
        let inner = CropRect { x: offset(rect.x, x.0), y: offset(rect.y, y.0), ..rect };
        let Image { width, height, channels, ref data } = wide;
        crop_into(data, Layout::Hwc, width, height, channels, inner, dst);
        self.wide = wide;
    }

    fn run(
        &mut self,
        view: &impl IntoImageView,
        channels: usize,
        part: Frame,
        (width, height): (usize, usize),
        dst: &mut Image,
    ) {
        dst.width = width;
        dst.height = height;
        dst.channels = channels;
        dst.data.resize(width * height * channels, 0);
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
            .use_alpha(false)
            .crop(part.x, part.y, part.width, part.height);
        let kind = pixel_type(channels);
        let out = View::from_slice_u8(to_u32(width), to_u32(height), &mut dst.data, kind);
        let mut out = out.expect("resized above");
        self.resizer.resize(view, &mut out, &options).expect("same pixels, a frame in the image");
    }
}

/// A range of `side` pixels, wider by [`MARGIN`] on both ends: its first pixel, and how many.
fn wider(start: i64, len: usize, side: usize) -> (usize, usize) {
    let start = usize::try_from(start).expect("the part is in the resized image");
    let first = start.saturating_sub(MARGIN);
    (first, (start + len + MARGIN).min(side) - first)
}

fn view_of(src: &Image) -> ImageRef<'_> {
    let kind = pixel_type(src.channels);
    let view = ImageRef::new(to_u32(src.width), to_u32(src.height), &src.data, kind);
    view.expect("an image has as many bytes as its shape says")
}

fn pixel_type(channels: usize) -> PixelType {
    match channels {
        1 => PixelType::U8,
        PADDED => PixelType::U8x4,
        _ => PixelType::U8x3,
    }
}

fn to_u32(side: usize) -> u32 {
    u32::try_from(side).expect("image sides fit u32")
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a side of an image")]
fn to_usize(side: f64) -> usize {
    side as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::PADDED;

    #[test]
    fn padded_pixels_are_resized_as_the_others_are() {
        let (width, height) = (97, 61);
        let mut state = 1_u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        let data: Vec<u8> = (0..width * height * 3).map(|_| byte()).collect();
        let pixels = data.as_chunks::<3>().0.iter();
        let padded = pixels.flat_map(|&[r, g, b]| [r, g, b, r ^ b]).collect();
        let image = Image { width, height, channels: 3, data };
        let padded = Image { width, height, channels: PADDED, data: padded };
        let mut scaler = Scaler::default();
        let (mut expected, mut found) = (Image::default(), Image::default());
        let sizes = [(5, 7), (40, 40), (64, 32), (97, 61), (200, 130)];
        let frames = [(0.0, 0.0, 97.0, 61.0), (3.25, 7.5, 60.5, 41.75), (96.0, 60.0, 1.0, 1.0)];
        let colours = |image: &Image| {
            assert_eq!(image.channels, PADDED);
            let pixels = image.data.as_chunks::<4>().0.iter();
            pixels.flat_map(|&[r, g, b, _]| [r, g, b]).collect::<Vec<_>>()
        };
        for size in sizes {
            for (x, y, width, height) in frames {
                let frame = Frame { x, y, width, height };
                scaler.resize(&image, frame, size, &mut expected);
                scaler.resize(&padded, frame, size, &mut found);
                assert!(colours(&found) == expected.data, "{frame:?} to {size:?}");
            }
            let frame = Frame { x: 0.0, y: 0.0, width: 97.0, height: 61.0 };
            let rect = CropRect { x: 2, y: 3, width: 3, height: 4 };
            scaler.resize_part(&image, frame, size, rect, &mut expected);
            scaler.resize_part(&padded, frame, size, rect, &mut found);
            assert!(colours(&found) == expected.data, "{rect:?} of {size:?}");
        }
    }
}
