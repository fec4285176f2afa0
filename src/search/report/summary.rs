//! The page's beginning: what came out and what it cost; and how the samples are split.
//!
//! Owns the words of the outcome. They say no more than the journal does: a kept policy was not
//! beaten as far as this gate could see, which is not that nothing better exists.

use super::data::ReportInput;
use super::markup::{
    Element, cell, count, el, note, number, number_cell, paragraph, percent, row_head, seconds,
    shortened, table,
};
use super::{NAME_CHARS_MAX, TEXT_CHARS_MAX};
use crate::search::folds::FoldSummary;
use crate::search::round::RoundRecord;

/// Notes on the journal that are shown; more of them say nothing new.
const NOTES_MAX: usize = 10;
/// Classes that are listed one by one.
const CLASSES_LISTED_MAX: usize = 32;

pub(super) fn section(input: &ReportInput) -> Vec<Element> {
    let mut content = Vec::new();
    match input.rounds.last() {
        Some(round) => {
            let class = if round.version.is_some() { "outcome published" } else { "outcome" };
            content.push(paragraph(outcome(&input.dataset, round)).class(class));
            if !round.summary.is_empty() {
                let own = shortened(&round.summary, TEXT_CHARS_MAX);
                content.push(paragraph("In the search’s own words:"));
                content.push(el("blockquote").text(own));
            }
        }
        None => content.push(
            paragraph(format!(
                "No round has finished yet: nothing is decided, and the policy of {} stays as it \
                 is. What is measured so far is below.",
                shortened(&input.dataset, NAME_CHARS_MAX)
            ))
            .class("outcome"),
        ),
    }
    content.push(facts(input));
    content.push(note(
        "CPU time counts every finished unit of work of all rounds, the training of the fold \
         models and of the gate’s models included. A figure for the paper’s algorithm is computed \
         from its image passes and this search’s own seconds per pass: it is no measurement.",
    ));
    let notes = input.notes.iter().take(NOTES_MAX);
    content.extend(notes.map(|text| note(shortened(text, TEXT_CHARS_MAX))));
    content
}

/// What the last round came to, in one sentence.
fn outcome(dataset: &str, round: &RoundRecord) -> String {
    let number = round.round;
    let incumbent = named(&round.incumbent);
    if let Some(version) = round.version {
        let rivals: Vec<String> = round
            .verdict
            .iter()
            .flat_map(|verdict| &verdict.comparisons)
            .map(|comparison| rival_name(&comparison.rival, round))
            .collect();
        let beaten = if rivals.is_empty() {
            String::new()
        } else {
            format!(" It was better than {} in the gate’s trainings.", rivals.join(" and "))
        };
        let dataset = shortened(dataset, NAME_CHARS_MAX);
        return format!("Round {number} published {dataset}@{version}.{beaten}");
    }
    match &round.verdict {
        None => format!(
            "Round {number} found nothing worth the gate’s trainings: its candidate was not put \
             to the gate. Keeping {incumbent}."
        ),
        Some(verdict) if verdict.is_better => format!(
            "Round {number}’s candidate passed the gate, but no version of it is recorded. \
             Keeping {incumbent}."
        ),
        Some(verdict) => {
            let unbeaten: Vec<String> = verdict
                .comparisons
                .iter()
                .filter(|comparison| comparison.lower <= 0.0)
                .map(|comparison| rival_name(&comparison.rival, round))
                .collect();
            let rival = if unbeaten.is_empty() { incumbent.clone() } else { unbeaten.join(" or ") };
            format!(
                "Round {number} found nothing that was shown to be better than {rival}. Keeping \
                 {incumbent}."
            )
        }
    }
}

/// A rival's name by its role.
fn rival_name(role: &str, round: &RoundRecord) -> String {
    if role == "incumbent" { named(&round.incumbent) } else { named(role) }
}

/// A policy's name or reference, which may be missing.
fn named(name: &str) -> String {
    match name {
        "" => "the policy in use".to_owned(),
        name => shortened(name, NAME_CHARS_MAX),
    }
}

fn facts(input: &ReportInput) -> Element {
    let mut facts = vec![fact("Dataset", &shortened(&input.dataset, NAME_CHARS_MAX), "")];
    if let Some(round) = input.rounds.last() {
        let n_published = input.rounds.iter().filter(|round| round.version.is_some()).count();
        let algorithm = shortened(&round.algorithm, NAME_CHARS_MAX);
        let rounds = format!("rounds finished: {}, published: {n_published}", input.rounds.len());
        facts.push(fact("Algorithm", &algorithm, &rounds));
    }
    let total = input.total();
    let passes = format!("{} image passes", count(total.passes));
    facts.push(fact("CPU time so far, training included", &seconds(total.cpu_seconds), &passes));
    let costed = input.rounds.iter().rev().find(|round| round.paper_cost.cpu_seconds > 0.0);
    if let Some(round) = costed {
        let paper = round.paper_cost;
        let mut beside = format!("{} image passes", count(paper.passes));
        if total.cpu_seconds > 0.0 {
            let ratio = paper.cpu_seconds / total.cpu_seconds;
            let times = number(ratio, usize::from(ratio < 10.0));
            let spent = format!("; {times} times what this search spent in all");
            beside.push_str(&spent);
        }
        let label = "The paper’s algorithm on the same data, computed";
        facts.push(fact(label, &seconds(paper.cpu_seconds), &beside));
    }
    let last_verdict = input
        .rounds
        .iter()
        .rev()
        .find_map(|round| round.verdict.as_ref().map(|verdict| (round.round, verdict)));
    if let Some((round, verdict)) = last_verdict {
        let detectable = verdict.detectable_gain;
        let gain = if detectable > 0.0 {
            format!("{} points", number(detectable, 2))
        } else {
            "not known".to_owned()
        };
        let how = format!(
            "seen 4 times in 5; round {round}, {} pairs of trainings, {} images",
            verdict.n_seeds,
            count(verdict.n_images)
        );
        facts.push(fact("Smallest gain the gate could see", &gain, &how));
    }
    el("dl").class("facts").add_all(facts)
}

fn fact(label: &str, value: &str, more: &str) -> Element {
    let mut value = el("dd").text(value);
    if !more.is_empty() {
        value = value.add(el("span").text(more));
    }
    el("div").add(el("dt").text(label)).add(value)
}

pub(super) fn folds(input: &ReportInput) -> Vec<Element> {
    let Some(summary) = &input.folds else {
        return vec![paragraph("The samples are not split yet.")];
    };
    let mut content = vec![paragraph(format!(
        "{} samples are searched on, in {} folds; D_gate’s {} samples are never searched on, and \
         decide. Each fold’s model is trained on its D_M without any policy, and scores candidates \
         on its D_A.",
        count(summary.n_searched),
        summary.options.n_folds,
        count(summary.n_gate)
    ))];
    content.push(fold_table(input, summary));
    if summary.options.reduced > 0 {
        content.push(note(format!(
            "search.reduced = {} limits the searched samples.",
            count(summary.options.reduced)
        )));
    }
    content.push(classes(summary));
    content
}

fn fold_table(input: &ReportInput, summary: &FoldSummary) -> Element {
    let total = |counts: &[u64]| counts.iter().fold(0_u64, |sum, &n| sum.saturating_add(n));
    let row = |(fold, counts): (usize, &Vec<u64>)| {
        let held_out = total(counts);
        let (accuracy, loss) = input.fold_models.get(&fold).map_or_else(
            || ("not trained yet".to_owned(), String::new()),
            |model| (percent(model.accuracy), number(model.train_loss, 4)),
        );
        vec![
            row_head(fold + 1),
            number_cell(count(summary.n_searched.saturating_sub(held_out))),
            number_cell(count(held_out)),
            number_cell(accuracy),
            number_cell(loss),
        ]
    };
    let rows = summary.class_counts.held_out.iter().enumerate().map(row).collect();
    let head = ["Fold", "D_M", "D_A", "Clean accuracy on D_A", "Training loss, nats"];
    table("Samples of the folds, and how their models do", &head, rows)
}

/// Samples per class: a row for each, or the range if there are many.
fn classes(summary: &FoldSummary) -> Element {
    let counts = &summary.class_counts;
    let get = |counts: &[u64], class: usize| counts.get(class).copied().unwrap_or_default();
    let range = |values: Vec<u64>| match (values.iter().min(), values.iter().max()) {
        (Some(min), Some(max)) if min == max => count(*min),
        (Some(min), Some(max)) => format!("{}–{}", count(*min), count(*max)),
        _ => "0".to_owned(),
    };
    let present: Vec<usize> =
        (0..counts.split.len()).filter(|&class| counts.split[class] > 0).collect();
    let of = |part: &[u64]| range(present.iter().map(|&class| get(part, class)).collect());
    if present.len() > CLASSES_LISTED_MAX {
        let held_out: Vec<u64> = present
            .iter()
            .flat_map(|&class| counts.held_out.iter().map(move |fold| get(fold, class)))
            .collect();
        return note(format!(
            "{} classes. Samples per class: {} in the split, {} in D_gate, {} searched, {} in a \
             fold’s D_A.",
            count(present.len() as u64),
            of(&counts.split),
            of(&counts.gate),
            of(&counts.searched),
            range(held_out)
        ));
    }
    let row = |&class: &usize| {
        let by_fold = counts.held_out.iter().map(|fold| get(fold, class)).collect();
        vec![
            row_head(class),
            number_cell(count(get(&counts.split, class))),
            number_cell(count(get(&counts.gate, class))),
            number_cell(count(get(&counts.searched, class))),
            cell(range(by_fold)),
        ]
    };
    let rows = present.iter().map(row).collect();
    let head = ["Class", "Split", "D_gate", "Searched", "D_A of each fold"];
    table("Samples per class", &head, rows)
}
