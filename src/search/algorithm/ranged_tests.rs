//! `ranged`, and the table it rests on, against a made-up lab whose truth is known.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::augment::PreparedPolicy;
use crate::random::{Purpose, SampleRng};
use crate::search::JournalHeader;
use crate::search::affinity::AffinityTable;
use crate::search::lab::{Change, Score};
use crate::search::ledger::{JOURNAL_VERSION, Ledger};

/// A clean model loses nothing up to an operation's tolerance, and 60 points per unit of strength
/// beyond. Training gains 3 points times the share of tolerance that the policy covers, and loses
/// 0.2 points per point of affinity.
struct MadeUpLab {
    tolerance: BTreeMap<Op, f64>,
    n_trainings: AtomicU64,
    n_scored: AtomicU64,
}

const CLEAN: f64 = 0.8;
const N_JUDGED: usize = 2000;

impl MadeUpLab {
    fn new(tolerance: &[(Op, f64)]) -> Self {
        let tolerance = tolerance.iter().copied().collect();
        Self { tolerance, n_trainings: AtomicU64::new(0), n_scored: AtomicU64::new(0) }
    }

    fn drop_points(&self, op: Op, strength: f64) -> f64 {
        let tolerance = self.tolerance.get(&op).copied().unwrap_or(0.02);
        60.0 * (strength - tolerance).max(0.0)
    }

    /// Operation and strength of a policy of one step, as the table asks for.
    fn only_step(policy: &PreparedPolicy) -> Option<(Op, f64)> {
        let mut drawn = Vec::new();
        policy.draw_into(&mut SampleRng::new(1, 0, 0, Purpose::Policy), &mut drawn);
        drawn.first().map(|op| (op.op, op.lambda))
    }
}

impl Lab for MadeUpLab {
    fn n_folds(&self) -> usize {
        5
    }

    fn n_held_out(&self, _fold: usize) -> usize {
        100
    }

    fn passes(&self, _on: TrainOn) -> u64 {
        1000
    }

    fn score(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        _n_draws: u32,
    ) -> Result<Vec<Score>, LabError> {
        self.n_scored.fetch_add(images.len() as u64, Ordering::Relaxed);
        let drop = Self::only_step(policy).map_or(0.0, |(op, at)| self.drop_points(op, at));
        // Folds differ a little.
        let accuracy = CLEAN + fold as f64 * 1e-3 - drop / 100.0;
        Ok(vec![Score { loss: 1.0 - accuracy, accuracy }; images.len()])
    }

    fn change(
        &self,
        _fold: usize,
        _images: Range<usize>,
        policy: &PreparedPolicy,
        _n_draws: u32,
    ) -> Result<Change, LabError> {
        // As on gray images, Color changes nothing.
        let changed = Self::only_step(policy).is_some_and(|(op, _)| op != Op::Color);
        Ok(Change { changed: f64::from(u8::from(changed)), distance: 0.1 })
    }

    fn train(&self, training: &Training<'_>) -> Result<Evaluation, LabError> {
        self.n_trainings.fetch_add(1, Ordering::Relaxed);
        let (mut gain, mut harm) = (0.0, 0.0);
        for sub_policy in training.policy.sub_policies() {
            for step in &sub_policy.ops {
                let Magnitude::Range(_, reach) = step.magnitude else { continue };
                let tolerance = self.tolerance.get(&step.op).copied().unwrap_or(0.02);
                gain += 3.0 * reach.min(tolerance) / self.tolerance.len().max(1) as f64;
                harm += 0.2 * sub_policy.weight * self.drop_points(step.op, reach);
            }
        }
        let noise = SampleRng::new(training.seed, 0, 0, Purpose::Order).unit() - 0.5;
        let accuracy = CLEAN + (gain - harm + noise) / 100.0;
        let right = (0..N_JUDGED).map(|idx| (idx as f64) < accuracy * N_JUDGED as f64).collect();
        Ok(Evaluation { right, loss: 1.0 - accuracy })
    }
}

fn ledger(path: &Path, n_threads: usize) -> Ledger {
    let header = JournalHeader {
        version: JOURNAL_VERSION,
        dataset: "made-up".to_owned(),
        config: "ranged".to_owned(),
        seed: 1,
    };
    Ledger::open(path, &header, n_threads, 0, |_| {}).expect("opens").0
}

fn tolerant() -> MadeUpLab {
    MadeUpLab::new(&[(Op::Rotate, 0.45), (Op::ShearX, 0.3), (Op::Brightness, 0.6)])
}

fn propose(lab: &MadeUpLab, ledger: &Ledger, round: u32) -> Proposal {
    let affinity = AffinityTable::measure(lab, ledger).expect("measures");
    let context = Context {
        lab,
        ledger,
        seed: 7,
        round,
        incumbent: &policy::none(),
        affinity: &affinity,
        name: "made-up",
    };
    Ranged::default().propose(&context).expect("proposes")
}

#[test]
fn the_table_finds_the_tolerances_and_is_measured_once() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(&dir.path().join("journal"), 2);
    let lab = tolerant();
    let table = AffinityTable::measure(&lab, &ledger).unwrap();
    assert_eq!(lab.n_scored.load(Ordering::Relaxed), crate::search::affinity::passes(&lab));
    // 60 points per unit: a budget of 6 points reaches 0.1 beyond the tolerance.
    let reach = |op| table.reach(op, 6.0);
    assert!((reach(Op::Rotate).unwrap() - 0.55).abs() < 0.03, "{:?}", reach(Op::Rotate));
    assert!((reach(Op::ShearX).unwrap() - 0.4).abs() < 1e-9);
    // Every op that is not tolerant reaches 0.12, and Color changes nothing.
    assert!((reach(Op::Solarize).unwrap() - 0.12).abs() < 0.02);
    assert_eq!((reach(Op::Color), table.reach(Op::Solarize, 0.5)), (None, None));
    assert_eq!(AffinityTable::measure(&lab, &ledger).unwrap(), table);
    assert_eq!(lab.n_scored.load(Ordering::Relaxed), crate::search::affinity::passes(&lab));
}

#[test]
fn the_candidate_covers_what_the_data_tolerates_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(&dir.path().join("journal"), 2);
    let proposal = propose(&tolerant(), &ledger, 1);
    let value = proposal.training_value.expect("it trains");
    assert!(value.candidate > value.incumbent + 0.003, "{value:?}");
    let reach = |wanted: Op| {
        let subs = proposal.policy.sub_policies().iter();
        let mut steps = subs.flat_map(|sub| &sub.ops).filter(|step| step.op == wanted);
        match steps.next().map(|step| step.magnitude) {
            Some(Magnitude::Range(_, reach)) => reach,
            _ => 0.0,
        }
    };
    assert!((0.4..0.8).contains(&reach(Op::Rotate)), "{}", reach(Op::Rotate));
    assert!(reach(Op::Brightness) > reach(Op::ShearX));
    assert!(reach(Op::ShearX) > reach(Op::ShearY));
    assert!(
        proposal
            .policy
            .sub_policies()
            .iter()
            .all(|sub| { sub.ops.iter().all(|step| step.op != Op::Color) })
    );
    assert_eq!(proposal.trials.len(), 8);
}

#[test]
fn a_search_cut_anywhere_and_any_number_of_threads_give_the_same_candidate() {
    let dir = tempfile::tempdir().unwrap();
    let whole_path = dir.path().join("whole");
    let lab = tolerant();
    let whole_ledger = ledger(&whole_path, 1);
    propose(&lab, &whole_ledger, 1);
    let whole = propose(&lab, &whole_ledger, 2);
    drop(whole_ledger);
    let lines: Vec<String> =
        std::fs::read_to_string(&whole_path).unwrap().lines().map(str::to_owned).collect();
    for (cut, n_threads) in [(1, 4), (40, 2), (82, 1), (90, 3), (lines.len() - 2, 2)] {
        let path = dir.path().join(format!("cut-{cut}"));
        std::fs::write(&path, lines[..cut].join("\n") + "\n").unwrap();
        let ledger = ledger(&path, n_threads);
        propose(&lab, &ledger, 1);
        let again = propose(&lab, &ledger, 2);
        assert_eq!(again.policy.id(), whole.policy.id(), "cut at {cut}");
        assert_eq!((again.trials, again.details), (whole.trials.clone(), whole.details.clone()));
    }
}

#[test]
fn later_rounds_go_on_from_all_trials_and_train_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(&dir.path().join("journal"), 1);
    let lab = tolerant();
    propose(&lab, &ledger, 1);
    let before = lab.n_trainings.load(Ordering::Relaxed);
    assert!(before * 1000 <= Ranged::default().passes(&lab));
    let second = propose(&lab, &ledger, 2);
    assert_eq!(second.trials.len(), 16);
    let own = lab.n_trainings.load(Ordering::Relaxed) - before;
    assert!(own <= 8 * 2 + 2 * 2, "the incumbent and old trials are not trained again: {own}");
    let scored = lab.n_scored.load(Ordering::Relaxed);
    propose(&lab, &ledger, 2);
    assert_eq!(lab.n_trainings.load(Ordering::Relaxed) - before, own);
    assert_eq!(lab.n_scored.load(Ordering::Relaxed), scored);
}

#[test]
fn data_that_tolerates_nothing_gives_no_augmentation() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = ledger(&dir.path().join("journal"), 1);
    let nothing = Op::ALL.map(|op| (op, -2.0));
    let proposal = propose(&MadeUpLab::new(&nothing), &ledger, 1);
    assert_eq!(proposal.policy.id(), policy::none().id());
    assert_eq!(proposal.training_value, None);
}
