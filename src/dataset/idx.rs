//! IDX files (MNIST's format): an images file and its labels file, plain or `.gz`.
//!
//! ```text
//! offset  images            labels            why it is checked
//! 0       0 0 8 3|4         0 0 8 1           zero, zero, element type u8, number of dimensions
//! 4       n, big-endian     n, big-endian     equal in both
//! 8       h, w[, c] each    labels, n × u8    u32 big-endian; c is 1 or 3
//! 16|20   pixels, n·h·w·c                     the file ends exactly here
//! ```
//! Source: the format's description on the MNIST page (LeCun, Cortes, Burges).
//!
//! Never guesses: a file that is one byte too long is refused, too.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::map::Map;
use super::{
    Content, DatasetError, ImageKind, Label, LabelKind, Pixels, RawImage, Sample, Split, SplitInfo,
    digest, gz,
};
use crate::limits;

/// The longest header that is accepted, in bytes: magic and four dimensions.
pub(super) const HEADER_BYTES_MAX: usize = 20;

/// Name endings of images files, after `train-` or `t10k-`.
const IMAGES_ENDINGS: [&str; 4] =
    ["images-idx3-ubyte", "images.idx3-ubyte", "images-idx4-ubyte", "images.idx4-ubyte"];

/// Which of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Images,
    Labels,
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) n: u64,
    /// `[height, width, channels]`; ones for labels.
    shape: [usize; 3],
    head_bytes: usize,
    /// What follows the header per sample, in bytes.
    item_bytes: usize,
    /// The whole file, in bytes.
    pub(super) file_bytes: u64,
}

impl Header {
    /// Reads the header at the beginning of `bytes`; `name` is what errors call the file.
    ///
    /// # Errors
    /// Too short, another magic number, another element type, no samples, or a shape beyond the
    /// limits.
    pub(super) fn parse(bytes: &[u8], kind: Kind, name: &str) -> Result<Self, DatasetError> {
        let magic = bytes.first_chunk::<4>().ok_or_else(|| too_short(bytes.len(), name))?;
        let n_dims = check_magic(*magic, kind, name)?;
        let head_bytes = 4 + 4 * n_dims;
        let dims = bytes.get(4..head_bytes).ok_or_else(|| too_short(bytes.len(), name))?;
        let mut dims = dims
            .chunks_exact(4)
            .map(|dim| dim.iter().fold(0_u32, |value, byte| value << 8 | u32::from(*byte)));
        let n = u64::from(dims.next().unwrap_or(0));
        let mut shape = [1; 3];
        for (side, dim) in shape.iter_mut().zip(dims) {
            *side = dim as usize;
        }
        if n == 0 {
            return Err(DatasetError::Empty { path: name.to_owned() });
        }
        if kind == Kind::Images {
            check_shape(shape, name)?;
        }
        // At most 16384² · 3 after the check above, so neither product can overflow.
        let item_bytes = shape.iter().product::<usize>();
        let file_bytes = head_bytes as u64 + n * item_bytes as u64;
        Ok(Self { n, shape, head_bytes, item_bytes, file_bytes })
    }
}

fn too_short(len: usize, name: &str) -> DatasetError {
    DatasetError::damaged(name, format!("{len} bytes are too few for an IDX header: it is cut off"))
}

/// The number of dimensions that a right magic number stands for.
fn check_magic(magic: [u8; 4], kind: Kind, name: &str) -> Result<usize, DatasetError> {
    let number = u32::from_be_bytes(magic);
    match (kind, magic) {
        (Kind::Images, [0, 0, 8, n_dims @ (3 | 4)]) | (Kind::Labels, [0, 0, 8, n_dims @ 1]) => {
            Ok(usize::from(n_dims))
        }
        (Kind::Images, [0, 0, 8, 1]) => Err(DatasetError::unsupported(
            name,
            "an IDX labels file (magic 0x00000801); give the images file that belongs to it",
        )),
        (_, [0, 0, 0x09 | 0x0b..=0x0e, _]) => Err(DatasetError::unsupported(
            name,
            format!(
                "IDX elements of type 0x{:02x}; only unsigned bytes (0x08) can be streamed: \
                 convert the file",
                magic[2]
            ),
        )),
        (Kind::Images, _) => Err(DatasetError::damaged(
            name,
            format!(
                "magic 0x{number:08x} is not that of IDX images (0x00000803, 0x00000804): not \
                 an IDX images file, or damaged (an archive must be unpacked first)"
            ),
        )),
        (Kind::Labels, _) => Err(DatasetError::damaged(
            name,
            format!("magic 0x{number:08x} is not that of IDX labels (0x00000801)"),
        )),
    }
}

/// Checks `[height, width, channels]` against the limits.
///
/// # Errors
/// A side is zero or too large, or the channels are neither 1 nor 3.
pub(super) fn check_shape(shape: [usize; 3], name: &str) -> Result<(), DatasetError> {
    let [height, width, channels] = shape;
    let side_max = limits::IMAGE_SIDE_MAX as usize;
    if !(1..=side_max).contains(&height) || !(1..=side_max).contains(&width) {
        let what = format!("images of {height} × {width} pixels; sides must be 1 to {side_max}");
        return Err(DatasetError::damaged(name, what));
    }
    if channels != 1 && channels != 3 {
        let what = format!("images of {channels} channels; only 1 and 3 can be streamed");
        return Err(DatasetError::unsupported(name, what));
    }
    // Both sides are within the limits, so the product fits.
    if (height * width * channels) as u64 > limits::IMAGE_BYTES_MAX {
        let what = format!("images of {height} × {width} × {channels} bytes are too large");
        return Err(DatasetError::unsupported(name, what));
    }
    Ok(())
}

/// A mapped pair of IDX files.
#[derive(Debug)]
pub(super) struct IdxSplit {
    images: Map,
    images_header: Header,
    labels: Map,
    labels_header: Header,
    info: SplitInfo,
}

impl IdxSplit {
    /// Maps the images file at `path` and the labels file that belongs to it; `.gz` files are
    /// unpacked into `cache_dir` first.
    ///
    /// # Errors
    /// Either file is missing, damaged or of another format, or their counts differ.
    pub(super) fn open(path: &Path, cache_dir: &Path) -> Result<Self, DatasetError> {
        let (images, images_header) = open_file(path, Kind::Images, cache_dir)?;
        let labels_path = find_labels(path)?;
        let (labels, labels_header) = open_file(&labels_path, Kind::Labels, cache_dir)?;
        if images_header.n != labels_header.n {
            return Err(DatasetError::CountMismatch {
                images_path: images.name().to_owned(),
                n_images: images_header.n,
                labels_path: labels.name().to_owned(),
                n_labels: labels_header.n,
            });
        }
        let label_bytes = labels.bytes().get(labels_header.head_bytes..).unwrap_or_default();
        let n_classes = label_bytes.iter().max().map_or(1, |label| u32::from(*label) + 1);
        let [height, width, channels] = images_header.shape;
        let info = SplitInfo {
            format: "idx",
            n_samples: images_header.n,
            images: ImageKind::Raw { height, width, channels },
            label_kind: LabelKind::Class { n_classes },
            class_names: Vec::new(),
            fingerprint: digest::file_fingerprint(&[path.to_owned(), labels_path])?,
            mapped_bytes: (images.bytes().len() + labels.bytes().len()) as u64,
        };
        images.expect_samples_of(images_header.item_bytes);
        Ok(Self { images, images_header, labels, labels_header, info })
    }
}

impl Split for IdxSplit {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        _buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let label = self.label(sample_idx)?;
        #[allow(clippy::cast_possible_truncation, reason = "below the length of a map")]
        let idx = sample_idx as usize;
        let header = &self.images_header;
        let start = header.head_bytes + idx * header.item_bytes;
        let pixels = Pixels::Hwc(&self.images.bytes()[start..start + header.item_bytes]);
        let [height, width, channels] = header.shape;
        let image = RawImage { width, height, channels, pixels };
        Ok(Sample { content: Content::Raw(image), label })
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        assert!(sample_idx < self.info.n_samples, "sample {sample_idx} is beyond the split");
        #[allow(clippy::cast_possible_truncation, reason = "below the length of a map")]
        let idx = sample_idx as usize;
        let label = self.labels.bytes()[self.labels_header.head_bytes + idx];
        Ok(Label::Class(i64::from(label)))
    }
}

/// Opens one of the two files and checks that its length is what its header says.
fn open_file(path: &Path, kind: Kind, cache_dir: &Path) -> Result<(Map, Header), DatasetError> {
    let mut name = path.display().to_string();
    let map = if gz::is_gz(path)? {
        let unpacked = gz::unpacked_idx(path, kind, cache_dir)?;
        name = format!("{name} (unpacked at {})", unpacked.display());
        Map::open(&unpacked, name.clone())?
    } else {
        Map::open(path, name.clone())?
    };
    let header = Header::parse(map.bytes(), kind, &name)?;
    let len = map.bytes().len() as u64;
    if len != header.file_bytes {
        return Err(DatasetError::damaged(
            &name,
            format!(
                "{len} bytes long, but its header stands for {} bytes ({} items of {} bytes): it \
                 is cut off, or not an IDX file",
                header.file_bytes, header.n, header.item_bytes
            ),
        ));
    }
    Ok((map, header))
}

/// The labels file that belongs to an images file: `images` → `labels`, `idx3` → `idx1`, with or
/// without `.gz`.
fn find_labels(images: &Path) -> Result<PathBuf, DatasetError> {
    let path = images.display().to_string();
    let name = images.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // The last occurrence: `images-of-cats/…` never matters, `my-images-images-idx3` does.
    let Some(at) = name.rfind("images") else {
        return Err(DatasetError::NoLabels {
            path,
            looked_for: "a name to derive it from (the images file's own name must contain \
                         'images', as in train-images-idx3-ubyte)"
                .to_owned(),
        });
    };
    let rest = &name[at + "images".len()..];
    let rest = rest.replacen("idx3", "idx1", 1).replacen("idx4", "idx1", 1);
    let same = format!("{}labels{rest}", &name[..at]);
    let other = match same.strip_suffix(".gz") {
        Some(plain) => plain.to_owned(),
        None => format!("{same}.gz"),
    };
    let candidates = [images.with_file_name(&same), images.with_file_name(&other)];
    match candidates.into_iter().find(|candidate| candidate.exists()) {
        Some(found) => Ok(found),
        None => Err(DatasetError::NoLabels { path, looked_for: format!("{same}, {other}") }),
    }
}

/// The usual name of a split's files: `train` or `t10k`, and whether there can be any.
fn prefix_of(split: &str) -> Option<&'static str> {
    match split {
        "train" => Some("train"),
        "test" => Some("t10k"),
        _ => None,
    }
}

/// The images file of a split in a folder, by the usual names; plain files before `.gz`.
pub(super) fn find_images(folder: &Path, split: &str) -> Option<PathBuf> {
    let prefix = prefix_of(split)?;
    let names = IMAGES_ENDINGS.iter().map(|ending| format!("{prefix}-{ending}"));
    let plain = names.clone().map(|name| folder.join(name)).find(|path| path.exists());
    plain.or_else(|| names.map(|name| folder.join(name + ".gz")).find(|path| path.exists()))
}

/// What [`find_images`] looks for, in words.
pub(super) fn looked_for(split: &str) -> Option<String> {
    prefix_of(split).map(|prefix| format!("{prefix}-images-idx3-ubyte[.gz]"))
}

/// The first bytes of a file, at most [`HEADER_BYTES_MAX`].
///
/// # Errors
/// The file cannot be read.
pub(super) fn first_bytes(path: &Path) -> Result<Vec<u8>, DatasetError> {
    let fail = |cause| DatasetError::io(path, cause);
    if !fs::metadata(path).map_err(fail)?.is_file() {
        return Err(DatasetError::NotAFile { path: path.display().to_string() });
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES_MAX);
    let file = File::open(path).map_err(fail)?;
    file.take(HEADER_BYTES_MAX as u64).read_to_end(&mut bytes).map_err(fail)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8], kind: Kind) -> Result<Header, String> {
        Header::parse(bytes, kind, "f").map_err(|error| error.to_string())
    }

    #[test]
    fn headers_of_right_files() {
        let images = [0, 0, 8, 3, 0, 0, 1, 0, 0, 0, 0, 28, 0, 0, 0, 14, 77];
        let header = parse(&images, Kind::Images).unwrap();
        assert_eq!((header.n, header.shape), (256, [28, 14, 1]));
        assert_eq!(header.file_bytes, 16 + 256 * 28 * 14);
        let colour = [0, 0, 8, 4, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 3];
        let header = parse(&colour, Kind::Images).unwrap();
        assert_eq!((header.shape, header.file_bytes), ([5, 6, 3], 20 + 2 * 90));
        let labels = [0, 0, 8, 1, 0, 0, 0, 9];
        assert_eq!(parse(&labels, Kind::Labels).unwrap().file_bytes, 17);
    }

    #[test]
    fn headers_of_wrong_files_name_the_cause() {
        let check = |bytes: &[u8], kind, expected: &str| {
            let text = parse(bytes, kind).unwrap_err();
            assert!(text.starts_with("f: ") && text.contains(expected), "{text}");
        };
        check(&[], Kind::Images, "0 bytes are too few");
        check(&[0, 0, 8, 3, 0, 0, 0, 1], Kind::Images, "8 bytes are too few");
        check(&[0, 0, 8, 1, 0, 0, 0, 1], Kind::Images, "give the images file");
        check(&[0, 0, 8, 3, 0, 0, 0, 1], Kind::Labels, "not that of IDX labels");
        check(&[0, 0, 0x0d, 3], Kind::Images, "type 0x0d");
        check(b"\x89PNG", Kind::Images, "0x89504e47");
        check(&[0, 0, 8, 1, 0, 0, 0, 0], Kind::Labels, "no samples");
        let images = |h: u8, w: u8| [0, 0, 8, 3, 0, 0, 0, 1, 0, 0, h, 0, 0, 0, 0, w];
        check(&images(0, 9), Kind::Images, "0 × 9 pixels");
        check(&images(200, 9), Kind::Images, "51200 × 9 pixels");
        let colour = [0, 0, 8, 4, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 4];
        check(&colour, Kind::Images, "4 channels");
        let huge = [0, 0, 8, 4, 0, 0, 0, 2, 0, 0, 64, 0, 0, 0, 64, 0, 0, 0, 0, 3];
        check(&huge, Kind::Images, "too large");
    }

    #[test]
    fn labels_are_found_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let check = |images: &str, labels: &str| {
            fs::write(dir.path().join(labels), b"").unwrap();
            let found = find_labels(&dir.path().join(images)).unwrap();
            assert_eq!(found, dir.path().join(labels));
            fs::remove_file(found).unwrap();
        };
        check("train-images-idx3-ubyte", "train-labels-idx1-ubyte");
        check("train-images.idx3-ubyte", "train-labels.idx1-ubyte");
        check("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz");
        check("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte");
        check("a-images-idx4-ubyte", "a-labels-idx1-ubyte.gz");
        let error = find_labels(&dir.path().join("digits.idx")).unwrap_err().to_string();
        assert!(error.contains("must contain 'images'"), "{error}");
    }
}
