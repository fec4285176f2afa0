//! What the dataset tests share: small datasets in the real formats, and an in-memory split.

#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code, but not in a #[test]")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use fastaa::dataset::{
    Content, DatasetError, Fingerprint, ImageKind, Label, LabelKind, Pixels, RawImage, Sample,
    Split, SplitInfo,
};

/// Where Debian's `dataset-fashion-mnist` puts its files.
const FASHION_MNIST: &str = "/usr/share/datasets/fashion-mnist";

pub fn fashion_mnist() -> Option<&'static Path> {
    let path = Path::new(FASHION_MNIST);
    if path.join("train-images-idx3-ubyte.gz").exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {FASHION_MNIST} is not there (install dataset-fashion-mnist)");
    None
}

/// The Python that the tests use, if it has numpy and pyarrow.
pub fn python() -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let python = match std::env::var_os("FASTAA_PYTHON") {
        Some(path) => PathBuf::from(path),
        None if own.exists() => own,
        None => PathBuf::from("python3"),
    };
    let script = checker();
    let found = Command::new(&python).arg(script).arg("versions").output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("SKIPPED: {} has no numpy and pyarrow", python.display());
    None
}

pub fn checker() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dataset_check.py")
}

/// Runs the Python checker; gives what it printed.
pub fn check_with(python: &Path, arguments: &[&str]) -> String {
    let output = Command::new(python).arg(checker()).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Bytes that look like noise, the same each time.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// An IDX images file: `shape` is `[n, h, w]` or `[n, h, w, c]`.
pub fn idx_images(shape: &[u32], pixels: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, u8::try_from(shape.len()).unwrap()];
    bytes.extend(shape.iter().flat_map(|dim| dim.to_be_bytes()));
    bytes.extend(pixels);
    bytes
}

pub fn idx_labels(labels: &[u8]) -> Vec<u8> {
    idx_images(&[u32::try_from(labels.len()).unwrap()], labels)
}

pub fn gz(content: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(content).unwrap();
    out.finish().unwrap()
}

/// Writes `train` and `t10k` IDX files of `n` and `n / 2` images, with labels `0..10` and `0..9`.
pub fn write_idx_folder(folder: &Path, n: u32, side: u32, gzip: bool) {
    std::fs::create_dir_all(folder).unwrap();
    for (prefix, n, n_classes) in [("train", n, 10), ("t10k", n / 2, 9)] {
        let pixels = noise(u64::from(n_classes), (n * side * side) as usize);
        let labels: Vec<u8> = (0..n).map(|idx| u8::try_from(idx % n_classes).unwrap()).collect();
        let files = [
            ("images-idx3-ubyte", idx_images(&[n, side, side], &pixels)),
            ("labels-idx1-ubyte", idx_labels(&labels)),
        ];
        for (name, content) in files {
            let (name, content) = if gzip {
                (format!("{prefix}-{name}.gz"), gz(&content))
            } else {
                (format!("{prefix}-{name}"), content)
            };
            std::fs::write(folder.join(name), content).unwrap();
        }
    }
}

/// CIFAR records: `labels` bytes before each image.
pub fn cifar_records(seed: u64, labels: &[&[u8]]) -> Vec<u8> {
    let pixels = noise(seed, labels.len() * 3072);
    let records = labels.iter().zip(pixels.chunks(3072));
    records.flat_map(|(label, pixels)| [label, pixels].concat()).collect()
}

pub fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|own| own == extension)
}

/// Names of all files in a folder, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[derive(Clone, Debug, PartialEq)]
pub enum Labels {
    Classes(Vec<i64>),
    Vectors(Vec<Vec<f32>>),
}

/// A split in memory: what a packed file is compared with.
#[derive(Clone, Debug)]
pub struct MemorySplit {
    pub info: SplitInfo,
    pub pixels: Vec<u8>,
    pub planar: bool,
    pub labels: Labels,
}

impl MemorySplit {
    /// `shape` is `[height, width, channels]`.
    pub fn new(shape: [usize; 3], planar: bool, pixels: Vec<u8>, labels: Labels) -> Self {
        let (n_samples, label_kind) = match &labels {
            Labels::Classes(classes) => {
                let n_classes = classes.iter().max().map_or(1, |class| class + 1);
                let n_classes = u32::try_from(n_classes).unwrap();
                (classes.len(), LabelKind::Class { n_classes })
            }
            Labels::Vectors(vectors) => {
                let len = u32::try_from(vectors[0].len()).unwrap();
                (vectors.len(), LabelKind::Vector { len })
            }
        };
        let [height, width, channels] = shape;
        let info = SplitInfo {
            format: "memory",
            n_samples: n_samples as u64,
            images: ImageKind::Raw { height, width, channels },
            label_kind,
            class_names: Vec::new(),
            fingerprint: Fingerprint("none".to_owned()),
            mapped_bytes: 0,
        };
        Self { info, pixels, planar, labels }
    }

    /// A small split with classes `0..3`.
    pub fn small(n: usize) -> Self {
        let classes = (0..n).map(|idx| i64::try_from(idx % 3).unwrap()).collect();
        Self::new([3, 5, 1], false, noise(7, n * 15), Labels::Classes(classes))
    }
}

impl Split for MemorySplit {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        _buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let idx = usize::try_from(sample_idx).unwrap();
        let [height, width, channels] = shape_of(&self.info);
        let bytes = &self.pixels[idx * width * height * channels..][..width * height * channels];
        let pixels = if self.planar { Pixels::Chw(bytes) } else { Pixels::Hwc(bytes) };
        let image = RawImage { width, height, channels, pixels };
        Ok(Sample { content: Content::Raw(image), label: self.label(sample_idx)? })
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        let idx = usize::try_from(sample_idx).unwrap();
        Ok(match &self.labels {
            Labels::Classes(classes) => Label::Class(classes[idx]),
            Labels::Vectors(vectors) => Label::Vector(&vectors[idx]),
        })
    }
}

/// `[height, width, channels]` of a split of raw images.
pub fn shape_of(info: &SplitInfo) -> [usize; 3] {
    let ImageKind::Raw { height, width, channels } = info.images else { panic!("raw images") };
    [height, width, channels]
}

/// A raw sample's bytes, whether they are planar, and its label.
pub fn raw_sample(split: &dyn Split, sample_idx: u64) -> (Vec<u8>, bool, Label<'_>) {
    let mut buffer = Vec::new();
    let sample = split.sample(sample_idx, &mut buffer).expect("reads");
    let (bytes, is_planar) = match sample.raw().expect("raw").pixels {
        Pixels::Hwc(bytes) => (bytes.to_vec(), false),
        Pixels::Chw(bytes) => (bytes.to_vec(), true),
    };
    (bytes, is_planar, split.label(sample_idx).expect("reads"))
}
