//! A folder of class folders of image files, as torchvision's `ImageFolder` reads it.
//!
//! Classes are the sub-folders in the order of their names; a class has every image file below it,
//! in the order of (folder, name), compared byte by byte. Files are not mapped (a dataset has more
//! of them than a process may have maps) but read one by one, each compared with what the index
//! says of it: one that was changed since is an error, not another image.
//!
//! *Not here*: finding the files, and the index on disk (index.rs).

mod index;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

use super::{Content, DatasetError, ImageKind, Label, LabelKind, Sample, Split, SplitInfo, digest};
use crate::limits;
pub(super) use index::has_class_folders;
use index::{Index, Stamp};

/// A folder of class folders.
#[derive(Debug)]
pub(super) struct FolderSplit {
    root: PathBuf,
    index: Index,
    info: SplitInfo,
}

impl FolderSplit {
    /// Indexes the folder at `root`, or takes the index that is kept in `cache_dir` if nothing has
    /// changed since.
    ///
    /// # Errors
    /// No class folders, a class without images, a file of a format that is not read, or a folder
    /// that cannot be read.
    pub(super) fn open(root: &Path, cache_dir: &Path) -> Result<Self, DatasetError> {
        let index = Index::load_or_scan(root, cache_dir)?;
        let path = || root.display().to_string();
        let n_classes = u32::try_from(index.classes.len()).unwrap_or(u32::MAX);
        if index.files.is_empty() {
            return Err(DatasetError::Empty { path: path() });
        }
        if n_classes > limits::CLASSES_MAX {
            let what = format!("{n_classes} classes; at most {} are possible", limits::CLASSES_MAX);
            return Err(DatasetError::unsupported(&path(), what));
        }
        let info = SplitInfo {
            format: "image-folder",
            n_samples: index.files.len() as u64,
            images: ImageKind::Encoded { turns_by_exif: false },
            label_kind: LabelKind::Class { n_classes },
            class_names: index.classes.clone(),
            fingerprint: fingerprint(&index),
            mapped_bytes: 0,
        };
        Ok(Self { root: root.to_owned(), index, info })
    }

    fn position(&self, sample_idx: u64) -> usize {
        assert!(sample_idx < self.info.n_samples, "sample {sample_idx} is beyond the split");
        usize::try_from(sample_idx).expect("below the length of a list in memory")
    }
}

impl Split for FolderSplit {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let label = self.label(sample_idx)?;
        let file_idx = self.position(sample_idx);
        let path = self.root.join(self.index.path_of(file_idx));
        read_file(&path, self.index.files[file_idx].stamp, buffer)?;
        Ok(Sample { content: Content::Encoded(buffer), label })
    }

    fn will_need(&self, sample_idx: u64) {
        let path = self.root.join(self.index.path_of(self.position(sample_idx)));
        if let Ok(file) = open_file(&path) {
            // A hint: whoever reads the file will tell what is wrong with it.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed);
        }
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        Ok(Label::Class(i64::from(self.index.class_of(self.position(sample_idx)))))
    }

    fn sample_name(&self, sample_idx: u64) -> String {
        self.root.join(self.index.path_of(self.position(sample_idx))).display().to_string()
    }
}

/// Opens a file; a pipe in its place must not keep this thread waiting for a writer.
fn open_file(path: &Path) -> std::io::Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("a small constant");
    File::options().read(true).custom_flags(flags).open(path)
}

/// Reads a file that must be as the index says.
fn read_file(path: &Path, stamp: Stamp, buffer: &mut Vec<u8>) -> Result<(), DatasetError> {
    let stale = |what: String| DatasetError::Stale { path: path.display().to_string(), what };
    let mut file = match open_file(path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            return Err(stale("it is gone".to_owned()));
        }
        Err(cause) => return Err(DatasetError::io(path, cause)),
    };
    let fail = |cause| DatasetError::io(path, cause);
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(stale("it is no regular file any more".to_owned()));
    }
    let now = Stamp { bytes: meta.size(), mtime_ns: index::mtime_ns(&meta) };
    if now != stamp {
        return Err(stale(if now.bytes == stamp.bytes {
            "another modification time".to_owned()
        } else {
            format!("it had {} bytes, and has {} now", stamp.bytes, now.bytes)
        }));
    }
    if now.bytes > limits::ENCODED_BYTES_MAX {
        let what = format!(
            "{} bytes; an image file may have {}: make it smaller, or remove it",
            now.bytes,
            limits::ENCODED_BYTES_MAX
        );
        return Err(DatasetError::unsupported(&path.display().to_string(), what));
    }
    let n_bytes = usize::try_from(now.bytes).expect("below ENCODED_BYTES_MAX");
    buffer.resize(n_bytes, 0);
    file.read_exact(buffer).map_err(fail)
}

/// Of every file's relative path, size and time: a copy that keeps times is the same dataset.
fn fingerprint(index: &Index) -> super::Fingerprint {
    let mut hash = Sha256::new();
    hash.update("image-folder");
    let text = |hash: &mut Sha256, text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    for class in &index.classes {
        text(&mut hash, class);
    }
    for file_idx in 0..index.files.len() {
        let (folder, name) = index.parts_of(file_idx);
        text(&mut hash, folder);
        text(&mut hash, name);
        let Stamp { bytes, mtime_ns } = index.files[file_idx].stamp;
        hash.update(bytes.to_le_bytes());
        hash.update(mtime_ns.to_le_bytes());
    }
    digest::fingerprint(hash)
}
