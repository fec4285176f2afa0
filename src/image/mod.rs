//! Pixel buffers and the kernels that work on them: geometry, colour, filters.
//!
//! Owns the bytes of one image, from its encoded form on. Knows nothing of policies, probabilities
//! or files.
//!
//! The kernels for interleaved images are scalar and equal Pillow's bit for bit
//! (`tests/pillow_ops.rs` compares them): they are the oracle for the fast ones of [`planar`]. One
//! file per family.

pub mod channels;
pub mod decode;
pub mod draw;
pub mod encode;
pub mod enhance;
pub mod filter;
pub mod geometry;
pub mod hsv;
pub mod planar;
pub mod point;
pub mod resize;
pub mod simd;
pub mod sources;

/// Channels of a padded image: RGB, and a byte that means nothing. Decoder and resizing are faster
/// on four bytes than on three; only what lies between a file and planes knows such images.
pub const PADDED: usize = 4;

/// One decoded image: 8-bit samples, interleaved rows (height × width × channels).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Columns, in pixels.
    pub width: usize,
    /// Rows, in pixels.
    pub height: usize,
    /// 1 (gray) or 3 (RGB), or [`PADDED`].
    pub channels: usize,
    /// `height * width * channels` bytes.
    pub data: Vec<u8>,
}

impl Image {
    /// A black image.
    pub fn black(width: usize, height: usize, channels: usize) -> Self {
        Self { width, height, channels, data: vec![0; width * height * channels] }
    }

    /// Takes the shape given and makes every byte 0, keeping the allocation.
    pub fn reset(&mut self, width: usize, height: usize, channels: usize) {
        self.width = width;
        self.height = height;
        self.channels = channels;
        self.data.clear();
        self.data.resize(width * height * channels, 0);
    }
}

/// A rectangle of source pixels, drawn before decoding. It may reach outside the image: pixels
/// there are black (pad-and-crop).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropRect {
    /// Left edge, in source pixels; negative is left of the image.
    pub x: i64,
    /// Top edge, in source pixels; negative is above the image.
    pub y: i64,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}
