//! `[images]`: limits on encoded images, and the room for those that are shared.

use serde::{Deserialize, Serialize};

use crate::image::decode::DecodeLimits;
use crate::limits::{
    ENCODED_PIXELS_MAX, ENCODED_SIDE_MAX, IMAGE_PIXELS_DEFAULT, IMAGE_SIDE_MAX, SHARED_MIB_MAX,
};

/// `[images]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImagesConfig {
    /// Most rows, and most columns, of an encoded image: what is larger is refused before memory
    /// is taken for it.
    pub max_side: u64,
    /// Most rows times columns.
    pub max_pixels: u64,
    /// Room for decoded images that several streams share, in MiB; 0: nothing is shared.
    pub shared_mib: u64,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        let (max_side, max_pixels) = (u64::from(IMAGE_SIDE_MAX), IMAGE_PIXELS_DEFAULT);
        Self { max_side, max_pixels, shared_mib: 256 }
    }
}

impl ImagesConfig {
    /// The limits, for decoders.
    pub fn limits(self) -> DecodeLimits {
        DecodeLimits { max_side: self.max_side, max_pixels: self.max_pixels }
    }

    /// The room for shared images, in bytes.
    pub fn shared_bytes(self) -> usize {
        usize::try_from(self.shared_mib << 20).unwrap_or(usize::MAX)
    }

    pub(super) fn check(self) -> Result<(), (String, String)> {
        let values = [
            ("max_side", self.max_side, 1, ENCODED_SIDE_MAX),
            ("max_pixels", self.max_pixels, 1, ENCODED_PIXELS_MAX),
            ("shared_mib", self.shared_mib, 0, SHARED_MIB_MAX),
        ];
        match values.into_iter().find(|(_, value, lo, hi)| !(lo..=hi).contains(&value)) {
            None => Ok(()),
            Some((key, _, lo, hi)) => {
                Err((format!("images.{key}"), format!("must be {lo} to {hi}")))
            }
        }
    }
}
