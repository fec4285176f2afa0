//! Tests of [`super`].

use proptest::prelude::*;

use super::*;

fn numbered(width: usize, height: usize, channels: usize) -> Image {
    let data = (1..=251).cycle().step_by(7).take(width * height * channels).collect();
    Image { width, height, channels, data }
}

#[test]
fn rounding_to_15_decimals_equals_exact_decimal_printing() {
    let mut value = 1.0_f64;
    for step in 0..20_000 {
        let angle = f64::from(step) * 0.013_7 - 130.0;
        for x in [angle.sin(), angle.cos(), angle.sin() * value] {
            let printed: f64 = format!("{x:.15}").parse().unwrap();
            assert_eq!(round_15_decimals(x).to_bits() << 1, printed.to_bits() << 1, "{x:e}");
        }
        value = if value < 1e-17 { 1.0 } else { value * 0.9 };
    }
}

#[test]
fn four_quarter_turns_are_the_identity() {
    for channels in [1, 3] {
        let image = numbered(5, 5, channels);
        let (mut a, mut b, mut columns) = (image.clone(), Image::default(), Vec::new());
        for _ in 0..4 {
            rotate(&a, 90.0, &mut b, &mut columns);
            std::mem::swap(&mut a, &mut b);
        }
        assert_eq!(a, image);
        rotate(&image, 90.0, &mut a, &mut columns);
        rotate(&a, 270.0, &mut b, &mut columns);
        assert_eq!(b, image);
        rotate(&image, -180.0, &mut a, &mut columns);
        rotate(&a, 180.0, &mut b, &mut columns);
        assert_eq!(b, image);
    }
}

#[test]
fn an_image_without_pixels_stays_one() {
    for (width, height) in [(0, 0), (0, 4), (4, 0)] {
        let image = Image::black(width, height, 3);
        let mut out = Image::default();
        rotate(&image, 17.0, &mut out, &mut Vec::new());
        assert_eq!(out, image);
        flip_horizontal(&mut out);
        assert_eq!(out, image);
    }
}

#[test]
fn a_crop_at_the_ends_of_the_number_range_is_black() {
    let image = numbered(4, 3, 3);
    for x in [i64::MIN, i64::MAX] {
        let rect = CropRect { x, y: 0, width: 2, height: 2 };
        let mut out = Image::default();
        crop_into(&image.data, Layout::Hwc, 4, 3, 3, rect, &mut out);
        assert_eq!(out, Image::black(2, 2, 3));
    }
}

proptest! {
    #[test]
    fn crop_equals_a_pixel_by_pixel_copy(
        (width, height, gray, planar) in (1_usize..9, 1_usize..9, any::<bool>(), any::<bool>()),
        (x, y) in (-12_i64..12, -12_i64..12),
        (crop_width, crop_height) in (0_usize..12, 0_usize..12),
    ) {
        let channels = if gray { 1 } else { 3 };
        let image = numbered(width, height, channels);
        let at = |x: usize, y: usize, c: usize| if planar {
            image.data[(c * height + y) * width + x]
        } else {
            image.data[(y * width + x) * channels + c]
        };
        let rect = CropRect { x, y, width: crop_width, height: crop_height };
        let layout = if planar { Layout::Chw } else { Layout::Hwc };
        let mut out = numbered(3, 3, 3);
        crop_into(&image.data, layout, width, height, channels, rect, &mut out);
        prop_assert_eq!(out.data.len(), crop_width * crop_height * channels);
        for (i, &byte) in out.data.iter().enumerate() {
            let (pixel, c) = (i / channels, i % channels);
            let column = usize::try_from(x + i64::try_from(pixel % crop_width).unwrap());
            let row = usize::try_from(y + i64::try_from(pixel / crop_width).unwrap());
            let expected = match (column, row) {
                (Ok(column), Ok(row)) if column < width && row < height => at(column, row, c),
                _ => 0,
            };
            prop_assert_eq!(byte, expected);
        }
    }

    #[test]
    fn flip_mirrors_every_row(
        (width, height, gray) in (1_usize..9, 1_usize..5, any::<bool>()),
    ) {
        let channels = if gray { 1 } else { 3 };
        let image = numbered(width, height, channels);
        let mut flipped = image.clone();
        flip_horizontal(&mut flipped);
        for (i, &byte) in flipped.data.iter().enumerate() {
            let (pixel, c) = (i / channels, i % channels);
            let mirrored = pixel / width * width + (width - 1 - pixel % width);
            prop_assert_eq!(byte, image.data[mirrored * channels + c]);
        }
    }
}
