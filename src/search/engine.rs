//! Runs a search: fold models, affinity table, then rounds of proposing, gate and publication.
//!
//! Owns the order of things. Every result comes from the ledger, so that a search that was killed
//! at any point goes on where it was. Never decides: algorithms propose, the gate decides.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::affinity::AffinityTable;
use super::algorithm::{Algorithm, Context, Paper, Proposal};
use super::error::SearchError;
use super::folds::FoldSummary;
use super::gate::{self, GateSettings, Verdict};
use super::lab::Lab;
use super::ledger::Ledger;
use super::progress::RoundOutcome;
use super::round::{Cost, FoldRecord, RoundRecord};
use crate::policy::{self, Policy, PolicyStore};

/// Value of `source` in the evidence of policies that the search published.
pub const EVIDENCE_SOURCE: &str = "search";

/// Fold models below so many times the accuracy of a constant answer have learned nothing.
const CHANCE_FACTOR: f64 = 1.2;

/// What a search is to do. Together with lab and journal it determines every result.
pub struct Plan<'a> {
    /// Name of the dataset, and of its line in the store.
    pub dataset: &'a str,
    /// Tells this search from others in the evidence: the journal's digest of its settings.
    pub search_id: &'a str,
    /// How candidates are found.
    pub algorithm: &'a dyn Algorithm,
    /// Rounds to do; 0: until the process is stopped.
    pub n_rounds: u32,
    /// Keys everything random.
    pub seed: u64,
    /// The gate's pairs.
    pub gate: GateSettings,
    /// The folds that the lab was made from.
    pub folds: FoldSummary,
}

/// The policy to beat, as it was when the round began.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Incumbent {
    reference: String,
    policy: Value,
}

/// Runs all rounds that are not done yet.
///
/// # Errors
/// A measurement fails, the journal or the store cannot be written.
pub fn run(
    lab: &dyn Lab,
    ledger: &Ledger,
    store: &PolicyStore,
    plan: &Plan<'_>,
) -> Result<(), SearchError> {
    ledger.update(|progress| {
        plan.dataset.clone_into(&mut progress.dataset);
        plan.algorithm.name().clone_into(&mut progress.algorithm);
        progress.n_rounds = plan.n_rounds;
    });
    ledger.unit("folds", 0, || Ok(plan.folds.clone()))?;
    let (mut n_tests, mut round) = (0, 0);
    while plan.n_rounds == 0 || round < plan.n_rounds {
        round += 1;
        let key = format!("round/{round}");
        let record = match ledger.finished::<RoundRecord>(&key)? {
            Some(record) => record,
            None => run_round(lab, ledger, store, plan, round, n_tests + 1)?,
        };
        n_tests += u32::from(record.verdict.as_ref().is_some_and(|verdict| verdict.test > 0));
        let is_idle = record.costs.values().all(|cost| cost.passes == 0);
        ledger.round_ended(RoundOutcome {
            round,
            version: record.version,
            summary: record.summary,
            cpu_seconds: record.costs.values().map(|cost| cost.cpu_seconds).sum(),
        });
        if is_idle && plan.n_rounds == 0 {
            ledger.note("a whole round had nothing new to measure: the search is at its end");
            break;
        }
    }
    Ok(())
}

fn run_round(
    lab: &dyn Lab,
    ledger: &Ledger,
    store: &PolicyStore,
    plan: &Plan<'_>,
    round: u32,
    test: u32,
) -> Result<RoundRecord, SearchError> {
    ledger.begin_round(round, expected_passes(lab, ledger, plan)?);
    let folds = train_folds(lab, ledger)?;
    if let Some(text) = chance_note(&folds, &plan.folds.class_counts.held_out) {
        ledger.note(text);
    }
    let affinity = AffinityTable::measure(lab, ledger)?;
    ledger.unit("affinity/table", 0, || Ok(affinity.clone()))?;
    let incumbent = ledger.unit(&format!("round-{round}/incumbent"), 0, || {
        let active = store.active(plan.dataset)?;
        let reference = match active.version {
            0 => "none".to_owned(),
            version => format!("{}@{version}", plan.dataset),
        };
        Ok(Incumbent { reference, policy: policy::to_value(&active.policy) })
    })?;
    let incumbent_policy = policy::from_value(&incumbent.policy, &incumbent.reference)?;
    let context = Context {
        lab,
        ledger,
        seed: plan.seed,
        round,
        incumbent: &incumbent_policy,
        affinity: &affinity,
        name: &format!("{}-{}-round-{round}", plan.dataset, plan.algorithm.name()),
    };
    let proposal = match plan.algorithm.propose(&context) {
        // Nothing fit was found in what was measured. What costs nothing fails in every round.
        Err(SearchError::Unfit(problem)) if ledger.cost(&context.key("")).1 > 0 => {
            let details = json!({ "problem": problem });
            let policy = policy::none();
            Proposal { policy, training_value: None, trials: Vec::new(), details }
        }
        proposal => proposal?,
    };
    let verdict =
        judge(lab, ledger, plan, test, &proposal, (&incumbent.reference, &incumbent_policy))?;
    let version = publish(ledger, store, plan, round, &proposal, verdict.as_ref())?;
    let summary = summary(&proposal, verdict.as_ref(), &incumbent.reference, version, plan.dataset);
    let record = RoundRecord {
        round,
        algorithm: plan.algorithm.name().to_owned(),
        candidate: policy::to_value(&proposal.policy),
        incumbent: incumbent.reference,
        training_value: proposal.training_value,
        trials: proposal.trials,
        details: proposal.details,
        verdict,
        version,
        summary,
        costs: costs(ledger, round)?,
        paper_cost: paper_cost(lab, ledger),
    };
    ledger.unit(&format!("round/{round}"), 0, || Ok(record))
}

/// Trains every fold's model, or makes sure that it is still there.
fn train_folds(lab: &dyn Lab, ledger: &Ledger) -> Result<Vec<FoldRecord>, SearchError> {
    let folds: Vec<usize> = (0..lab.n_folds()).collect();
    ledger.begin_stage("fold training", folds.len() as u64);
    ledger.parallel(&folds, |&fold| {
        ledger.part(&format!("fold {} of {}", fold + 1, folds.len()));
        let key = format!("fold/{fold}");
        let record: FoldRecord =
            ledger.unit(&key, lab.fold_passes(fold), || Ok(lab.train_fold(fold)?))?;
        if !lab.has_fold(fold, &record) {
            ledger.note(format!("the model of fold {} is gone: it is trained again", fold + 1));
            let again = lab.train_fold(fold)?;
            if again.weights != record.weights {
                return Err(SearchError::Unfit(format!(
                    "the model of fold {} was lost, and training it again gives other weights: \
                     another processor or libtorch than before; restore the search's folder from \
                     a backup, or move it away to start afresh",
                    fold + 1
                )));
            }
        }
        ledger.step();
        Ok(record)
    })
}

/// Says so if the fold models know no more than which class is the most frequent one: then nothing
/// that is measured with them means anything. `held_out`: samples by fold and class.
fn chance_note(folds: &[FoldRecord], held_out: &[Vec<u64>]) -> Option<String> {
    let accuracy = folds.iter().map(|fold| fold.accuracy).sum::<f64>() / folds.len() as f64;
    let most_frequent = |counts: &Vec<u64>| {
        let (most, all) = (counts.iter().max()?, counts.iter().sum::<u64>());
        Some(*most as f64 / all as f64)
    };
    let guesses: Vec<f64> = held_out.iter().filter_map(most_frequent).collect();
    let guess = guesses.iter().sum::<f64>() / guesses.len() as f64;
    (accuracy <= guess * CHANCE_FACTOR).then(|| {
        format!(
            "the fold models learned nothing: {:.1} % of the held-out samples are right, and \
             always saying the most frequent class makes {:.1} %; raise search.fold_epochs, or \
             look at search.model and the labels",
            100.0 * accuracy,
            100.0 * guess
        )
    })
}

/// Puts the candidate to the gate, unless the algorithm's own trainings speak against it.
fn judge(
    lab: &dyn Lab,
    ledger: &Ledger,
    plan: &Plan<'_>,
    test: u32,
    proposal: &Proposal,
    incumbent: (&str, &Policy),
) -> Result<Option<Verdict>, SearchError> {
    let is_hopeless =
        proposal.training_value.is_some_and(|value| value.candidate <= value.incumbent);
    if is_hopeless {
        return Ok(None);
    }
    gate::decide(lab, ledger, &plan.gate, test, &proposal.policy, incumbent).map(Some)
}

/// Stores the candidate if it passed. Killed between store and journal, it finds its own version.
fn publish(
    ledger: &Ledger,
    store: &PolicyStore,
    plan: &Plan<'_>,
    round: u32,
    proposal: &Proposal,
    verdict: Option<&Verdict>,
) -> Result<Option<u64>, SearchError> {
    let Some(verdict) = verdict.filter(|verdict| verdict.is_better) else { return Ok(None) };
    let key = format!("round-{round}/published");
    let search = plan.search_id;
    ledger.unit(&key, 0, || {
        for (version, content) in store.list(plan.dataset)? {
            let evidence = content.map(|content| content.evidence).unwrap_or_default();
            if evidence["search_id"] == search && evidence["round"] == round {
                return Ok(Some(version));
            }
        }
        let evidence = json!({
            "source": EVIDENCE_SOURCE,
            "search_id": search,
            "round": round,
            "algorithm": plan.algorithm.name(),
            "verdict": verdict,
            "training_value": proposal.training_value,
            "details": proposal.details,
        });
        Ok(Some(store.publish(plan.dataset, &proposal.policy, evidence)?.version.version))
    })
}

fn summary(
    proposal: &Proposal,
    verdict: Option<&Verdict>,
    incumbent: &str,
    version: Option<u64>,
    dataset: &str,
) -> String {
    match (version, verdict, proposal.training_value) {
        (Some(version), Some(verdict), _) => format!("{dataset}@{version} {}", verdict.reason),
        (_, Some(verdict), _) => verdict.reason.clone(),
        (_, None, Some(value)) => format!(
            "not published, {incumbent} stays: in the search's own trainings the best candidate \
             has a clean accuracy of {:.2} %, {incumbent} {:.2} %; the gate was not asked",
            100.0 * value.candidate,
            100.0 * value.incumbent
        ),
        (_, None, None) => format!("not published, {incumbent} stays"),
    }
}

/// Image passes of a round, as far as is known before it begins.
fn expected_passes(lab: &dyn Lab, ledger: &Ledger, plan: &Plan<'_>) -> Result<u64, SearchError> {
    let folds = (0..lab.n_folds()).map(|fold| lab.fold_passes(fold)).sum::<u64>();
    let is_first = ledger.finished::<RoundRecord>("round/1")?.is_none();
    let n_arms = if is_first { 3 } else { 1 };
    Ok(folds
        + super::affinity::passes(lab)
        + plan.algorithm.passes(lab)
        + gate::passes(lab, plan.gate.n_seeds, n_arms))
}

/// What this round cost, by part. What earlier rounds paid for is theirs.
fn costs(ledger: &Ledger, round: u32) -> Result<BTreeMap<String, Cost>, SearchError> {
    let parts: [(&str, &[&str]); 4] = [
        ("folds", &["fold/"]),
        ("affinity", &["affinity/"]),
        ("proposals", &["train/fold-", "round-"]),
        ("gate", &["train/searched/"]),
    ];
    let mut earlier: BTreeMap<String, Cost> = BTreeMap::new();
    for before in 1..round {
        let record = ledger.finished::<RoundRecord>(&format!("round/{before}"))?;
        for (part, cost) in record.unwrap_or_default().costs {
            let sum = earlier.entry(part).or_default();
            sum.cpu_seconds += cost.cpu_seconds;
            sum.passes += cost.passes;
        }
    }
    Ok(parts
        .into_iter()
        .map(|(part, prefixes)| {
            let mut cost = Cost::default();
            for prefix in prefixes {
                let (cpu_seconds, passes) = ledger.cost(prefix);
                cost.cpu_seconds += cpu_seconds;
                cost.passes += passes;
            }
            let before = earlier.get(part).copied().unwrap_or_default();
            cost.cpu_seconds = (cost.cpu_seconds - before.cpu_seconds).max(0.0);
            cost.passes = cost.passes.saturating_sub(before.passes);
            (part.to_owned(), cost)
        })
        .collect())
}

/// The paper's algorithm on the same lab, at the seconds per pass that were measured here.
fn paper_cost(lab: &dyn Lab, ledger: &Ledger) -> Cost {
    let (fold_seconds, fold_passes) = ledger.cost("fold/");
    let (score_seconds, score_passes) = ledger.cost("affinity/");
    let passes = Paper::default().passes(lab);
    let per_pass = score_seconds / (score_passes.max(1)) as f64;
    Cost { cpu_seconds: fold_seconds + per_pass * passes as f64, passes: fold_passes + passes }
}
