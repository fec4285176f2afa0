//! The gate from end to end: a real ledger, and a made-up lab of which the truth is known.

use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use serde_json::Map;

use super::*;
use crate::augment::PreparedPolicy;
use crate::policy::{Magnitude, Op, OpStep, OpsProfile, PolicyId, SubPolicy};
use crate::random::mix64;
use crate::search::journal::JournalHeader;
use crate::search::lab::{Change, Evaluation, LabError, Score, Training};
use crate::search::ledger::JOURNAL_VERSION;
use simulate::Normals;

const N_IMAGES: usize = 4000;
const SETTINGS: GateSettings = GateSettings { n_seeds: 5, seed: 9 };

/// Right with the logit of difficulty + worth of the policy + luck of the seed.
struct MadeUp {
    /// Worth in logits; that of other policies is 0. At 0.1, some 1.2 points.
    worths: Vec<(PolicyId, f64)>,
    /// Diverges with the seed of this index.
    diverging: Option<(PolicyId, u32)>,
    /// Fails once so many trainings were done.
    n_trainings_max: usize,
    trained: Mutex<Vec<(PolicyId, u64)>>,
}

impl MadeUp {
    fn new(worths: &[(&Policy, f64)]) -> Self {
        let worths = worths.iter().map(|(policy, worth)| (policy.id(), *worth)).collect();
        let trained = Mutex::default();
        Self { worths, diverging: None, n_trainings_max: usize::MAX, trained }
    }

    fn n_trained(&self) -> usize {
        self.trained.lock().unwrap().len()
    }
}

impl Lab for MadeUp {
    fn n_folds(&self) -> usize {
        0
    }

    fn n_held_out(&self, _: usize) -> usize {
        0
    }

    fn passes(&self, on: TrainOn) -> u64 {
        assert_eq!(on, TrainOn::Searched);
        30_000
    }

    fn score(
        &self,
        _: usize,
        _: Range<usize>,
        _: &PreparedPolicy,
        _: u32,
    ) -> Result<Vec<Score>, LabError> {
        Err(LabError::Failed("the gate scores nothing".into()))
    }

    fn change(
        &self,
        _: usize,
        _: Range<usize>,
        _: &PreparedPolicy,
        _: u32,
    ) -> Result<Change, LabError> {
        Err(LabError::Failed("the gate looks at no augmented image".into()))
    }

    fn train(&self, training: &Training<'_>) -> Result<Evaluation, LabError> {
        assert_eq!(training.on, TrainOn::Searched, "D_gate is judged on");
        let id = training.policy.id();
        {
            let mut trained = self.trained.lock().unwrap();
            if trained.len() >= self.n_trainings_max {
                return Err(LabError::Failed("the power is out".into()));
            }
            trained.push((id, training.seed));
        }
        let is_seed = |idx: u32| training.seed == mix64(mix64(SETTINGS.seed) ^ u64::from(idx));
        if self.diverging.is_some_and(|(diverging, idx)| diverging == id && is_seed(idx)) {
            let what = "the gate's model".into();
            return Err(LabError::Diverged { what, loss: f64::NAN, step: 7 });
        }
        let worth = self.worths.iter().find(|(known, _)| *known == id).map_or(0.0, |at| at.1);
        let policy = u64::from_le_bytes(id.0[..8].try_into().unwrap());
        let luck = 0.03 * Normals::new(training.seed, policy).next_normal();
        let mut difficulty = Normals::new(1, 1);
        let mut draw = Normals::new(training.seed, policy ^ 1);
        let mut is_right = |_| {
            let logit = 1.5 + 2.0 * difficulty.next_normal() + worth + luck;
            // Mostly the image decides; a tenth of the logit's spread is the training's.
            logit + 0.3 * draw.next_normal() > 0.0
        };
        Ok(Evaluation { right: (0..N_IMAGES).map(&mut is_right).collect(), loss: 0.5 })
    }
}

/// A policy of its own for every number.
fn policy(number: u32) -> Policy {
    let magnitude = Magnitude::Fixed(f64::from(number) / 1000.0);
    let ops = vec![OpStep { op: Op::Rotate, probability: 0.5, magnitude }];
    let sub_policies = vec![SubPolicy { weight: 1.0, ops }];
    Policy::new(format!("p{number}"), OpsProfile::Fastaa, 1, sub_policies, Map::new()).unwrap()
}

fn ledger(dir: &Path, n_threads: usize) -> Ledger {
    let header = JournalHeader {
        version: JOURNAL_VERSION,
        dataset: "d".into(),
        config: "c".into(),
        seed: SETTINGS.seed,
    };
    Ledger::open(&dir.join("search.journal"), &header, n_threads, 0, |_| ()).unwrap().0
}

/// The first test of a search against `none`, in a journal of its own.
fn first_test(lab: &MadeUp, candidate: &Policy) -> Result<Verdict, SearchError> {
    let dir = tempfile::tempdir().unwrap();
    let none = policy::none();
    decide(lab, &ledger(dir.path(), 2), &SETTINGS, 1, candidate, ("cifar10@0", &none))
}

fn roles(verdict: &Verdict) -> Vec<&str> {
    verdict.arms.iter().map(|arm| arm.role.as_str()).collect()
}

#[test]
fn a_real_gain_is_published_with_all_its_evidence() {
    let candidate = policy(1);
    let lab = MadeUp::new(&[(&candidate, 0.3), (&policy::trivial_wide(), 0.1)]);
    let verdict = first_test(&lab, &candidate).unwrap();
    assert!(verdict.is_better, "{verdict:?}");
    assert_eq!((verdict.test, verdict.n_seeds, verdict.n_seeds_max), (1, 5, 5));
    assert_eq!((verdict.n_images, lab.n_trained()), (4000, 15));
    assert!((verdict.alpha - 0.025).abs() < 1e-12);
    assert_eq!(roles(&verdict), ["candidate", "incumbent (none)", "trivial-wide"]);
    let rivals: Vec<_> = verdict.comparisons.iter().map(|one| one.rival.as_str()).collect();
    assert_eq!(rivals, ["incumbent (none)", "trivial-wide"]);
    // The one that was nearest decides.
    let nearest = &verdict.comparisons[1];
    assert!(nearest.lower < verdict.comparisons[0].lower);
    let sentence = format!(
        "published: +{:.2} points over trivial-wide (lower bound +{:.2} at level 0.025, 5 seeds, \
         4,000 images)",
        nearest.gain, nearest.lower
    );
    assert_eq!(verdict.reason, sentence);
    for (comparison, arm) in verdict.comparisons.iter().zip(&verdict.arms[1..]) {
        let mean = |arm: &Arm| arm.accuracy.iter().sum::<f64>() / 5.0;
        let gain = 100.0 * (mean(&verdict.arms[0]) - mean(arm));
        assert!((comparison.gain - gain).abs() < 1e-9);
        assert!(comparison.interval.0 < gain && gain < comparison.interval.1);
        assert!(comparison.se_seeds > 0.0 && comparison.se_images > 0.0);
    }
    assert!(verdict.detectable_gain > 0.1 && verdict.detectable_gain < 3.0, "{verdict:?}");
    // Pairs: every arm had the same five seeds.
    let mut seeds: Vec<u64> = lab.trained.lock().unwrap().iter().map(|(_, seed)| *seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 5);
    let json = serde_json::to_string(&verdict).unwrap();
    assert_eq!(serde_json::from_str::<Verdict>(&json).unwrap(), verdict);
}

#[test]
fn what_is_no_better_or_beats_only_some_is_kept() {
    let candidate = policy(1);
    let lab = MadeUp::new(&[]);
    let verdict = first_test(&lab, &candidate).unwrap();
    assert!(
        !verdict.is_better && verdict.reason.starts_with("not published: "),
        "{}",
        verdict.reason
    );
    // Far better than none, but only as good as trivial-wide.
    let lab = MadeUp::new(&[(&candidate, 0.5), (&policy::trivial_wide(), 0.5)]);
    let verdict = first_test(&lab, &candidate).unwrap();
    assert!(!verdict.is_better && verdict.comparisons[0].lower > 0.0);
    assert!(verdict.reason.contains(" trivial-wide "), "{}", verdict.reason);
    // The incumbent is a rival of its own, and may be trivial-wide.
    let (dir, incumbent) = (tempfile::tempdir().unwrap(), policy(2));
    let lab = MadeUp::new(&[(&candidate, 0.3), (&incumbent, 0.8)]);
    let ledger = ledger(dir.path(), 2);
    let verdict = decide(&lab, &ledger, &SETTINGS, 2, &candidate, ("cifar10@4", &incumbent));
    let verdict = verdict.unwrap();
    assert_eq!(roles(&verdict), ["candidate", "incumbent", "none", "trivial-wide"]);
    assert!(verdict.reason.contains("against the incumbent cifar10@4"), "{}", verdict.reason);
    let trivial_wide = policy::trivial_wide().with_name("another name").unwrap();
    let verdict = decide(&lab, &ledger, &SETTINGS, 3, &candidate, ("x@1", &trivial_wide)).unwrap();
    assert_eq!(roles(&verdict), ["candidate", "incumbent (trivial-wide)", "none"]);
}

#[test]
fn a_clear_loser_costs_only_some_seeds() {
    let candidate = policy(1);
    let lab = MadeUp::new(&[(&candidate, -1.5)]);
    let verdict = first_test(&lab, &candidate).unwrap();
    assert!(!verdict.is_better);
    assert!(verdict.n_seeds < 5, "{}", verdict.reason);
    assert_eq!(lab.n_trained(), 3 * verdict.n_seeds as usize);
    assert!(verdict.reason.starts_with("not published: −"), "{}", verdict.reason);
    assert!(
        verdict.reason.contains(&format!(" after {} of 5 seeds (upper bound −", verdict.n_seeds))
    );
    assert!(verdict.test == 1 && verdict.alpha > 0.0, "it has spent its level");
}

#[test]
fn later_rounds_train_the_candidate_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second, none) = (policy(1), policy(2), policy::none());
    let lab = MadeUp::new(&[(&first, 0.3), (&second, 0.3)]);
    let ledger = ledger(dir.path(), 2);
    let verdict = decide(&lab, &ledger, &SETTINGS, 1, &first, ("x@0", &none)).unwrap();
    assert!(verdict.is_better && lab.n_trained() == 15, "{}", verdict.reason);
    // The incumbent was a candidate once, and `none` the incumbent.
    let verdict = decide(&lab, &ledger, &SETTINGS, 2, &second, ("x@1", &first)).unwrap();
    assert_eq!(verdict.arms.len(), 4);
    assert_eq!(lab.n_trained(), 15 + verdict.n_seeds as usize);
    let trained = lab.trained.lock().unwrap();
    assert!(trained[15..].iter().all(|(id, _)| *id == second.id()));
    assert_eq!(ledger.cost("train/searched/").1, 30_000 * trained.len() as u64);
    assert_eq!(passes(&lab, 5, 3), 450_000);
}

#[test]
fn a_rival_that_proposes_itself_is_kept_without_a_test() {
    let (incumbent, none) = (policy(1), policy::none());
    let lab = MadeUp::new(&[]);
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(dir.path(), 1);
    for (candidate, expected) in [
        (&incumbent, "not published: the candidate is the incumbent x@3 itself"),
        (&none, "not published: the candidate is the policy none itself"),
        (&policy::trivial_wide(), "not published: the candidate is the policy trivial-wide itself"),
    ] {
        let candidate = candidate.with_name("candidate").unwrap();
        let verdict = decide(&lab, &ledger, &SETTINGS, 4, &candidate, ("x@3", &incumbent)).unwrap();
        assert_eq!((verdict.reason.as_str(), verdict.test), (expected, 0));
        assert!(!verdict.is_better && verdict.alpha.abs() < 1e-15);
    }
    assert_eq!(lab.n_trained(), 0);
}

#[test]
fn a_candidate_that_diverges_is_kept_and_stays_so() {
    let (candidate, none) = (policy(1), policy::none());
    for seed_idx in [0, 1, 3] {
        let dir = tempfile::tempdir().unwrap();
        let mut lab = MadeUp::new(&[(&candidate, 2.0)]);
        lab.diverging = Some((candidate.id(), seed_idx));
        let test = |lab: &MadeUp| {
            decide(lab, &ledger(dir.path(), 2), &SETTINGS, 1, &candidate, ("x@0", &none)).unwrap()
        };
        let verdict = test(&lab);
        assert!(!verdict.is_better);
        assert_eq!(verdict.n_seeds, seed_idx + 1);
        assert!(verdict.arms[0].accuracy[seed_idx as usize].abs() < 1e-15);
        let start = format!(
            "not published: the candidate's training diverged with seed {} of 5",
            seed_idx + 1
        );
        assert!(verdict.reason.starts_with(&start), "{}", verdict.reason);
        let json = serde_json::to_string(&verdict).unwrap();
        assert_eq!(serde_json::from_str::<Verdict>(&json).unwrap(), verdict);
        // The journal knows it: nothing is trained again.
        let n_trained = lab.n_trained();
        lab.n_trainings_max = n_trained;
        assert_eq!(test(&lab), verdict);
    }
}

#[test]
fn a_rival_that_diverges_is_an_error_that_names_it() {
    let candidate = policy(1);
    let mut lab = MadeUp::new(&[(&candidate, 0.3)]);
    lab.diverging = Some((policy::trivial_wide().id(), 2));
    let error = first_test(&lab, &candidate).unwrap_err().to_string();
    for part in ["cannot compare with trivial-wide", "seed 3 ", "step 7", "learning rate"] {
        assert!(error.contains(part), "'{error}' lacks '{part}'");
    }
    let dir = tempfile::tempdir().unwrap();
    let one_seed = GateSettings { n_seeds: 1, ..SETTINGS };
    let none = policy::none();
    for (settings, test) in [(one_seed, 1), (SETTINGS, 0)] {
        let ledger = ledger(dir.path(), 1);
        let error = decide(&lab, &ledger, &settings, test, &candidate, ("x@0", &none));
        assert!(error.unwrap_err().to_string().contains("gate_seeds"));
    }
}

#[test]
fn threads_and_kills_change_nothing() {
    let (candidate, none) = (policy(1), policy::none());
    let worths = [(&candidate, 0.25), (&policy::trivial_wide(), 0.1)];
    let run = |dir: &Path, lab: &MadeUp, n_threads| {
        decide(lab, &ledger(dir, n_threads), &SETTINGS, 1, &candidate, ("x@0", &none))
    };
    let dir = tempfile::tempdir().unwrap();
    let expected = run(dir.path(), &MadeUp::new(&worths), 1).unwrap();
    for n_threads in [2, 4] {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(run(dir.path(), &MadeUp::new(&worths), n_threads).unwrap(), expected);
    }
    for n_done in [1, 4, 9, 14] {
        let dir = tempfile::tempdir().unwrap();
        let mut lab = MadeUp::new(&worths);
        lab.n_trainings_max = n_done;
        run(dir.path(), &lab, 2).unwrap_err();
        lab.n_trainings_max = usize::MAX;
        assert_eq!(run(dir.path(), &lab, 4).unwrap(), expected);
        assert_eq!(lab.n_trained(), 15, "nothing is trained twice");
    }
}
