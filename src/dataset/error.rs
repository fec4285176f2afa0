//! What can be wrong with a dataset. One variant per cause; each message names the file (and the
//! sample, if there is one) and says what to do.
//!
//! Never opens anything: variants carry what was found.

use std::io;
use std::path::Path;

/// Why a dataset or sample is refused. Every message names the file, and the sample if there is
/// one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The file cannot be opened, mapped or read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing is at the path.
    #[error("{path}: no such file or folder; looked for {looked_for}")]
    NotFound {
        /// The path that was given.
        path: String,
        /// What would have been right.
        looked_for: String,
    },
    /// The path is a pipe, a socket or a device.
    #[error("{path}: not a regular file, so it cannot be mapped; give a file or folder on disk")]
    NotAFile {
        /// The path.
        path: String,
    },
    /// A folder or file that has no such split.
    #[error("{path}: no split '{split}' here ({has}); looked for {looked_for}")]
    NoSplit {
        /// The folder or file.
        path: String,
        /// The split that was asked for.
        split: String,
        /// The splits that are there, in words.
        has: String,
        /// File names that would have been right.
        looked_for: String,
    },
    /// A split's name that cannot be a file's name.
    #[error(
        "'{split}' cannot be the name of a split: use 1 to 128 letters, digits, '-', '_' or '.', \
         and start with a letter or digit"
    )]
    SplitName {
        /// The name.
        split: String,
    },
    /// The content is none of the formats.
    #[error(
        "{path}: not a dataset file that is known: {found}; give a packed .arrow file, an IDX \
         images file (may be .gz), a CIFAR .bin file, a folder of these, or a folder of class \
         folders of images"
    )]
    UnknownFormat {
        /// The file.
        path: String,
        /// What its beginning looks like.
        found: String,
    },
    /// No samples.
    #[error("{path}: holds no samples; a split needs at least one")]
    Empty {
        /// The file.
        path: String,
    },
    /// A file whose header or length is wrong for its format.
    #[error("{path}: {what}; copy or download the file again")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A file that is whole, but holds what cannot be streamed.
    #[error("{path}: {what}")]
    Unsupported {
        /// The file.
        path: String,
        /// What is wrong, and what to do.
        what: String,
    },
    /// Images and labels do not belong together.
    #[error(
        "{labels_path} has {n_labels} labels, but {images_path} has {n_images} images; the two \
         files are of different splits or one is damaged: get both again from one source"
    )]
    CountMismatch {
        /// The images file.
        images_path: String,
        /// Its count.
        n_images: u64,
        /// The labels file.
        labels_path: String,
        /// Its count.
        n_labels: u64,
    },
    /// The partner file with the labels is missing.
    #[error(
        "{path}: its labels file is missing; looked for {looked_for}; put it beside the images"
    )]
    NoLabels {
        /// The images file.
        path: String,
        /// The names that were tried.
        looked_for: String,
    },
    /// Labels outside `0..n_classes`.
    #[error(
        "{path}: sample {sample_idx} has label {label}, but there are {n_classes} classes \
         (0 to {}); {cure}",
        n_classes - 1
    )]
    LabelRange {
        /// The file.
        path: String,
        /// The first sample with such a label.
        sample_idx: u64,
        /// Its label.
        label: i64,
        /// How many classes there are, at least 1.
        n_classes: u32,
        /// What to do.
        cure: &'static str,
    },
    /// A file of class names that cannot be used.
    #[error("{path}: {what}; it must be UTF-8 text, one class name a line")]
    ClassNames {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A `.gz` file that does not unpack.
    #[error("{path}: damaged or cut off .gz file: {source}; copy or download it again")]
    Gzip {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Bytes that are no whole Arrow IPC file.
    #[error(
        "{path}: not a whole Arrow IPC file: {what}; copy it again, or pack it anew with \
         `fastaa-ctl dataset pack`"
    )]
    Arrow {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// An Arrow IPC file whose columns or metadata are not those of a packed split.
    #[error(
        "{path}: an Arrow file, but not a packed split: {what}; packed splits are written by \
         `fastaa-ctl dataset pack`"
    )]
    ArrowSchema {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A file of Hugging Face `datasets` that cannot be read.
    #[error("{path}: not what `datasets` writes of images and classes: {what}")]
    Hf {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}; {cure}", cure = write_cure(source))]
    Write {
        /// The file or folder.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The destination is there already.
    #[error("{path} exists already; use --force to replace it, or choose another folder")]
    Exists {
        /// The file.
        path: String,
    },
    /// Another process writes to the same folder.
    #[error(
        "{path}: another pack is writing here; wait until it ends (a leftover of one that was \
         killed may be deleted)"
    )]
    Busy {
        /// The folder, or the temp file in it.
        path: String,
    },
    /// A class without images.
    #[error(
        "{path}: no image file in this class's folder (.jpg, .jpeg, .png, .webp, .bmp, .ppm, \
         .pgm); remove the folder, or put the class's images there"
    )]
    EmptyClass {
        /// The folder.
        path: String,
    },
    /// A file that is not as it was when the dataset was opened.
    #[error(
        "{path}: changed since the dataset was opened ({what}); start the daemon anew, which looks \
         at all files again"
    )]
    Stale {
        /// The file.
        path: String,
        /// What changed.
        what: String,
    },
    /// An image that cannot be decoded, where it must be.
    #[error("{path}: {what}; move the file out of the dataset, or pack without converting images")]
    BadImage {
        /// The sample's file, or its place.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// The source changed while it was read.
    #[error("{path}: changed while it was read ({what}); try again when nothing writes to it")]
    Changed {
        /// The file or folder.
        path: String,
        /// What changed.
        what: String,
    },
}

impl DatasetError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }

    pub(super) fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.display().to_string(), source }
    }

    pub(super) fn damaged(path: &str, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub(super) fn unsupported(path: &str, what: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), what: what.into() }
    }
}

/// What to do when a write fails for this cause.
fn write_cure(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space there, or choose a folder on another disk"
        }
        io::ErrorKind::FileTooLarge => {
            "raise the limit on file sizes (`ulimit -f`), or choose a file system without one"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "a part of the path is a file: choose a path that leads through folders only"
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "choose a folder that this user may write to"
        }
        _ => "check the disk, or choose another folder",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_errors_say_what_to_do() {
        let check = |errno: i32, cure: &str| {
            let source = io::Error::from_raw_os_error(errno);
            let text = DatasetError::write(Path::new("out/train.arrow"), source).to_string();
            assert!(text.starts_with("cannot write out/train.arrow: "), "{text}");
            assert!(text.contains(cure), "{text}");
        };
        check(rustix::io::Errno::NOSPC.raw_os_error(), "free some space");
        check(rustix::io::Errno::FBIG.raw_os_error(), "ulimit -f");
        check(rustix::io::Errno::NOTDIR.raw_os_error(), "a part of the path is a file");
        check(rustix::io::Errno::ROFS.raw_os_error(), "may write to");
        check(rustix::io::Errno::IO.raw_os_error(), "check the disk");
    }
}
