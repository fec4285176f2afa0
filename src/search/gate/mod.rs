//! The gate: whether a candidate is published.
//!
//! Owns the decision and its statistics. Never proposes anything, and is the only part of the
//! search that looks at D_gate.
//!
//! The candidate is trained next to its rivals – the incumbent, no augmentation, and
//! TrivialAugment-wide – on all searched samples from the same seeds, and judged on the clean
//! images of D_gate. It is published if it is better than every one of them ([`decision`]), at the
//! level that this test of the search may spend ([`alpha`]).
//!
//! *Invariants*: a verdict is a pure function of lab, settings, number of the test and policies;
//! when a test ends early is decided by results in the order of seeds, never by time or threads. A
//! training is a unit of the ledger, so that later rounds use the rivals' trainings again.

pub mod alpha;
pub mod decision;
pub mod power;
pub mod simulate;
#[cfg(test)]
mod tests;
mod trainings;
mod verdict;
mod words;

pub use verdict::{Arm, Comparison, Verdict};

use super::error::SearchError;
use super::lab::{Lab, TrainOn};
use super::ledger::Ledger;
use crate::policy::{self, Policy};
use decision::{Estimate, FUTILITY_LEVEL, Quantiles, is_better, is_futile};
use power::Design;
use trainings::{Outcome, Trainings};

/// Seeds that the test begins with: fewer show no spread.
const N_SEEDS_FIRST: u32 = 2;

/// How a test is done. Part of the journal's header: another setting is another search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateSettings {
    /// Pairs of trainings, at most; at least 2.
    pub n_seeds: u32,
    /// Keys the trainings' seeds.
    pub seed: u64,
}

/// What the candidate is tested against, or the candidate itself.
struct Contender<'a> {
    /// `candidate`, `incumbent`, `incumbent (none)`, `none`, ….
    role: String,
    /// Within a sentence: `the incumbent fashion-mnist@1`.
    words: String,
    policy: &'a Policy,
}

/// Image passes of a test with `n_seeds` seeds, at most, when nothing is known yet. A test against
/// rivals that an earlier one has trained costs as much as one arm.
pub fn passes(lab: &dyn Lab, n_seeds: u32, n_arms: u32) -> u64 {
    lab.passes(TrainOn::Searched) * u64::from(n_seeds) * u64::from(n_arms)
}

/// Decides whether the candidate is published. `test` is the number of this test among those of the
/// whole search, from 1, and `incumbent` the policy in use with its reference, such as
/// `fashion-mnist@1`.
///
/// A candidate that is one of its rivals is kept without a test: nothing is trained, and the
/// verdict's `test` and `alpha` are 0. In every other case `test` has been spent, also if it ended
/// early, and the next test has the next number.
///
/// # Errors
/// Fewer than 2 seeds, test 0, a rival whose training diverges, a lab that fails, or a journal that
/// cannot be written.
pub fn decide(
    lab: &dyn Lab,
    ledger: &Ledger,
    settings: &GateSettings,
    test: u32,
    candidate: &Policy,
    incumbent: (&str, &Policy),
) -> Result<Verdict, SearchError> {
    if settings.n_seeds < N_SEEDS_FIRST || test == 0 {
        return Err(SearchError::Unfit(format!(
            "the gate was asked for test {test} with {} seeds: tests are numbered from 1, and \
            fewer than {N_SEEDS_FIRST} seeds show no spread; set gate_seeds to {N_SEEDS_FIRST} or \
            more",
            settings.n_seeds
        )));
    }
    let (none, trivial_wide) = (policy::none(), policy::trivial_wide());
    let contenders = contenders(candidate, incumbent, [&none, &trivial_wide]);
    if let Some(same) = contenders[1..].iter().find(|rival| rival.policy.id() == candidate.id()) {
        return Ok(Verdict {
            reason: format!(
                "not published: the candidate is {} itself",
                words::policy(&same.words)
            ),
            n_seeds_max: settings.n_seeds,
            ..Verdict::default()
        });
    }
    let trainings = Trainings::new(lab, ledger, settings, &contenders);
    let end = train_until_decided(&trainings, settings.n_seeds)?;
    Ok(verdict(settings, test, &contenders, end))
}

/// The candidate, then its rivals, each policy once.
fn contenders<'a>(
    candidate: &'a Policy,
    (reference, incumbent): (&str, &'a Policy),
    builtins: [&'a Policy; 2],
) -> Vec<Contender<'a>> {
    let is_same = |builtin: &&&Policy| builtin.id() == incumbent.id();
    let (role, words) = match builtins.iter().find(is_same) {
        Some(builtin) => {
            let role = format!("incumbent ({})", builtin.name());
            (role.clone(), format!("the {role}"))
        }
        None => ("incumbent".to_owned(), format!("the incumbent {reference}")),
    };
    let mut contenders = vec![
        Contender { role: "candidate".into(), words: "the candidate".into(), policy: candidate },
        Contender { role, words, policy: incumbent },
    ];
    for builtin in builtins.into_iter().filter(|builtin| builtin.id() != incumbent.id()) {
        let name = builtin.name().to_owned();
        contenders.push(Contender { role: name.clone(), words: name, policy: builtin });
    }
    contenders
}

/// Where a test ended.
struct End {
    /// Right and wrong, by contender, seed and image.
    right: Vec<Vec<Vec<bool>>>,
    /// Against each rival.
    estimates: Vec<Estimate>,
    /// What went wrong in the candidate's last training.
    diverged: Option<String>,
    is_futile: bool,
}

/// Trains seed by seed, and looks at the seeds in their order. The first two are trained side by
/// side, since nothing can be decided between them but that the candidate diverged.
fn train_until_decided(trainings: &Trainings<'_>, n_seeds: u32) -> Result<End, SearchError> {
    let n_contenders = trainings.n_contenders();
    let mut end = End {
        right: vec![Vec::new(); n_contenders],
        estimates: Vec::new(),
        diverged: None,
        is_futile: false,
    };
    let mut n_done = 0;
    while n_done < n_seeds && end.diverged.is_none() && !end.is_futile {
        let until = if n_done == 0 { N_SEEDS_FIRST } else { n_done + 1 };
        for outcomes in trainings.train(n_done..until)?.chunks(n_contenders) {
            n_done += 1;
            end.diverged = take_seed(&mut end.right, outcomes, trainings, n_done)?;
            end.estimates =
                end.right[1..].iter().map(|rival| Estimate::new(&end.right[0], rival)).collect();
            let can_stop = n_done >= N_SEEDS_FIRST && n_done < n_seeds;
            let n_images = end.estimates.first().map_or(0, |estimate| estimate.n_images);
            let quantiles = Quantiles::new(FUTILITY_LEVEL, n_done, n_images);
            end.is_futile =
                can_stop && end.diverged.is_none() && is_futile(&end.estimates, &quantiles);
            if end.diverged.is_some() {
                break;
            }
        }
    }
    Ok(end)
}

/// Takes in one seed's outcomes, in the order of the contenders; gives what went wrong with the
/// candidate's training, if it diverged.
fn take_seed(
    right: &mut [Vec<Vec<bool>>],
    outcomes: &[Outcome],
    trainings: &Trainings<'_>,
    n_done: u32,
) -> Result<Option<String>, SearchError> {
    let mut diverged = None;
    let n_images = Trainings::n_images(outcomes)?;
    for (idx, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Outcome::Evaluated(evaluation) => right[idx].push(evaluation.right.clone()),
            Outcome::Diverged(why) if idx == 0 => {
                right[idx].push(vec![false; n_images]);
                diverged = Some(why.clone());
            }
            Outcome::Diverged(why) => return Err(trainings.rival_diverged(idx, n_done, why)),
        }
    }
    Ok(diverged)
}

fn verdict(settings: &GateSettings, test: u32, contenders: &[Contender<'_>], end: End) -> Verdict {
    let level = alpha::level(test);
    let rivals = contenders[1..].iter().zip(&end.estimates);
    let comparisons: Vec<Comparison> =
        rivals.map(|(rival, estimate)| estimate.compare(&rival.role, level)).collect();
    let is_cut_short = end.diverged.is_some() || end.is_futile;
    let arms = contenders.iter().zip(&end.right).map(|(contender, right)| Arm {
        role: contender.role.clone(),
        policy: contender.policy.name().to_owned(),
        policy_id: contender.policy.id().to_string(),
        accuracy: right.iter().map(|right| share(right)).collect(),
    });
    let detectable = end
        .estimates
        .iter()
        .map(|estimate| Design::of(estimate, settings.n_seeds).detectable_gain(level));
    let mut verdict = Verdict {
        is_better: !is_cut_short && is_better(&comparisons),
        reason: String::new(),
        test,
        alpha: level,
        n_images: end.estimates.first().map_or(0, |estimate| estimate.n_images),
        n_seeds: end.estimates.first().map_or(0, |estimate| estimate.n_seeds),
        n_seeds_max: settings.n_seeds,
        detectable_gain: detectable.fold(0.0, f64::max),
        arms: arms.collect(),
        comparisons,
    };
    verdict.reason = match &end.diverged {
        Some(why) => words::diverged(&verdict, why),
        None if end.is_futile => words::futile(&verdict, contenders, &end.estimates),
        None => words::decided(&verdict, contenders),
    };
    verdict
}

fn share(right: &[bool]) -> f64 {
    right.iter().filter(|&&right| right).count() as f64 / right.len().max(1) as f64
}
