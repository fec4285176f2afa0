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
    let channels = src.channels;
    let stride = src.width * channels;
    let inner = stride - 2 * channels;
    for y in 1..src.height - 1 {
        let rows = [y - 1, y, y + 1].map(|row| &src.data[row * stride..][..stride]);
        // Each of the nine neighbours as a row of its own, so that the loop below has no indices
        // to check.
        let taps = |column: usize| rows.map(|row| &row[column * channels..][..inner]);
        let (left, middle, right) = (taps(0), taps(1), taps(2));
        let out = &mut dst.data[y * stride + channels..][..inner];
        for (i, out) in out.iter_mut().enumerate() {
            let centre = middle[1][i];
            let sum = [left[0][i], middle[0][i], right[0][i], left[1][i], right[1][i]]
                .into_iter()
                .chain([left[2][i], middle[2][i], right[2][i]])
                .map(u16::from)
                .sum::<u16>()
                + 5 * u16::from(centre);
            *out = blend(smooth(sum), centre, factor);
        }
    }
}

/// The weighted sum divided by 13 and rounded.
///
/// Pillow sums in f32 and cuts `sum / 13 + ½`. That number is an odd multiple of 1/26, at least
/// 1/26 away from any integer and far more than f32's error, so integers give the same.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "a weighted mean of bytes is a byte")]
fn smooth(sum: u16) -> u8 {
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
