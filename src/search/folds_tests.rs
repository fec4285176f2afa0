//! Fold plans against what they promise, counted from their indices alone.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::folds::*;

fn options(n_folds: u32, reduced: u64, gate_images: u64, seed: u64) -> FoldOptions {
    FoldOptions { n_folds, reduced, gate_images, seed }
}

/// Labels of classes with these many samples, interleaved.
fn labels(counts: &[usize]) -> Vec<i64> {
    let longest = counts.iter().copied().max().unwrap_or(0);
    let row = |idx: usize| (0i64..).zip(counts).filter(move |(_, n)| idx < **n);
    (0..longest).flat_map(row).map(|(class, _)| class).collect()
}

fn count(samples: &[u64], labels: &[i64], class: usize) -> u64 {
    let is_class =
        |&&idx: &&u64| labels[usize::try_from(idx).unwrap()] == i64::try_from(class).unwrap();
    samples.iter().filter(is_class).count() as u64
}

/// |part − whole · size / total| < 1, in integers.
fn is_proportional(part: u64, whole: u64, size: u64, total: u64) -> bool {
    let (part, whole) = (i128::from(part), i128::from(whole));
    let (size, total) = (i128::from(size), i128::from(total));
    (part * total - whole * size).abs() < total
}

/// Everything that the module promises of a plan, from its indices alone.
fn check_plan(plan: &FoldPlan, labels: &[i64], n_classes: usize) {
    let set = |samples: &[u64]| {
        assert!(samples.is_sorted_by(|a, b| a < b), "ascending, each once");
        samples.iter().copied().collect::<BTreeSet<u64>>()
    };
    let FoldOptions { n_folds, reduced, gate_images, .. } = plan.options;
    let n_samples = labels.len() as u64;
    let gate = set(&plan.gate);
    assert_eq!(gate.len() as u64, gate_images.min(n_samples / 4));
    assert_eq!(plan.gate_note().is_some(), (gate.len() as u64) < gate_images);
    assert_eq!(plan.folds.len(), n_folds as usize);
    let mut searched = BTreeSet::new();
    for fold in &plan.folds {
        for sample in set(&fold.held_out) {
            assert!(searched.insert(sample), "sample {sample} is held out twice");
            assert!(!gate.contains(&sample) && sample < n_samples);
        }
    }
    let n_searched = searched.len() as u64;
    assert_eq!(n_searched, if reduced == 0 { n_samples - gate.len() as u64 } else { reduced });
    let searched_list: Vec<u64> = searched.iter().copied().collect();
    let n_left = n_samples - gate.len() as u64;
    for (fold_idx, fold) in plan.folds.iter().enumerate() {
        let rest = &searched - &set(&fold.held_out);
        assert_eq!(set(&fold.train), rest, "D_M is the searched samples without D_A");
        assert!(is_proportional(fold.held_out.len() as u64, n_searched, 1, n_folds.into()));
        for class in 0..n_classes {
            let whole = count(&searched_list, labels, class);
            let part = count(&fold.held_out, labels, class);
            assert!(is_proportional(part, whole, 1, n_folds.into()), "class {class}");
            let train = count(&fold.train, labels, class);
            assert!(is_proportional(train, whole, u64::from(n_folds) - 1, n_folds.into()));
            assert!(whole == 0 || part > 0, "class {class} is not in D_A of {fold_idx}");
            assert_eq!(plan.class_counts.held_out[fold_idx][class], part);
        }
    }
    for class in 0..n_classes {
        let counts = &plan.class_counts;
        let all =
            labels.iter().filter(|&&label| usize::try_from(label).unwrap() == class).count() as u64;
        let in_gate = count(&plan.gate, labels, class);
        let in_search = count(&searched_list, labels, class);
        assert!(is_proportional(in_gate, all, plan.gate.len() as u64, n_samples));
        assert!(is_proportional(in_search, all - in_gate, n_searched, n_left));
        assert_eq!((counts.split[class], counts.gate[class]), (all, in_gate));
        assert_eq!(counts.searched[class], in_search);
    }
}

proptest! {
    #[test]
    fn plans_keep_every_promise(
        counts in prop::collection::vec(
            prop_oneof![Just(0usize), 14usize..60, 100usize..400], 2..6),
        n_folds in 2u32..8,
        gate_images in 1u64..200,
        reduced_share in prop_oneof![Just(0.0), 0.7f64..=1.0],
        seed: u64,
    ) {
        prop_assume!(counts.iter().filter(|&&n| n > 0).count() >= 2);
        let labels = labels(&counts);
        let n_classes = counts.len();
        let n_classes_u32 = u32::try_from(n_classes).unwrap();
        let n_left = labels.len() as u64 - gate_images.min(labels.len() as u64 / 4);
        #[allow(clippy::cast_possible_truncation, reason = "a share of a small number")]
        let reduced = (n_left as f64 * reduced_share) as u64;
        let options = options(n_folds, reduced, gate_images, seed);
        let plan = match plan_folds(&labels, n_classes_u32, &options) {
            Ok(plan) => plan,
            // The bound that the message gives is enough.
            Err(FoldError::ReducedTooSmall { reduced_min, .. }) => {
                let options = FoldOptions { reduced: reduced_min, ..options };
                plan_folds(&labels, n_classes_u32, &options).unwrap()
            }
            Err(error) => panic!("{error}"),
        };
        let options = plan.options;
        check_plan(&plan, &labels, n_classes);
        let again = plan_folds(&labels, n_classes_u32, &options).unwrap();
        prop_assert_eq!(again.digest(), plan.digest());
        prop_assert_eq!(&again, &plan);
        let other = FoldOptions { seed: seed ^ 1, ..options };
        let other = plan_folds(&labels, n_classes_u32, &other).unwrap();
        prop_assert_ne!(&other.folds, &plan.folds);
        prop_assert_eq!(other.class_counts, plan.class_counts);
        // Another K or subset is judged on the same images.
        let other = FoldOptions { n_folds: 2, reduced: 0, ..options };
        let other = plan_folds(&labels, n_classes_u32, &other).unwrap();
        prop_assert_eq!(other.gate, plan.gate);
    }

    #[test]
    fn any_input_gives_a_plan_or_an_error(
        labels in prop::collection::vec(-2i64..5, 0..60),
        n_classes in 0u32..6,
        n_folds in 0u32..6,
        reduced in 0u64..80,
        gate_images in 0u64..40,
    ) {
        let options = options(n_folds, reduced, gate_images, 1);
        if let Ok(plan) = plan_folds(&labels, n_classes, &options) {
            check_plan(&plan, &labels, n_classes as usize);
            prop_assert!(!plan.gate.is_empty());
        }
    }

    /// Against the textbook: hand out one seat at a time to the largest remainder left.
    #[test]
    fn apportioning_is_by_largest_remainder(
        counts in prop::collection::vec(0u64..50, 1..8),
        share in 0.0f64..=1.0,
    ) {
        let sum: u64 = counts.iter().sum();
        prop_assume!(sum > 0);
        #[allow(clippy::cast_possible_truncation, reason = "a share of a small number")]
        let total = (sum as f64 * share) as u64;
        let mut remainders: Vec<u64> = counts.iter().map(|n| n * total % sum).collect();
        let mut expected: Vec<u64> = counts.iter().map(|n| n * total / sum).collect();
        while expected.iter().sum::<u64>() < total {
            let largest = *remainders.iter().max().unwrap();
            let class = remainders.iter().position(|&r| r == largest).unwrap();
            remainders[class] = 0;
            expected[class] += 1;
        }
        prop_assert_eq!(apportion(&counts, total), expected);
    }
}

/// Any change to the choice of samples would silently change every search's result. The values
/// come from an independent computation in Python: Philox keys, sorted, sliced `[fold::2]`.
#[test]
fn the_choice_of_samples_is_pinned() {
    let plan = plan_folds(&labels(&[8, 8]), 2, &options(2, 0, 4, 7)).unwrap();
    assert_eq!(plan.gate, GOLDEN_GATE);
    assert_eq!(plan.folds[0].held_out, GOLDEN_HELD_OUT);
    assert_eq!(plan.digest(), GOLDEN_DIGEST);
    let summary = plan.summary();
    assert_eq!((summary.n_gate, summary.n_searched), (4, 12));
    let text = serde_json::to_string(&summary).unwrap();
    assert_eq!(serde_json::from_str::<FoldSummary>(&text).unwrap(), summary);
}

const GOLDEN_GATE: [u64; 4] = [1, 3, 10, 12];
const GOLDEN_HELD_OUT: [u64; 6] = [2, 4, 6, 7, 11, 15];
const GOLDEN_DIGEST: &str = "ca645a3e154b2bfa57ebabca708c73dafd431ddd6adf705ce336394e802b7d9e";

#[test]
fn errors_name_the_place_and_the_cure() {
    let check = |counts: &[usize], n_classes: u32, options: FoldOptions, expected: &[&str]| {
        let error = plan_folds(&labels(counts), n_classes, &options).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "'{error}' lacks '{part}'");
        }
    };
    let good = options(5, 0, 10, 0);
    check(&[50, 50], 2, options(1, 0, 10, 0), &["search.folds = 1", "2 to 64"]);
    check(&[50, 50], 2, options(65, 0, 10, 0), &["search.folds = 65"]);
    check(&[50, 50], 2, options(5, 0, 0, 0), &["gate_images = 0", "at least 1"]);
    check(&[50, 50], 1, good, &["1 class(es)", "2 to"]);
    check(&[50, 50, 50], 2, good, &["sample 2 ", "label 2", "0 to 1"]);
    check(&[], 2, good, &["no samples"]);
    check(&[0, 50], 2, good, &["all 50 samples", "label 1", "two classes"]);
    check(&[50, 4], 2, good, &["class 1 has 4", "5 folds", "lower search.folds"]);
    check(&[50, 50], 2, options(5, 91, 10, 0), &["= 91", "100 samples", "10 are", "most 90"]);
    check(&[90, 10], 2, options(5, 30, 10, 0), &["class 1 gets 3", "to 50 or more"]);
    let error = plan_folds(&[0, 1, -1], 2, &good).unwrap_err();
    assert_eq!(error, FoldError::LabelRange { sample_idx: 2, label: -1, n_classes: 2 });
}

#[test]
fn the_papers_subset_of_cifar_is_exact() {
    let plan = plan_folds(&labels(&[5000; 10]), 10, &options(5, 4000, 10_000, 0)).unwrap();
    assert_eq!((plan.gate.len(), plan.gate_note()), (10_000, None));
    for fold in &plan.folds {
        assert_eq!((fold.train.len(), fold.held_out.len()), (3200, 800));
    }
    assert_eq!(plan.class_counts.searched, [400; 10]);
}
