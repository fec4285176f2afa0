//! Runs operations on an image, one after the other: the oracle for [`Canvas`](super::Canvas). And
//! the recipe's cutout.

use super::draw::{DrawnOp, PreparedPolicy};
use super::resolve::{Action, CUTOUT_FILL_GRAY, CUTOUT_FILL_RGB, resolve};
use crate::image::draw::{PixelBox, fill_box};
use crate::image::point::{self, Histogram};
use crate::image::{Image, enhance, filter, geometry};
use crate::policy::{Op, OpsProfile};
use crate::random::SampleRng;

/// Buffers that are kept from image to image, so that nothing is allocated after the first.
/// One per worker thread.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// Where an operation writes that can't work in place.
    image: Image,
    /// Source columns of a translation.
    columns: Vec<i32>,
    /// Of the image at hand.
    histogram: Histogram,
    /// Operations of the image at hand.
    drawn: Vec<DrawnOp>,
}

impl Scratch {
    /// The operations that the last [`PreparedPolicy::augment`] applied, in order.
    pub fn last_drawn(&self) -> &[DrawnOp] {
        &self.drawn
    }
}

impl PreparedPolicy {
    /// Draws operations for one image and applies them in order.
    ///
    /// `rng` is the sample's stream for [`Purpose::Policy`](crate::random::Purpose); the result
    /// is a pure function of the policy, the image and that stream.
    pub fn augment(&self, image: &mut Image, scratch: &mut Scratch, rng: &mut SampleRng) {
        let mut drawn = std::mem::take(&mut scratch.drawn);
        self.draw_into(rng, &mut drawn);
        for op in &drawn {
            let action = op.action(self.ops_profile(), image.width, image.height);
            apply_action(image, scratch, &action);
        }
        scratch.drawn = drawn;
    }
}

/// Applies one operation at magnitude λ ∈ [0, 1]; `cutout_centre` is in pixels. See [`resolve`].
pub fn apply_op(
    image: &mut Image,
    scratch: &mut Scratch,
    op: Op,
    profile: OpsProfile,
    lambda: f64,
    negative: bool,
    cutout_centre: (f64, f64),
) {
    let size = (image.width, image.height);
    let action = resolve(op, profile, lambda, negative, size, cutout_centre);
    apply_action(image, scratch, &action);
}

/// Does to an image what an action says.
pub fn apply_action(image: &mut Image, scratch: &mut Scratch, action: &Action) {
    match *action {
        Action::Identity => {}
        Action::Affine(matrix) => {
            geometry::affine(image, &matrix, &mut scratch.image, &mut scratch.columns);
            std::mem::swap(image, &mut scratch.image);
        }
        Action::Rotate(degrees) => {
            geometry::rotate(image, degrees, &mut scratch.image, &mut scratch.columns);
            std::mem::swap(image, &mut scratch.image);
        }
        Action::AutoContrast => {
            let histogram = &mut scratch.histogram;
            point::apply_from_histogram(image, histogram, point::autocontrast_lut);
        }
        Action::Equalize => {
            let histogram = &mut scratch.histogram;
            point::apply_from_histogram(image, histogram, point::equalize_lut);
        }
        Action::Invert => point::apply_lut(image, &point::invert_lut()),
        Action::Solarize(threshold) => point::apply_lut(image, &point::solarize_lut(threshold)),
        Action::Posterize(bits) => point::apply_lut(image, &point::posterize_lut(bits)),
        Action::Contrast(factor) => enhance::contrast(image, factor),
        Action::Color(factor) => enhance::color(image, factor),
        Action::Brightness(factor) => enhance::brightness(image, factor),
        Action::Sharpness(factor) => {
            filter::sharpness(image, factor, &mut scratch.image);
            std::mem::swap(image, &mut scratch.image);
        }
        Action::Cutout(area) => {
            let gray = image.channels == 1;
            fill_box(image, area, if gray { [CUTOUT_FILL_GRAY; 3] } else { CUTOUT_FILL_RGB });
        }
    }
}

/// The recipe's cutout: a box of `2 * (side / 2)` pixels a side about a pixel.
///
/// The centre is meant to be uniform over all pixels: `rng.below(width)`, `rng.below(height)`.
///
/// *Source*: `CutoutDefault` of kakaobrain/fast-autoaugment, after DeVries & Taylor 2017.
pub fn cutout_area(centre_x: usize, centre_y: usize, side: usize) -> PixelBox {
    let reach = |centre: usize| {
        let centre = i64::try_from(centre).unwrap_or(i64::MAX);
        let half = i64::try_from(side / 2).unwrap_or(i64::MAX);
        (centre.saturating_sub(half), centre.saturating_add(half))
    };
    let ((x0, x1), (y0, y1)) = (reach(centre_x), reach(centre_y));
    PixelBox { x0, y0, x1, y1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Magnitude, OpStep, SubPolicy};
    use crate::random::Purpose;

    fn noise(width: usize, height: usize, channels: usize) -> Image {
        let mut rng = SampleRng::new(5, 0, 0, Purpose::Crop);
        let mut image = Image::black(width, height, channels);
        image.data.fill_with(|| u8::try_from(rng.below(256)).unwrap());
        image
    }

    fn all_ops(draws: u32) -> PreparedPolicy {
        let steps = Op::ALL.map(|op| OpStep {
            op,
            probability: 0.5,
            magnitude: Magnitude::Range(0.0, 1.0),
        });
        let subs = steps.map(|step| SubPolicy { weight: 1.0, ops: vec![step; 2] });
        PreparedPolicy::from_parts(OpsProfile::Fastaa, draws, &subs)
    }

    #[test]
    fn augmenting_equals_applying_the_drawn_operations_one_by_one() {
        let prepared = all_ops(3);
        let (mut scratch, mut other, mut drawn) = (Scratch::default(), Scratch::default(), vec![]);
        for sample in 0..300 {
            let rng = SampleRng::new(1, 2, sample, Purpose::Policy);
            let mut image = noise(9, 7, if sample % 2 == 0 { 3 } else { 1 });
            let mut expected = image.clone();
            prepared.augment(&mut image, &mut scratch, &mut rng.clone());
            prepared.draw_into(&mut rng.clone(), &mut drawn);
            assert_eq!(scratch.last_drawn(), drawn);
            for d in &drawn {
                let centre = (d.cutout_centre.0 * 9.0, d.cutout_centre.1 * 7.0);
                let profile = OpsProfile::Fastaa;
                apply_op(&mut expected, &mut other, d.op, profile, d.lambda, d.negative, centre);
            }
            assert_eq!(image, expected);
        }
    }

    /// Scratch space left by any other image, of any other shape, must not show.
    #[test]
    fn an_image_does_not_depend_on_what_was_augmented_before() {
        let prepared = all_ops(2);
        let mut used = Scratch::default();
        for sample in 0..400 {
            let rng = SampleRng::new(3, 0, sample, Purpose::Policy);
            let side = 1 + usize::try_from(sample % 11).unwrap();
            let mut image = noise(side, 12 - side, if sample % 3 == 0 { 1 } else { 3 });
            let mut fresh = image.clone();
            prepared.augment(&mut image, &mut used, &mut rng.clone());
            prepared.augment(&mut fresh, &mut Scratch::default(), &mut rng.clone());
            assert_eq!(image, fresh);
        }
    }

    #[test]
    fn every_operation_survives_an_image_without_pixels() {
        for op in Op::ALL {
            for (width, height) in [(0, 0), (0, 3), (3, 0)] {
                let mut image = Image::black(width, height, 3);
                let mut scratch = Scratch::default();
                let profile = OpsProfile::Fastaa;
                apply_op(&mut image, &mut scratch, op, profile, 0.9, true, (0.0, 0.0));
                assert_eq!(image, Image::black(width, height, 3));
            }
        }
    }

    #[test]
    fn the_recipe_cutout_has_an_even_side_and_is_clipped() {
        let filled = |x, y, side| {
            let mut image = Image::black(8, 6, 3);
            fill_box(&mut image, cutout_area(x, y, side), [1, 2, 3]);
            image.data.as_chunks::<3>().0.iter().filter(|&&p| p == [1, 2, 3]).count()
        };
        assert_eq!(filled(4, 3, 4), 16);
        assert_eq!(filled(4, 3, 5), 16);
        assert_eq!(filled(4, 3, 1), 0);
        assert_eq!(filled(0, 0, 4), 4);
        assert_eq!(filled(7, 5, 4), 9);
        assert_eq!(filled(4, 3, usize::MAX), 48);
    }
}
