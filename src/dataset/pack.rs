//! Packs a dataset into Arrow IPC files, one a split.
//!
//! Each split is read twice: once for the checksums and the fingerprint that the schema at the
//! file's beginning must hold, once to write it; a sample that differs in the second pass ends the
//! pack. All splits are written to temp files and on the disk before the first is renamed: a pack
//! that fails leaves the destination as it was.
//!
//! *Invariants*: existing files are never opened for writing; one pack at a time per folder (a
//! lock on the folder itself, which ends with its process).

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::divide::Division;
use super::pack_passes::{Origin, first_pass, second_pass};
use super::{DatasetError, Fingerprint, ImageKind, LabelKind, Split, open};

/// Samples between two reports of progress.
const PROGRESS_STEP: u64 = 256;

/// What to pack, and how.
#[derive(Clone, Debug, Default)]
pub struct PackOptions {
    /// The splits to pack; all if it is empty.
    pub splits: Vec<String>,
    /// Whether files that are there may be replaced.
    pub force: bool,
    /// Where compressed sources are unpacked.
    pub cache_dir: PathBuf,
    /// Threads that read, and convert, samples; 0: as many as there are cores.
    pub n_threads: usize,
    /// Splits the source's only split in two: `train` with this part of every class, and `val`.
    pub divide: Option<Division>,
    /// What becomes of each split before it is written.
    pub convert: Option<Convert>,
}

/// A change of a split's samples, made while they are packed.
#[derive(Clone)]
pub struct Convert(pub Arc<ConvertSplit>);

/// From a split to the one that is packed instead.
pub type ConvertSplit = dyn Fn(Arc<dyn Split>) -> Result<Arc<dyn Split>, DatasetError>;

type NamedSplit = (String, Arc<dyn Split>);

impl std::fmt::Debug for Convert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Convert")
    }
}

/// How far a pack or a verification is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The split being worked on.
    pub split: &'a str,
    /// Samples done; packing reads each sample twice, so it counts each twice.
    pub done: u64,
    /// What `done` goes up to.
    pub total: u64,
}

/// A packed split.
#[derive(Clone, Debug)]
pub struct PackedSplit {
    /// Its name.
    pub split: String,
    /// The file.
    pub path: PathBuf,
    /// Samples in it.
    pub n_samples: u64,
    /// Its size in bytes.
    pub file_bytes: u64,
    /// Its fingerprint, as stored in it.
    pub fingerprint: Fingerprint,
}

/// Packs the splits of the dataset at `source` into `dest_dir/<split>.arrow`.
///
/// # Errors
/// The source cannot be read or is damaged, a destination file exists (without `force`), the disk
/// is full, or another pack is writing to `dest_dir`. Nothing is left behind then.
pub fn pack(
    source: &Path,
    dest_dir: &Path,
    options: &PackOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<PackedSplit>, DatasetError> {
    let has = open::list_splits(source)?;
    let mut opened = match options.divide {
        None => open_wanted(source, &has, options)?,
        Some(division) => open_divided(source, &has, options, division)?,
    };
    let n_classes = common_n_classes(source, &has, &opened, &options.cache_dir);
    if let Some(Convert(convert)) = &options.convert {
        for (_, samples) in &mut opened {
            *samples = convert(Arc::clone(samples))?;
        }
    }

    refuse_own_folder(source, dest_dir, &opened)?;
    let folder = DestFolder::prepare(dest_dir)?;
    let mut written = Vec::new();
    for (split, samples) in &opened {
        let dest = dest_dir.join(format!("{split}.arrow"));
        refuse_existing(&dest, options.force)?;
        let header = Header { split, source: source.display().to_string(), n_classes };
        written.push(write_temp(
            &folder,
            samples.as_ref(),
            &header,
            dest,
            options.n_threads,
            progress,
        )?);
    }
    let packed = written.into_iter().map(Temp::publish).collect::<Result<Vec<_>, _>>()?;
    folder.sync()?;
    Ok(packed)
}

/// The splits that are to be packed.
fn open_wanted(
    source: &Path,
    has: &[String],
    options: &PackOptions,
) -> Result<Vec<NamedSplit>, DatasetError> {
    let wanted = if options.splits.is_empty() { has } else { &options.splits };
    let mut opened: Vec<NamedSplit> = Vec::new();
    for split in wanted {
        if !has.contains(split) {
            open::check_split_name(split)?;
            return Err(DatasetError::NoSplit {
                path: source.display().to_string(),
                split: split.clone(),
                has: format!("it has {}", has.join(", ")),
                looked_for: "one of these".to_owned(),
            });
        }
        if !opened.iter().any(|(name, _)| name == split) {
            opened.push((split.clone(), open::open_split(source, split, &options.cache_dir)?));
        }
    }
    Ok(opened)
}

/// The two parts of the source's only split.
fn open_divided(
    source: &Path,
    has: &[String],
    options: &PackOptions,
    division: Division,
) -> Result<Vec<NamedSplit>, DatasetError> {
    let [only] = has else {
        let what = format!(
            "it has the splits {} already: pack them as they are, or name one folder to divide",
            has.join(", ")
        );
        return Err(DatasetError::unsupported(&source.display().to_string(), what));
    };
    let whole = open::open_split(source, only, &options.cache_dir)?;
    let [first, second] = division.of(&whole, &source.display().to_string())?;
    Ok(vec![("train".to_owned(), Arc::new(first)), ("val".to_owned(), Arc::new(second))])
}

/// Packs samples from any source into the file `dest`; `source` is stored as where they came from.
///
/// # Errors
/// As [`pack`]; or the samples are not as their [`super::SplitInfo`] says.
pub fn write_split(
    samples: &dyn Split,
    split: &str,
    source: &str,
    dest: &Path,
    force: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PackedSplit, DatasetError> {
    open::check_split_name(split)?;
    let folder = DestFolder::prepare(dest.parent().unwrap_or(Path::new("")))?;
    refuse_existing(dest, force)?;
    let header = Header { split, source: source.to_owned(), n_classes: None };
    let packed = write_temp(&folder, samples, &header, dest.to_owned(), 0, progress)?.publish()?;
    folder.sync()?;
    Ok(packed)
}

/// What a packed file says about its origin.
#[derive(Debug)]
struct Header<'a> {
    split: &'a str,
    source: String,
    /// Overrides the split's own count.
    n_classes: Option<u32>,
}

/// The largest number of classes among the source's splits: a split that lacks the last class must
/// not get fewer than the others. `None` where names or vectors fix the number.
fn common_n_classes(
    source: &Path,
    has: &[String],
    opened: &[NamedSplit],
    cache_dir: &Path,
) -> Option<u32> {
    let count = |samples: &dyn Split| match samples.info().label_kind {
        LabelKind::Class { n_classes } if samples.info().class_names.is_empty() => Some(n_classes),
        _ => None,
    };
    let mut most = None;
    for split in has {
        let known = opened.iter().find(|(name, _)| name == split);
        // A split that is not to be packed may well be damaged; it has no say then.
        let samples = match known {
            Some((_, samples)) => Some(Arc::clone(samples)),
            None => open::open_split(source, split, cache_dir).ok(),
        };
        most = most.max(samples.and_then(|samples| count(samples.as_ref())));
    }
    // Splits with names keep their own number.
    if opened.iter().all(|(_, samples)| count(samples.as_ref()).is_some()) { most } else { None }
}

/// A packed file in a folder of image files would hide them from then on.
fn refuse_own_folder(
    source: &Path,
    dest_dir: &Path,
    opened: &[NamedSplit],
) -> Result<(), DatasetError> {
    let is_encoded =
        |split: &NamedSplit| matches!(split.1.info().images, ImageKind::Encoded { .. });
    let same = fs::canonicalize(source).ok().zip(fs::canonicalize(dest_dir).ok());
    if source.is_dir() && opened.iter().any(is_encoded) && same.is_some_and(|(a, b)| a == b) {
        let what = "the packed files would hide the images in this folder: choose another DEST";
        return Err(DatasetError::unsupported(&dest_dir.display().to_string(), what));
    }
    Ok(())
}

fn refuse_existing(dest: &Path, force: bool) -> Result<(), DatasetError> {
    if dest.symlink_metadata().is_ok() && !force {
        return Err(DatasetError::Exists { path: dest.display().to_string() });
    }
    Ok(())
}

/// The folder packed into: locked, and gone again if it was made for a pack that failed.
#[derive(Debug)]
struct DestFolder {
    path: PathBuf,
    handle: File,
    is_locked: bool,
    /// Folders that were made, outermost first.
    made: Vec<PathBuf>,
}

impl DestFolder {
    fn prepare(path: &Path) -> Result<Self, DatasetError> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let fail = |cause| DatasetError::write(path, cause);
        let missing = path.ancestors().take_while(|folder| !folder.exists());
        let mut made: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        made.retain(|folder| !folder.as_os_str().is_empty());
        made.reverse();
        fs::create_dir_all(path).map_err(fail)?;
        let handle = File::open(path).map_err(fail)?;
        let is_locked = match handle.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => {
                return Err(DatasetError::Busy { path: path.display().to_string() });
            }
            // Some network file systems have no locks on folders.
            Err(TryLockError::Error(_)) => false,
        };
        Ok(Self { path: path.to_owned(), handle, is_locked, made })
    }

    /// Creates the temp file at `path`, which must not belong to another pack.
    fn create(&self, path: &Path) -> Result<File, DatasetError> {
        if self.is_locked {
            // Left by a pack that was killed: the lock says that nobody is writing it.
            let _ = fs::remove_file(path);
        }
        let file = File::options().write(true).create_new(true).open(path);
        file.map_err(|cause| match cause.kind() {
            io::ErrorKind::AlreadyExists => DatasetError::Busy { path: path.display().to_string() },
            _ => DatasetError::write(path, cause),
        })
    }

    /// Makes the renames in it durable, and keeps the folder.
    fn sync(mut self) -> Result<(), DatasetError> {
        self.made.clear();
        self.handle.sync_all().map_err(|cause| DatasetError::write(&self.path, cause))
    }
}

impl Drop for DestFolder {
    fn drop(&mut self) {
        for folder in self.made.iter().rev() {
            // Fails, rightly, where it is not empty.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// A temp file that is removed unless it is published.
#[derive(Debug)]
struct Temp {
    path: PathBuf,
    /// What it will be.
    packed: PackedSplit,
}

impl Temp {
    fn publish(mut self) -> Result<PackedSplit, DatasetError> {
        fs::rename(&self.path, &self.packed.path)
            .map_err(|cause| DatasetError::write(&self.packed.path, cause))?;
        self.path.clear();
        Ok(self.packed.clone())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes a split's temp file, and makes sure that it is on the disk.
fn write_temp(
    folder: &DestFolder,
    samples: &dyn Split,
    header: &Header<'_>,
    dest: PathBuf,
    n_threads: usize,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Temp, DatasetError> {
    let name = dest.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let path = dest.with_file_name(format!(".{name}.tmp"));
    let file = folder.create(&path)?;
    let info = samples.info();
    let n_samples = info.n_samples;
    let fingerprint = info.fingerprint.clone();
    let packed = PackedSplit {
        split: header.split.to_owned(),
        path: dest,
        n_samples,
        file_bytes: 0,
        fingerprint,
    };
    let mut temp = Temp { path, packed };

    let mut report = |done: u64| {
        if done.is_multiple_of(PROGRESS_STEP) || done >= 2 * n_samples {
            progress(Progress { split: header.split, done, total: 2 * n_samples });
        }
    };
    let Header { split, source, n_classes } = header;
    let origin = Origin { split, source, n_classes: *n_classes };
    let (meta, entries) = first_pass(samples, &origin, n_threads, &mut report)?;
    temp.packed.fingerprint = meta.fingerprint.clone();
    let dest = temp.packed.path.clone();
    let file = second_pass(samples, &meta, &entries, &dest, file, n_threads, &mut report)?;
    let fail = |cause| DatasetError::write(&dest, cause);
    file.sync_all().map_err(fail)?;
    temp.packed.file_bytes = file.metadata().map_err(fail)?.len();
    Ok(temp)
}
