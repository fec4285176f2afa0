//! Resizing, antialiased bilinear, by `fast_image_resize`.
//!
//! Differs from Pillow's `resize(…, BILINEAR)`, which torchvision's transforms of Pillow images
//! use, by at most [`DIFFERENCE_MAX`] in a byte (`tests/python/test_decode.py`).

use fast_image_resize::images::{CroppedImage, Image as View, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::Image;
use super::decode::Area;

/// Largest difference to Pillow's result in any byte.
pub const DIFFERENCE_MAX: u8 = 1;

/// Resizes images; keeps its buffers. One per thread.
#[derive(Debug, Default)]
pub struct Scaler {
    resizer: Resizer,
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
        dst.width = width;
        dst.height = height;
        dst.channels = src.channels;
        dst.data.resize(width * height * src.channels, 0);
        let kind = if src.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
        let view = ImageRef::new(to_u32(src.width), to_u32(src.height), &src.data, kind);
        let view = view.expect("an image has as many bytes as its shape says");
        // The frame's whole pixels: what the filter may look at.
        let (left, top) = (frame.x.floor(), frame.y.floor());
        let area = Area {
            x: to_usize(left),
            y: to_usize(top),
            width: to_usize((frame.x + frame.width).ceil() - left).min(src.width - to_usize(left)),
            height: to_usize((frame.y + frame.height).ceil() - top).min(src.height - to_usize(top)),
        };
        let view = CroppedImage::new(
            &view,
            to_u32(area.x),
            to_u32(area.y),
            to_u32(area.width),
            to_u32(area.height),
        );
        let view = view.expect("the frame is in the image");
        let (x, y) = (frame.x - left, frame.y - top);
        let (frame_width, frame_height) =
            (frame.width.min(area.width as f64 - x), frame.height.min(area.height as f64 - y));
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
            .use_alpha(false)
            .crop(x, y, frame_width, frame_height);
        let out = View::from_slice_u8(to_u32(width), to_u32(height), &mut dst.data, kind);
        let mut out = out.expect("resized above");
        self.resizer.resize(&view, &mut out, &options).expect("same pixels, a frame in the image");
    }
}

fn to_u32(side: usize) -> u32 {
    u32::try_from(side).expect("image sides fit u32")
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a side of an image")]
fn to_usize(side: f64) -> usize {
    side as usize
}
