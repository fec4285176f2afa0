//! Tests of the two density-matching algorithms, on a lab whose truth is known.

use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use super::objective::{Floor, Measured};
use super::paper::{Paper, ProposerKind};
use super::structured::{Aim, Pairs, SUB_POLICIES_MAX, Structured};
use super::{Algorithm, Context, Proposal};
use crate::augment::{DrawnOp, PreparedPolicy};
use crate::policy::{Op, OpsProfile, Policy, none};
use crate::random::{Purpose, SampleRng, mix64};
use crate::search::affinity::AffinityTable;
use crate::search::error::SearchError;
use crate::search::journal::JournalHeader;
use crate::search::lab::{Change, Evaluation, Lab, LabError, Score, TrainOn, Training};
use crate::search::ledger::{JOURNAL_VERSION, Ledger};
use crate::search::proposer::{Proposer as _, Tpe, TpeSettings};
use crate::search::space::{FoldedOp, Point, PolicySpace};

#[path = "synthetic.rs"]
mod synthetic;
use synthetic::{SyntheticLab, share_of};

const SEED: u64 = 7;
/// Enough to find something in, little enough for a test.
const SMALL: Structured = Structured {
    n_pairs: 192,
    pairs: Pairs::Grid,
    budget_points: 5.0,
    aim: Aim::Price,
    has_floor: true,
};

fn small_paper() -> Paper {
    Paper { n_rounds: 1, n_trials: 60, n_best: 5, n_draws: 1, ..Paper::default() }
}

fn ledger(folder: &Path, n_threads: usize) -> Ledger {
    let header = JournalHeader {
        version: JOURNAL_VERSION,
        dataset: "synthetic".to_owned(),
        config: String::new(),
        seed: SEED,
    };
    Ledger::open(&folder.join("journal"), &header, n_threads, 0, |_| {}).unwrap().0
}

/// The lab's affinity table, which every test needs but none is about.
fn affinity(lab: &SyntheticLab) -> AffinityTable {
    let folder = tempfile::tempdir().unwrap();
    AffinityTable::measure(lab, &ledger(folder.path(), 2)).unwrap()
}

fn run_with(
    lab: &dyn Lab,
    affinity: &AffinityTable,
    ledger: &Ledger,
    algorithm: &dyn Algorithm,
) -> Result<Proposal, SearchError> {
    let incumbent = none();
    let context =
        Context { lab, ledger, seed: SEED, round: 1, incumbent: &incumbent, affinity, name: "r1" };
    algorithm.propose(&context)
}

fn run(lab: &SyntheticLab, algorithm: &dyn Algorithm) -> Proposal {
    let folder = tempfile::tempdir().unwrap();
    run_with(lab, &affinity(lab), &ledger(folder.path(), 2), algorithm).unwrap()
}

fn truth(lab: &SyntheticLab, policy: &Policy) -> (f64, Change) {
    let (with, without) = lab.truth(&PreparedPolicy::new(policy));
    (with.against(&without).loss_gain, with.change)
}

#[test]
fn the_plain_objective_collapses_to_identity_and_the_floor_holds_it() {
    let lab = SyntheticLab::new(1, 3, 200, &[]);
    let floor = Floor::new(&affinity(&lab));
    let bare = Structured { aim: Aim::LeastLoss, has_floor: false, ..SMALL };
    let (_, change) = truth(&lab, &run(&lab, &bare).policy);
    assert!(change.changed < 0.1, "least loss without a floor is near identity: {change:?}");
    assert!(!floor.admits(change));
    for aim in [Aim::LeastLoss, Aim::Price] {
        let (_, change) = truth(&lab, &run(&lab, &Structured { aim, ..SMALL }).policy);
        assert!(floor.admits(Change { changed: change.changed + 0.03, ..change }), "{change:?}");
    }
    let least = Structured { aim: Aim::LeastLoss, ..SMALL };
    let (_, least) = truth(&lab, &run(&lab, &least).policy);
    let (cost, price) = truth(&lab, &run(&lab, &SMALL).policy);
    // Least loss above the floor is the weakest admissible distortion; the price is not.
    assert!(price.distance > 1.5 * least.distance, "{price:?} vs {least:?}");
    assert!(cost > 0.0 && price.changed > 0.8, "{cost} {price:?}");
}

#[test]
fn the_papers_objective_drifts_towards_identity() {
    let lab = SyntheticLab::new(1, 1, 100, &[]);
    let paper = Paper { n_trials: 160, ..small_paper() };
    let (cost, found) = truth(&lab, &run(&lab, &paper).policy);
    let random = Paper { n_best: 160, proposer: ProposerKind::Random, ..paper };
    let (random_cost, random) = truth(&lab, &run(&lab, &random).policy);
    assert!(random.changed > 0.7, "{random:?}");
    assert!(found.changed < 0.7, "below the floor: {found:?}");
    assert!(found.distance < 0.7 * random.distance, "{found:?} vs {random:?}");
    assert!(cost < 0.5 * random_cost, "{cost} vs {random_cost}");
}

#[test]
fn what_the_data_varies_in_gets_the_weight() {
    let structured = Structured { n_pairs: 512, ..SMALL };
    let (mut with_it, mut without_it) = (Vec::new(), Vec::new());
    for (seed, op) in (20..22).flat_map(|seed| [(seed, Op::Rotate), (seed, Op::Brightness)]) {
        let with = run(&SyntheticLab::new(seed, 3, 200, &[op]), &structured).policy;
        let without = run(&SyntheticLab::new(seed, 3, 200, &[]), &structured).policy;
        with_it.push(share_of(&with, op));
        without_it.push(share_of(&without, op));
    }
    let pairs = with_it.iter().zip(&without_it);
    assert!(pairs.clone().all(|(with, without)| with > without), "{with_it:?} {without_it:?}");
    let mean = |shares: &[f64]| shares.iter().sum::<f64>() / shares.len() as f64;
    let (with, without) = (mean(&with_it), mean(&without_it));
    assert!(with > 0.35 && with > 2.0 * without, "{with_it:?} {without_it:?}");
}

#[test]
fn proposals_are_small_weighted_and_valid() {
    let lab = SyntheticLab::new(3, 3, 200, &[Op::ShearX]);
    let random = Pairs::Proposed(ProposerKind::Random);
    for pairs in [Pairs::Grid, Pairs::Proposed(ProposerKind::Tpe), random] {
        let found = run(&lab, &Structured { pairs, ..SMALL });
        let subs = found.policy.sub_policies();
        assert!((5..=SUB_POLICIES_MAX).contains(&subs.len()), "{pairs:?}: {}", subs.len());
        assert!(subs.iter().all(|sub| sub.weight > 0.0 && (1..=2).contains(&sub.ops.len())));
        assert!((subs.iter().map(|sub| sub.weight).sum::<f64>() - 1.0).abs() < 0.01);
        for op in Op::ALL {
            assert!(share_of(&found.policy, op) < 0.51, "{pairs:?}: {op:?}");
        }
        assert_eq!((found.policy.name(), found.policy.ops_profile()), ("r1", OpsProfile::Fastaa));
        assert!(found.trials.len() > 100, "{pairs:?}: {}", found.trials.len());
        assert!(found.trials.iter().zip(0..).all(|(trial, idx)| trial.trial == idx));
        let (cost, _) = truth(&lab, &found.policy);
        assert!(cost < found.details["budget_nats"].as_f64().unwrap() * 1.3, "{cost}");
    }
    let paper = small_paper();
    let found = run(&lab, &paper);
    // Five sub-policies of each of five trials per fold, but for exact duplicates.
    let n_duplicates = found.details["duplicates"].as_u64().unwrap();
    assert_eq!(found.policy.sub_policies().len() as u64 + n_duplicates, 3 * 5 * 5);
    assert!(n_duplicates < 5, "{n_duplicates}");
    assert!(
        found
            .policy
            .sub_policies()
            .iter()
            .all(|sub| sub.ops.len() == 2 && (sub.weight - 1.0).abs() < 1e-12)
    );
    assert_eq!(found.trials.len(), 3 * 60);
    for fold in 0..3 {
        let trials = found.trials.iter().filter(|trial| trial.fold == Some(fold));
        assert!(trials.map(|trial| trial.trial).eq(0..60));
    }
}

#[test]
fn passes_are_what_the_lab_counts() {
    let lab = SyntheticLab::new(4, 3, 100, &[]);
    let table = affinity(&lab);
    let count = |algorithm: &dyn Algorithm| {
        let folder = tempfile::tempdir().unwrap();
        let before = lab.n_passes();
        let ledger = ledger(folder.path(), 2);
        run_with(&lab, &table, &ledger, algorithm).unwrap();
        assert_eq!(ledger.cost("").1, lab.n_passes() - before, "{}", algorithm.name());
        lab.n_passes() - before
    };
    let paper = Paper { n_rounds: 2, n_trials: 30, n_draws: 2, ..small_paper() };
    assert_eq!(count(&paper), paper.passes(&lab));
    let random = Pairs::Proposed(ProposerKind::Random);
    for pairs in [Pairs::Grid, random] {
        let structured = Structured { pairs, ..SMALL };
        let (counted, bound) = (count(&structured), structured.passes(&lab));
        assert!(counted <= bound && counted > bound / 2, "{counted} of {bound}");
    }
}

#[test]
fn a_round_costs_an_eighth_of_the_papers() {
    let lab = SyntheticLab::new(0, 5, 800, &[]);
    assert_eq!(Paper::default().passes(&lab), 8_000_000);
    let passes = Structured::default().passes(&lab);
    assert!(passes < 1_000_000, "{passes}");
}

/// A lab that dies after a number of questions, as a killed search does.
struct Dying<'a> {
    lab: &'a SyntheticLab,
    left: Mutex<u64>,
}

impl Lab for Dying<'_> {
    fn n_folds(&self) -> usize {
        self.lab.n_folds()
    }

    fn n_held_out(&self, fold: usize) -> usize {
        self.lab.n_held_out(fold)
    }

    fn passes(&self, on: TrainOn) -> u64 {
        Lab::passes(self.lab, on)
    }

    fn score(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Vec<Score>, LabError> {
        let mut left = self.left.lock().unwrap();
        *left = left.checked_sub(1).ok_or_else(|| LabError::Failed("killed".to_owned()))?;
        drop(left);
        self.lab.score(fold, images, policy, n_draws)
    }

    fn change(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Change, LabError> {
        self.lab.change(fold, images, policy, n_draws)
    }

    fn train(&self, training: &Training<'_>) -> Result<Evaluation, LabError> {
        self.lab.train(training)
    }
}

#[test]
fn kills_and_threads_change_nothing() {
    let lab = SyntheticLab::new(5, 3, 100, &[Op::Cutout]);
    let table = affinity(&lab);
    let tpe = Pairs::Proposed(ProposerKind::Tpe);
    let proposed = Structured { n_pairs: 128, pairs: tpe, ..SMALL };
    let paper = Paper { n_trials: 35, ..small_paper() };
    let algorithms: [&dyn Algorithm; 3] = [&paper, &SMALL, &proposed];
    for algorithm in algorithms {
        let shown =
            |found: &Proposal| (found.policy.clone(), found.trials.clone(), found.details.clone());
        let folder = tempfile::tempdir().unwrap();
        let whole = run_with(&lab, &table, &ledger(folder.path(), 1), algorithm).unwrap();
        // Again on the finished journal: nothing is measured.
        let before = lab.n_passes();
        let again = run_with(&lab, &table, &ledger(folder.path(), 4), algorithm).unwrap();
        assert_eq!((shown(&again), lab.n_passes()), (shown(&whole), before));
        for (n_threads, n_questions) in [(2, 30), (4, 90)] {
            let folder = tempfile::tempdir().unwrap();
            let dying = Dying { lab: &lab, left: Mutex::new(n_questions) };
            let killed = run_with(&dying, &table, &ledger(folder.path(), n_threads), algorithm);
            assert!(killed.unwrap_err().to_string().contains("killed"));
            let found = run_with(&lab, &table, &ledger(folder.path(), n_threads), algorithm);
            assert_eq!(shown(&found.unwrap()), shown(&whole), "{}", algorithm.name());
        }
    }
}

/// Every point in the journal is what its proposer says to the trials before it, all of them
/// finished, and to no other.
#[test]
fn no_proposal_is_fitted_on_unfinished_trials() {
    let lab = SyntheticLab::new(6, 2, 40, &[]);
    let (folder, paper) = (tempfile::tempdir().unwrap(), small_paper());
    let ledger = ledger(folder.path(), 4);
    run_with(&lab, &AffinityTable::default(), &ledger, &paper).unwrap();
    for fold in 0..2_u64 {
        let seed = mix64(SEED ^ mix64(1 << 40 | fold << 32));
        let space = PolicySpace::paper().space().clone();
        let tpe = Tpe::new(space, seed, TpeSettings::POLICIES).unwrap();
        let mut history: Vec<(Point, f64)> = Vec::new();
        for trial in 0..paper.n_trials {
            let key = format!("round-1/trial/{fold}/0/{trial}");
            let value: Value = ledger.finished(&key).unwrap().unwrap();
            let point: Point = serde_json::from_value(value["point"].clone()).unwrap();
            assert_eq!(point, tpe.propose(&history, trial), "fold {fold}, trial {trial}");
            history.push((point, value["loss"].as_f64().unwrap()));
        }
    }
}

#[test]
fn a_later_round_tries_something_else() {
    let (folder, lab) = (tempfile::tempdir().unwrap(), SyntheticLab::new(6, 2, 100, &[]));
    let (table, ledger, incumbent) = (affinity(&lab), ledger(folder.path(), 2), none());
    let paper = Paper { n_trials: 25, ..small_paper() };
    let algorithms: [&dyn Algorithm; 2] = [&paper, &SMALL];
    for algorithm in algorithms {
        let found = [1, 2].map(|round| {
            let (lab, ledger, incumbent, affinity) = (&lab, &ledger, &incumbent, &table);
            let (seed, name) = (SEED, "any");
            algorithm
                .propose(&Context { lab, ledger, seed, round, incumbent, affinity, name })
                .unwrap()
                .policy
                .id()
        });
        assert_ne!(found[0], found[1], "{}", algorithm.name());
    }
}

#[test]
fn too_few_images_and_too_strict_a_budget_are_told() {
    let (folder, lab) = (tempfile::tempdir().unwrap(), SyntheticLab::new(6, 2, 20, &[]));
    let table = AffinityTable::default();
    let error = run_with(&lab, &table, &ledger(folder.path(), 1), &SMALL).unwrap_err().to_string();
    assert!(error.contains("fold 1 holds 20 images out"), "{error}");
    let (folder, lab) = (tempfile::tempdir().unwrap(), SyntheticLab::new(6, 2, 60, &[]));
    let strict = Structured { budget_points: 1e-9, ..SMALL };
    let error = run_with(&lab, &table, &ledger(folder.path(), 1), &strict).unwrap_err().to_string();
    assert!(error.contains("no pair of operations"), "{error}");
}

#[test]
fn another_search_s_units_are_refused() {
    let (folder, lab) = (tempfile::tempdir().unwrap(), SyntheticLab::new(6, 2, 60, &[]));
    let ledger = ledger(folder.path(), 1);
    ledger.unit("round-1/corners/singles-0/0/0", 0, || Ok(Value::Array(Vec::new()))).unwrap();
    let error = run_with(&lab, &AffinityTable::default(), &ledger, &SMALL).unwrap_err().to_string();
    assert!(error.contains("move the journal away"), "{error}");
}
