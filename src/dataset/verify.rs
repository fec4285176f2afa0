//! Compares every sample of a split with what is stored about it.
//!
//! Packed splits: checksum and label range of each sample, and the fingerprint over all. Other
//! formats store no checksums; their structure and labels are checked, and the report says that
//! this is all. Of image files, the caller says whether they can be decoded.

use std::path::Path;

use super::digest::{self, ContentHasher};
use super::{Content, DatasetError, Fingerprint, Progress, SplitInfo, open};

/// How many bad samples a report lists; it counts all.
const BAD_LISTED_MAX: usize = 10;

/// Samples between two reports of progress.
const PROGRESS_STEP: u64 = 256;

/// What was found.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    /// What the split says about itself.
    pub info: SplitInfo,
    /// Whether the format stores a checksum per sample.
    pub has_checksums: bool,
    /// How many samples are bad.
    pub n_bad: u64,
    /// The first bad samples.
    pub first_bad: Vec<BadSample>,
    /// The fingerprint's state.
    pub fingerprint: FingerprintCheck,
}

impl VerifyReport {
    /// Whether everything that could be compared was right.
    pub fn is_good(&self) -> bool {
        self.n_bad == 0 && !matches!(self.fingerprint, FingerprintCheck::Differs { .. })
    }
}

/// A bad sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// Which.
    pub sample_idx: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// Whether a split's content is what its fingerprint says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FingerprintCheck {
    /// It is.
    Matches,
    /// It is not: samples or checksums were changed, moved or exchanged.
    Differs {
        /// What the content gives.
        computed: Fingerprint,
    },
    /// The format has none over its content, or labels could not be read.
    NotCompared,
}

/// Looks at an image file: `Err` says what is wrong with it.
pub type CheckImage<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), String>;

/// Reads the whole split and compares; `check_image` is asked about every encoded image.
///
/// # Errors
/// The split cannot be opened; bad samples are no error but in the report.
pub fn verify_split(
    path: &Path,
    split: &str,
    cache_dir: &Path,
    check_image: CheckImage<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<VerifyReport, DatasetError> {
    let samples = open::open_for_verify(path, split, cache_dir)?;
    let info = samples.info().clone();
    let total = info.n_samples;
    let mut hash = Some(ContentHasher::new(info.images, info.label_kind));
    let mut has_checksums = true;
    let mut bad = BadList::default();
    let (mut scratch, mut buffer) = (Vec::new(), Vec::new());
    for sample_idx in 0..total {
        let stored = samples.checksum(sample_idx);
        has_checksums &= stored.is_some();
        match samples.sample(sample_idx, &mut buffer) {
            Ok(sample) => {
                let image = digest::image_bytes(&sample, &mut scratch);
                let computed = super::sample_checksum(image, sample.label);
                if let Some(stored) = stored.filter(|stored| *stored != computed) {
                    bad.add(sample_idx, || {
                        format!("checksum {computed:08x}, but {stored:08x} is stored")
                    });
                }
                if let Content::Encoded(bytes) = sample.content
                    && let Err(what) = check_image(bytes)
                {
                    bad.add(sample_idx, || format!("{}: {what}", samples.sample_name(sample_idx)));
                }
                if let (Some(hash), Some(stored)) = (&mut hash, stored) {
                    hash.add(stored, sample.label);
                }
            }
            Err(error) => {
                hash = None;
                bad.add(sample_idx, || match error {
                    DatasetError::LabelRange { label, n_classes, .. } => {
                        format!("label {label} is not in 0..{n_classes}")
                    }
                    other => other.to_string(),
                });
            }
        }
        if sample_idx % PROGRESS_STEP == 0 || sample_idx + 1 == total {
            progress(Progress { split, done: sample_idx + 1, total });
        }
    }
    let fingerprint = match hash.filter(|_| has_checksums).map(ContentHasher::finish) {
        None => FingerprintCheck::NotCompared,
        Some(computed) if computed == info.fingerprint => FingerprintCheck::Matches,
        Some(computed) => FingerprintCheck::Differs { computed },
    };
    Ok(VerifyReport { info, has_checksums, n_bad: bad.n, first_bad: bad.first, fingerprint })
}

#[derive(Debug, Default)]
struct BadList {
    n: u64,
    first: Vec<BadSample>,
}

impl BadList {
    fn add(&mut self, sample_idx: u64, reason: impl FnOnce() -> String) {
        self.n += 1;
        if self.first.len() < BAD_LISTED_MAX {
            self.first.push(BadSample { sample_idx, reason: reason() });
        }
    }
}
