//! Brightness, colour and contrast: a blend of the image with a degenerate version of itself.
//!
//! *Source*: Pillow, `ImageEnhance.py` and `src/libImaging/Blend.c`: single precision, product
//! rounded before the sum, cut (not rounded) to a byte. `Sharpness` is in [`super::filter`].

use super::Image;
use super::point::{Lut, apply_lut, lut};

/// `degenerate + factor · (value − degenerate)` in f32, clipped to 0–255, cut to an integer.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "the cast clips and cuts, as is meant")]
pub fn blend(degenerate: u8, value: u8, factor: f32) -> u8 {
    let difference = f32::from(i16::from(value) - i16::from(degenerate));
    (f32::from(degenerate) + factor * difference) as u8
}

/// The table of a blend with a constant.
pub fn blend_lut(degenerate: u8, factor: f32) -> Lut {
    lut(|value| blend(degenerate, value, factor))
}

/// Luma of an RGB pixel: ITU-R 601-2 in 16.16 fixed point, as Pillow's `convert("L")`.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "the weights add up to one")]
pub fn luma([r, g, b]: [u8; 3]) -> u8 {
    ((19_595 * u32::from(r) + 38_470 * u32::from(g) + 7_471 * u32::from(b) + 0x8000) >> 16) as u8
}

/// Blends with black: factor 0 is black, 1 the image itself.
pub fn brightness(image: &mut Image, factor: f32) {
    apply_lut(image, &blend_lut(0, factor));
}

/// Blends with the constant gray of the mean luma, rounded half up. No pixels: no change.
pub fn contrast(image: &mut Image, factor: f32) {
    if !image.data.is_empty() {
        let mean = mean_luma(image);
        apply_lut(image, &blend_lut(mean, factor));
    }
}

/// The degenerate gray of [`contrast`].
#[allow(clippy::cast_possible_truncation, reason = "a mean of bytes is a byte")]
fn mean_luma(image: &Image) -> u8 {
    let sum: u64 = if image.channels == 1 {
        image.data.iter().map(|&value| u64::from(value)).sum()
    } else {
        image.data.as_chunks::<3>().0.iter().map(|&pixel| u64::from(luma(pixel))).sum()
    };
    (sum as f64 / (image.width * image.height) as f64 + 0.5) as u8
}

/// Blends with the gray version of the image. A gray image is its own, and stays as it is.
pub fn color(image: &mut Image, factor: f32) {
    if image.channels == 1 {
        return;
    }
    for pixel in image.data.as_chunks_mut::<3>().0 {
        let gray = luma(*pixel);
        *pixel = pixel.map(|value| blend(gray, value, factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_zero_and_one_are_exact_and_the_rest_is_clipped() {
        for degenerate in 0..=255 {
            for value in 0..=255 {
                assert_eq!(blend(degenerate, value, 0.0), degenerate);
                assert_eq!(blend(degenerate, value, 1.0), value);
            }
        }
        assert_eq!(blend(0, 200, 1.9), 255);
        assert_eq!(blend(200, 10, 1.9), 0);
        assert_eq!(blend(0, 3, 0.5), 1);
    }

    #[test]
    fn the_luma_of_a_gray_pixel_is_its_value() {
        for value in 0..=255 {
            assert_eq!(luma([value; 3]), value);
        }
    }
}
