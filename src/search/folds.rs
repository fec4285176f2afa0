//! The search's samples: D_gate, and K stratified, disjoint folds of the rest.
//!
//! Owns which sample of a train split serves for what. Never reads a sample: labels by index are
//! all it sees.
//!
//! *Invariants*
//!
//! * D_gate shares no sample with any fold. The held-out parts (D_A) of the folds are disjoint and
//!   cover the searched samples; a fold's D_M is the searched samples without its D_A.
//! * Everything is stratified: for each class, the count in D_gate and among the searched samples
//!   differs from the exact proportion by less than one, and so does its count in each D_A and D_M
//!   from its share of the searched samples. The totals are exact, and sizes of D_A differ by at
//!   most one.
//! * A plan is a pure function of (labels, number of classes, options).
//! * D_gate depends on neither K nor `reduced`: another search is judged on the same images.
//!
//! *Limits*: [`limits::FOLDS_MAX`], [`limits::CLASSES_MAX`].
//!
//! *Source*: Fast AutoAugment (arXiv 1905.00397), Algorithm 1: K stratified folds of (D_M, D_A).
//! The published code takes overlapping random splits instead; these are true folds.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::limits;
use crate::random::{Purpose, SampleRng};

/// D_gate takes at most one in so many samples of the split, however many are asked for.
const GATE_SHARE_MAX: u64 = 4;

/// Names the encoding that [`FoldPlan::digest`] hashes.
const DIGEST_TAG: &[u8] = b"fastaa folds 1\n";

/// What to split into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoldOptions {
    /// Number of folds K, at least 2.
    pub n_folds: u32,
    /// Samples to search on, D_gate not counted; 0: all that D_gate leaves.
    pub reduced: u64,
    /// Samples of D_gate, at least 1. A small split gives fewer: at most a quarter of its samples
    /// go there ([`FoldPlan::gate_note`] says so).
    pub gate_images: u64,
    /// Keys the choice.
    pub seed: u64,
}

/// One fold: sample indices, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fold {
    /// D_M: what the fold's model is trained on.
    pub train: Vec<u64>,
    /// D_A: what candidates are scored on.
    pub held_out: Vec<u64>,
}

/// Samples per class, by class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassCounts {
    /// In the whole split. A class without samples is left out of everything.
    pub split: Vec<u64>,
    /// In D_gate.
    pub gate: Vec<u64>,
    /// In the folds together.
    pub searched: Vec<u64>,
    /// In D_A of each fold; the rest of `searched` is in its D_M.
    pub held_out: Vec<Vec<u64>>,
}

/// Which samples serve for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoldPlan {
    /// What was asked for.
    pub options: FoldOptions,
    /// D_gate: sample indices, ascending; never used for search.
    pub gate: Vec<u64>,
    /// The K folds.
    pub folds: Vec<Fold>,
    /// How the classes are spread.
    pub class_counts: ClassCounts,
}

/// A plan without its indices: small enough for a journal, and enough to know the plan again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoldSummary {
    /// What was asked for.
    pub options: FoldOptions,
    /// Samples in D_gate.
    pub n_gate: u64,
    /// Samples in the folds together.
    pub n_searched: u64,
    /// How the classes are spread.
    pub class_counts: ClassCounts,
    /// [`FoldPlan::digest`].
    pub digest: String,
}

/// Why a split cannot be folded. Counts are samples.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// K is out of range.
    #[error("search.folds = {n_folds}: use 2 to {} folds", limits::FOLDS_MAX)]
    FoldCount {
        /// K.
        n_folds: u32,
    },
    /// No D_gate, so nothing could ever be published.
    #[error(
        "search.gate_images = 0: nothing can be published without a D_gate; set it to at least 1 \
         (1000 or more to see small gains)"
    )]
    NoGate,
    /// The number of classes is out of range.
    #[error(
        "the train split has {n_classes} class(es): a search needs 2 to {}; search another \
         dataset, or set search.enabled = false",
        limits::CLASSES_MAX
    )]
    ClassCount {
        /// As the split's description has it.
        n_classes: u32,
    },
    /// A label that is no class.
    #[error(
        "sample {sample_idx} of the train split has label {label}, but classes are 0 to {}; repair \
         its labels and pack the dataset again",
        .n_classes - 1
    )]
    LabelRange {
        /// The first such sample.
        sample_idx: u64,
        /// Its label.
        label: i64,
        /// As the split's description has it.
        n_classes: u32,
    },
    /// No samples.
    #[error("the train split has no samples to search on; check the dataset's path")]
    Empty,
    /// Nothing to tell apart.
    #[error(
        "all {n_samples} samples of the train split have label {class}: a search needs at least \
         two classes; check the labels, or set search.enabled = false"
    )]
    OneClass {
        /// The only class.
        class: u32,
        /// Samples in the split.
        n_samples: u64,
    },
    /// A class that cannot be in every fold.
    #[error(
        "class {class} has {n_samples} samples in the train split, {n_gate} of them in D_gate: the \
         other {} are too few for {n_folds} folds; leave this class out of the dataset, or lower \
         search.folds (at least 2) or search.gate_images",
        .n_samples - .n_gate
    )]
    ClassTooSmall {
        /// The class.
        class: u32,
        /// Its samples in the split.
        n_samples: u64,
        /// Those that go to D_gate.
        n_gate: u64,
        /// K.
        n_folds: u32,
    },
    /// More samples wanted than there are.
    #[error(
        "search.reduced = {reduced}: of the train split's {n_samples} samples, {n_gate} are in \
         D_gate, so at most {n_left} are left; lower it, or set it to 0 for all of them"
    )]
    ReducedTooLarge {
        /// As configured.
        reduced: u64,
        /// Samples in the split.
        n_samples: u64,
        /// Samples in D_gate.
        n_gate: u64,
        /// Samples beside D_gate.
        n_left: u64,
    },
    /// A class whose share of the subset cannot be in every fold.
    #[error(
        "search.reduced = {reduced}: class {class} gets {n_class} of these samples, too few for \
         {n_folds} folds; raise it to {reduced_min} or more (0: all samples), or lower search.folds"
    )]
    ReducedTooSmall {
        /// As configured.
        reduced: u64,
        /// The class.
        class: u32,
        /// Its samples in the subset.
        n_class: u64,
        /// K.
        n_folds: u32,
        /// From here on every class has enough.
        reduced_min: u64,
    },
}

/// Splits a train split, given its labels by sample index, into D_gate and K folds.
///
/// For each class, samples are put into a random order by a key of their own, a function of (seed,
/// sample index): the first go to D_gate, then, in an order of its own, the next to the searched
/// samples. Those are dealt to the folds in turn, each class going on where the one before it
/// ended. How many a class gives to D_gate and to the search is its exact share rounded by
/// largest remainder.
///
/// # Errors
/// A split or options that cannot give such a plan; see [`FoldError`].
pub fn plan_folds(
    labels: &[i64],
    n_classes: u32,
    options: &FoldOptions,
) -> Result<FoldPlan, FoldError> {
    check_options(options)?;
    let mut members = members_by_class(labels, n_classes)?;
    let split_counts = lengths(&members);
    let n_samples = labels.len() as u64;
    let n_gate = options.gate_images.min(n_samples / GATE_SHARE_MAX);
    let gate_counts = apportion(&split_counts, n_gate);
    check_class_sizes(&split_counts, &gate_counts, options.n_folds)?;

    let gate = take_random(&mut members, &gate_counts, options.seed, Purpose::GateOrder);
    let searched_counts = searched_counts(&lengths(&members), n_gate, options)?;
    let searched = take_random(&mut members, &searched_counts, options.seed, Purpose::FoldOrder);

    let n_folds = options.n_folds as usize;
    let held_out_counts = deal(&searched, n_folds).map(|part| lengths(&part)).collect();
    let folds = deal(&searched, n_folds).map(|part| fold_from(&searched, part)).collect();
    Ok(FoldPlan {
        options: *options,
        gate: ascending(gate),
        folds,
        class_counts: ClassCounts {
            split: split_counts,
            gate: gate_counts,
            searched: searched_counts,
            held_out: held_out_counts,
        },
    })
}

impl FoldPlan {
    /// What to tell the user when D_gate is smaller than configured, else `None`.
    pub fn gate_note(&self) -> Option<String> {
        let (n_asked, n_gate) = (self.options.gate_images, self.gate.len() as u64);
        let n_samples: u64 = self.class_counts.split.iter().sum();
        (n_gate < n_asked).then(|| {
            format!(
                "D_gate has {n_gate} samples instead of search.gate_images = {n_asked}: at most a \
                 quarter of the split's {n_samples} samples are kept from the search"
            )
        })
    }

    /// SHA-256 over the options and all indices, as 64 hex digits: equal iff the plans are.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(DIGEST_TAG);
        let FoldOptions { n_folds, reduced, gate_images, seed } = self.options;
        for number in [u64::from(n_folds), reduced, gate_images, seed] {
            hash.update(number.to_le_bytes());
        }
        let parts = self.folds.iter().flat_map(|fold| [&fold.train, &fold.held_out]);
        for part in std::iter::once(&self.gate).chain(parts) {
            hash.update((part.len() as u64).to_le_bytes());
            for sample_idx in part {
                hash.update(sample_idx.to_le_bytes());
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What a journal keeps of the plan.
    pub fn summary(&self) -> FoldSummary {
        FoldSummary {
            options: self.options,
            n_gate: self.gate.len() as u64,
            n_searched: self.class_counts.searched.iter().sum(),
            class_counts: self.class_counts.clone(),
            digest: self.digest(),
        }
    }
}

fn check_options(options: &FoldOptions) -> Result<(), FoldError> {
    if !(2..=limits::FOLDS_MAX).contains(&options.n_folds) {
        return Err(FoldError::FoldCount { n_folds: options.n_folds });
    }
    if options.gate_images == 0 {
        return Err(FoldError::NoGate);
    }
    Ok(())
}

/// Sample indices by class, ascending. At least two classes have some.
fn members_by_class(labels: &[i64], n_classes: u32) -> Result<Vec<Vec<u64>>, FoldError> {
    if !(2..=limits::CLASSES_MAX).contains(&n_classes) {
        return Err(FoldError::ClassCount { n_classes });
    }
    let mut members = vec![Vec::new(); n_classes as usize];
    for (sample_idx, &label) in (0..).zip(labels) {
        let class = usize::try_from(label).ok().and_then(|class| members.get_mut(class));
        let Some(class) = class else {
            return Err(FoldError::LabelRange { sample_idx, label, n_classes });
        };
        class.push(sample_idx);
    }
    let mut present = (0..).zip(&members).filter(|(_, samples)| !samples.is_empty());
    match (present.next(), present.next()) {
        (None, _) => Err(FoldError::Empty),
        (Some((class, samples)), None) => {
            Err(FoldError::OneClass { class, n_samples: samples.len() as u64 })
        }
        _ => Ok(members),
    }
}

/// Every class that is there can be in every fold once D_gate has its share.
fn check_class_sizes(split: &[u64], gate: &[u64], n_folds: u32) -> Result<(), FoldError> {
    for (class, (&n_samples, &n_gate)) in (0..).zip(split.iter().zip(gate)) {
        if n_samples > 0 && n_samples - n_gate < u64::from(n_folds) {
            return Err(FoldError::ClassTooSmall { class, n_samples, n_gate, n_folds });
        }
    }
    Ok(())
}

/// Samples to search on per class, from those that D_gate leaves.
fn searched_counts(
    left: &[u64],
    n_gate: u64,
    options: &FoldOptions,
) -> Result<Vec<u64>, FoldError> {
    let FoldOptions { n_folds, reduced, .. } = *options;
    let n_left: u64 = left.iter().sum();
    if reduced == 0 {
        return Ok(left.to_vec());
    }
    if reduced > n_left {
        let n_samples = n_left + n_gate;
        return Err(FoldError::ReducedTooLarge { reduced, n_samples, n_gate, n_left });
    }
    let counts = apportion(left, reduced);
    for (class, (&n_class, &n_left_class)) in (0..).zip(counts.iter().zip(left)) {
        if n_left_class > 0 && n_class < u64::from(n_folds) {
            // Enough for the smallest class even if its share is rounded down.
            let smallest = left.iter().copied().filter(|&n| n > 0).min().unwrap_or(1);
            let reduced_min = (u64::from(n_folds) * n_left).div_ceil(smallest);
            return Err(FoldError::ReducedTooSmall {
                reduced,
                class,
                n_class,
                n_folds,
                reduced_min,
            });
        }
    }
    Ok(counts)
}

/// `total` divided in proportion to `counts`, rounded by largest remainder; among equal remainders
/// the lower class comes first. `total` is at most the sum of `counts`, so no class gives more than
/// it has.
pub(super) fn apportion(counts: &[u64], total: u64) -> Vec<u64> {
    let sum: u64 = counts.iter().sum();
    debug_assert!(total <= sum, "{total} of {sum} samples");
    if sum == 0 {
        return counts.to_vec();
    }
    let exact = |count: u64| u128::from(count) * u128::from(total);
    let floor = |count: u64| {
        u64::try_from(exact(count) / u128::from(sum)).expect("a share is at most the total")
    };
    let mut shares: Vec<u64> = counts.iter().map(|&count| floor(count)).collect();
    let n_missing = total - shares.iter().sum::<u64>();
    let mut by_remainder: Vec<usize> = (0..counts.len()).collect();
    by_remainder
        .sort_by_key(|&class| (std::cmp::Reverse(exact(counts[class]) % u128::from(sum)), class));
    // The remainders sum to n_missing times sum, so at least n_missing of them are above zero.
    for class in (0..n_missing).zip(by_remainder).map(|(_, class)| class) {
        shares[class] += 1;
    }
    shares
}

/// Takes `counts[class]` random samples out of each class, in random order.
fn take_random(
    members: &mut [Vec<u64>],
    counts: &[u64],
    seed: u64,
    purpose: Purpose,
) -> Vec<Vec<u64>> {
    let key = |&sample_idx: &u64| {
        let mut rng = SampleRng::new(seed, 0, sample_idx, purpose);
        (rng.next_u32(), rng.next_u32(), sample_idx)
    };
    let take = |(samples, &count): (&mut Vec<u64>, &u64)| {
        samples.sort_by_cached_key(key);
        let count = usize::try_from(count).expect("at most the class's samples, which are here");
        samples.drain(..count).collect()
    };
    members.iter_mut().zip(counts).map(take).collect()
}

/// The samples of each fold's held-out part, by class: the samples, class by class, dealt in turn.
fn deal(searched: &[Vec<u64>], n_folds: usize) -> impl Iterator<Item = Vec<Vec<u64>>> {
    (0..n_folds).map(move |fold| {
        let mut n_dealt = 0;
        let mut part_of_class = |samples: &Vec<u64>| {
            let first = (n_folds + fold - n_dealt % n_folds) % n_folds;
            n_dealt += samples.len();
            samples.iter().skip(first).step_by(n_folds).copied().collect()
        };
        searched.iter().map(&mut part_of_class).collect()
    })
}

fn fold_from(searched: &[Vec<u64>], held_out: Vec<Vec<u64>>) -> Fold {
    let held_out = ascending(held_out);
    let mut train: Vec<u64> = searched.iter().flatten().copied().collect();
    train.retain(|sample_idx| held_out.binary_search(sample_idx).is_err());
    train.sort_unstable();
    Fold { train, held_out }
}

fn lengths(members: &[Vec<u64>]) -> Vec<u64> {
    members.iter().map(|samples| samples.len() as u64).collect()
}

fn ascending(parts: Vec<Vec<u64>>) -> Vec<u64> {
    let mut all: Vec<u64> = parts.into_iter().flatten().collect();
    all.sort_unstable();
    all
}
