//! The recipe: what happens to a sample between the dataset and the batch, as configuration.
//!
//! Order of the parts: crop, flip, policy, cutout, normalise and convert. Owns names, defaults and
//! checks; `render` does the work.

use serde::{Deserialize, Serialize};

use crate::dataset::{ImageKind, LabelKind, SplitInfo};
use crate::limits::{IMAGE_SIDE_MAX, MIX_CLASSES_MAX, VIEWS_MAX};

pub use super::recipe_parts::{Erase, Jitter, Mix};

/// Smaller ones would turn normalised values into infinities.
const NORMALIZE_STD_MIN: f32 = 1e-6;

/// What happens to a sample. Every key has a default, and can be overridden per subscription.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// Which part of the image is taken.
    pub crop: Crop,
    /// How much of an encoded image is decoded.
    #[serde(skip_serializing_if = "is_default")]
    pub decode: Decode,
    /// Whether encoded images are turned as their EXIF orientation says.
    #[serde(skip_serializing_if = "is_default")]
    pub exif: Exif,
    /// What happens with a sample that cannot be read.
    #[serde(skip_serializing_if = "is_default")]
    pub on_error: OnError,
    /// 1 (gray) or 3 (RGB); `None`: 3 for encoded images, else as many as the dataset has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<u32>,
    /// Mirror left and right with probability ½.
    pub hflip: bool,
    /// Reference of the policy: `active`, a built-in's name, `NAME@VERSION`, or a file.
    pub policy: String,
    /// Random changes of colours, before the policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Jitter>,
    /// A random box that is filled with the mean, after the policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub erase: Option<Erase>,
    /// Mixtures of pairs of samples; labels become vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mix: Option<Mix>,
    /// Views of every sample, each with draws of its own: images `[n, views, …]`.
    #[serde(skip_serializing_if = "is_one")]
    pub views: u32,
    /// Side of the cutout box, in pixels; 0: none. Odd sides are rounded down.
    pub cutout: u32,
    /// Mean and standard deviation, on the scale 0..1; `None`: divide by 255 only.
    pub normalize: Option<Normalize>,
    /// Element type of the batch. `u8` batches are not normalised.
    pub dtype: Dtype,
    /// Element order of the batch.
    pub layout: Layout,
    /// Epochs of the run; 0: unknown. Changes no sample: near a run's end the search's new
    /// versions are kept from it.
    #[serde(skip_serializing_if = "is_default")]
    pub total_epochs: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_one(number: &u32) -> bool {
    *number == 1
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            crop: Crop::None,
            decode: Decode::default(),
            exif: Exif::default(),
            on_error: OnError::default(),
            channels: None,
            hflip: false,
            policy: "active".to_owned(),
            jitter: None,
            erase: None,
            mix: None,
            views: 1,
            cutout: 0,
            normalize: None,
            dtype: Dtype::F32,
            layout: Layout::Nchw,
            total_epochs: 0,
        }
    }
}

/// Which part of the image is taken.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Crop {
    /// The whole image.
    None,
    /// Pad with black on all sides, then a random square.
    Pad {
        /// Side of the square, in pixels.
        size: u32,
        /// Padding on each side, in pixels.
        pad: u32,
    },
    /// The square in the middle.
    Center {
        /// Side of the square, in pixels.
        size: u32,
        /// Resize the shorter side to this first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resize: Option<u32>,
    },
    /// A random part of random aspect, resized to a square.
    RandomResized {
        /// Side of the square, in pixels.
        size: u32,
        /// Range of the part's area, relative to the image.
        #[serde(default = "default_scale")]
        scale: [f64; 2],
        /// Range of the part's aspect (width / height).
        #[serde(default = "default_ratio")]
        ratio: [f64; 2],
    },
}

fn default_scale() -> [f64; 2] {
    [0.08, 1.0]
}

fn default_ratio() -> [f64; 2] {
    [3.0 / 4.0, 4.0 / 3.0]
}

/// How much of an encoded image is decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decode {
    /// What the crop needs, reduced by the decoder where it becomes smaller anyway: close to
    /// `full`, and equal to it where nothing is reduced.
    #[default]
    Partial,
    /// The whole image.
    Full,
}

/// Whether encoded images are turned as their EXIF orientation says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exif {
    /// As the format's own reader does: Hugging Face `datasets` turns, torchvision's `ImageFolder`
    /// and `webdataset` do not.
    #[default]
    Source,
    /// They are.
    Apply,
    /// They are not.
    Ignore,
}

/// What happens with a sample that cannot be read: a damaged image, or one too small for the crop.
/// A file that is gone or has changed, or a disk that fails, ends the stream in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The stream ends with an error that names it.
    #[default]
    Fail,
    /// Another sample comes in its place, image and label; `indices` says the place.
    Substitute,
    /// It is left out: its batch is smaller.
    Skip,
}

/// `((x / 255) − mean) / std`, per channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalize {
    /// One value, or one per channel.
    pub mean: Vec<f32>,
    /// One value, or one per channel; not zero.
    pub std: Vec<f32>,
}

/// Element type of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Dtype {
    U8,
    F16,
    Bf16,
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Element order of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// `[batch, channels, height, width]`.
    Nchw,
    /// `[batch, height, width, channels]`.
    Nhwc,
}

/// Why a recipe is refused. Messages name the key and the cure.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// A key is unknown.
    #[error("recipe: {0}")]
    Syntax(String),
    /// A value is out of range, or of the wrong kind.
    #[error("recipe key '{key}': {problem}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

pub(super) fn value_error(key: impl Into<String>, problem: impl Into<String>) -> RecipeError {
    RecipeError::Value { key: key.into(), problem: problem.into() }
}

impl Recipe {
    /// Checks what can be checked without a dataset.
    ///
    /// # Errors
    /// The first value that is out of range.
    pub fn validate(&self) -> Result<(), RecipeError> {
        self.validate_crop()?;
        if !matches!(self.channels, None | Some(1 | 3)) {
            return Err(value_error("channels", "must be 1 (gray) or 3 (RGB)"));
        }
        if self.cutout > IMAGE_SIDE_MAX {
            return Err(value_error("cutout", format!("at most {IMAGE_SIDE_MAX} pixels")));
        }
        if self.cutout == 1 {
            return Err(value_error("cutout", "1 fills nothing: write 0 for none, or 2 and more"));
        }
        if self.policy.is_empty() {
            return Err(value_error("policy", "empty; write \"none\" for no policy"));
        }
        self.validate_parts()?;
        let Some(normalize) = &self.normalize else { return Ok(()) };
        for (key, values) in
            [("normalize.mean", &normalize.mean), ("normalize.std", &normalize.std)]
        {
            if ![1, 3].contains(&values.len()) {
                return Err(value_error(key, "give one number, or one per channel"));
            }
            if values.iter().any(|value| !value.is_finite()) {
                return Err(value_error(key, "every number must be finite"));
            }
        }
        if normalize.std.iter().any(|&std| std < NORMALIZE_STD_MIN) {
            let problem = format!("every number must be above zero, at least {NORMALIZE_STD_MIN}");
            return Err(value_error("normalize.std", problem));
        }
        if normalize.mean.iter().any(|&mean| !(-1.0..=2.0).contains(&mean)) {
            return Err(value_error(
                "normalize.mean",
                "must be on the scale 0..1 (divide values on the scale 0..255 by 255)",
            ));
        }
        Ok(())
    }

    fn validate_parts(&self) -> Result<(), RecipeError> {
        let checks = [
            ("jitter", self.jitter.map_or(Ok(()), |jitter| jitter.check())),
            ("erase", self.erase.map_or(Ok(()), |erase| erase.check())),
            ("mix", self.mix.map_or(Ok(()), |mix| mix.check())),
        ];
        for (key, checked) in checks {
            checked.map_err(|problem| value_error(key, problem))?;
        }
        if !(1..=VIEWS_MAX).contains(&self.views) {
            return Err(value_error("views", format!("must be 1 to {VIEWS_MAX}")));
        }
        if self.views > 1 && self.mix.is_some() {
            return Err(value_error("mix", "not with views above 1; mix in the training loop"));
        }
        Ok(())
    }

    fn validate_crop(&self) -> Result<(), RecipeError> {
        let size = match self.crop {
            Crop::None => return Ok(()),
            Crop::Pad { size, .. }
            | Crop::Center { size, .. }
            | Crop::RandomResized { size, .. } => size,
        };
        if size == 0 || size > IMAGE_SIDE_MAX {
            return Err(value_error("crop.size", format!("must be 1 to {IMAGE_SIDE_MAX} pixels")));
        }
        match self.crop {
            Crop::Pad { pad, .. } if pad > IMAGE_SIDE_MAX => {
                Err(value_error("crop.pad", format!("at most {IMAGE_SIDE_MAX} pixels")))
            }
            Crop::Center { resize: Some(resize), .. }
                if !(size..=IMAGE_SIDE_MAX).contains(&resize) =>
            {
                let problem = format!("must be crop.size = {size} to {IMAGE_SIDE_MAX} pixels");
                Err(value_error("crop.resize", problem))
            }
            Crop::RandomResized { scale: [lo, hi], .. } if !(lo > 0.0 && lo <= hi && hi <= 1.0) => {
                Err(value_error("crop.scale", "give [lo, hi] with 0 < lo <= hi <= 1"))
            }
            Crop::RandomResized { ratio: [lo, hi], .. }
                if !(lo > 0.0 && lo <= hi && hi.is_finite()) =>
            {
                Err(value_error("crop.ratio", "give [lo, hi] with 0 < lo <= hi"))
            }
            _ => Ok(()),
        }
    }

    /// Channels of the output.
    pub fn output_channels(&self, info: &SplitInfo) -> usize {
        match (self.channels, info.images) {
            (Some(channels), _) => channels as usize,
            (None, ImageKind::Raw { channels, .. }) => channels,
            (None, ImageKind::Encoded { .. }) => 3,
        }
    }

    /// What the labels of a batch are: vectors where samples are mixed.
    ///
    /// # Errors
    /// There are too many classes for vectors.
    pub fn output_labels(&self, info: &SplitInfo) -> Result<LabelKind, RecipeError> {
        match (self.mix, info.label_kind) {
            (Some(_), LabelKind::Class { n_classes }) if n_classes > MIX_CLASSES_MAX => {
                let problem = format!("{n_classes} classes; at most {MIX_CLASSES_MAX} are mixed");
                Err(value_error("mix", problem))
            }
            (Some(_), LabelKind::Class { n_classes }) => Ok(LabelKind::Vector { len: n_classes }),
            (_, kind) => Ok(kind),
        }
    }

    /// Checks the recipe against a split, and gives the height and width of its output.
    ///
    /// # Errors
    /// The images are too small for the crop, or of no common size without one.
    pub fn output_size(&self, info: &SplitInfo) -> Result<(usize, usize), RecipeError> {
        let ImageKind::Raw { height, width, .. } = info.images else {
            return self.output_size_of_encoded();
        };
        let fits = |size: u32, pad: u32| {
            let (size, pad) = (size as usize, pad as usize);
            if height.min(width) + 2 * pad < size {
                let cure = if pad > 0 {
                    format!(" with {pad} pixels of padding; choose a smaller size or more padding")
                } else {
                    "; choose a smaller size, or kind = \"pad\"".to_owned()
                };
                let problem = format!("{size} is larger than the images ({height}x{width}){cure}");
                return Err(value_error("crop.size", problem));
            }
            Ok((size, size))
        };
        match self.crop {
            Crop::None => Ok((height, width)),
            Crop::Pad { size, pad } => fits(size, pad),
            Crop::Center { size, resize: None } => fits(size, 0),
            Crop::Center { size, resize: Some(_) } | Crop::RandomResized { size, .. } => {
                Ok((size as usize, size as usize))
            }
        }
    }

    fn output_size_of_encoded(&self) -> Result<(usize, usize), RecipeError> {
        let size = match self.crop {
            Crop::Pad { size, .. }
            | Crop::Center { size, .. }
            | Crop::RandomResized { size, .. } => size as usize,
            Crop::None => {
                return Err(value_error(
                    "crop.kind",
                    "'none' needs images of one size, but encoded ones have any: use \
                     'random-resized' to train, and 'center' with resize to evaluate, as in crop = \
                     { kind = \"random-resized\", size = 224 }",
                ));
            }
        };
        Ok((size, size))
    }

    /// Normalisation of each channel, with single values repeated; `(0, 1)` without any.
    ///
    /// # Errors
    /// The number of values fits neither 1 nor `channels`.
    pub fn channel_norms(&self, channels: usize) -> Result<Vec<(f32, f32)>, RecipeError> {
        let Some(Normalize { mean, std }) = &self.normalize else {
            return Ok(vec![(0.0, 1.0); channels]);
        };
        for (key, values) in [("normalize.mean", mean), ("normalize.std", std)] {
            if values.len() != 1 && values.len() != channels {
                return Err(value_error(
                    key,
                    format!("{} numbers for {channels} channel(s)", values.len()),
                ));
            }
        }
        let pick = |values: &[f32], channel: usize| {
            if values.len() == 1 { values[0] } else { values[channel] }
        };
        Ok((0..channels).map(|channel| (pick(mean, channel), pick(std, channel))).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check_refused(overrides: Value, expected: &str) {
        let Value::Object(overrides) = overrides else { panic!("overrides are an object") };
        let error = Recipe::default()
            .overridden(&overrides)
            .and_then(|recipe| recipe.validate())
            .expect_err("must be refused")
            .to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }

    #[test]
    fn wrong_values_name_the_key_and_the_cure() {
        check_refused(json!({"polcy": "none"}), "unknown field `polcy`");
        check_refused(json!({"crop": {"kind": "pads"}}), "unknown variant `pads`");
        check_refused(json!({"crop": {"kind": "pad", "size": 0, "pad": 4}}), "crop.size");
        check_refused(json!({"crop": {"kind": "pad", "size": 32}}), "missing field `pad`");
        check_refused(json!({"dtype": "f64"}), "unknown variant `f64`");
        check_refused(json!({"hflip": "yes"}), "'hflip': invalid type: string \"yes\", expected");
        check_refused(json!({"hflip": true, "cutout": -1}), "'cutout': invalid value");
        check_refused(json!({"cutout": -1}), "expected a whole number, 0 or more");
        check_refused(json!({"normalize": {"mean": 0.5}}), "'normalize': invalid type");
        check_refused(
            json!({"erase": {"p": [1]}}),
            "'erase': invalid type: a list, expected a num",
        );
        check_refused(json!({"normalize": {"mean": [0.5], "std": [0.0]}}), "above zero");
        check_refused(json!({"normalize": {"mean": [124.0], "std": [50.0]}}), "scale 0..1");
        check_refused(json!({"normalize": {"mean": [], "std": [0.2]}}), "one per channel");
        check_refused(
            json!({"crop": {"kind": "random-resized", "size": 8, "scale": [0.5, 0.1]}}),
            "crop.scale",
        );
        check_refused(json!({"policy": ""}), "write \"none\"");
        check_refused(json!({"jitter": {"hue": 0.6}}), "'jitter': hue must be 0 to 0.5");
        check_refused(json!({"jitter": {"gamma": 1}}), "unknown field `gamma`");
        check_refused(json!({"erase": {"scale": [0.5, 0.2]}}), "'erase': give scale");
        check_refused(json!({"mix": {}}), "'mix': give mixup, cutmix or both");
        check_refused(json!({"mix": {"mixup": 0.01}}), "must be 0 or 0.05 to 8");
        check_refused(json!({"views": 0}), "'views': must be 1 to");
        check_refused(json!({"views": 2, "mix": {"mixup": 0.2}}), "not with views above 1");
    }
}
