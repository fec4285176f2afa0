//! Kernels that look at all channels of a pixel, or at its neighbours.

use super::super::enhance::luma;
use super::super::filter::smooth;
use super::super::hsv;
use super::super::simd::{byte_of_f32, for_levels};
use super::Planes;

/// Pixels whose luma is summed in 32 bits: 2^16 · 255 is less than 2^32.
const SUM_BLOCK: usize = 1 << 16;

/// As [`super::super::enhance::blend`].
#[inline(always)]
#[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
pub(super) fn blend(degenerate: u8, value: u8, factor: f32) -> u8 {
    let (degenerate, value) = (f32::from(degenerate), f32::from(value));
    byte_of_f32(degenerate + factor * (value - degenerate))
}

for_levels! {
    /// The sum of the pixels' luma.
    fn luma_sum(planes: [&[u8]; 3]) -> u64 {
        let [red, green, blue] = planes;
        let blocks =
            red.chunks(SUM_BLOCK).zip(green.chunks(SUM_BLOCK)).zip(blue.chunks(SUM_BLOCK));
        let mut total = 0;
        for ((red, green), blue) in blocks {
            let pixels = red.iter().zip(green).zip(blue);
            let sum: u32 = pixels.map(|((&r, &g), &b)| u32::from(luma([r, g, b]))).sum();
            total += u64::from(sum);
        }
        total
    }
}

for_levels! {
    fn byte_sum(plane: &[u8]) -> u64 {
        let sum = |block: &[u8]| block.iter().map(|&byte| u32::from(byte)).sum::<u32>();
        plane.chunks(SUM_BLOCK).map(|block| u64::from(sum(block))).sum()
    }
}

/// The mean luma, rounded half up: the gray that contrast blends with. There must be pixels.
#[allow(clippy::cast_possible_truncation, reason = "a mean of bytes is a byte")]
pub fn mean_luma(image: &Planes) -> u8 {
    let sum = image.rgb().map_or_else(|| byte_sum(&image.data), luma_sum);
    (sum as f64 / image.n_pixels() as f64 + 0.5) as u8
}

/// Blends with the gray version of the image. A gray image is its own, and stays as it is.
pub fn color(image: &mut Planes, factor: f32) {
    if let Some(planes) = image.rgb_mut() {
        blend_with_luma(planes, factor);
    }
}

for_levels! {
    fn blend_with_luma(planes: [&mut [u8]; 3], factor: f32) {
        let [red, green, blue] = planes;
        for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
            let gray = luma([*r, *g, *b]);
            *r = blend(gray, *r, factor);
            *g = blend(gray, *g, factor);
            *b = blend(gray, *b, factor);
        }
    }
}

/// `dst` becomes `src` blended with its 3×3 smoothing; see [`super::super::filter::sharpness`].
pub fn sharpness(src: &Planes, factor: f32, dst: &mut Planes) {
    let Planes { width, height, channels, .. } = *src;
    dst.reshape(width, height, channels);
    if width < 3 || height < 3 {
        dst.data.copy_from_slice(&src.data);
        return;
    }
    for (src, dst) in src.planes().zip(dst.planes_mut()) {
        sharpen(src, width, factor, dst);
    }
}

for_levels! {
    /// The whole plane as one row, so that narrow images fill a register, too; what this makes of
    /// the outermost columns, whose neighbours are of other rows, is overwritten.
    fn sharpen(src: &[u8], width: usize, factor: f32, dst: &mut [u8]) {
        let inner = width + 1..src.len() - width - 1;
        let n = inner.len();
        let [a0, a1, a2] = [0, 1, 2].map(|x| &src[x..][..n]);
        let [r0, r1, r2] = [0, 1, 2].map(|x| &src[width + x..][..n]);
        let [b0, b1, b2] = [0, 1, 2].map(|x| &src[2 * width + x..][..n]);
        let out = &mut dst[inner];
        let wide = |value: u8| u16::from(value);
        for i in 0..n {
            let above = wide(a0[i]) + wide(a1[i]) + wide(a2[i]);
            let row = wide(r0[i]) + 5 * wide(r1[i]) + wide(r2[i]);
            let below = wide(b0[i]) + wide(b1[i]) + wide(b2[i]);
            out[i] = blend(smooth(above + row + below), r1[i], factor);
        }
        dst[..width].copy_from_slice(&src[..width]);
        let last = src.len() - width;
        dst[last..].copy_from_slice(&src[last..]);
        for (dst, src) in dst.chunks_exact_mut(width).zip(src.chunks_exact(width)) {
            (dst[0], dst[width - 1]) = (src[0], src[width - 1]);
        }
    }
}

/// Adds `shift` (of 256, wrapping) to every pixel's hue. A gray image stays as it is.
pub fn shift_hue(image: &mut Planes, shift: u8) {
    let Some([red, green, blue]) = image.rgb_mut() else { return };
    for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
        [*r, *g, *b] = hsv::shifted([*r, *g, *b], shift);
    }
}
