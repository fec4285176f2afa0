//! Hugging Face `datasets` on disk: Arrow IPC *streams*, mapped and read in place.
//!
//! | what | its folder |
//! |---|---|
//! | `Dataset.save_to_disk` | `state.json`, `dataset_info.json`, `data-00000-of-00001.arrow`, … |
//! | `DatasetDict.save_to_disk` | `dataset_dict.json`, and a folder as above for each split |
//! | the cache | `dataset_info.json`, `NAME-SPLIT.arrow` or `NAME-SPLIT-00000-of-00002.arrow`, … |
//!
//! The image is the first column of the feature `Image`: a struct of `bytes` and `path`, of which
//! the bytes are read. The class is the column `label` if it is a `ClassLabel`, else the first one
//! that is. Images are turned by their EXIF orientation, as `datasets` itself does.
//!
//! *Invariants*: an image's offsets are checked when it is read; a column's ranges when the file is
//! opened. The messages' flatbuffers are verified by `arrow-ipc` before they are read.
//!
//! *Not here*: where columns lie in a record batch (columns.rs), which files belong together
//! (files.rs).

mod columns;
mod files;

use std::path::Path;

use arrow_ipc as ipc;
use serde_json::Value;

use super::map::Map;
use super::{Content, DatasetError, ImageKind, Label, LabelKind, Sample, Split, SplitInfo, digest};
use crate::limits;
use columns::{Batch, Columns};
pub(super) use files::{HfFiles, find_in_folder, find_whole, splits_in_folder};

/// Continuation mark before a message's length.
const CONTINUATION: [u8; 4] = [0xFF; 4];

/// Largest header of a message, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The mapped files of a split.
#[derive(Debug)]
pub(super) struct HfSplit {
    files: Vec<Map>,
    batches: Vec<FileBatch>,
    n_classes: u32,
    info: SplitInfo,
}

#[derive(Debug)]
struct FileBatch {
    first_idx: u64,
    file: usize,
    batch: Batch,
}

impl HfSplit {
    /// Maps the files of a split, in order.
    ///
    /// # Errors
    /// A file is damaged or cut off, has no image or class column, or is compressed.
    pub(super) fn open(found: &HfFiles) -> Result<Self, DatasetError> {
        let (mut files, mut batches) = (Vec::new(), Vec::new());
        let (mut n_samples, mut mapped_bytes) = (0_u64, 0);
        let mut class_names: Option<Vec<String>> = None;
        for path in &found.paths {
            let map = Map::open(path, path.display().to_string())?;
            let fail = |what| DatasetError::Hf { path: map.name().to_owned(), what };
            let (columns, names, at) = read_schema(map.bytes()).map_err(fail)?;
            if class_names.as_ref().is_some_and(|others| *others != names) {
                return Err(fail(
                    "its classes are not those of the split's other files".to_owned(),
                ));
            }
            class_names = Some(names);
            let in_file = Batches { bytes: map.bytes(), at, columns: &columns };
            for batch in in_file {
                let batch = batch.map_err(fail)?;
                let n_rows = batch.n_rows;
                if n_rows > 0 {
                    batches.push(FileBatch { first_idx: n_samples, file: files.len(), batch });
                }
                let total = n_samples.checked_add(n_rows).filter(|n| *n <= limits::SAMPLES_MAX);
                n_samples = total.ok_or_else(|| fail("more samples than possible".to_owned()))?;
            }
            mapped_bytes += map.bytes().len() as u64;
            files.push(map);
        }
        if n_samples == 0 {
            return Err(DatasetError::Empty { path: found.folder.display().to_string() });
        }
        let class_names = class_names.unwrap_or_default();
        let n_classes = u32::try_from(class_names.len()).unwrap_or(u32::MAX);
        let info = SplitInfo {
            format: "huggingface",
            n_samples,
            images: ImageKind::Encoded { turns_by_exif: true },
            label_kind: LabelKind::Class { n_classes },
            class_names,
            fingerprint: digest::file_fingerprint(&found.paths)?,
            mapped_bytes,
        };
        let split = Self { files, batches, n_classes, info };
        for sample_idx in 0..n_samples {
            split.label(sample_idx)?;
        }
        Ok(split)
    }

    fn locate(&self, sample_idx: u64) -> (&Map, &Batch, usize) {
        assert!(sample_idx < self.info.n_samples, "sample {sample_idx} is beyond the split");
        let at = self.batches.partition_point(|batch| batch.first_idx <= sample_idx) - 1;
        let FileBatch { first_idx, file, batch } = &self.batches[at];
        let row = usize::try_from(sample_idx - first_idx).expect("below the length of a map");
        (&self.files[*file], batch, row)
    }
}

impl Split for HfSplit {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        _buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let label = self.label(sample_idx)?;
        let (map, batch, row) = self.locate(sample_idx);
        let image = batch.image(map.bytes(), row).map_err(|what| DatasetError::Hf {
            path: map.name().to_owned(),
            what: format!("row {row} of a batch (sample {sample_idx}): {what}"),
        })?;
        Ok(Sample { content: Content::Encoded(image), label })
    }

    fn will_need(&self, sample_idx: u64) {
        if let Ok(sample) = self.sample(sample_idx, &mut Vec::new()) {
            self.locate(sample_idx).0.will_need(sample.content.bytes());
        }
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        let (map, batch, row) = self.locate(sample_idx);
        let class = batch.class(map.bytes(), row);
        if (0..i64::from(self.n_classes)).contains(&class) {
            return Ok(Label::Class(class));
        }
        let (path, n_classes) = (map.name().to_owned(), self.n_classes);
        let cure = "a label of -1 stands for an unknown class: leave the split out, or filter it";
        Err(DatasetError::LabelRange { path, sample_idx, label: class, n_classes, cure })
    }

    fn sample_name(&self, sample_idx: u64) -> String {
        let (map, ..) = self.locate(sample_idx);
        format!("{}: sample {sample_idx}", map.name())
    }
}

/// The record batches of a stream, from `at` on.
struct Batches<'a> {
    bytes: &'a [u8],
    at: usize,
    columns: &'a Columns,
}

impl Iterator for Batches<'_> {
    type Item = Result<Batch, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = next_message(self.bytes, self.at).transpose()?;
        let batch = next.and_then(|(message, body_at)| {
            let end = body_end(&message, body_at, self.bytes.len())?;
            self.at = end;
            let batch = message.header_as_record_batch();
            let batch = batch.ok_or("it has a message that is no record batch (a dictionary?)")?;
            self.columns.find_in(batch, body_at..end)
        });
        if batch.is_err() {
            self.at = self.bytes.len();
        }
        Some(batch)
    }
}

/// The message at `at`, and where its body begins; `None` at the stream's end.
fn next_message(bytes: &[u8], at: usize) -> Result<Option<(ipc::Message<'_>, usize)>, String> {
    let rest = bytes.get(at..).unwrap_or_default();
    if rest.is_empty() {
        return Ok(None);
    }
    let cut = || format!("it is cut off at byte {at}");
    let (mark, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    if *mark != CONTINUATION {
        return Err(format!("no message begins at byte {at}: it is damaged, or no Arrow stream"));
    }
    let len = usize::try_from(i32::from_le_bytes(*len)).ok();
    let len = len.filter(|len| *len <= MESSAGE_BYTES_MAX);
    let len = len.ok_or_else(|| format!("a message of impossible length at byte {at}"))?;
    if len == 0 {
        return Ok(None);
    }
    let header = rest.get(..len).ok_or_else(cut)?;
    let message = ipc::root_as_message(header).map_err(|cause| {
        let cause = cause.to_string();
        format!(
            "the message at byte {at} is damaged ({})",
            cause.lines().next().unwrap_or_default()
        )
    })?;
    Ok(Some((message, at + 8 + len)))
}

fn body_end(message: &ipc::Message<'_>, body_at: usize, len: usize) -> Result<usize, String> {
    let body = usize::try_from(message.bodyLength()).ok();
    let end = body.and_then(|body| body_at.checked_add(body)).filter(|end| *end <= len);
    end.ok_or_else(|| format!("it is cut off: the body at byte {body_at} goes beyond its end"))
}

/// The columns, the classes' names, and where the first record batch begins.
fn read_schema(bytes: &[u8]) -> Result<(Columns, Vec<String>, usize), String> {
    let (message, body_at) = next_message(bytes, 0)?.ok_or("it is empty")?;
    let end = body_end(&message, body_at, bytes.len())?;
    let schema = message.header_as_schema().ok_or("it does not begin with a schema")?;
    if schema.endianness() != ipc::Endianness::Little {
        return Err("it is big-endian".to_owned());
    }
    let metadata = schema.custom_metadata().into_iter().flatten();
    let text =
        metadata.filter(|pair| pair.key() == Some("huggingface")).find_map(|pair| pair.value());
    let text =
        text.ok_or("its schema has no 'huggingface' metadata: datasets has not written it")?;
    let json: Value = serde_json::from_str(text)
        .map_err(|cause| format!("its 'huggingface' metadata is no JSON: {cause}"))?;
    let features = json["info"]["features"].as_object().ok_or("its metadata has no features")?;
    let kind = |name: &str| features.get(name).and_then(|feature| feature["_type"].as_str());
    let fields: Vec<_> = schema.fields().map(|all| all.iter().collect()).unwrap_or_default();
    let names: Vec<&str> = fields.iter().map(|field| field.name().unwrap_or("")).collect();
    let column = |wanted: &str| names.iter().position(|name| kind(name) == Some(wanted));
    let listed = || names.join(", ");
    let image = column("Image").ok_or_else(|| {
        let columns = listed();
        format!("no column is an Image; its columns are {columns}; cast_column(NAME, Image())")
    })?;
    let label = names.iter().position(|name| *name == "label" && kind(name) == Some("ClassLabel"));
    let label = label.or_else(|| column("ClassLabel")).ok_or_else(|| {
        let columns = listed();
        format!(
            "no column is a ClassLabel; its columns are {columns}; class_encode_column(NAME), and \
                 save it anew"
        )
    })?;
    let class_names = features[names[label]]["names"].as_array().map(Vec::as_slice);
    let class_names: Option<Vec<String>> = class_names
        .unwrap_or_default()
        .iter()
        .map(|name| name.as_str().map(str::to_owned))
        .collect();
    let class_names = class_names
        .filter(|names| (1..=limits::CLASSES_MAX as usize).contains(&names.len()))
        .ok_or("its ClassLabel has no names, or too many")?;
    Ok((Columns::of(&fields, image, label)?, class_names, end))
}

/// Whether a folder's `name` is one of an Arrow file.
fn is_arrow_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "arrow")
}
