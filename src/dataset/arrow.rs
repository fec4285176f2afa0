//! Packed splits: Arrow IPC files, mapped and read in place.
//!
//! ```text
//! "ARROW1" 0 0 | schema message | record batch … | end mark | footer | footer length | "ARROW1"
//! ```
//! Source: Arrow Columnar Format, "IPC File Format".
//!
//! *Invariants*: after [`ArrowSplit::open`] every byte range that a sample needs is known to lie
//! within the map, blocks are in order and apart, and labels are in range. The footer and the
//! record batches' headers are flatbuffers, verified by `arrow-ipc` before they are read; their
//! numbers are then checked here, with checked arithmetic, before they become ranges. No body is
//! read through arrow-rs, and nothing is copied.
//!
//! *Not here*: the columns and metadata (arrow_schema.rs), checksums (verify.rs).

use std::ops::Range;
use std::path::Path;

use arrow_ipc as ipc;

use super::arrow_schema::PackedMeta;
use super::map::Map;
use super::{
    Content, DatasetError, ImageKind, Label, LabelKind, Pixels, RawImage, Sample, Split, SplitInfo,
};
use crate::limits;

const MAGIC: &[u8] = b"ARROW1";

/// The magic number at the beginning, padded to 8 bytes.
const HEAD_BYTES: usize = 8;

/// Footer length and magic number at the end, in bytes.
const TAIL_BYTES: usize = 10;

/// Continuation mark and length before a message's flatbuffer, in bytes.
const MESSAGE_PREFIX_BYTES: usize = 8;

/// Where a record batch's columns begin in the map.
#[derive(Clone, Debug)]
struct Batch {
    first_idx: u64,
    n_rows: u64,
    images: Images,
    labels_at: usize,
    checksums_at: usize,
}

/// A column of images, in bytes of the map.
#[derive(Clone, Debug)]
enum Images {
    /// All of one length.
    Raw { at: usize },
    /// Of any: `n_rows + 1` offsets into the data, checked when they are read.
    Encoded { offsets_at: usize, data: Range<usize> },
}

/// A mapped packed split.
#[derive(Debug)]
pub(super) struct ArrowSplit {
    map: Map,
    batches: Vec<Batch>,
    info: SplitInfo,
}

/// Whether these are the first bytes of an Arrow IPC file.
pub(super) fn is_arrow(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(MAGIC)
}

impl ArrowSplit {
    /// Maps and checks the file at `path`, labels included.
    ///
    /// # Errors
    /// Not a whole Arrow IPC file, not a packed split, compressed, or a label out of range.
    pub(super) fn open(path: &Path) -> Result<Self, DatasetError> {
        let split = Self::open_structure(path)?;
        if let LabelKind::Class { .. } = split.info.label_kind {
            for sample_idx in 0..split.info.n_samples {
                split.label(sample_idx)?;
            }
        }
        Ok(split)
    }

    /// As [`Self::open`], but leaves labels to [`Split::sample`]: `verify` counts the bad ones.
    ///
    /// # Errors
    /// Not a whole Arrow IPC file, not a packed split, or compressed.
    pub(super) fn open_structure(path: &Path) -> Result<Self, DatasetError> {
        let map = Map::open(path, path.display().to_string())?;
        let fail = |what| DatasetError::Arrow { path: map.name().to_owned(), what };
        let footer_range = footer_range(map.bytes()).map_err(fail)?;
        let footer = map.bytes().get(footer_range.clone()).unwrap_or_default();
        let footer = ipc::root_as_footer(footer)
            .map_err(|cause| fail(format!("its footer is damaged ({})", first_line(&cause))))?;
        if footer.version() < ipc::MetadataVersion::V4 {
            return Err(fail("it is of a format version before 4".to_owned()));
        }
        let schema = footer.schema().ok_or_else(|| fail("it has no schema".to_owned()))?;
        let meta = PackedMeta::from_schema(schema, map.name())?;
        if footer.dictionaries().is_some_and(|blocks| !blocks.is_empty()) {
            let path = map.name().to_owned();
            return Err(DatasetError::ArrowSchema { path, what: "it has dictionaries".to_owned() });
        }
        let blocks = footer.recordBatches().into_iter().flatten();
        let blocks =
            blocks.map(|block| (block.offset(), block.metaDataLength(), block.bodyLength()));
        let batches = read_batches(&map, blocks, footer_range.start, &meta)?;
        if let Some(image_bytes) = meta.image_bytes() {
            map.expect_samples_of(image_bytes);
        }
        let info = SplitInfo {
            format: "arrow",
            n_samples: meta.n_samples,
            images: meta.images,
            label_kind: meta.label_kind,
            class_names: meta.class_names,
            fingerprint: meta.fingerprint,
            mapped_bytes: map.bytes().len() as u64,
        };
        Ok(Self { map, batches, info })
    }

    /// The batch that holds a sample, and the sample's row in it.
    #[inline]
    fn locate(&self, sample_idx: u64) -> (&Batch, usize) {
        assert!(sample_idx < self.info.n_samples, "sample {sample_idx} is beyond the split");
        let batch_idx = self.batches.partition_point(|batch| batch.first_idx <= sample_idx) - 1;
        let batch = &self.batches[batch_idx];
        #[allow(clippy::cast_possible_truncation, reason = "below the length of a map")]
        let row = (sample_idx - batch.first_idx) as usize;
        (batch, row)
    }
}

impl Split for ArrowSplit {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        _buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let label = self.label(sample_idx)?;
        let (batch, row) = self.locate(sample_idx);
        let bytes = self.map.bytes();
        let content = match (&batch.images, self.info.images) {
            (Images::Raw { at }, ImageKind::Raw { height, width, channels }) => {
                let image_bytes = height * width * channels;
                let at = at + row * image_bytes;
                let pixels = Pixels::Hwc(&bytes[at..at + image_bytes]);
                Content::Raw(RawImage { width, height, channels, pixels })
            }
            (Images::Encoded { offsets_at, data }, _) => {
                let offset = |row: usize| {
                    let offset = i32::from_le_bytes(array_at(bytes, offsets_at + 4 * row));
                    usize::try_from(offset).ok()?.checked_add(data.start)
                };
                let range = offset(row).zip(offset(row + 1));
                let range = range.filter(|(start, end)| start <= end && *end <= data.end);
                let (start, end) = range.ok_or_else(|| DatasetError::Arrow {
                    path: self.map.name().to_owned(),
                    what: format!("the offsets of sample {sample_idx} make no sense"),
                })?;
                Content::Encoded(&bytes[start..end])
            }
            _ => unreachable!("a batch is read as its split's images are"),
        };
        Ok(Sample { content, label })
    }

    fn will_need(&self, sample_idx: u64) {
        if let Ok(sample) = self.sample(sample_idx, &mut Vec::new()) {
            self.map.will_need(sample.content.bytes());
        }
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        let (batch, row) = self.locate(sample_idx);
        let bytes = self.map.bytes();
        Ok(match self.info.label_kind {
            LabelKind::Class { n_classes } => {
                let class = i64::from_le_bytes(array_at(bytes, batch.labels_at + row * 8));
                if !(0..i64::from(n_classes)).contains(&class) {
                    return Err(DatasetError::LabelRange {
                        path: self.map.name().to_owned(),
                        sample_idx,
                        label: class,
                        n_classes,
                        cure: "the file is damaged: copy it again or pack it anew",
                    });
                }
                Label::Class(class)
            }
            LabelKind::Vector { len } => {
                let vector_bytes = len as usize * 4;
                let at = batch.labels_at + row * vector_bytes;
                let values = self.map.f32s(at..at + vector_bytes);
                Label::Vector(values.expect("range and alignment were checked when it was opened"))
            }
        })
    }

    fn checksum(&self, sample_idx: u64) -> Option<u32> {
        let (batch, row) = self.locate(sample_idx);
        Some(u32::from_le_bytes(array_at(self.map.bytes(), batch.checksums_at + row * 4)))
    }
}

#[inline]
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("the column's range was checked when the file was opened")
}

/// Where the footer lies, by the file's last bytes.
fn footer_range(bytes: &[u8]) -> Result<Range<usize>, String> {
    if !is_arrow(bytes) {
        let hint = if bytes.starts_with(&[0xff; 4]) {
            " (it looks like an Arrow stream, which is another format)"
        } else {
            ""
        };
        return Err(format!("it does not begin with 'ARROW1'{hint}"));
    }
    let cut = || format!("it ends after {} bytes without a footer: it is cut off", bytes.len());
    let end = bytes.len().checked_sub(TAIL_BYTES).ok_or_else(cut)?;
    let (body, tail) = bytes.split_at(end);
    let (len, magic) = tail.split_first_chunk::<4>().ok_or_else(cut)?;
    if magic != MAGIC {
        return Err(cut());
    }
    let len = i32::from_le_bytes(*len);
    let footer_len = usize::try_from(len).ok().filter(|len| *len <= limits::ARROW_FOOTER_BYTES_MAX);
    let start = footer_len.and_then(|len| body.len().checked_sub(len));
    match start {
        Some(start) if start >= HEAD_BYTES && start < end => Ok(start..end),
        _ => Err(format!("its footer has the impossible length of {len} bytes")),
    }
}

/// Checks all record batches. Blocks are `(offset, header length, body length)`.
fn read_batches(
    map: &Map,
    blocks: impl Iterator<Item = (i64, i32, i64)>,
    footer_start: usize,
    meta: &PackedMeta,
) -> Result<Vec<Batch>, DatasetError> {
    let fail = |what| DatasetError::Arrow { path: map.name().to_owned(), what };
    let mut batches = Vec::new();
    let mut n_samples = 0_u64;
    let mut free_from = HEAD_BYTES;
    for (batch_idx, block) in blocks.enumerate() {
        let fail = |what| fail(format!("record batch {batch_idx}: {what}"));
        let (header, body) = block_ranges(block, free_from, footer_start).map_err(fail)?;
        free_from = body.end;
        let header = map.bytes().get(header).unwrap_or_default();
        let batch = read_batch(header, &body, n_samples, meta).map_err(fail)?;
        // A file's length bounds the rows of one batch, not of all: the sum is checked.
        let total = n_samples.checked_add(batch.n_rows).filter(|n| *n <= limits::SAMPLES_MAX);
        n_samples = total.ok_or_else(|| fail("more samples than possible".to_owned()))?;
        if batch.n_rows > 0 {
            batches.push(batch);
        }
    }
    if n_samples != meta.n_samples {
        return Err(fail(format!(
            "its batches hold {n_samples} samples, but its metadata says {}",
            meta.n_samples
        )));
    }
    if n_samples == 0 {
        return Err(DatasetError::Empty { path: map.name().to_owned() });
    }
    Ok(batches)
}

/// The ranges of a block's header and body, which must lie in `from..to`.
fn block_ranges(
    (offset, header_len, body_len): (i64, i32, i64),
    from: usize,
    to: usize,
) -> Result<(Range<usize>, Range<usize>), String> {
    let ranges = || {
        let start = usize::try_from(offset).ok()?;
        let body_start = start.checked_add(usize::try_from(header_len).ok()?)?;
        let end = body_start.checked_add(usize::try_from(body_len).ok()?)?;
        (start >= from && end <= to).then_some((start..body_start, body_start..end))
    };
    ranges().ok_or_else(|| {
        format!(
            "it should lie at {offset} with {header_len} + {body_len} bytes, which is outside \
             the file or inside another batch"
        )
    })
}

/// Checks one record batch's header, and finds its columns in `body`.
fn read_batch(
    header: &[u8],
    body: &Range<usize>,
    first_idx: u64,
    meta: &PackedMeta,
) -> Result<Batch, String> {
    let bad_prefix = || "its header does not begin as a message does".to_owned();
    let (prefix, rest) =
        header.split_first_chunk::<MESSAGE_PREFIX_BYTES>().ok_or_else(bad_prefix)?;
    let [0xff, 0xff, 0xff, 0xff, a, b, c, d] = *prefix else { return Err(bad_prefix()) };
    let len = usize::try_from(i32::from_le_bytes([a, b, c, d])).map_err(|_| bad_prefix())?;
    let message = rest.get(..len).ok_or_else(bad_prefix)?;
    let message = ipc::root_as_message(message)
        .map_err(|cause| format!("its header is damaged ({})", first_line(&cause)))?;
    let batch =
        message.header_as_record_batch().ok_or("its header is not that of a record batch")?;
    if batch.compression().is_some() {
        return Err("it is compressed, so it cannot be mapped; write it without compression".into());
    }
    let n_rows = u64::try_from(batch.length()).map_err(|_| "it has a negative length")?;
    let (label_bytes, vector_len) = match meta.label_kind {
        LabelKind::Class { .. } => (8, None),
        LabelKind::Vector { len } => (4 * u64::from(len), Some(u64::from(len))),
    };
    check_nodes(batch, n_rows, vector_len)?;

    // Each column has a validity buffer, then its data, binary ones offsets between; a list has
    // only a validity buffer, and then both of its items.
    let buffers: Vec<_> = batch.buffers().into_iter().flatten().collect();
    let images_end = if meta.image_bytes().is_some() { 2 } else { 3 };
    let labels = images_end + if vector_len.is_some() { 2 } else { 1 };
    let checksums = labels + 2;
    if buffers.len() != checksums + 1 {
        return Err(format!("it has {} buffers", buffers.len()));
    }
    let part = |buffer: usize, name: &str, needed: Option<u64>| {
        column_range(body, buffers[buffer].offset(), buffers[buffer].length(), needed)
            .ok_or_else(|| format!("its column '{name}' does not fit into it"))
    };
    let images = if let Some(image_bytes) = meta.image_bytes() {
        let at = part(1, "image", n_rows.checked_mul(image_bytes as u64))?.start;
        Images::Raw { at }
    } else {
        // An empty batch may leave its offsets out.
        let n_offsets = if n_rows == 0 { 0 } else { n_rows + 1 };
        let offsets_at = part(1, "image", n_offsets.checked_mul(4))?.start;
        Images::Encoded { offsets_at, data: part(2, "image", Some(0))? }
    };
    let labels_at = part(labels, "label", n_rows.checked_mul(label_bytes))?.start;
    let checksums_at = part(checksums, "checksum", n_rows.checked_mul(4))?.start;
    // The map begins at a page, so an offset's alignment is that of the address.
    if vector_len.is_some() && !labels_at.is_multiple_of(align_of::<f32>()) {
        return Err("its column 'label' is not aligned to 4 bytes".to_owned());
    }
    Ok(Batch { first_idx, n_rows, images, labels_at, checksums_at })
}

/// Checks that all columns have `n_rows` values (a vector's items `vector_len` times that), and no
/// nulls.
fn check_nodes(
    batch: ipc::RecordBatch<'_>,
    n_rows: u64,
    vector_len: Option<u64>,
) -> Result<(), String> {
    let items = vector_len.map(|len| n_rows.checked_mul(len));
    let mut expected = vec![Some(n_rows), Some(n_rows)];
    expected.extend(items);
    expected.push(Some(n_rows));
    let nodes: Vec<_> = batch.nodes().into_iter().flatten().collect();
    if nodes.iter().any(|node| node.null_count() != 0) {
        return Err("it has nulls; fill or drop them before packing".to_owned());
    }
    let lengths: Vec<_> = nodes.iter().map(|node| u64::try_from(node.length()).ok()).collect();
    if lengths != expected {
        return Err(format!("its columns do not all have {n_rows} rows"));
    }
    Ok(())
}

/// A column's buffer in the map, if it is in `body` and holds `needed` bytes.
fn column_range(
    body: &Range<usize>,
    offset: i64,
    len: i64,
    needed: Option<u64>,
) -> Option<Range<usize>> {
    let start = body.start.checked_add(usize::try_from(offset).ok()?)?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    let needed = usize::try_from(needed?).ok()?;
    (end <= body.end && needed <= end - start).then_some(start..end)
}

/// The verifier's errors go on with a trace, which is of no use to a user.
fn first_line(cause: &impl std::fmt::Display) -> String {
    cause.to_string().lines().next().unwrap_or_default().trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn footers_are_found_or_refused() {
        let file = |len: i32| {
            let tail = [&len.to_le_bytes()[..], MAGIC].concat();
            [b"ARROW1\0\0".as_slice(), &[7; 20], &tail].concat()
        };
        assert_eq!(footer_range(&file(20)), Ok(8..28));
        assert_eq!(footer_range(&file(12)), Ok(16..28));
        for len in [0, -1, 21, 28, i32::MAX, i32::MIN] {
            let error = footer_range(&file(len)).unwrap_err();
            assert!(error.contains(&format!("length of {len} bytes")), "{error}");
        }
        assert!(footer_range(b"ARROW1").unwrap_err().contains("cut off"));
        assert!(footer_range(&file(20)[..37]).unwrap_err().contains("cut off"));
        assert!(footer_range(b"PARQUET!").unwrap_err().contains("does not begin with 'ARROW1'"));
        assert!(footer_range(&[0xff; 16]).unwrap_err().contains("Arrow stream"));
    }

    #[test]
    fn blocks_must_lie_between_the_last_one_and_the_footer() {
        assert_eq!(block_ranges((8, 16, 32), 8, 56), Ok((8..24, 24..56)));
        for block in [
            (0, 16, 32),
            (8, 16, 33),
            (-8, 16, 32),
            (8, -16, 32),
            (8, 16, -32),
            (i64::MAX, i32::MAX, i64::MAX),
            (8, 16, i64::MAX),
        ] {
            let error = block_ranges(block, 8, 56).unwrap_err();
            assert!(error.contains("outside the file or inside another batch"), "{error}");
        }
    }

    #[test]
    fn columns_must_lie_in_their_body() {
        let body = 100..200;
        assert_eq!(column_range(&body, 8, 64, Some(60)).map(|range| range.start), Some(108));
        assert_eq!(column_range(&body, 36, 64, Some(64)).map(|range| range.start), Some(136));
        assert_eq!(column_range(&body, 37, 64, Some(60)), None, "beyond the body");
        assert_eq!(column_range(&body, 8, 59, Some(60)), None, "too short");
        assert_eq!(column_range(&body, -1, 64, Some(60)), None);
        assert_eq!(column_range(&body, i64::MAX, i64::MAX, Some(60)), None);
        assert_eq!(column_range(&body, 0, 100, None), None, "overflow");
        assert_eq!(column_range(&body, 0, 100, Some(u64::MAX)), None);
    }
}
