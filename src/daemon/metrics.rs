//! What training runs report of themselves, and whether it speaks against a new policy.
//!
//! Owns the recent values of each run, in memory, and the rule. Never rolls back by itself: the
//! handler asks the store to.
//!
//! *Rule*: a run's metric (higher is better) is compared with its own values before the switch.
//! Two evaluations in a row that are below the mean of those by more than the noise are held
//! against the version.
//!
//! *Source*: the noise is J. von Neumann's estimate from successive differences ("Distribution of
//! the ratio of the mean square successive difference to the variance", 1941): a slow trend, which
//! every training has, hardly enters it. σ² = mean(dᵢ²) / 2.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use crate::limits::{METRIC_RUNS_MAX, METRIC_VALUES_MAX};

/// Values before the switch that are looked at, the last ones.
const BEFORE_MAX: usize = 10;
/// With fewer values before the switch nothing is concluded.
const BEFORE_MIN: usize = 3;
/// Evaluations in a row that must be worse.
const N_WORSE: usize = 2;
/// Width of the noise band, in σ.
const BAND_SIGMAS: f64 = 2.0;

/// One evaluation of a run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Evaluation {
    /// Reference of the policy that the epoch was trained with.
    pub(super) policy: String,
    /// Higher is better.
    pub(super) value: f64,
}

/// A policy that made a run's metric fall.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fall {
    /// Reference of the policy.
    pub(super) policy: String,
    /// Mean before the switch.
    pub(super) before: f64,
    /// Half width of the noise band.
    pub(super) band: f64,
    /// The last values.
    pub(super) after: [f64; N_WORSE],
}

/// Whether a run's metric fell with its last policy; `evaluations` by epoch.
pub(super) fn judge(evaluations: &BTreeMap<u64, Evaluation>) -> Option<Fall> {
    let all: Vec<&Evaluation> = evaluations.values().collect();
    let policy = &all.last()?.policy;
    let n_after = all.iter().rev().take_while(|evaluation| evaluation.policy == *policy).count();
    let before = &all[..all.len() - n_after];
    let before = &before[before.len().saturating_sub(BEFORE_MAX)..];
    if n_after < N_WORSE || before.len() < BEFORE_MIN {
        return None;
    }
    let mean = before.iter().map(|evaluation| evaluation.value).sum::<f64>() / before.len() as f64;
    let squares = before.windows(2).map(|pair| (pair[1].value - pair[0].value).powi(2));
    let sigma = (squares.sum::<f64>() / (before.len() - 1) as f64 / 2.0).sqrt();
    let band = BAND_SIGMAS * sigma;
    let after = [all[all.len() - 2].value, all[all.len() - 1].value];
    let is_worse = after.iter().all(|value| *value < mean - band);
    is_worse.then(|| Fall { policy: policy.clone(), before: mean, band, after })
}

/// The values of all runs.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    runs: Mutex<Runs>,
}

#[derive(Debug, Default)]
struct Runs {
    /// (dataset, run) → epoch → value.
    values: HashMap<(String, String), BTreeMap<u64, Evaluation>>,
    /// Oldest first, for forgetting.
    order: VecDeque<(String, String)>,
}

impl Metrics {
    /// Notes a value (an epoch's second one replaces its first) and judges the run.
    pub(super) fn report(
        &self,
        dataset: &str,
        run: &str,
        epoch: u64,
        evaluation: Evaluation,
    ) -> Option<Fall> {
        let key = (dataset.to_owned(), run.to_owned());
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if !runs.values.contains_key(&key) {
            runs.order.push_back(key.clone());
            if runs.order.len() > METRIC_RUNS_MAX
                && let Some(oldest) = runs.order.pop_front()
            {
                runs.values.remove(&oldest);
            }
        }
        let values = runs.values.entry(key).or_default();
        values.insert(epoch, evaluation);
        // A run that went back to an earlier epoch does not know what came after.
        values.split_off(&(epoch + 1));
        while values.len() > METRIC_VALUES_MAX {
            values.pop_first();
        }
        judge(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluations(parts: &[(&str, &[f64])]) -> BTreeMap<u64, Evaluation> {
        let all = parts.iter().flat_map(|(policy, values)| {
            values.iter().map(|value| Evaluation { policy: (*policy).to_owned(), value: *value })
        });
        (0..).zip(all).collect()
    }

    fn falls(parts: &[(&str, &[f64])]) -> bool {
        judge(&evaluations(parts)).is_some()
    }

    #[test]
    fn two_values_below_the_noise_speak_against_the_last_policy() {
        // σ² = mean(0.02², 0.02², 0.02²) / 2, so the band is 2 · 0.01414 below 0.81.
        let before: &[f64] = &[0.80, 0.82, 0.80, 0.82];
        let fall = judge(&evaluations(&[("d@1", before), ("d@2", &[0.78, 0.77])])).expect("falls");
        assert_eq!((fall.policy.as_str(), fall.after), ("d@2", [0.78, 0.77]));
        assert!((fall.before - 0.81).abs() < 1e-12, "{fall:?}");
        assert!((fall.band - 2.0 * (0.02f64.powi(2) / 2.0).sqrt()).abs() < 1e-12, "{fall:?}");
        assert!(!falls(&[("d@1", before), ("d@2", &[0.7])]), "once is chance");
        assert!(!falls(&[("d@1", before), ("d@2", &[0.7, 0.79])]), "it came back");
        assert!(!falls(&[("d@1", before), ("d@2", &[0.79, 0.7])]));
        assert!(!falls(&[("d@1", before), ("d@2", &[0.783, 0.783])]), "within the noise");
        assert!(!falls(&[("d@1", before), ("d@2", &[0.85, 0.86])]), "better");
        assert!(falls(&[("d@1", before), ("d@2", &[0.85, 0.7, 0.7])]), "in a row, not at once");
    }

    #[test]
    fn few_values_and_other_policies_say_nothing() {
        assert_eq!(judge(&BTreeMap::new()), None);
        assert!(!falls(&[("d@1", &[0.8, 0.8]), ("d@2", &[0.1, 0.1])]));
        assert!(falls(&[("d@1", &[0.8, 0.8, 0.8]), ("d@2", &[0.1, 0.1])]));
        assert!(!falls(&[("d@2", &[0.8, 0.8, 0.8, 0.8, 0.1, 0.1])]), "no switch");
        assert!(!falls(&[("d@1", &[0.8, 0.8, 0.8]), ("d@2", &[0.1]), ("d@3", &[0.1])]));
    }

    #[test]
    fn a_training_that_still_improves_is_not_noise() {
        // It rises by 0.05 an epoch, then stands still: above the mean of before.
        let rising = [0.3, 0.35, 0.4, 0.45, 0.5];
        assert!(!falls(&[("d@1", &rising), ("d@2", &[0.5, 0.5])]));
        assert!(falls(&[("d@1", &rising), ("d@2", &[0.2, 0.2])]));
    }

    #[test]
    fn an_epoch_has_one_value_and_runs_are_apart() {
        let metrics = Metrics::default();
        let report = |run: &str, epoch: u64, policy: &str, value: f64| {
            metrics.report("d", run, epoch, Evaluation { policy: policy.to_owned(), value })
        };
        for epoch in 0..3 {
            // Every rank reports.
            for _ in 0..2 {
                assert_eq!(report("r", epoch, "d@1", 0.8), None);
            }
        }
        for _ in 0..4 {
            assert_eq!(report("r", 3, "d@2", 0.1), None, "four ranks are one evaluation");
        }
        assert_eq!(report("other", 4, "d@2", 0.1), None);
        assert!(report("r", 4, "d@2", 0.1).is_some());
        // Resumed at epoch 3: what was reported of 4 is void.
        assert_eq!(report("r", 3, "d@2", 0.1), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let metrics = Metrics::default();
        let one = || Evaluation { policy: "d@1".to_owned(), value: 0.5 };
        for epoch in 0..2 * METRIC_VALUES_MAX as u64 {
            metrics.report("d", "long", epoch, one());
        }
        for run in 0..METRIC_RUNS_MAX {
            metrics.report("d", &format!("r{run}"), 0, one());
        }
        let runs = metrics.runs.lock().expect("not poisoned");
        assert_eq!((runs.values.len(), runs.order.len()), (METRIC_RUNS_MAX, METRIC_RUNS_MAX));
        assert!(!runs.values.contains_key(&("d".to_owned(), "long".to_owned())));
    }
}
