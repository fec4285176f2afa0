//! The recipe's own distortions of one image: colour jitter and erasing.
//!
//! *Source*: torchvision, `ColorJitter` and `RandomErasing`, whose draws are made here from the
//! sample's own numbers.

use crate::augment::{Action, Step};
use crate::image::draw::PixelBox;
use crate::random::SampleRng;

use super::recipe::{Erase, Jitter};

/// Draws before erasing is given up, as in torchvision.
const ATTEMPTS: usize = 10;

/// The four changes, each by a uniform factor, in a random order.
#[allow(clippy::cast_possible_truncation, reason = "factors are single precision in the kernels")]
pub(super) fn jitter(jitter: &Jitter, rng: &mut SampleRng, out: &mut Vec<Step>) {
    let mut order = [0, 1, 2, 3];
    for last in (1..order.len()).rev() {
        let bound = u32::try_from(last + 1).expect("at most four");
        order.swap(last, rng.below(bound) as usize);
    }
    let Jitter { brightness, contrast, saturation, hue } = *jitter;
    let mut factor = |range: f64| {
        let (lo, hi) = ((1.0 - range).max(0.0), 1.0 + range);
        (lo + (hi - lo) * rng.unit()) as f32
    };
    let factors = [factor(brightness), factor(contrast), factor(saturation)];
    let turn = hue * (2.0 * rng.unit() - 1.0);
    for change in order {
        match change {
            0 if brightness > 0.0 => out.push(Step::Act(Action::Brightness(factors[0]))),
            1 if contrast > 0.0 => out.push(Step::Act(Action::Contrast(factors[1]))),
            2 if saturation > 0.0 => out.push(Step::Act(Action::Color(factors[2]))),
            3 if hue > 0.0 => out.push(Step::Hue(hue_shift(turn))),
            _ => {}
        }
    }
}

/// torchvision's `np.int32(turn * 255).astype(np.uint8)`.
#[allow(clippy::cast_possible_truncation, reason = "cut to an integer, then wrapped to a byte")]
fn hue_shift(turn: f64) -> u8 {
    ((turn * 255.0) as i32).rem_euclid(256) as u8
}

/// A random box, strictly smaller than the image.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sides of images")]
pub(super) fn erase(
    erase: &Erase,
    (image_width, image_height): (usize, usize),
    rng: &mut SampleRng,
) -> Option<PixelBox> {
    if rng.unit() >= erase.p {
        return None;
    }
    let ([scale_lo, scale_hi], [ratio_lo, ratio_hi]) = (erase.scale, erase.ratio);
    let (log_lo, log_hi) = (libm::log(ratio_lo), libm::log(ratio_hi));
    let n_pixels = (image_width * image_height) as f64;
    for _ in 0..ATTEMPTS {
        let area = n_pixels * (scale_lo + (scale_hi - scale_lo) * rng.unit());
        let aspect = libm::exp(log_lo + (log_hi - log_lo) * rng.unit());
        let height = (area * aspect).sqrt().round_ties_even() as usize;
        let width = (area / aspect).sqrt().round_ties_even() as usize;
        if height >= image_height || width >= image_width || height == 0 || width == 0 {
            continue;
        }
        let mut place = |len: usize, side: usize| {
            let n_places = u32::try_from(side - len + 1).expect("image sides fit u32");
            i64::from(rng.below(n_places))
        };
        let (y0, x0) = (place(height, image_height), place(width, image_width));
        let end = |start: i64, len: usize| start + i64::try_from(len).expect("image sides fit");
        return Some(PixelBox { x0, y0, x1: end(x0, width), y1: end(y0, height) });
    }
    None
}
