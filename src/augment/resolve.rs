//! What an operation at magnitude λ physically does, in each of the three profiles.
//!
//! *Source*: `fastaa`: `augmentations.py` of kakaobrain/fast-autoaugment (`augment_list(False)`);
//! `torchvision` and `trivial-wide`: `transforms/autoaugment.py` and `transforms/functional.py`
//! of torchvision (`_augmentation_space`, `_apply_op`, PIL path, nearest, fill black).

use crate::image::draw::PixelBox;
use crate::image::geometry::AffineMatrix;
use crate::policy::{Op, OpsProfile};

/// Fill of the Cutout operation, from the published code.
pub const CUTOUT_FILL_RGB: [u8; 3] = [125, 123, 114];
/// Fill of the Cutout operation on gray images.
pub const CUTOUT_FILL_GRAY: u8 = 124;

/// Steps of `TrivialAugmentWide` (`num_magnitude_bins`).
const TRIVIAL_BINS: u32 = 31;
/// Steps of `AutoAugment`'s tables.
const AUTOAUGMENT_BINS: u32 = 10;
/// Steps of `RandAugment`'s tables.
const RANDAUGMENT_BINS: u32 = 31;

/// What is done to an image: an operation with its magnitude in physical units.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Nothing.
    Identity,
    /// Nearest-neighbour affine map from output to source (shear, translation).
    Affine(AffineMatrix),
    /// Turn about the centre, in degrees, counter-clockwise.
    Rotate(f64),
    /// Stretch each channel to 0–255.
    AutoContrast,
    /// 255 − value.
    Invert,
    /// Flatten each channel's histogram.
    Equalize,
    /// Invert values at or above this threshold.
    Solarize(f64),
    /// Keep this many upper bits.
    Posterize(u32),
    /// Blend with the mean gray; 1 is the identity.
    Contrast(f32),
    /// Blend with the gray image; 1 is the identity.
    Color(f32),
    /// Blend with black; 1 is the identity.
    Brightness(f32),
    /// Blend with the smoothed image; 1 is the identity.
    Sharpness(f32),
    /// Fill this box with [`CUTOUT_FILL_RGB`] or [`CUTOUT_FILL_GRAY`].
    Cutout(PixelBox),
}

/// Gives magnitude λ ∈ [0, 1] of an operation its meaning for an image of `width` × `height`.
///
/// - `negative` flips the sign of operations that have one ([`OpsProfile::has_random_sign`]); the
///   others ignore it.
/// - `cutout_centre` is in pixels; only Cutout looks at it. Cutout is no operation of
///   torchvision's, so all profiles take it from `fastaa`.
/// - In `torchvision`, λ = m / (bins − 1) gives exactly the table entry m of `AutoAugment`
///   (10 bins) or `RandAugment` (31 bins), and any other λ the value in between. At λ = 2/3 the
///   two tables differ in the last bit of the enhancers' factors: 6/9 means `AutoAugment`'s; write
///   20/30 + 10⁻¹² for `RandAugment`'s.
/// - In `trivial-wide`, λ chooses one of 31 steps: min(30, ⌊31 λ⌋).
pub fn resolve(
    op: Op,
    profile: OpsProfile,
    lambda: f64,
    negative: bool,
    (width, height): (usize, usize),
    cutout_centre: (f64, f64),
) -> Action {
    match op {
        Op::AutoContrast => Action::AutoContrast,
        Op::Invert => Action::Invert,
        Op::Equalize => Action::Equalize,
        Op::Cutout => cutout(lambda, (width, height), cutout_centre),
        _ => match profile {
            OpsProfile::Fastaa => fastaa(op, lambda, negative, width, height),
            OpsProfile::Torchvision | OpsProfile::TrivialWide => {
                let sign = if negative && profile.has_random_sign(op) { -1.0 } else { 1.0 };
                let strength = Strength::new(profile, lambda);
                torchvision(op, strength, sign, width, height)
            }
        },
    }
}

/// λ as a position in `[lo, hi]`, and mirrored on top of that.
fn fastaa(op: Op, lambda: f64, negative: bool, width: usize, height: usize) -> Action {
    let within = |lo: f64, hi: f64| lambda * (hi - lo) + lo;
    let mirrored =
        |limit: f64| if negative { -within(-limit, limit) } else { within(-limit, limit) };
    #[allow(clippy::cast_possible_truncation, reason = "Pillow takes the factor as a float")]
    let factor = || within(0.1, 1.9) as f32;
    match op {
        Op::ShearX => shear_x(mirrored(0.3)),
        Op::ShearY => shear_y(mirrored(0.3)),
        Op::TranslateX => translate(mirrored(0.45) * width as f64, 0.0),
        Op::TranslateY => translate(0.0, mirrored(0.45) * height as f64),
        Op::Rotate => Action::Rotate(mirrored(30.0)),
        Op::Solarize => Action::Solarize(within(0.0, 256.0)),
        Op::Posterize => Action::Posterize(whole(within(4.0, 8.0))),
        Op::Contrast => Action::Contrast(factor()),
        Op::Color => Action::Color(factor()),
        Op::Brightness => Action::Brightness(factor()),
        Op::Sharpness => Action::Sharpness(factor()),
        Op::AutoContrast | Op::Invert | Op::Equalize | Op::Cutout => Action::Identity,
    }
}

fn shear_x(slope: f64) -> Action {
    Action::Affine([1.0, slope, 0.0, 0.0, 1.0, 0.0])
}

fn shear_y(slope: f64) -> Action {
    Action::Affine([1.0, 0.0, 0.0, slope, 1.0, 0.0])
}

fn translate(x: f64, y: f64) -> Action {
    Action::Affine([1.0, 0.0, x, 0.0, 1.0, y])
}

/// The integer part of a small non-negative number.
#[allow(clippy::cast_possible_truncation, reason = "cutting the fraction off is the point")]
fn whole(value: f64) -> u32 {
    value as u32
}

/// The published Cutout: a box of side 0.2 λ width whose left and top edges are pushed inside.
/// Its last column and row belong to it, so that it is one pixel larger than its side says.
fn cutout(lambda: f64, (width, height): (usize, usize), (x, y): (f64, f64)) -> Action {
    let side = lambda * 0.2;
    if side <= 0.0 {
        return Action::Identity;
    }
    let side = side * width as f64;
    let edges = |centre: f64, size: usize| {
        let first = (centre - side / 2.0).max(0.0).trunc();
        let last = (first + side).min(size as f64);
        (pixel(first), pixel(last) + 1)
    };
    let ((x0, x1), (y0, y1)) = (edges(x, width), edges(y, height));
    Action::Cutout(PixelBox { x0, y0, x1, y1 })
}

#[allow(clippy::cast_possible_truncation, reason = "cutting the fraction off is the point")]
fn pixel(value: f64) -> i64 {
    value as i64
}

/// A strength in one of torchvision's profiles, which tells its magnitude tables.
#[derive(Clone, Copy, Debug)]
struct Strength {
    profile: OpsProfile,
    position: Position,
}

#[derive(Clone, Copy, Debug)]
enum Position {
    /// Entry `bin` of a table of `bins` entries.
    Table { bin: u32, bins: u32 },
    /// Between the entries.
    Between(f64),
}

impl Strength {
    /// How near to m/9 is meant to be m/9: the rounding error of a decimal, and no more, so that
    /// 20/30 + 10⁻¹² is not 6/9.
    const AUTOAUGMENT_TOLERANCE: f64 = 1e-13;
    /// How near to m/30 is meant to be m/30.
    const RANDAUGMENT_TOLERANCE: f64 = 1e-9;

    fn new(profile: OpsProfile, lambda: f64) -> Self {
        let position = if profile == OpsProfile::TrivialWide {
            let bin = whole(lambda * f64::from(TRIVIAL_BINS)).min(TRIVIAL_BINS - 1);
            Position::Table { bin, bins: TRIVIAL_BINS }
        } else {
            let entry = |bins: u32, tolerance: f64| {
                let bin = (lambda * f64::from(bins - 1)).round();
                let distance = (lambda - bin / f64::from(bins - 1)).abs();
                (distance <= tolerance).then(|| Position::Table { bin: whole(bin), bins })
            };
            entry(AUTOAUGMENT_BINS, Self::AUTOAUGMENT_TOLERANCE)
                .or_else(|| entry(RANDAUGMENT_BINS, Self::RANDAUGMENT_TOLERANCE))
                .unwrap_or(Position::Between(lambda))
        };
        Self { profile, position }
    }

    /// The value for `torchvision`, or for `trivial-wide`.
    fn choose<T>(self, torchvision: T, trivial_wide: T) -> T {
        if self.profile == OpsProfile::TrivialWide { trivial_wide } else { torchvision }
    }

    /// The entry of `torch.linspace(start, end, bins)`, as the float it is there.
    ///
    /// torch counts up from the start in the lower half and down from the end in the upper one,
    /// in f32 with one rounding (fused multiply-add); f64 holds the unrounded sum exactly.
    #[allow(clippy::cast_possible_truncation, reason = "torch's tables are of f32")]
    fn linspace(self, start: f64, end: f64) -> f64 {
        let (start, end) = (start as f32, end as f32);
        match self.position {
            Position::Table { bin, bins } => {
                let step = f64::from((end - start) / (bins - 1) as f32);
                let entry = if bin < bins / 2 {
                    f64::from(start) + step * f64::from(bin)
                } else {
                    f64::from(end) - step * f64::from(bins - 1 - bin)
                };
                f64::from(entry as f32)
            }
            Position::Between(lambda) => {
                let (start, end) = (f64::from(start), f64::from(end));
                f64::from((start + lambda * (end - start)) as f32)
            }
        }
    }

    /// Entry of `8 − round(arange(bins) / ((bins − 1) / dropped))`, halves to even.
    fn bits(self, dropped: f64) -> u32 {
        let lambda = match self.position {
            Position::Table { bin, bins } => f64::from(bin) / f64::from(bins - 1),
            Position::Between(lambda) => lambda,
        };
        8 - whole((lambda * dropped).round_ties_even()).min(8)
    }
}

fn torchvision(op: Op, strength: Strength, sign: f64, width: usize, height: usize) -> Action {
    let shear = || strength.linspace(0.0, strength.choose(0.3, 0.99)) * sign;
    let shift = |size: usize| {
        let end = strength.choose(150.0 / 331.0 * size as f64, 32.0);
        -(strength.linspace(0.0, end) * sign).trunc()
    };
    #[allow(clippy::cast_possible_truncation, reason = "Pillow takes the factor as a float")]
    let factor = || (1.0 + strength.linspace(0.0, strength.choose(0.9, 0.99)) * sign) as f32;
    match op {
        Op::ShearX => shear_x(shear_angle(shear()).tan()),
        Op::ShearY => {
            let angle = shear_angle(shear());
            shear_y(angle.sin() / angle.cos())
        }
        Op::TranslateX => translate(shift(width), 0.0),
        Op::TranslateY => translate(0.0, shift(height)),
        Op::Rotate => Action::Rotate(strength.linspace(0.0, strength.choose(30.0, 135.0)) * sign),
        Op::Solarize => Action::Solarize(strength.linspace(255.0, 0.0)),
        Op::Posterize => Action::Posterize(strength.bits(strength.choose(4.0, 6.0))),
        Op::Contrast => Action::Contrast(factor()),
        Op::Color => Action::Color(factor()),
        Op::Brightness => Action::Brightness(factor()),
        Op::Sharpness => Action::Sharpness(factor()),
        Op::AutoContrast | Op::Invert | Op::Equalize | Op::Cutout => Action::Identity,
    }
}

/// The angle of a slope, in radians, by way of degrees as torchvision goes.
fn shear_angle(slope: f64) -> f64 {
    slope.atan().to_degrees().to_radians()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: (usize, usize) = (32, 40);

    fn check(op: Op, profile: OpsProfile, lambda: f64, negative: bool, expected: Action) {
        let action = resolve(op, profile, lambda, negative, SIZE, (16.0, 20.0));
        assert_eq!(action, expected, "{op:?} {profile:?} {lambda} {negative}");
    }

    #[test]
    fn fastaa_takes_lambda_as_a_signed_position() {
        let profile = OpsProfile::Fastaa;
        check(Op::Rotate, profile, 0.0, false, Action::Rotate(-30.0));
        check(Op::Rotate, profile, 0.0, true, Action::Rotate(30.0));
        check(Op::Rotate, profile, 0.5, true, Action::Rotate(0.0));
        check(Op::TranslateX, profile, 1.0, false, translate(14.4, 0.0));
        check(Op::TranslateY, profile, 1.0, true, translate(0.0, -18.0));
        check(Op::Solarize, profile, 0.0, true, Action::Solarize(0.0));
        check(Op::Posterize, profile, 0.74, false, Action::Posterize(6));
        check(Op::Posterize, profile, 1.0, false, Action::Posterize(8));
        check(Op::Brightness, profile, 0.0, true, Action::Brightness(0.1));
        check(Op::Cutout, profile, 0.0, false, Action::Identity);
    }

    #[test]
    fn torchvision_takes_lambda_as_a_strength_with_a_sign() {
        let profile = OpsProfile::Torchvision;
        check(Op::Rotate, profile, 0.0, true, Action::Rotate(-0.0));
        check(Op::Rotate, profile, 1.0, true, Action::Rotate(-30.0));
        check(Op::TranslateX, profile, 1.0, false, translate(-14.0, 0.0));
        check(Op::TranslateY, profile, 1.0, true, translate(0.0, 18.0));
        check(Op::Posterize, profile, 4.0 / 9.0, false, Action::Posterize(6));
        check(Op::Solarize, profile, 1.0 / 3.0, false, Action::Solarize(170.0));
        check(Op::Solarize, profile, 0.35, false, Action::Solarize(f64::from(165.75_f32)));
    }

    #[test]
    fn trivial_wide_has_31_steps() {
        let profile = OpsProfile::TrivialWide;
        check(Op::Rotate, profile, 1.0, false, Action::Rotate(135.0));
        check(Op::Rotate, profile, 0.999_999, false, Action::Rotate(135.0));
        check(Op::Rotate, profile, 20.0 / 30.0, true, Action::Rotate(-90.0));
        check(Op::TranslateX, profile, 1.0, false, translate(-32.0, 0.0));
        check(Op::Posterize, profile, 1.0, false, Action::Posterize(2));
        for bin in 0..TRIVIAL_BINS {
            let position = Strength::new(profile, f64::from(bin) / 30.0).position;
            assert!(matches!(position, Position::Table { bin: b, bins: 31 } if b == bin));
        }
    }

    #[test]
    fn every_table_entry_is_recognised_and_two_thirds_can_mean_both_tables() {
        let position = |lambda| Strength::new(OpsProfile::Torchvision, lambda).position;
        for bin in 0..10 {
            let found = position(f64::from(bin) / 9.0);
            assert!(matches!(found, Position::Table { bin: b, bins: 10 } if b == bin));
        }
        for bin in (0..31).filter(|bin| bin % 10 != 0) {
            let found = position(f64::from(bin) / 30.0);
            assert!(matches!(found, Position::Table { bin: b, bins: 31 } if b == bin));
        }
        let found = position(20.0 / 30.0 + 1e-12);
        assert!(matches!(found, Position::Table { bin: 20, bins: 31 }));
        assert!(matches!(position(0.35), Position::Between(_)));
    }

    #[test]
    fn cutout_is_pushed_inside_at_the_left_and_cut_at_the_right() {
        let at = |centre| resolve(Op::Cutout, OpsProfile::Fastaa, 1.0, false, SIZE, centre);
        // Side 0.2 × 32 = 6.4 pixels; the last column and row are part of the box.
        let left = Action::Cutout(PixelBox { x0: 0, y0: 0, x1: 7, y1: 7 });
        assert_eq!(at((0.0, 0.0)), left);
        let right = Action::Cutout(PixelBox { x0: 28, y0: 36, x1: 33, y1: 41 });
        assert_eq!(at((31.9, 39.9)), right);
    }
}
