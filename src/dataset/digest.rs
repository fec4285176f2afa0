//! Checksums and fingerprints: what identifies a sample, a packed split, and a set of files.
//!
//! Never opens a sample: callers hand in bytes.
//!
//! | digest | over | stored |
//! |---|---|---|
//! | sample checksum | pixels (HWC), then the label, little-endian | column `checksum` |
//! | content fingerprint | shape, label kind, (checksum, label) of each sample | metadata |
//! | file fingerprint | canonical path, size and time of each file | nowhere |

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use super::{
    Content, DatasetError, Fingerprint, ImageKind, Label, LabelKind, Pixels, RawImage, Sample,
};

/// Characters of a fingerprint: half of SHA-256 is plenty to tell datasets apart.
pub(super) const FINGERPRINT_CHARS: usize = 32;

/// CRC-32 (IEEE, as zlib's `crc32`) of a sample: its pixels as `[height, width, channels] u8`, or
/// its encoded image, then its label: `i64`, or each `f32` of the vector, little-endian.
pub fn sample_checksum(image: &[u8], label: Label<'_>) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(image);
    label_bytes(label, |bytes| crc.update(bytes));
    crc.finalize()
}

/// A sample's image as it is packed: the encoded bytes, or pixels as HWC, borrowed if they are so,
/// else rearranged into `scratch`.
pub(super) fn image_bytes<'a>(sample: &Sample<'a>, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    match sample.content {
        Content::Raw(image) => pixels_hwc(image, scratch),
        Content::Encoded(bytes) => bytes,
    }
}

fn pixels_hwc<'a>(sample: RawImage<'a>, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    match sample.pixels {
        Pixels::Hwc(bytes) => bytes,
        Pixels::Chw(bytes) => {
            let plane_len = sample.width * sample.height;
            scratch.clear();
            scratch.resize(bytes.len(), 0);
            for (channel, plane) in bytes.chunks_exact(plane_len).enumerate() {
                let out = scratch.iter_mut().skip(channel).step_by(sample.channels);
                for (to, from) in out.zip(plane) {
                    *to = *from;
                }
            }
            scratch
        }
    }
}

/// The fingerprint of a packed split, made sample by sample.
#[derive(Debug)]
pub(super) struct ContentHasher(Sha256);

impl ContentHasher {
    /// Starts with the shape `[height, width, channels]` (encoded images: zeros, and whether they
    /// are turned) and the kind of labels.
    pub(super) fn new(images: ImageKind, label_kind: LabelKind) -> Self {
        let mut hash = Sha256::new();
        let shape = match images {
            ImageKind::Raw { height, width, channels } => [height, width, channels],
            ImageKind::Encoded { turns_by_exif } => [0, 0, usize::from(turns_by_exif)],
        };
        for side in shape {
            hash.update((side as u64).to_le_bytes());
        }
        // The number of classes is left out: it may grow when another split knows more of them.
        match label_kind {
            LabelKind::Class { .. } => hash.update(0_u64.to_le_bytes()),
            LabelKind::Vector { len } => hash.update(u64::from(len).to_le_bytes()),
        }
        Self(hash)
    }

    /// Adds the next sample.
    pub(super) fn add(&mut self, checksum: u32, label: Label<'_>) {
        self.0.update(checksum.to_le_bytes());
        label_bytes(label, |bytes| self.0.update(bytes));
    }

    /// The fingerprint of all that was added.
    pub(super) fn finish(self) -> Fingerprint {
        fingerprint(self.0)
    }
}

/// The fingerprint of an unpacked source: canonical path, size and modification time of its files.
///
/// # Errors
/// A file is gone.
pub(super) fn file_fingerprint(files: &[PathBuf]) -> Result<Fingerprint, DatasetError> {
    let mut hash = Sha256::new();
    for file in files {
        let canonical = fs::canonicalize(file).map_err(|cause| DatasetError::io(file, cause))?;
        let meta = fs::metadata(file).map_err(|cause| DatasetError::io(file, cause))?;
        let name = canonical.as_os_str().as_bytes();
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update(meta.len().to_le_bytes());
        hash.update(meta.mtime().to_le_bytes());
        hash.update(meta.mtime_nsec().to_le_bytes());
    }
    Ok(fingerprint(hash))
}

/// The first characters of a hash, as lower-case hex.
pub(super) fn fingerprint(hash: Sha256) -> Fingerprint {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(2 * FINGERPRINT_CHARS);
    for byte in hash.finalize() {
        let _ = write!(text, "{byte:02x}");
    }
    text.truncate(FINGERPRINT_CHARS);
    Fingerprint(text)
}

fn label_bytes(label: Label<'_>, mut each: impl FnMut(&[u8])) {
    match label {
        Label::Class(class) => each(&class.to_le_bytes()),
        Label::Vector(values) => values.iter().for_each(|value| each(&value.to_le_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planar_pixels_become_interleaved() {
        let bytes = [1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16, 21, 22, 23, 24, 25, 26];
        let pixels = Pixels::Chw(&bytes);
        let image = RawImage { width: 3, height: 2, channels: 3, pixels };
        let mut scratch = vec![99; 40];
        let hwc = pixels_hwc(image, &mut scratch);
        assert_eq!(hwc, [1, 11, 21, 2, 12, 22, 3, 13, 23, 4, 14, 24, 5, 15, 25, 6, 16, 26]);
    }

    #[test]
    fn checksums_cover_pixels_and_labels() {
        // zlib.crc32(bytes([1, 2, 3]) + (7).to_bytes(8, "little")) in Python.
        assert_eq!(sample_checksum(&[1, 2, 3], Label::Class(7)), 0x9db4_8bcd);
        let base = sample_checksum(&[1, 2, 3], Label::Vector(&[0.5, 1.0]));
        assert_ne!(base, sample_checksum(&[1, 2, 4], Label::Vector(&[0.5, 1.0])));
        assert_ne!(base, sample_checksum(&[1, 2, 3], Label::Vector(&[0.5, 2.0])));
    }

    #[test]
    fn fingerprints_depend_on_shape_order_and_label_kind() {
        let make = |[height, width, channels]: [usize; 3], kind, first: u32| {
            let mut hash = ContentHasher::new(ImageKind::Raw { height, width, channels }, kind);
            hash.add(first, Label::Class(1));
            hash.add(3 - first, Label::Class(1));
            hash.finish().0
        };
        let class = LabelKind::Class { n_classes: 2 };
        let base = make([2, 3, 1], class, 1);
        assert_eq!(base.len(), FINGERPRINT_CHARS);
        assert_eq!(base, make([2, 3, 1], LabelKind::Class { n_classes: 9 }, 1));
        assert_ne!(base, make([3, 2, 1], class, 1));
        assert_ne!(base, make([2, 3, 1], class, 2));
        assert_ne!(base, make([2, 3, 1], LabelKind::Vector { len: 2 }, 1));
    }
}
