//! Datasets: mapped readers and the packer. Bytes and labels by index, nothing else.
//!
//! Owns files and their formats. Never decodes, augments or orders samples.
//!
//! *Invariants*: a file is checked whole (lengths, counts, label range) when it is opened, so that
//! [`Split::sample`] is a look-up into the map; files are replaced by temp + rename, never
//! truncated, so a map made here stays valid while other processes pack or unpack.
//!
//! *Formats*: packed Arrow IPC files, IDX (also `.gz`), CIFAR-10 and CIFAR-100 binary.

mod arrow;
mod arrow_schema;
mod cifar;
mod digest;
mod error;
mod gz;
mod idx;
mod map;
mod open;
mod pack;
mod verify;

use std::fmt;

pub use digest::sample_checksum;
pub use error::DatasetError;
pub use open::{list_splits, open_split};
pub use pack::{PackOptions, PackedSplit, Progress, pack, write_split};
pub use verify::{BadSample, FingerprintCheck, VerifyReport, verify_split};

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

/// One sample, borrowed from the map.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Columns, in pixels.
    pub width: usize,
    /// Rows, in pixels.
    pub height: usize,
    /// 1 or 3.
    pub channels: usize,
    /// The image.
    pub pixels: Pixels<'a>,
    /// Its label.
    pub label: Label<'a>,
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
    /// Format as people call it: `arrow`, `idx`, `cifar10`, `cifar100`.
    pub format: &'static str,
    /// Samples in the split, at least 1.
    pub n_samples: u64,
    /// Shape of every sample (all formats of today have one shape).
    pub width: usize,
    /// Rows, in pixels.
    pub height: usize,
    /// 1 or 3.
    pub channels: usize,
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

    /// The sample at `sample_idx`, borrowed from the map.
    ///
    /// # Errors
    /// A label out of range, or damage found in the record.
    ///
    /// # Panics
    /// If `sample_idx` is not below `n_samples`.
    fn sample(&self, sample_idx: u64) -> Result<Sample<'_>, DatasetError>;

    /// The stored CRC-32 of a sample ([`sample_checksum`]), where the format has one.
    ///
    /// # Panics
    /// If `sample_idx` is not below `n_samples`.
    fn checksum(&self, sample_idx: u64) -> Option<u32> {
        let _ = sample_idx;
        None
    }
}
