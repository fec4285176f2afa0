//! One split divided in two: a part of every class, chosen by a seed.

use std::collections::BTreeMap;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::{DatasetError, Label, Sample, Split, SplitInfo};

/// How a split is divided.
#[derive(Clone, Copy, Debug)]
pub struct Division {
    /// Part of every class that goes to the first split, above 0 and below 1.
    pub fraction: f64,
    /// Which samples these are.
    pub seed: u64,
}

/// Some samples of a split, in the order of the whole.
#[derive(Debug)]
pub(super) struct Subset {
    whole: Arc<dyn Split>,
    sample_idxs: Vec<u64>,
    info: SplitInfo,
}

impl Division {
    /// The two parts; of each class, the samples whose hash by the seed is smallest go to the
    /// first: round(fraction * n) of them, and at least one to each part where there are two.
    ///
    /// # Errors
    /// Labels are vectors, a class cannot be read, or a part would be empty.
    pub(super) fn of(
        self,
        whole: &Arc<dyn Split>,
        name: &str,
    ) -> Result<[Subset; 2], DatasetError> {
        let mut classes: BTreeMap<i64, Vec<u64>> = BTreeMap::new();
        for sample_idx in 0..whole.info().n_samples {
            let Label::Class(class) = whole.label(sample_idx)? else {
                let what = "its labels are vectors, which have no classes to divide by; name the \
                            splits' files instead";
                return Err(DatasetError::unsupported(name, what));
            };
            classes.entry(class).or_default().push(sample_idx);
        }
        let mut parts = [Vec::new(), Vec::new()];
        for mut samples in classes.into_values() {
            samples.sort_by_cached_key(|sample_idx| self.hash(*sample_idx));
            let n = samples.len();
            #[allow(clippy::cast_possible_truncation, reason = "between 0 and n")]
            let wanted = (n as f64 * self.fraction).round() as usize;
            let n_first = if n < 2 { wanted } else { wanted.clamp(1, n - 1) };
            parts[1].extend(samples.split_off(n_first));
            parts[0].extend(samples);
        }
        let [mut first, mut second] = parts;
        first.sort_unstable();
        second.sort_unstable();
        if first.is_empty() || second.is_empty() {
            let what = "too few samples to divide: one part would be empty";
            return Err(DatasetError::unsupported(name, what));
        }
        Ok([first, second].map(|sample_idxs| Subset::new(Arc::clone(whole), sample_idxs)))
    }

    fn hash(self, sample_idx: u64) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(self.seed.to_le_bytes());
        hash.update(sample_idx.to_le_bytes());
        hash.finalize().into()
    }
}

impl Subset {
    fn new(whole: Arc<dyn Split>, sample_idxs: Vec<u64>) -> Self {
        let info = SplitInfo { n_samples: sample_idxs.len() as u64, ..whole.info().clone() };
        Self { whole, sample_idxs, info }
    }

    fn of_whole(&self, sample_idx: u64) -> u64 {
        self.sample_idxs[usize::try_from(sample_idx).expect("below a list's length")]
    }
}

impl Split for Subset {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        self.whole.sample(self.of_whole(sample_idx), buffer)
    }

    fn will_need(&self, sample_idx: u64) {
        self.whole.will_need(self.of_whole(sample_idx));
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        self.whole.label(self.of_whole(sample_idx))
    }

    fn sample_name(&self, sample_idx: u64) -> String {
        self.whole.sample_name(self.of_whole(sample_idx))
    }

    fn checksum(&self, sample_idx: u64) -> Option<u32> {
        self.whole.checksum(self.of_whole(sample_idx))
    }
}
