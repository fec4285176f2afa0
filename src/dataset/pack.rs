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
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::arrow_schema::{ArrowError, Schema};
use arrow_array::{
    ArrayRef, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch,
    UInt32Array,
};
use arrow_buffer::Buffer;
use arrow_ipc::writer::FileWriter;

use super::arrow_schema::{self, PackedMeta};
use super::digest::{self, ContentHasher};
use super::{DatasetError, Fingerprint, ImageKind, Label, LabelKind, Sample, Split, idx, open};

/// Record batches are about this large, in bytes: few enough for a small footer, small enough to
/// be built in memory.
const BATCH_BYTES: usize = 32 * 1024 * 1024;

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
    let wanted = if options.splits.is_empty() { &has } else { &options.splits };
    let mut opened: Vec<(&str, Arc<dyn Split>)> = Vec::new();
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
            opened.push((split, open::open_split(source, split, &options.cache_dir)?));
        }
    }
    let n_classes = common_n_classes(source, &has, &opened, &options.cache_dir);

    let folder = DestFolder::prepare(dest_dir)?;
    let mut written = Vec::new();
    for (split, samples) in &opened {
        let dest = dest_dir.join(format!("{split}.arrow"));
        refuse_existing(&dest, options.force)?;
        let header = Header { split, source: source.display().to_string(), n_classes };
        written.push(write_temp(&folder, samples.as_ref(), &header, dest, progress)?);
    }
    let packed = written.into_iter().map(Temp::publish).collect::<Result<Vec<_>, _>>()?;
    folder.sync()?;
    Ok(packed)
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
    let packed = write_temp(&folder, samples, &header, dest.to_owned(), progress)?.publish()?;
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
    opened: &[(&str, Arc<dyn Split>)],
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
    let (meta, checksums) = first_pass(samples, header, &mut report)?;
    temp.packed.fingerprint = meta.fingerprint.clone();
    let dest = temp.packed.path.clone();
    let file = second_pass(samples, &meta, &checksums, &dest, file, &mut report)?;
    let fail = |cause| DatasetError::write(&dest, cause);
    file.sync_all().map_err(fail)?;
    temp.packed.file_bytes = file.metadata().map_err(fail)?.len();
    Ok(temp)
}

/// Checks every sample; gives the metadata and the checksums.
fn first_pass(
    samples: &dyn Split,
    header: &Header<'_>,
    report: &mut impl FnMut(u64),
) -> Result<(PackedMeta, Vec<u32>), DatasetError> {
    let info = samples.info();
    let ImageKind::Raw { height, width, channels } = info.images else {
        return Err(DatasetError::unsupported(&header.source, "encoded images are not packed yet"));
    };
    let shape = [height, width, channels];
    idx::check_shape(shape, &header.source)?;
    let label_kind = match (info.label_kind, header.n_classes) {
        (LabelKind::Class { .. }, Some(n_classes)) => LabelKind::Class { n_classes },
        (kind, _) => kind,
    };
    arrow_schema::check_class_names(label_kind, &info.class_names)
        .map_err(|what| DatasetError::unsupported(&header.source, what))?;
    if info.n_samples == 0 {
        return Err(DatasetError::Empty { path: header.source.clone() });
    }
    let mut hash = ContentHasher::new(info.images, label_kind);
    let mut checksums = Vec::new();
    let (mut scratch, mut buffer) = (Vec::new(), Vec::new());
    for sample_idx in 0..info.n_samples {
        let sample = samples.sample(sample_idx, &mut buffer)?;
        check_sample(&sample, sample_idx, shape, label_kind, &header.source)?;
        let checksum =
            super::sample_checksum(digest::image_bytes(&sample, &mut scratch), sample.label);
        // A new checksum would make a damaged sample look whole.
        if samples.checksum(sample_idx).is_some_and(|stored| stored != checksum) {
            let what = format!("sample {sample_idx} does not match its stored checksum");
            return Err(DatasetError::damaged(&header.source, what));
        }
        hash.add(checksum, sample.label);
        checksums.push(checksum);
        report(sample_idx + 1);
    }
    let meta = PackedMeta {
        shape,
        n_samples: info.n_samples,
        label_kind,
        class_names: info.class_names.clone(),
        fingerprint: hash.finish(),
        split: header.split.to_owned(),
        source: header.source.clone(),
    };
    Ok((meta, checksums))
}

/// Checks that a sample is as its split says: the packed file has one shape and one kind of labels.
fn check_sample(
    sample: &Sample<'_>,
    sample_idx: u64,
    shape: [usize; 3],
    label_kind: LabelKind,
    source: &str,
) -> Result<(), DatasetError> {
    let Some(image) = sample.raw() else {
        let what = format!("sample {sample_idx} is encoded, but the others are pixels");
        return Err(DatasetError::unsupported(source, what));
    };
    let (super::Pixels::Hwc(bytes) | super::Pixels::Chw(bytes)) = image.pixels;
    let own_shape = [image.height, image.width, image.channels];
    if own_shape != shape || bytes.len() != shape.iter().product::<usize>() {
        return Err(DatasetError::unsupported(
            source,
            format!(
                "sample {sample_idx} has shape {own_shape:?}, but the others {shape:?}; crop or \
                 resize the images to one shape"
            ),
        ));
    }
    match (sample.label, label_kind) {
        (Label::Class(class), LabelKind::Class { n_classes }) => {
            if (0..i64::from(n_classes)).contains(&class) {
                return Ok(());
            }
            let (path, cure) = (source.to_owned(), "correct the source's labels");
            Err(DatasetError::LabelRange { path, sample_idx, label: class, n_classes, cure })
        }
        (Label::Vector(values), LabelKind::Vector { len }) if values.len() == len as usize => {
            Ok(())
        }
        _ => Err(DatasetError::unsupported(
            source,
            format!("sample {sample_idx} has another kind of label than the others"),
        )),
    }
}

/// Writes schema, record batches and footer; gives the file back.
fn second_pass(
    samples: &dyn Split,
    meta: &PackedMeta,
    checksums: &[u32],
    dest: &Path,
    file: File,
    report: &mut impl FnMut(u64),
) -> Result<File, DatasetError> {
    let fail = |cause| write_error(dest, cause);
    let schema = Arc::new(meta.to_schema(&dest.display().to_string())?);
    let mut writer = FileWriter::try_new(BufWriter::new(file), &schema).map_err(fail)?;
    let rows_per_batch = (BATCH_BYTES / meta.image_bytes()).max(1);
    let mut first_idx = 0;
    for checksums in checksums.chunks(rows_per_batch) {
        let batch = record_batch(samples, meta, &schema, first_idx, checksums, dest)?;
        writer.write(&batch).map_err(fail)?;
        first_idx += checksums.len() as u64;
        report(meta.n_samples + first_idx);
    }
    writer.finish().map_err(fail)?;
    let buffered = writer.into_inner().map_err(fail)?;
    buffered.into_inner().map_err(|cause| DatasetError::write(dest, cause.into_error()))
}

/// One record batch, of as many samples as there are checksums.
fn record_batch(
    samples: &dyn Split,
    meta: &PackedMeta,
    schema: &Arc<Schema>,
    first_idx: u64,
    checksums: &[u32],
    dest: &Path,
) -> Result<RecordBatch, DatasetError> {
    let n_rows = checksums.len();
    let mut images = Vec::with_capacity(n_rows * meta.image_bytes());
    let (mut classes, mut vectors) = (Vec::new(), Vec::new());
    let (mut scratch, mut buffer) = (Vec::new(), Vec::new());
    for (sample_idx, checksum) in (first_idx..).zip(checksums) {
        let sample = samples.sample(sample_idx, &mut buffer)?;
        let pixels = digest::image_bytes(&sample, &mut scratch);
        if super::sample_checksum(pixels, sample.label) != *checksum {
            return Err(DatasetError::Changed {
                path: meta.source.clone(),
                what: format!("sample {sample_idx}"),
            });
        }
        images.extend_from_slice(pixels);
        match sample.label {
            Label::Class(class) => classes.push(class),
            Label::Vector(values) => vectors.extend_from_slice(values),
        }
    }
    let fail = |cause| write_error(dest, cause);
    let image_type = i32::try_from(meta.image_bytes())
        .map_err(|_| DatasetError::unsupported(&meta.source, "images of more than 2 GiB"))?;
    let images = FixedSizeBinaryArray::try_new(image_type, Buffer::from_vec(images), None);
    let labels: ArrayRef = match meta.label_kind {
        LabelKind::Class { .. } => Arc::new(Int64Array::from(classes)),
        LabelKind::Vector { len } => {
            let len = i32::try_from(len)
                .map_err(|_| DatasetError::unsupported(&meta.source, "label vectors too long"))?;
            let items = Arc::new(Float32Array::from(vectors));
            let item = arrow_schema::vector_item();
            Arc::new(FixedSizeListArray::try_new(item, len, items, None).map_err(fail)?)
        }
    };
    let checksums = Arc::new(UInt32Array::from(checksums.to_vec()));
    let columns: Vec<ArrayRef> = vec![Arc::new(images.map_err(fail)?), labels, checksums];
    RecordBatch::try_new(Arc::clone(schema), columns).map_err(fail)
}

fn write_error(dest: &Path, cause: ArrowError) -> DatasetError {
    match cause {
        ArrowError::IoError(_, cause) => DatasetError::write(dest, cause),
        other => DatasetError::write(dest, io::Error::other(other)),
    }
}
