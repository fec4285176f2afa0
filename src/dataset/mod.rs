//! Datasets: mapped readers and the packer. Bytes and labels by index, nothing else.
//!
//! Owns files and their formats. Never decodes, augments or orders samples: an encoded image is
//! bytes here.
//!
//! *Invariants*: a file is checked whole (lengths, counts, label range) when it is opened, so that
//! [`Split::sample`] is a look-up into the map; files are replaced by temp + rename, never
//! truncated, so a map made here stays valid while other processes pack or unpack.
//!
//! *Formats*: packed Arrow IPC files, IDX (also `.gz`), CIFAR-10 and CIFAR-100 binary, folders of
//! class folders of image files, WebDataset shards, Hugging Face `datasets` folders.

mod arrow;
mod arrow_schema;
mod cifar;
mod digest;
mod divide;
mod error;
mod folder;
mod gz;
mod huggingface;
mod idx;
mod map;
mod open;
mod pack;
mod pack_passes;
mod tar;
mod verify;
mod webdataset;

use std::fmt;

pub use digest::sample_checksum;
pub use divide::Division;
pub use error::DatasetError;
pub use open::{list_splits, open_split};
pub use pack::{Convert, ConvertSplit, PackOptions, PackedSplit, Progress, pack, write_split};
pub use verify::{BadSample, CheckImage, FingerprintCheck, VerifyReport, verify_split};

/// Where a sample's pixels lie, without a copy.
#[derive(Clone, Copy, Debug)]
pub enum Pixels<'a> {
    /// Raw 8-bit, interleaved: `[height, width, channels]`.
    Hwc(&'a [u8]),
    /// Raw 8-bit, planar: `[channels, height, width]` (CIFAR's binary files).
    Chw(&'a [u8]),
}

/// A sample's label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Label<'a> {
    /// A class, `0..n_classes`.
    Class(i64),
    /// A fixed-length vector (multi-label, regression).
    Vector(&'a [f32]),
}

/// An image that lies in the dataset as pixels.
#[derive(Clone, Copy, Debug)]
pub struct RawImage<'a> {
    /// Columns, in pixels.
    pub width: usize,
    /// Rows, in pixels.
    pub height: usize,
    /// 1 or 3.
    pub channels: usize,
    /// The bytes.
    pub pixels: Pixels<'a>,
}

/// What a sample's image is made of.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Pixels, ready to be used.
    Raw(RawImage<'a>),
    /// A whole image file (JPEG, PNG, …), not looked into.
    Encoded(&'a [u8]),
}

impl<'a> Content<'a> {
    /// The bytes of the pixels or the file.
    pub fn bytes(&self) -> &'a [u8] {
        match *self {
            Self::Raw(RawImage { pixels: Pixels::Hwc(bytes) | Pixels::Chw(bytes), .. })
            | Self::Encoded(bytes) => bytes,
        }
    }
}

/// One sample, borrowed from the map or from the reader's buffer.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The image.
    pub content: Content<'a>,
    /// Its label.
    pub label: Label<'a>,
}

impl<'a> Sample<'a> {
    /// The pixels, if they need no decoding.
    pub fn raw(&self) -> Option<RawImage<'a>> {
        match self.content {
            Content::Raw(image) => Some(image),
            Content::Encoded(_) => None,
        }
    }
}

/// What the images of a split are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// Pixels, all of one shape.
    Raw {
        /// Rows, in pixels.
        height: usize,
        /// Columns, in pixels.
        width: usize,
        /// 1 or 3.
        channels: usize,
    },
    /// Image files of any size, to be decoded.
    Encoded {
        /// Whether the format's own reader turns images as their EXIF orientation says.
        turns_by_exif: bool,
    },
}

/// What labels a split has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelKind {
    /// One class per sample.
    Class {
        /// Labels are in `0..n_classes`.
        n_classes: u32,
    },
    /// A vector of f32 per sample.
    Vector {
        /// Its length.
        len: u32,
    },
}

/// Identity of a split's content: hex text, stored in packed files, else made of path, size and
/// modification time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub String);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is known of a split without reading its samples.
#[derive(Clone, Debug)]
pub struct SplitInfo {
    /// Format as people call it: `arrow`, `idx`, `cifar10`, `image-folder`, ….
    pub format: &'static str,
    /// Samples in the split, at least 1.
    pub n_samples: u64,
    /// What its images are.
    pub images: ImageKind,
    /// What labels it has.
    pub label_kind: LabelKind,
    /// Names of the classes, or empty.
    pub class_names: Vec<String>,
    /// Identity of the content.
    pub fingerprint: Fingerprint,
    /// Bytes mapped.
    pub mapped_bytes: u64,
}

/// A mapped split: samples by index, from any thread.
pub trait Split: Send + Sync + fmt::Debug {
    /// What is known without reading samples.
    fn info(&self) -> &SplitInfo;

    /// The sample at `sample_idx`, borrowed from the map; from `buffer` where a sample is a file of
    /// its own, which is read into it.
    ///
    /// # Errors
    /// A label out of range, damage found in the record, or a file that is gone or has changed.
    ///
    /// # Panics
    /// If `sample_idx` is not below `n_samples`.
    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError>;

    /// The label alone; no image is read.
    ///
    /// # Errors
    /// As [`Self::sample`], as far as the label goes.
    ///
    /// # Panics
    /// If `sample_idx` is not below `n_samples`.
    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError>;

    /// A hint that the sample will be read soon: starts reading it into memory if it is not there.
    /// May wait a little for the disk, says nothing of errors, and does nothing where the system's
    /// own read-ahead is as good.
    ///
    /// # Panics
    /// If `sample_idx` is not below `n_samples`.
    fn will_need(&self, sample_idx: u64) {
        let _ = sample_idx;
    }

    /// What a message calls the sample: its file, or its place in the split's.
    fn sample_name(&self, sample_idx: u64) -> String {
        format!("sample {sample_idx}")
    }

    /// The stored CRC-32 of a sample ([`sample_checksum`]), where the format has one.
    ///
    /// # Panics
    /// If `sample_idx` is not below `n_samples`.
    fn checksum(&self, sample_idx: u64) -> Option<u32> {
        let _ = sample_idx;
        None
    }
}
