//! Raw pixels into planes: a part of an image, mirrored or not, whatever its order.

use super::super::geometry::{Layout, overlap};
use super::super::simd::for_levels;
use super::super::{CropRect, Image, PADDED};
use super::Planes;

/// Pixels of an image, in any order.
#[derive(Clone, Copy, Debug)]
pub struct RawPixels<'a> {
    /// `height * width * channels` bytes.
    pub bytes: &'a [u8],
    /// Their order.
    pub layout: Layout,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// 1, 3 or (interleaved) [`PADDED`].
    pub channels: usize,
}

impl<'a> From<&'a Image> for RawPixels<'a> {
    fn from(image: &'a Image) -> Self {
        let Image { width, height, channels, ref data } = *image;
        Self { bytes: data, layout: Layout::Hwc, width, height, channels }
    }
}

/// Where rows go from and to.
#[derive(Clone, Copy)]
struct Rows {
    n: usize,
    n_cols: usize,
    /// Pixels from one source row to the next.
    src_stride: usize,
    /// Bytes from one row of a plane to the next.
    stride: usize,
    flip: bool,
}

/// Bytes that are copied at once.
const BLOCK: usize = 16;
/// Rows longer than this are worth a call.
const LONG: usize = 64;

impl RawPixels<'_> {
    /// `out` becomes the part `rect`, mirrored left to right if `flip`; black where `rect` reaches
    /// outside of the image.
    ///
    /// # Panics
    /// If `bytes` is shorter than its shape says.
    pub fn read(&self, rect: CropRect, flip: bool, out: &mut Planes) {
        let Self { bytes, layout, width, height, channels } = *self;
        assert!(bytes.len() >= width * height * channels, "shorter than its shape says");
        out.reshape(rect.width, rect.height, channels.min(3));
        let x = overlap(rect.x, rect.width, width);
        let y = overlap(rect.y, rect.height, height);
        let (Some((src_x, out_x, n_cols)), Some((src_y, out_y, n_rows))) = (x, y) else {
            out.data.fill(0);
            return;
        };
        if n_cols < rect.width || n_rows < rect.height {
            out.data.fill(0);
        }
        let out_x = if flip { rect.width - out_x - n_cols } else { out_x };
        let first = out_y * rect.width + out_x;
        let start = src_y * width + src_x;
        let stride = rect.width;
        if layout == Layout::Hwc && channels > 1 {
            let rows = Rows { n: n_rows, n_cols, src_stride: width, stride, flip };
            let [red, green, blue] = out.rgb_mut().expect("three channels");
            let planes = [&mut red[first..], &mut green[first..], &mut blue[first..]];
            let src = &bytes[channels * start..];
            if channels == PADDED {
                split_padded(src, planes, rows);
            } else {
                split(src, planes, rows);
            }
            return;
        }
        let rows = Rows { n: n_rows, n_cols, src_stride: width, stride, flip };
        let src_planes = bytes.chunks_exact(width * height);
        for (plane, src) in out.planes_mut().zip(src_planes) {
            copy(&src[start..], &mut plane[first..], rows);
        }
    }
}

for_levels! {
    fn copy(src: &[u8], out: &mut [u8], rows: Rows) {
        let Rows { n, n_cols, src_stride, stride, flip } = rows;
        for row in 0..n {
            let src = &src[row * src_stride..][..n_cols];
            let out = &mut out[row * stride..][..n_cols];
            if flip {
                mirror_row(src, out);
            } else {
                copy_row(src, out);
            }
        }
    }
}

/// Copies a row in whole blocks, the last of which may overlap the one before: for short rows that
/// is faster than a call.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
pub(super) fn copy_row(src: &[u8], out: &mut [u8]) {
    if src.len() > LONG {
        out.copy_from_slice(src);
        return;
    }
    let (Some(src_last), Some(_)) = (src.last_chunk::<BLOCK>(), out.last_chunk_mut::<BLOCK>())
    else {
        out.iter_mut().zip(src).for_each(|(out, &byte)| *out = byte);
        return;
    };
    let blocks = src.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0);
    blocks.for_each(|(src, out)| *out = *src);
    *out.last_chunk_mut().expect("asked for above") = *src_last;
}

/// As [`copy_row`], from right to left.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
fn mirror_row(src: &[u8], out: &mut [u8]) {
    let mirrored = |block: &[u8; BLOCK]| {
        let mut block = *block;
        block.reverse();
        block
    };
    let (Some(src_last), Some(_)) = (src.last_chunk::<BLOCK>(), out.last_chunk_mut::<BLOCK>())
    else {
        out.iter_mut().rev().zip(src).for_each(|(out, &byte)| *out = byte);
        return;
    };
    let places = out.as_rchunks_mut::<BLOCK>().1.iter_mut().rev();
    src.as_chunks::<BLOCK>().0.iter().zip(places).for_each(|(src, out)| *out = mirrored(src));
    *out.first_chunk_mut().expect("asked for above") = mirrored(src_last);
}

for_levels! {
    fn split(src: &[u8], planes: [&mut [u8]; 3], rows: Rows) {
        split_rows::<3>(src, planes, rows);
    }
}

for_levels! {
    fn split_padded(src: &[u8], planes: [&mut [u8]; 3], rows: Rows) {
        split_rows::<PADDED>(src, planes, rows);
    }
}

/// Rows of pixels of `C` bytes into planes.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
fn split_rows<const C: usize>(src: &[u8], planes: [&mut [u8]; 3], rows: Rows) {
    let Rows { n, n_cols, src_stride, stride, flip } = rows;
    let [red, green, blue] = planes;
    for row in 0..n {
        let src = src[row * C * src_stride..][..C * n_cols].as_chunks::<C>().0;
        let at = row * stride..row * stride + n_cols;
        let (red, green, blue) = (&mut red[at.clone()], &mut green[at.clone()], &mut blue[at]);
        let planes = red.iter_mut().zip(green).zip(blue);
        if flip {
            for (((r, g), b), pixel) in planes.rev().zip(src) {
                (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
            }
        } else {
            for (((r, g), b), pixel) in planes.zip(src) {
                (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
            }
        }
    }
}
