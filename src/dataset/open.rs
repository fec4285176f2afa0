//! Finds out what is at a path, and opens a split of it.
//!
//! A folder is looked through for the usual names; a file is known by its first bytes, and where
//! those tell nothing (CIFAR) by its name or length. Formats themselves are not known here.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::arrow::{self, ArrowSplit};
use super::cifar::{self, CifarSplit};
use super::folder::{FolderSplit, has_class_folders};
use super::huggingface::{self, HfFiles, HfSplit};
use super::idx::{self, IdxSplit};
use super::webdataset::{self, WebSplit};
use super::{DatasetError, Split, tar};
use crate::limits;

/// Splits that have usual names, in the order in which they are listed.
const SPLITS: [&str; 6] = ["train", "val", "valid", "validation", "dev", "test"];

/// Opens a split of the dataset at `path`: a folder, in which the split's files are found by their
/// usual names, or the split's own file (`split` then only says what it is used as). Compressed
/// files are unpacked into `cache_dir`, once.
///
/// # Errors
/// Nothing usable is at the path, or a file is damaged; the message says what was looked for.
pub fn open_split(
    path: &Path,
    split: &str,
    cache_dir: &Path,
) -> Result<Arc<dyn Split>, DatasetError> {
    Ok(match locate(path, split)? {
        Found::Arrow(file) => Arc::new(ArrowSplit::open(&file)?),
        Found::Idx(images) => Arc::new(IdxSplit::open(&images, cache_dir)?),
        Found::Cifar(files) => Arc::new(CifarSplit::open(&files)?),
        Found::Hf(files) => Arc::new(HfSplit::open(&files)?),
        Found::Web(shards) => Arc::new(WebSplit::open(&shards)?),
        Found::Folder(root) => Arc::new(FolderSplit::open(&root, cache_dir)?),
    })
}

/// As [`open_split`], but a packed file's labels may be out of range: the samples say so.
///
/// # Errors
/// As [`open_split`].
pub(super) fn open_for_verify(
    path: &Path,
    split: &str,
    cache_dir: &Path,
) -> Result<Arc<dyn Split>, DatasetError> {
    match locate(path, split)? {
        Found::Arrow(file) => Ok(Arc::new(ArrowSplit::open_structure(&file)?)),
        _ => open_split(path, split, cache_dir),
    }
}

/// The splits that the dataset at `path` has: those of the usual names first (train, val, valid,
/// validation, dev, test), then others by name. A file, and a folder of class folders, has one.
///
/// # Errors
/// Nothing is at the path, or nothing that is a dataset.
pub fn list_splits(path: &Path) -> Result<Vec<String>, DatasetError> {
    if is_folder(path)? {
        let mut splits = splits_of_folder(path)?;
        if splits.is_empty() && whole_folder(path)?.is_some() {
            splits.push("train".to_owned());
        }
        if splits.is_empty() {
            return Err(no_split(path, "train"));
        }
        return Ok(splits);
    }
    locate_file(path)?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let stem = name.strip_suffix(".arrow").filter(|stem| check_split_name(stem).is_ok());
    let split = match (cifar::split_of(name), stem) {
        (Some(split), _) => split,
        (None, Some(stem)) => stem,
        (None, None) if webdataset::is_tar_name(name) => {
            webdataset::split_of(name).unwrap_or("train")
        }
        (None, None) if name.contains("t10k") || name.contains("test") => "test",
        (None, None) => "train",
    };
    Ok(vec![split.to_owned()])
}

/// Checks that a split's name can be part of a file's name.
///
/// # Errors
/// It is empty, too long, or has characters that a file name should not have.
pub(super) fn check_split_name(split: &str) -> Result<(), DatasetError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let starts_well = split.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if starts_well && split.len() <= limits::NAME_BYTES_MAX && split.bytes().all(is_plain) {
        return Ok(());
    }
    let shown = split.chars().take(limits::QUOTE_CHARS_MAX).collect::<String>();
    Err(DatasetError::SplitName { split: shown.escape_debug().to_string() })
}

/// What a split is made of.
#[derive(Debug)]
enum Found {
    Arrow(PathBuf),
    /// The images file.
    Idx(PathBuf),
    Cifar(cifar::Files),
    Hf(HfFiles),
    /// Tar archives.
    Web(Vec<PathBuf>),
    /// A folder of class folders.
    Folder(PathBuf),
}

fn locate(path: &Path, split: &str) -> Result<Found, DatasetError> {
    check_split_name(split)?;
    if !is_folder(path)? {
        return locate_file(path);
    }
    match locate_in_folder(path, split)? {
        Some(found) => Ok(found),
        // A folder of one split that has no name of its own is whatever it is used as.
        None if !has_named_splits(path)? => {
            whole_folder(path)?.ok_or_else(|| no_split(path, split))
        }
        None => Err(no_split(path, split)),
    }
}

fn is_folder(path: &Path) -> Result<bool, DatasetError> {
    match fs::metadata(path) {
        Ok(meta) => Ok(meta.is_dir()),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Err(DatasetError::NotFound {
            path: path.display().to_string(),
            looked_for: "a packed .arrow file, an IDX images file (may be .gz), a CIFAR .bin \
                         file, a folder of these, or a folder of class folders of images"
                .to_owned(),
        }),
        Err(cause) => Err(DatasetError::io(path, cause)),
    }
}

fn locate_in_folder(folder: &Path, split: &str) -> Result<Option<Found>, DatasetError> {
    let packed = folder.join(format!("{split}.arrow"));
    if packed.exists() {
        return Ok(Some(Found::Arrow(packed)));
    }
    if let Some(images) = idx::find_images(folder, split) {
        return Ok(Some(Found::Idx(images)));
    }
    if let Some(files) = cifar::find_in_folder(folder, split)? {
        return Ok(Some(Found::Cifar(files)));
    }
    if let Some(files) = huggingface::find_in_folder(folder, split)? {
        return Ok(Some(Found::Hf(files)));
    }
    let shards = webdataset::shards_in_folder(folder, split);
    if !shards.is_empty() {
        return Ok(Some(Found::Web(shards)));
    }
    let of_split = folder.join(split);
    if let Some(found) = whole_folder(&of_split)? {
        return Ok(Some(found));
    }
    Ok(None)
}

/// A folder that is one split, whatever it is used as: class folders, shards of one split, or what
/// `save_to_disk` wrote of one.
fn whole_folder(folder: &Path) -> Result<Option<Found>, DatasetError> {
    if let Some(files) = huggingface::find_whole(folder)? {
        return Ok(Some(Found::Hf(files)));
    }
    let shards = webdataset::whole_folder(folder);
    if !shards.is_empty() {
        return Ok(Some(Found::Web(shards)));
    }
    Ok(has_class_folders(folder).then(|| Found::Folder(folder.to_owned())))
}

fn locate_file(path: &Path) -> Result<Found, DatasetError> {
    let first = idx::first_bytes(path)?;
    if arrow::is_arrow(&first) {
        return Ok(Found::Arrow(path.to_owned()));
    }
    // Before IDX: a CIFAR file may begin with any bytes, the magic number of IDX among them.
    if let Some(files) = cifar::by_name(path)? {
        return Ok(Found::Cifar(files));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_gz = first.starts_with(&[0x1f, 0x8b]);
    if is_gz || first.starts_with(&[0, 0, 8]) || name.contains("idx") {
        return Ok(Found::Idx(path.to_owned()));
    }
    if webdataset::is_tar_name(name) || tar::is_tar(&first) {
        return Ok(Found::Web(vec![path.to_owned()]));
    }
    let extension = path.extension().and_then(|extension| extension.to_str());
    if extension == Some("arrow") {
        return Ok(Found::Arrow(path.to_owned())); // Damaged; opening it says how.
    }
    let len = fs::metadata(path).map_err(|cause| DatasetError::io(path, cause))?.len();
    if extension == Some("bin")
        && let Some(files) = cifar::by_length(path, len)
    {
        return Ok(Found::Cifar(files));
    }
    Err(DatasetError::UnknownFormat { path: path.display().to_string(), found: describe(&first) })
}

/// What a file's first bytes look like, in words.
fn describe(first: &[u8]) -> String {
    if first.is_empty() {
        return "it is empty".to_owned();
    }
    let known: [(&[u8], &str); 6] = [
        (&[0xff; 4], "it looks like an Arrow stream; write the Arrow *file* format"),
        (b"\x89PNG", "it is a PNG image"),
        (&[0xff, 0xd8], "it is a JPEG image"),
        (b"PK\x03\x04", "it is a zip archive; unpack it"),
        (b"PAR1", "it is a Parquet file"),
        (b"\x80", "it looks like a Python pickle; get the binary version of the set"),
    ];
    if let Some((_, text)) = known.iter().find(|(magic, _)| first.starts_with(magic)) {
        return (*text).to_owned();
    }
    let bytes: Vec<String> = first.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("its first bytes are {}", bytes.join(" "))
}

fn no_split(folder: &Path, split: &str) -> DatasetError {
    let splits = splits_of_folder(folder).unwrap_or_default();
    let has = if splits.is_empty() {
        "no dataset is in it".to_owned()
    } else {
        format!("it has {}", splits.join(", "))
    };
    let mut looked_for = vec![format!("{split}.arrow")];
    looked_for.extend(idx::looked_for(split));
    looked_for.extend(cifar::looked_for(split).map(str::to_owned));
    looked_for.push(format!("a folder {split} of class folders of images"));
    DatasetError::NoSplit {
        path: folder.display().to_string(),
        split: split.to_owned(),
        has,
        looked_for: looked_for.join(", "),
    }
}

/// Whether the folder's files or sub-folders say which split they are.
fn has_named_splits(folder: &Path) -> Result<bool, DatasetError> {
    Ok(!splits_of_folder(folder)?.is_empty())
}

/// The splits in a folder: those that have files by their usual names, and all packed ones.
fn splits_of_folder(folder: &Path) -> Result<Vec<String>, DatasetError> {
    let fail = |cause| DatasetError::io(folder, cause);
    let mut splits = Vec::new();
    for split in SPLITS {
        if locate_in_folder(folder, split)?.is_some() {
            splits.push(split.to_owned());
        }
    }
    let mut packed: Vec<String> = huggingface::splits_in_folder(folder);
    packed.retain(|split| !splits.contains(split));
    for entry in fs::read_dir(folder).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".arrow"));
        if let Some(stem) = stem
            && check_split_name(stem).is_ok()
            && !splits.iter().chain(&packed).any(|split| split == stem)
            && !folder.join("dataset_info.json").exists()
        {
            packed.push(stem.to_owned());
        }
    }
    packed.sort();
    splits.append(&mut packed);
    Ok(splits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_splits() {
        for split in ["train", "test", "valid-2", "a.b_c", "0"] {
            check_split_name(split).unwrap();
        }
        for split in ["", ".", "..", "a/b", "-x", "a b", "ü", "a\0", &"x".repeat(129)] {
            let error = check_split_name(split).unwrap_err().to_string();
            assert!(error.contains("cannot be the name of a split: use 1 to 128"), "{error}");
        }
    }

    #[test]
    fn unknown_files_are_described() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str, content: &[u8], expected: &str| {
            let path = dir.path().join(name);
            fs::write(&path, content).unwrap();
            let error = open_split(&path, "train", dir.path()).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(expected), "{error}");
            assert!(error.contains("give a packed .arrow file"), "{error}");
            let error = list_splits(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("empty", b"", "it is empty");
        check("picture.png", b"\x89PNG\r\n", "it is a PNG image");
        check("hello.txt", b"hello world", "its first bytes are 68 65 6c 6c 6f 20 77 6f");
        check("short.bin", &[5; 3072], "its first bytes are 05 05");
        check("stream", &[0xff; 16], "Arrow stream");
    }

    #[test]
    fn missing_paths_say_what_was_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error = open_split(&missing, "train", dir.path()).unwrap_err().to_string();
        assert!(error.contains("missing: no such file or folder; looked for a packed"), "{error}");
        let error = open_split(dir.path(), "train", dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("no split 'train' here (no dataset is in it); looked for train.arrow, ")
                && error.contains("train-images-idx3-ubyte[.gz], data_batch_1.bin, train.bin"),
            "{error}"
        );
        fs::write(dir.path().join("test_batch.bin"), vec![1; 3073]).unwrap();
        let error = open_split(dir.path(), "dev", dir.path()).unwrap_err().to_string();
        assert!(error.contains("(it has test); looked for dev.arrow"), "{error}");
        let error = open_split(dir.path(), "../x", dir.path()).unwrap_err().to_string();
        assert!(error.contains("'../x' cannot be the name of a split"), "{error}");
    }

    #[test]
    fn splits_are_listed_in_a_fixed_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["valid.arrow", "dev.arrow", "test_batch.bin", "data_batch_1.bin", "x.txt"] {
            fs::write(dir.path().join(name), vec![1; 3073]).unwrap();
        }
        fs::write(dir.path().join(".train.arrow.tmp"), b"").unwrap();
        assert_eq!(list_splits(dir.path()).unwrap(), ["train", "valid", "dev", "test"]);
        assert_eq!(list_splits(&dir.path().join("test_batch.bin")).unwrap(), ["test"]);
        assert_eq!(list_splits(&dir.path().join("dev.arrow")).unwrap(), ["dev"]);
    }
}
