//! Filled rectangles.

use super::Image;

/// A half-open box of pixels, `x0..x1` by `y0..y1`, which may be empty or reach outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelBox {
    /// First column.
    pub x0: i64,
    /// First row.
    pub y0: i64,
    /// Column after the last.
    pub x1: i64,
    /// Row after the last.
    pub y1: i64,
}

/// Fills the part of the box that lies in the image. A gray image takes `fill[0]`.
pub fn fill_box(image: &mut Image, area: PixelBox, fill: [u8; 3]) {
    let clip = |value: i64, size: usize| usize::try_from(value).unwrap_or(0).min(size);
    let (x0, x1) = (clip(area.x0, image.width), clip(area.x1, image.width));
    let (y0, y1) = (clip(area.y0, image.height), clip(area.y1, image.height));
    if x0 >= x1 {
        return;
    }
    let channels = image.channels;
    for y in y0..y1 {
        let start = (y * image.width + x0) * channels;
        let row = &mut image.data[start..][..(x1 - x0) * channels];
        if channels == 1 {
            row.fill(fill[0]);
        } else {
            row.as_chunks_mut::<3>().0.fill(fill);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_is_clipped_and_may_be_empty() {
        let filled = |x0, y0, x1, y1, channels: usize| {
            let mut image = Image::black(4, 3, channels);
            fill_box(&mut image, PixelBox { x0, y0, x1, y1 }, [9, 9, 9]);
            image.data.iter().map(|&value| usize::from(value / 9)).sum::<usize>() / channels
        };
        for channels in [1, 3] {
            assert_eq!(filled(1, 1, 3, 2, channels), 2);
            assert_eq!(filled(-5, -5, 2, 1, channels), 2);
            assert_eq!(filled(2, 2, 99, 99, channels), 2);
            assert_eq!(filled(2, 2, 2, 3, channels), 0);
            assert_eq!(filled(3, 0, 1, 3, channels), 0);
            assert_eq!(filled(i64::MIN, i64::MIN, i64::MAX, i64::MAX, channels), 12);
            assert_eq!(filled(i64::MIN, 0, -1, 3, channels), 0);
        }
    }
}
