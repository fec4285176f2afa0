//! The two passes of packing a split: over checksums, and over the file.
//!
//! Samples are read (and converted, where the split does that) by several threads, a block at a
//! time; what depends on their order is done in order.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::sync::Arc;

use ::arrow_schema::{ArrowError, Schema};
use arrow_array::builder::BinaryBuilder;
use arrow_array::{
    ArrayRef, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch,
    UInt32Array,
};
use arrow_buffer::Buffer;
use arrow_ipc::writer::FileWriter;

use super::arrow_schema::{self, PackedMeta};
use super::digest::{self, ContentHasher};
use super::{DatasetError, ImageKind, Label, LabelKind, Sample, Split, idx};
use crate::limits;

/// Record batches are about this large, in bytes: few enough for a small footer, small enough to
/// be built in memory.
const BATCH_BYTES: usize = 32 * 1024 * 1024;

/// Samples that the threads share before results are put in order.
const BLOCK_SAMPLES: u64 = BLOCK_STEP as u64;
const BLOCK_STEP: usize = 512;

/// Where samples come from, for the metadata.
#[derive(Debug)]
pub(super) struct Origin<'a> {
    pub(super) split: &'a str,
    pub(super) source: &'a str,
    /// Overrides the split's own count.
    pub(super) n_classes: Option<u32>,
}

/// What the first pass found of a sample.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    checksum: u32,
    /// Of its image.
    n_bytes: usize,
}

/// Buffers of a thread.
#[derive(Debug, Default)]
struct Buffers {
    file: Vec<u8>,
    pixels: Vec<u8>,
}

/// Checks every sample; gives the metadata, and what each sample is.
pub(super) fn first_pass(
    samples: &dyn Split,
    origin: &Origin<'_>,
    n_threads: usize,
    report: &mut impl FnMut(u64),
) -> Result<(PackedMeta, Vec<Entry>), DatasetError> {
    let info = samples.info();
    if let ImageKind::Raw { height, width, channels } = info.images {
        idx::check_shape([height, width, channels], origin.source)?;
    }
    let label_kind = match (info.label_kind, origin.n_classes) {
        (LabelKind::Class { .. }, Some(n_classes)) => LabelKind::Class { n_classes },
        (kind, _) => kind,
    };
    arrow_schema::check_class_names(label_kind, &info.class_names)
        .map_err(|what| DatasetError::unsupported(origin.source, what))?;
    if info.n_samples == 0 {
        return Err(DatasetError::Empty { path: origin.source.to_owned() });
    }
    let mut hash = ContentHasher::new(info.images, label_kind);
    let mut entries = Vec::new();
    let look = |sample_idx: u64, buffers: &mut Buffers| {
        let sample = samples.sample(sample_idx, &mut buffers.file)?;
        check_sample(&sample, sample_idx, info.images, label_kind, origin.source)?;
        let image = digest::image_bytes(&sample, &mut buffers.pixels);
        let checksum = super::sample_checksum(image, sample.label);
        // A new checksum would make a damaged sample look whole.
        if samples.checksum(sample_idx).is_some_and(|stored| stored != checksum) {
            let what = format!("sample {sample_idx} does not match its stored checksum");
            return Err(DatasetError::damaged(origin.source, what));
        }
        Ok(Entry { checksum, n_bytes: image.len() })
    };
    for start in (0..info.n_samples).step_by(BLOCK_STEP) {
        let end = (start + BLOCK_SAMPLES).min(info.n_samples);
        let found = in_threads(start..end, n_threads, look)?;
        for (sample_idx, entry) in (start..end).zip(&found) {
            hash.add(entry.checksum, samples.label(sample_idx)?);
            report(sample_idx + 1);
        }
        entries.extend(found);
    }
    let meta = PackedMeta {
        images: info.images,
        n_samples: info.n_samples,
        label_kind,
        class_names: info.class_names.clone(),
        fingerprint: hash.finish(),
        split: origin.split.to_owned(),
        source: origin.source.to_owned(),
    };
    Ok((meta, entries))
}

/// Does `work` on every sample, in threads; gives the results in order, or the first error.
fn in_threads<T: Send>(
    sample_idxs: std::ops::Range<u64>,
    n_threads: usize,
    work: impl Fn(u64, &mut Buffers) -> Result<T, DatasetError> + Sync,
) -> Result<Vec<T>, DatasetError> {
    let n_cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let n_threads = if n_threads == 0 { n_cores() } else { n_threads } as u64;
    let n_samples = sample_idxs.end - sample_idxs.start;
    let per_thread = n_samples.div_ceil(n_threads).max(1);
    let part = |start: u64| {
        let mut buffers = Buffers::default();
        let end = (start + per_thread).min(sample_idxs.end);
        (start..end).map(|sample_idx| work(sample_idx, &mut buffers)).collect::<Result<Vec<_>, _>>()
    };
    let starts = (0..n_threads).map(|thread| sample_idxs.start + thread * per_thread);
    let starts: Vec<u64> = starts.take_while(|start| *start < sample_idxs.end).collect();
    if let [start] = starts[..] {
        return part(start);
    }
    std::thread::scope(|scope| {
        let part = &part;
        let threads: Vec<_> =
            starts.into_iter().map(|start| scope.spawn(move || part(start))).collect();
        let mut all = Vec::new();
        for thread in threads {
            let found = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            all.extend(found?);
        }
        Ok(all)
    })
}

/// Checks that a sample is as its split says: the packed file has one kind of images and labels.
fn check_sample(
    sample: &Sample<'_>,
    sample_idx: u64,
    images: ImageKind,
    label_kind: LabelKind,
    source: &str,
) -> Result<(), DatasetError> {
    let refuse = |what: String| DatasetError::unsupported(source, what);
    match (sample.raw(), images) {
        (Some(image), ImageKind::Raw { height, width, channels }) => {
            let shape = [height, width, channels];
            let (super::Pixels::Hwc(bytes) | super::Pixels::Chw(bytes)) = image.pixels;
            let own_shape = [image.height, image.width, image.channels];
            if own_shape != shape || bytes.len() != shape.iter().product::<usize>() {
                return Err(refuse(format!(
                    "sample {sample_idx} has shape {own_shape:?}, but the others {shape:?}; crop \
                     or resize the images to one shape"
                )));
            }
        }
        (None, ImageKind::Encoded { .. }) => {}
        _ => {
            let what = "is not of the kind that its split says: pixels, or an image file";
            return Err(refuse(format!("sample {sample_idx} {what}")));
        }
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
        _ => Err(refuse(format!("sample {sample_idx} has another kind of label than the others"))),
    }
}

/// Writes schema, record batches and footer; gives the file back.
pub(super) fn second_pass(
    samples: &dyn Split,
    meta: &PackedMeta,
    entries: &[Entry],
    dest: &Path,
    file: File,
    n_threads: usize,
    report: &mut impl FnMut(u64),
) -> Result<File, DatasetError> {
    let fail = |cause| write_error(dest, cause);
    let schema = Arc::new(meta.to_schema(&dest.display().to_string())?);
    let mut writer = FileWriter::try_new(BufWriter::new(file), &schema).map_err(fail)?;
    let (mut first_idx, mut rest) = (0, entries);
    while !rest.is_empty() {
        let (batch, after) = rest.split_at(rows_of_batch(rest));
        rest = after;
        let batch_read = read_batch(samples, meta, first_idx, batch, n_threads)?;
        let record = record_batch(samples, meta, &schema, first_idx, batch_read, batch, dest)?;
        writer.write(&record).map_err(fail)?;
        first_idx += batch.len() as u64;
        report(meta.n_samples + first_idx);
    }
    writer.finish().map_err(fail)?;
    let buffered = writer.into_inner().map_err(fail)?;
    buffered.into_inner().map_err(|cause| DatasetError::write(dest, cause.into_error()))
}

/// How many of the next samples make a batch.
fn rows_of_batch(entries: &[Entry]) -> usize {
    let mut n_bytes = 0;
    let fits = |entry: &&Entry| {
        n_bytes += entry.n_bytes;
        n_bytes <= BATCH_BYTES
    };
    entries.iter().take_while(fits).count().max(1)
}

/// The images of a batch, which must be those of the first pass.
fn read_batch(
    samples: &dyn Split,
    meta: &PackedMeta,
    first_idx: u64,
    entries: &[Entry],
    n_threads: usize,
) -> Result<Vec<Vec<u8>>, DatasetError> {
    let read = |sample_idx: u64, buffers: &mut Buffers| {
        let sample = samples.sample(sample_idx, &mut buffers.file)?;
        let image = digest::image_bytes(&sample, &mut buffers.pixels);
        let row = usize::try_from(sample_idx - first_idx).expect("a row of the batch");
        if super::sample_checksum(image, sample.label) != entries[row].checksum {
            let (path, what) = (meta.source.clone(), format!("sample {sample_idx}"));
            return Err(DatasetError::Changed { path, what });
        }
        if image.len() as u64 > limits::ENCODED_BYTES_MAX {
            let what = format!("sample {sample_idx} has {} bytes", image.len());
            return Err(DatasetError::unsupported(&meta.source, what));
        }
        Ok(image.to_vec())
    };
    in_threads(first_idx..first_idx + entries.len() as u64, n_threads, read)
}

/// One record batch.
fn record_batch(
    samples: &dyn Split,
    meta: &PackedMeta,
    schema: &Arc<Schema>,
    first_idx: u64,
    read: Vec<Vec<u8>>,
    entries: &[Entry],
    dest: &Path,
) -> Result<RecordBatch, DatasetError> {
    let fail = |cause| write_error(dest, cause);
    let images: ArrayRef = if let Some(image_bytes) = meta.image_bytes() {
        let image_bytes = i32::try_from(image_bytes)
            .map_err(|_| DatasetError::unsupported(&meta.source, "images of more than 2 GiB"))?;
        let pixels = Buffer::from_vec(read.concat());
        Arc::new(FixedSizeBinaryArray::try_new(image_bytes, pixels, None).map_err(fail)?)
    } else {
        let mut builder = BinaryBuilder::new();
        for image in &read {
            builder.append_value(image);
        }
        Arc::new(builder.finish())
    };
    let (mut classes, mut vectors) = (Vec::new(), Vec::new());
    for sample_idx in first_idx..first_idx + entries.len() as u64 {
        match samples.label(sample_idx)? {
            Label::Class(class) => classes.push(class),
            Label::Vector(values) => vectors.extend_from_slice(values),
        }
    }
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
    let checksums: Vec<u32> = entries.iter().map(|entry| entry.checksum).collect();
    let columns: Vec<ArrayRef> = vec![images, labels, Arc::new(UInt32Array::from(checksums))];
    RecordBatch::try_new(Arc::clone(schema), columns).map_err(fail)
}

fn write_error(dest: &Path, cause: ArrowError) -> DatasetError {
    match cause {
        ArrowError::IoError(_, cause) => DatasetError::write(dest, cause),
        other => DatasetError::write(dest, io::Error::other(other)),
    }
}
