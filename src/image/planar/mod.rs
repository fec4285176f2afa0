//! Images as planes, and the kernels of the hot path that work on them.
//!
//! One channel lies after the other, so that a kernel runs over bytes of one meaning, as wide as
//! the processor allows. Results equal those of the interleaved kernels of [`super`] bit for bit:
//! these are the oracle (`tests/planar_ops.rs`, `tests/pillow_ops.rs`).

pub mod color;
pub mod geometry;
pub mod lut;
pub mod read;
pub mod tables;

use super::draw::PixelBox;

/// One decoded image: 8-bit samples, all rows of a channel, then the next channel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planes {
    /// Columns, in pixels.
    pub width: usize,
    /// Rows, in pixels.
    pub height: usize,
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// `channels * height * width` bytes.
    pub data: Vec<u8>,
}

impl Planes {
    /// Takes the shape given, keeping the allocation; what the bytes are is not said.
    pub fn reshape(&mut self, width: usize, height: usize, channels: usize) {
        (self.width, self.height, self.channels) = (width, height, channels);
        self.data.resize(width * height * channels, 0);
    }

    /// Pixels of a plane.
    pub fn n_pixels(&self) -> usize {
        self.width * self.height
    }

    /// The planes, in order; none if there are no pixels.
    pub fn planes(&self) -> impl Iterator<Item = &[u8]> {
        self.data.chunks_exact(self.n_pixels().max(1))
    }

    /// The planes, to be written.
    pub fn planes_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let n_pixels = self.n_pixels().max(1);
        self.data.chunks_exact_mut(n_pixels)
    }

    /// The planes of a colour image.
    pub fn rgb(&self) -> Option<[&[u8]; 3]> {
        let n_pixels = self.n_pixels();
        if self.channels != 3 {
            return None;
        }
        let (red, rest) = self.data.split_at(n_pixels);
        let (green, blue) = rest.split_at(n_pixels);
        Some([red, green, blue])
    }

    /// The planes of a colour image, to be written.
    pub fn rgb_mut(&mut self) -> Option<[&mut [u8]; 3]> {
        let n_pixels = self.n_pixels();
        if self.channels != 3 {
            return None;
        }
        let (red, rest) = self.data.split_at_mut(n_pixels);
        let (green, blue) = rest.split_at_mut(n_pixels);
        Some([red, green, blue])
    }

    /// Fills the part of the box that lies in the image. A gray image takes `fill[0]`.
    pub fn fill_box(&mut self, area: PixelBox, fill: [u8; 3]) {
        let clip = |value: i64, size: usize| usize::try_from(value).unwrap_or(0).min(size);
        let (x0, x1) = (clip(area.x0, self.width), clip(area.x1, self.width));
        let (y0, y1) = (clip(area.y0, self.height), clip(area.y1, self.height));
        let width = self.width;
        if x0 >= x1 || y0 >= y1 {
            return;
        }
        for (plane, value) in self.planes_mut().zip(fill) {
            for row in plane[y0 * width..y1 * width].chunks_exact_mut(width) {
                row[x0..x1].fill(value);
            }
        }
    }
}
