//! Parts of a recipe that have several numbers: colour jitter, erasing, mixing.
//!
//! Owns names, defaults and checks; `distort` and `mix` do the work.

use serde::{Deserialize, Serialize};

/// Mixing parameters of Beta distributions: what the sampler is good for.
const ALPHA_RANGE: std::ops::RangeInclusive<f64> = 0.05..=8.0;

/// Random changes of brightness, contrast, saturation and hue, in a random order: torchvision's
/// `ColorJitter`. Each is the greatest change; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Jitter {
    /// A factor of 1 ± this, at least 0.
    pub brightness: f64,
    /// A factor of 1 ± this, at least 0.
    pub contrast: f64,
    /// A factor of 1 ± this, at least 0.
    pub saturation: f64,
    /// A turn of ± this, of 1; at most 0.5.
    pub hue: f64,
}

/// A random box that is filled with the mean: torchvision's `RandomErasing`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Erase {
    /// Probability.
    pub p: f64,
    /// Range of the box's area, relative to the image.
    pub scale: [f64; 2],
    /// Range of the box's aspect (height / width).
    pub ratio: [f64; 2],
}

impl Default for Erase {
    fn default() -> Self {
        Self { p: 0.5, scale: [0.02, 0.33], ratio: [0.3, 3.3] }
    }
}

/// Pairs of samples of a batch become two mixtures of both, and so do their labels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mix {
    /// Both parameters of the Beta distribution of Mixup's weight; 0: no Mixup.
    pub mixup: f64,
    /// The same of CutMix; 0: no CutMix. With both, each pair takes either with probability ½.
    pub cutmix: f64,
    /// Probability that a pair is mixed.
    pub p: f64,
}

impl Default for Mix {
    fn default() -> Self {
        Self { mixup: 0.0, cutmix: 0.0, p: 1.0 }
    }
}

/// What is wrong with a value, and what would be right.
type Problem = String;

impl Jitter {
    pub(super) fn check(&self) -> Result<(), Problem> {
        let factors = [self.brightness, self.contrast, self.saturation];
        if factors.iter().any(|factor| !(0.0..=10.0).contains(factor)) {
            return Err("brightness, contrast and saturation must be 0 to 10".to_owned());
        }
        if (0.0..=0.5).contains(&self.hue) {
            Ok(())
        } else {
            Err("hue must be 0 to 0.5".to_owned())
        }
    }
}

impl Erase {
    pub(super) fn check(&self) -> Result<(), Problem> {
        if !(0.0..=1.0).contains(&self.p) {
            return Err("p must be 0 to 1".to_owned());
        }
        let [lo, hi] = self.scale;
        if !(lo > 0.0 && lo <= hi && hi <= 1.0) {
            return Err("give scale = [lo, hi] with 0 < lo <= hi <= 1".to_owned());
        }
        let [lo, hi] = self.ratio;
        if !(lo > 0.0 && lo <= hi && hi.is_finite()) {
            return Err("give ratio = [lo, hi] with 0 < lo <= hi".to_owned());
        }
        Ok(())
    }
}

impl Mix {
    pub(super) fn check(&self) -> Result<(), Problem> {
        if !(0.0..=1.0).contains(&self.p) {
            return Err("p must be 0 to 1".to_owned());
        }
        if self.mixup == 0.0 && self.cutmix == 0.0 {
            return Err("give mixup, cutmix or both, as in mix = { mixup = 0.2 }".to_owned());
        }
        let is_fine = |alpha: &f64| *alpha == 0.0 || ALPHA_RANGE.contains(alpha);
        if [self.mixup, self.cutmix].iter().all(is_fine) {
            return Ok(());
        }
        let (lo, hi) = (ALPHA_RANGE.start(), ALPHA_RANGE.end());
        Err(format!("mixup and cutmix must be 0 or {lo} to {hi}"))
    }
}
