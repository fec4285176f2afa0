//! Sharpness: a blend of the image with its smoothed version.
//!
//! *Source*: Pillow, `ImageFilter.SMOOTH` (1 1 1 / 1 5 1 / 1 1 1, over 13), `ImageEnhance.py`.

use super::Image;
use super::enhance::blend;

/// Sum of the kernel's weights.
const WEIGHTS_SUM: u16 = 13;

/// `dst` becomes `src` blended with its 3×3 smoothing: factor 0 is smooth, 1 the image itself.
///
/// The outermost pixels have no full neighbourhood and stay as they are.
pub fn sharpness(src: &Image, factor: f32, dst: &mut Image) {
    dst.width = src.width;
    dst.height = src.height;
    dst.channels = src.channels;
    dst.data.clear();
    dst.data.extend_from_slice(&src.data);
    if src.width < 3 || src.height < 3 {
        return;
    }
    let stride = src.width * src.channels;
    for y in 1..src.height - 1 {
        let rows = [y - 1, y, y + 1].map(|row| &src.data[row * stride..][..stride]);
        let inner = src.channels..stride - src.channels;
        let out = &mut dst.data[y * stride..][inner.clone()];
        smooth_row(rows, src.channels, out);
        for (out, &value) in out.iter_mut().zip(&rows[1][inner]) {
            *out = blend(*out, value, factor);
        }
    }
}

/// Smooths the middle of three rows, without its first and last pixel.
fn smooth_row([above, row, below]: [&[u8]; 3], channels: usize, out: &mut [u8]) {
    // Slices of one length, so that the loop has no index to check.
    let n = out.len();
    let (a0, a1, a2) = (&above[..n], &above[channels..][..n], &above[2 * channels..][..n]);
    let (r0, r1, r2) = (&row[..n], &row[channels..][..n], &row[2 * channels..][..n]);
    let (b0, b1, b2) = (&below[..n], &below[channels..][..n], &below[2 * channels..][..n]);
    let wide = |value: u8| u16::from(value);
    for i in 0..n {
        let sum_above = wide(a0[i]) + wide(a1[i]) + wide(a2[i]);
        let sum_row = wide(r0[i]) + 5 * wide(r1[i]) + wide(r2[i]);
        let sum_below = wide(b0[i]) + wide(b1[i]) + wide(b2[i]);
        out[i] = smooth(sum_above + sum_row + sum_below);
    }
}

/// The weighted sum divided by 13 and rounded.
///
/// Pillow sums in f32 and cuts `sum / 13 + ½`. That number is an odd multiple of 1/26, at least
/// 1/26 away from any integer and far more than f32's error, so integers give the same.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "a weighted mean of bytes is a byte")]
pub(super) fn smooth(sum: u16) -> u8 {
    ((2 * sum + WEIGHTS_SUM) / (2 * WEIGHTS_SUM)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_image_stays_and_a_small_one_is_copied() {
        for (width, height) in [(5, 4), (2, 9), (9, 1), (0, 0)] {
            let image =
                Image { data: vec![77; width * height * 3], ..Image::black(width, height, 3) };
            let mut out = Image::default();
            sharpness(&image, 0.0, &mut out);
            assert_eq!(out, image);
        }
    }

    #[test]
    fn a_single_bright_pixel_spreads_by_the_kernel() {
        let mut image = Image::black(5, 5, 1);
        image.data[12] = 130;
        let mut out = Image::default();
        sharpness(&image, 0.0, &mut out);
        let row = [0, 10, 10, 10, 0];
        assert_eq!(out.data[5..10], row);
        assert_eq!(out.data[10..15], [0, 10, 50, 10, 0]);
        assert_eq!(out.data[15..20], row);
        assert_eq!(out.data[..5], [0; 5]);
    }
}
