//! CIFAR-10 and CIFAR-100 binary files: records of label bytes and a planar 32 × 32 colour image.
//!
//! ```text
//! CIFAR-10   1 label          1024 red  1024 green  1024 blue     3073 bytes a record
//! CIFAR-100  1 coarse 1 fine  1024 red  1024 green  1024 blue     3074 bytes (fine counts)
//! ```
//! Source: <https://www.cs.toronto.edu/~kriz/cifar.html>, "Binary version".
//!
//! A split may have several files; each has a map of its own. The files have no magic number: their
//! names and lengths tell what they are.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::map::Map;
use super::{
    Content, DatasetError, ImageKind, Label, LabelKind, Pixels, RawImage, Sample, Split, SplitInfo,
    digest,
};
use crate::limits;

const SIDE: usize = 32;
const PIXEL_BYTES: usize = 3 * SIDE * SIDE;

/// Most `data_batch_N.bin` files that are looked for; CIFAR-10 has five.
const BATCH_FILES_MAX: usize = 99;

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Cifar10,
    Cifar100,
}

impl Kind {
    fn format(self) -> &'static str {
        match self {
            Self::Cifar10 => "cifar10",
            Self::Cifar100 => "cifar100",
        }
    }

    /// Bytes before the pixels; the label is the last of them.
    fn label_bytes(self) -> usize {
        match self {
            Self::Cifar10 => 1,
            Self::Cifar100 => 2,
        }
    }

    fn record_bytes(self) -> usize {
        self.label_bytes() + PIXEL_BYTES
    }

    fn n_classes(self) -> u32 {
        match self {
            Self::Cifar10 => 10,
            Self::Cifar100 => 100,
        }
    }

    fn names_file(self) -> &'static str {
        match self {
            Self::Cifar10 => "batches.meta.txt",
            Self::Cifar100 => "fine_label_names.txt",
        }
    }
}

/// The files of a split, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) kind: Kind,
    pub(super) paths: Vec<PathBuf>,
}

/// The files of a split in a folder, by the usual names; `None` if there are none.
///
/// # Errors
/// A file is missing among `data_batch_1.bin`, `data_batch_2.bin`, ….
pub(super) fn find_in_folder(folder: &Path, split: &str) -> Result<Option<Files>, DatasetError> {
    let one = |kind, name: &str| {
        let path = folder.join(name);
        path.exists().then(|| Files { kind, paths: vec![path] })
    };
    match split {
        "train" => {
            let batches = batch_files(folder)?;
            if batches.is_empty() {
                return Ok(one(Kind::Cifar100, "train.bin"));
            }
            Ok(Some(Files { kind: Kind::Cifar10, paths: batches }))
        }
        "test" => Ok(one(Kind::Cifar10, "test_batch.bin").or(one(Kind::Cifar100, "test.bin"))),
        _ => Ok(None),
    }
}

/// What [`find_in_folder`] looks for, in words.
pub(super) fn looked_for(split: &str) -> Option<&'static str> {
    match split {
        "train" => Some("data_batch_1.bin, train.bin"),
        "test" => Some("test_batch.bin, test.bin"),
        _ => None,
    }
}

/// What a single file is by its name: a batch takes its partners. `None` if the name tells nothing.
///
/// # Errors
/// As [`find_in_folder`].
pub(super) fn by_name(path: &Path) -> Result<Option<Files>, DatasetError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let kind = match name {
        "test_batch.bin" => Kind::Cifar10,
        "train.bin" | "test.bin" => Kind::Cifar100,
        _ if is_batch_name(name) => {
            let folder = path.parent().unwrap_or(Path::new(""));
            return Ok(Some(Files { kind: Kind::Cifar10, paths: batch_files(folder)? }));
        }
        _ => return Ok(None),
    };
    Ok(Some(Files { kind, paths: vec![path.to_owned()] }))
}

/// What a `.bin` file of any other name is by its length; `None` if its length fits neither.
pub(super) fn by_length(path: &Path, len: u64) -> Option<Files> {
    let kinds = [Kind::Cifar10, Kind::Cifar100];
    let kind = kinds.into_iter().find(|kind| len.is_multiple_of(kind.record_bytes() as u64))?;
    (len > 0).then(|| Files { kind, paths: vec![path.to_owned()] })
}

/// The split that a file of a usual name belongs to.
pub(super) fn split_of(name: &str) -> Option<&'static str> {
    match name {
        "test_batch.bin" | "test.bin" => Some("test"),
        "train.bin" => Some("train"),
        _ => is_batch_name(name).then_some("train"),
    }
}

fn is_batch_name(name: &str) -> bool {
    let number = name.strip_prefix("data_batch_").and_then(|rest| rest.strip_suffix(".bin"));
    number.is_some_and(|number| (1..=BATCH_FILES_MAX).any(|n| n.to_string() == number))
}

/// `data_batch_1.bin` and on, as many as there are; a gap is an error.
fn batch_files(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let path_of = |n: usize| folder.join(format!("data_batch_{n}.bin"));
    let Some(last) = (1..=BATCH_FILES_MAX).rev().find(|n| path_of(*n).exists()) else {
        return Ok(Vec::new());
    };
    let paths: Vec<PathBuf> = (1..=last).map(path_of).collect();
    match paths.iter().find(|path| !path.exists()) {
        Some(missing) => Err(DatasetError::NotFound {
            path: missing.display().to_string(),
            looked_for: format!("all of data_batch_1.bin to data_batch_{last}.bin"),
        }),
        None => Ok(paths),
    }
}

/// The mapped files of a split.
#[derive(Debug)]
pub(super) struct CifarSplit {
    kind: Kind,
    parts: Vec<Part>,
    info: SplitInfo,
}

/// One file: its first sample's index in the split, and its map.
#[derive(Debug)]
struct Part {
    first_idx: u64,
    map: Map,
}

impl CifarSplit {
    /// Maps the files of a split, in order.
    ///
    /// # Errors
    /// A file is missing, empty or cut off, or a label is out of range.
    pub(super) fn open(files: &Files) -> Result<Self, DatasetError> {
        let kind = files.kind;
        let record_bytes = kind.record_bytes();
        let mut parts = Vec::with_capacity(files.paths.len());
        let (mut n_samples, mut mapped_bytes) = (0, 0);
        for path in &files.paths {
            let map = Map::open(path, path.display().to_string())?;
            let len = map.bytes().len();
            if len == 0 {
                return Err(DatasetError::Empty { path: map.name().to_owned() });
            }
            if !len.is_multiple_of(record_bytes) {
                let what = format!(
                    "{len} bytes are not a whole number of {} records of {record_bytes} bytes: \
                     it is cut off, or of another format",
                    kind.format()
                );
                return Err(DatasetError::damaged(map.name(), what));
            }
            map.expect_samples_of(record_bytes);
            parts.push(Part { first_idx: n_samples, map });
            n_samples += (len / record_bytes) as u64;
            mapped_bytes += len as u64;
        }
        let folder = files.paths.first().and_then(|path| path.parent()).unwrap_or(Path::new(""));
        let names_path = folder.join(kind.names_file());
        let class_names = if names_path.exists() { read_names(&names_path)? } else { Vec::new() };
        let n_classes = match u32::try_from(class_names.len()) {
            Ok(n @ 1..) => n,
            _ => kind.n_classes(),
        };
        let mut fingerprinted = files.paths.clone();
        fingerprinted.extend((!class_names.is_empty()).then_some(names_path));
        let info = SplitInfo {
            format: kind.format(),
            n_samples,
            images: ImageKind::Raw { height: SIDE, width: SIDE, channels: 3 },
            label_kind: LabelKind::Class { n_classes },
            class_names,
            fingerprint: digest::file_fingerprint(&fingerprinted)?,
            mapped_bytes,
        };
        let split = Self { kind, parts, info };
        split.check_labels(n_classes)?;
        Ok(split)
    }

    fn check_labels(&self, n_classes: u32) -> Result<(), DatasetError> {
        for part in &self.parts {
            let labels = part.map.bytes().iter().skip(self.kind.label_bytes() - 1);
            let labels = labels.step_by(self.kind.record_bytes());
            for (idx, label) in (0_u64..).zip(labels) {
                if u32::from(*label) >= n_classes {
                    return Err(DatasetError::LabelRange {
                        path: part.map.name().to_owned(),
                        sample_idx: idx,
                        label: i64::from(*label),
                        n_classes,
                        cure: "the file is damaged or of another format; if the set has more \
                               classes, list their names in batches.meta.txt (CIFAR-10 format) or \
                               fine_label_names.txt (CIFAR-100 format) beside it",
                    });
                }
            }
        }
        Ok(())
    }
}

impl Split for CifarSplit {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        _buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let (labels, pixels) = self.record(sample_idx);
        let pixels = Pixels::Chw(pixels);
        let image = RawImage { width: SIDE, height: SIDE, channels: 3, pixels };
        Ok(Sample { content: Content::Raw(image), label: class_of(labels) })
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        Ok(class_of(self.record(sample_idx).0))
    }
}

/// The class is the last label: CIFAR-100 has a coarse one before it.
fn class_of(labels: &[u8]) -> Label<'_> {
    Label::Class(i64::from(labels[labels.len() - 1]))
}

impl CifarSplit {
    /// A record's labels and pixels.
    fn record(&self, sample_idx: u64) -> (&[u8], &[u8]) {
        assert!(sample_idx < self.info.n_samples, "sample {sample_idx} is beyond the split");
        let part_idx = self.parts.partition_point(|part| part.first_idx <= sample_idx) - 1;
        let part = &self.parts[part_idx];
        #[allow(clippy::cast_possible_truncation, reason = "below the length of a map")]
        let row = (sample_idx - part.first_idx) as usize;
        let record_bytes = self.kind.record_bytes();
        let record = &part.map.bytes()[row * record_bytes..(row + 1) * record_bytes];
        record.split_at(self.kind.label_bytes())
    }
}

/// Class names, one a line; blank lines are skipped.
fn read_names(path: &Path) -> Result<Vec<String>, DatasetError> {
    let fail = |what: String| DatasetError::ClassNames { path: path.display().to_string(), what };
    let file = fs::File::open(path).map_err(|cause| DatasetError::io(path, cause))?;
    let mut text = String::new();
    let limit = limits::CLASS_NAMES_BYTES_MAX;
    let len = file
        .take(limit + 1)
        .read_to_string(&mut text)
        .map_err(|cause| fail(format!("class names cannot be read: {cause}")))?;
    if len as u64 > limit {
        return Err(fail(format!("more than {limit} bytes of class names")));
    }
    let names: Vec<String> =
        text.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    match names.len() {
        0 => Err(fail("no class name in it".to_owned())),
        n if n > limits::CLASSES_MAX as usize => {
            Err(fail(format!("{n} class names; at most {} are possible", limits::CLASSES_MAX)))
        }
        _ => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_split() {
        assert_eq!(split_of("data_batch_5.bin"), Some("train"));
        assert_eq!(split_of("data_batch_05.bin"), None);
        assert_eq!(split_of("data_batch_.bin"), None);
        assert_eq!(split_of("test_batch.bin"), Some("test"));
        assert_eq!(split_of("other.bin"), None);
    }

    #[test]
    fn lengths_tell_the_format() {
        let kind = |len| by_length(Path::new("x.bin"), len).map(|files| files.kind);
        assert_eq!(kind(3073 * 7), Some(Kind::Cifar10));
        assert_eq!(kind(3074 * 7), Some(Kind::Cifar100));
        assert_eq!(kind(3073 * 7 + 1), None);
        assert_eq!(kind(0), None);
    }

    #[test]
    fn a_gap_between_the_batches_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for n in [1, 2, 4] {
            fs::write(dir.path().join(format!("data_batch_{n}.bin")), vec![0; 3073]).unwrap();
        }
        let error = find_in_folder(dir.path(), "train").unwrap_err().to_string();
        assert!(error.contains("data_batch_3.bin: no such file"), "{error}");
        assert!(error.contains("data_batch_1.bin to data_batch_4.bin"), "{error}");
        fs::write(dir.path().join("data_batch_3.bin"), vec![0; 3073 * 2]).unwrap();
        let files = by_name(&dir.path().join("data_batch_2.bin")).unwrap().unwrap();
        assert_eq!((files.kind, files.paths.len()), (Kind::Cifar10, 4));
        assert_eq!(CifarSplit::open(&files).unwrap().info().n_samples, 5);
    }
}
