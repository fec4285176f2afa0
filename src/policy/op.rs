//! The fifteen operations and the profiles that say what a magnitude means.
//!
//! *Source*: `augmentations.py` of kakaobrain/fast-autoaugment, `augment_list(False)`, in its
//! order; torchvision's `AutoAugment` and `TrivialAugmentWide` use the same names.

use serde::{Deserialize, Serialize};

/// One augmentation operation. The discriminants are the ids of the published search space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are Pillow's and the paper's")]
pub enum Op {
    ShearX = 0,
    ShearY = 1,
    TranslateX = 2,
    TranslateY = 3,
    Rotate = 4,
    AutoContrast = 5,
    Invert = 6,
    Equalize = 7,
    Solarize = 8,
    Posterize = 9,
    Contrast = 10,
    Color = 11,
    Brightness = 12,
    Sharpness = 13,
    Cutout = 14,
}

impl Op {
    /// All operations, by id.
    pub const ALL: [Self; 15] = [
        Self::ShearX,
        Self::ShearY,
        Self::TranslateX,
        Self::TranslateY,
        Self::Rotate,
        Self::AutoContrast,
        Self::Invert,
        Self::Equalize,
        Self::Solarize,
        Self::Posterize,
        Self::Contrast,
        Self::Color,
        Self::Brightness,
        Self::Sharpness,
        Self::Cutout,
    ];

    /// The name in policy files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ShearX => "ShearX",
            Self::ShearY => "ShearY",
            Self::TranslateX => "TranslateX",
            Self::TranslateY => "TranslateY",
            Self::Rotate => "Rotate",
            Self::AutoContrast => "AutoContrast",
            Self::Invert => "Invert",
            Self::Equalize => "Equalize",
            Self::Solarize => "Solarize",
            Self::Posterize => "Posterize",
            Self::Contrast => "Contrast",
            Self::Color => "Color",
            Self::Brightness => "Brightness",
            Self::Sharpness => "Sharpness",
            Self::Cutout => "Cutout",
        }
    }

    /// The operation of that exact name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|op| op.name() == name)
    }

    /// AutoContrast, Invert and Equalize ignore their magnitude.
    pub const fn has_magnitude(self) -> bool {
        !matches!(self, Self::AutoContrast | Self::Invert | Self::Equalize)
    }
}

/// What λ ∈ [0, 1] means for each operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OpsProfile {
    /// The published Fast AutoAugment code: λ is a signed position in the operation's range.
    #[default]
    Fastaa,
    /// torchvision's `AutoAugment` and `RandAugment` (PIL path): λ is a strength.
    Torchvision,
    /// torchvision's `TrivialAugmentWide` (PIL path): λ is a strength in 31 steps.
    TrivialWide,
}

impl OpsProfile {
    /// The name in policy files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fastaa => "fastaa",
            Self::Torchvision => "torchvision",
            Self::TrivialWide => "trivial-wide",
        }
    }

    /// Whether the operation's sign is flipped with probability ½ when it is applied.
    ///
    /// `fastaa` mirrors the five geometric operations (on top of a symmetric range);
    /// torchvision's profiles also give the four enhancers a random sign (factor 1 ± m).
    pub const fn has_random_sign(self, op: Op) -> bool {
        match op {
            Op::ShearX | Op::ShearY | Op::TranslateX | Op::TranslateY | Op::Rotate => true,
            Op::Contrast | Op::Color | Op::Brightness | Op::Sharpness => {
                !matches!(self, Self::Fastaa)
            }
            _ => false,
        }
    }
}
