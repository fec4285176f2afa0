//! Which pixels of a source image a sample is made of: the crop, drawn.
//!
//! Owns the draws of the purpose `Crop`, and the geometry of torchvision's `RandomCrop`,
//! `CenterCrop`, `Resize` and `RandomResizedCrop`. Touches no pixels.

use crate::image::CropRect;
use crate::image::decode::Area;
use crate::random::SampleRng;

use super::recipe::Crop;

/// Draws until a random part fits; as torchvision's `RandomResizedCrop.get_params`.
const ATTEMPTS: usize = 10;

/// How a sample is cut out of its source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Placement {
    /// These pixels as they are; black where the rectangle is outside the source.
    Take(CropRect),
    /// An area of the source, resized to a size (columns, rows), of which a part is taken.
    Resize {
        /// In the source.
        area: Area,
        /// What it is resized to.
        size: (usize, usize),
        /// What is taken of that.
        crop: Option<CropRect>,
    },
}

/// The source is too small for the crop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{width}x{height} pixels and {pad} of padding on each side are less than the crop of {size}; \
     choose a smaller crop.size, more padding, or kind = \"random-resized\""
)]
pub struct TooSmall {
    width: usize,
    height: usize,
    pad: u32,
    size: u32,
}

/// Places `crop` in a source of `width` × `height` pixels.
///
/// # Errors
/// The source and its padding are smaller than the crop.
pub(super) fn place(
    crop: &Crop,
    (width, height): (usize, usize),
    rng: SampleRng,
) -> Result<Placement, TooSmall> {
    match *crop {
        Crop::None => Ok(Placement::Take(CropRect { x: 0, y: 0, width, height })),
        Crop::Pad { size, pad } => {
            let (side, pad_pixels) = (size as usize, pad as usize);
            if width.min(height) + 2 * pad_pixels < side {
                return Err(TooSmall { width, height, pad, size });
            }
            Ok(Placement::Take(padded(side, pad_pixels, (width, height), rng)))
        }
        Crop::Center { size, resize: None } => {
            Ok(Placement::Take(centered(size as usize, (width, height))))
        }
        Crop::Center { size, resize: Some(resize) } => {
            let resized = shorter_side_to(resize as usize, (width, height));
            Ok(Placement::Resize {
                area: Area { x: 0, y: 0, width, height },
                size: resized,
                crop: Some(centered(size as usize, resized)),
            })
        }
        Crop::RandomResized { size, scale, ratio } => {
            let area = random_area((width, height), scale, ratio, rng);
            Ok(Placement::Resize { area, size: (size as usize, size as usize), crop: None })
        }
    }
}

/// A random square in the padded source. Top is drawn before left, as torchvision's `RandomCrop`
/// does.
fn padded(
    side: usize,
    pad: usize,
    (width, height): (usize, usize),
    mut rng: SampleRng,
) -> CropRect {
    let mut at = |len: usize| {
        let n_places = to_u32(len + 2 * pad - side + 1);
        i64::from(rng.below(n_places)) - i64::from(to_u32(pad))
    };
    let y = at(height);
    CropRect { x: at(width), y, width: side, height: side }
}

/// torchvision's `CenterCrop`: int(round((len - side) / 2)), half to even; black around what is
/// smaller, the odd pixel after it.
fn centered(side: usize, (width, height): (usize, usize)) -> CropRect {
    let at = |len: usize| match len.checked_sub(side) {
        Some(spare) => {
            let (half, odd) = (spare / 2, spare % 2);
            i64::from(to_u32(half + (odd & half)))
        }
        None => -i64::from(to_u32((side - len) / 2)),
    };
    CropRect { x: at(width), y: at(height), width: side, height: side }
}

/// torchvision's `Resize` with one number: the shorter side becomes it, the other is cut to whole
/// pixels.
fn shorter_side_to(side: usize, (width, height): (usize, usize)) -> (usize, usize) {
    let scaled = |long: usize, short: usize| (side * long / short).max(1);
    if width <= height { (side, scaled(height, width)) } else { (scaled(width, height), side) }
}

/// torchvision's `RandomResizedCrop.get_params`: an area of random size and aspect, else the
/// largest central one whose aspect is in the range.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sides of images")]
fn random_area(
    (width, height): (usize, usize),
    [scale_lo, scale_hi]: [f64; 2],
    [ratio_lo, ratio_hi]: [f64; 2],
    mut rng: SampleRng,
) -> Area {
    let (full_width, full_height) = (width as f64, height as f64);
    // Not std's: its last bits depend on the system's libm, and pixels must not.
    let (log_lo, log_hi) = (libm::log(ratio_lo), libm::log(ratio_hi));
    for _ in 0..ATTEMPTS {
        let scale = scale_lo + (scale_hi - scale_lo) * rng.unit();
        let aspect = libm::exp(log_lo + (log_hi - log_lo) * rng.unit());
        let target = full_width * full_height * scale;
        let part_width = (target * aspect).sqrt().round_ties_even() as usize;
        let part_height = (target / aspect).sqrt().round_ties_even() as usize;
        let sides = 1..=width;
        if sides.contains(&part_width) && (1..=height).contains(&part_height) {
            let y = rng.below(to_u32(height - part_height + 1)) as usize;
            let x = rng.below(to_u32(width - part_width + 1)) as usize;
            return Area { x, y, width: part_width, height: part_height };
        }
    }
    let own_ratio = full_width / full_height;
    let (part_width, part_height) = if own_ratio < ratio_lo {
        (width, (full_width / ratio_lo).round_ties_even() as usize)
    } else if own_ratio > ratio_hi {
        ((full_height * ratio_hi).round_ties_even() as usize, height)
    } else {
        (width, height)
    };
    let (part_width, part_height) = (part_width.clamp(1, width), part_height.clamp(1, height));
    let (x, y) = ((width - part_width) / 2, (height - part_height) / 2);
    Area { x, y, width: part_width, height: part_height }
}

fn to_u32(side: usize) -> u32 {
    u32::try_from(side).expect("image sides fit u32")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::Purpose;

    fn rng(sample: u64) -> SampleRng {
        SampleRng::new(1, 2, sample, Purpose::Crop)
    }

    /// Expected values by torchvision 0.26 (`F.resize`, `F.center_crop`).
    #[test]
    fn resize_and_center_are_those_of_torchvision() {
        let check = |source, resize, size, expected: ((usize, usize), (i64, i64))| {
            let crop = Crop::Center { size, resize: Some(resize) };
            let Ok(Placement::Resize { size: resized, crop: Some(part), .. }) =
                place(&crop, source, rng(0))
            else {
                panic!("resized and cut");
            };
            assert_eq!((resized, (part.x, part.y)), expected);
        };
        check((500, 375), 256, 224, ((341, 256), (58, 16)));
        check((375, 500), 256, 224, ((256, 341), (16, 58)));
        check((333, 333), 256, 224, ((256, 256), (16, 16)));
        check((1, 1000), 8, 8, ((8, 8000), (0, 3996)));
        check((224, 230), 225, 224, ((225, 231), (0, 4)));
    }

    #[test]
    fn a_center_crop_of_less_is_padded() {
        let crop = Crop::Center { size: 8, resize: None };
        let placed = place(&crop, (5, 10), rng(0)).unwrap();
        assert_eq!(placed, Placement::Take(CropRect { x: -1, y: 1, width: 8, height: 8 }));
        let error = place(&Crop::Pad { size: 8, pad: 1 }, (5, 10), rng(0)).unwrap_err().to_string();
        assert!(error.contains("5x10 pixels and 1 of padding on each side are less"), "{error}");
    }

    #[test]
    fn random_areas_have_the_mean_and_spread_of_their_ranges() {
        let crop = Crop::RandomResized { size: 224, scale: [0.08, 1.0], ratio: [0.75, 4.0 / 3.0] };
        let (mut area_sum, mut log_ratio_sum, n) = (0.0, 0.0, 20_000_u32);
        for sample in 0..u64::from(n) {
            let Ok(Placement::Resize { area, .. }) = place(&crop, (1000, 1000), rng(sample)) else {
                panic!("resized");
            };
            let (width, height) = (area.width as f64, area.height as f64);
            area_sum += width * height / 1e6;
            log_ratio_sum += (width / height).ln();
            assert!((0.7..1.4).contains(&(width / height)), "{area:?}");
        }
        // Areas near 1 do not fit at every aspect, and are drawn again: 0.478 rather than 0.54, as
        // a simulation of torchvision's loop gives.
        let mean_area = area_sum / f64::from(n);
        assert!((0.472..0.484).contains(&mean_area), "{mean_area}");
        assert!((log_ratio_sum / f64::from(n)).abs() < 0.01);
    }

    proptest! {
        #[test]
        fn random_areas_lie_in_their_image(
            width in 1usize..300, height in 1usize..300, sample: u64,
            scale in 0.001f64..1.0, ratio in 0.05f64..20.0,
        ) {
            let crop = Crop::RandomResized { size: 7, scale: [scale, 1.0], ratio: [ratio, ratio] };
            let Ok(Placement::Resize { area, size: (7, 7), crop: None }) =
                place(&crop, (width, height), rng(sample))
            else {
                panic!("resized");
            };
            prop_assert!(area.width >= 1 && area.x + area.width <= width);
            prop_assert!(area.height >= 1 && area.y + area.height <= height);
        }
    }
}
