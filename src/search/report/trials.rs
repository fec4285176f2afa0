//! What the algorithm tried, round by round: losses and the running best.
//!
//! Owns the chart. Never leaves out a best value; of very many others it draws some.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::NAME_CHARS_MAX;
use super::data::ReportInput;
use super::markup::{
    Element, cell, count, el, note, number, number_cell, paragraph, row_head, shortened, table,
};
use super::svg::{self, Scale, xy};
use crate::search::algorithm::Trial;
use crate::search::round::RoundRecord;

/// Rounds whose trials are drawn; the newest ones.
const ROUNDS_MAX: usize = 4;
/// Series that get a colour of their own.
const COLOURS: usize = 8;
/// Trials of a round that are drawn; of more, every so many-th.
const POINTS_MAX: usize = 6_000;
/// Trials in the table.
const LISTED_MAX: usize = 10;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 745.0;
const TOP: f64 = 32.0;
const BOTTOM: f64 = 280.0;

pub(super) fn section(input: &ReportInput) -> Vec<Element> {
    let with_trials: Vec<&RoundRecord> =
        input.rounds.iter().rev().filter(|round| !round.trials.is_empty()).collect();
    if with_trials.is_empty() {
        let none = if input.rounds.is_empty() {
            "No round has finished yet: trials are shown once one has."
        } else {
            "The rounds so far tell of no trials."
        };
        return vec![paragraph(none)];
    }
    let mut content = vec![paragraph(
        "Each point is one proposal as the algorithm judged it (lower is better: a loss in nats, \
         or an error rate); lines are the best so far. These values choose the candidate; whether \
         it is published, the gate decides on other images.",
    )];
    for (idx, round) in with_trials.iter().take(ROUNDS_MAX).enumerate() {
        let title = format!("Round {}: {} trials", round.round, count(round.trials.len() as u64));
        if idx == 0 {
            content.push(el("h3").text(title));
            content.extend(of_round(round));
        } else {
            // Older rounds are folded away.
            let details = el("details").add(el("summary").text(title));
            content.push(details.add_all(of_round(round)));
        }
    }
    if with_trials.len() > ROUNDS_MAX {
        content.push(note("Trials of older rounds are in the journal, but not drawn."));
    }
    content
}

/// Trials by series: a fold, or none. In the order of evaluation.
fn by_series(trials: &[Trial]) -> BTreeMap<Option<usize>, Vec<&Trial>> {
    let mut series: BTreeMap<Option<usize>, Vec<&Trial>> = BTreeMap::new();
    for trial in trials {
        series.entry(trial.fold).or_default().push(trial);
    }
    for trials in series.values_mut() {
        trials.sort_by_key(|trial| trial.trial);
    }
    series
}

fn of_round(round: &RoundRecord) -> Vec<Element> {
    let series = by_series(&round.trials);
    let mut content = Vec::new();
    let top = y_top(&round.trials);
    let finite = round.trials.iter().map(|trial| trial.loss).filter(|loss| loss.is_finite());
    let y = Scale::around(finite.map(|loss| loss.min(top)), (BOTTOM, TOP));
    let last = round.trials.iter().map(|trial| trial.trial).max().unwrap_or_default();
    let x = Scale::exact((0.0, last as f64 + 1.0), (LEFT, RIGHT));
    let title = format!("Round {}: loss of each trial and the best so far", round.round);
    let mut chart = svg::chart(WIDTH, HEIGHT, &title)
        .add(svg::y_axis(&y, LEFT, RIGHT, "loss"))
        .add(svg::x_axis(&x, TOP, BOTTOM, "trial"));
    let every = round.trials.len().div_ceil(POINTS_MAX).max(1);
    for (idx, trials) in series.values().enumerate() {
        let class = format!("points p{}", idx.min(COLOURS));
        chart = chart.add(points(&class, trials, &x, &y, every));
    }
    for (idx, trials) in series.values().enumerate() {
        let class = format!("best l{}", idx.min(COLOURS));
        chart = chart.add(running_best(&class, trials, &x, &y));
    }
    content.push(svg::in_box(chart));
    content.push(legend(&series));
    let n_above = round.trials.iter().filter(|trial| trial.loss > top).count();
    if n_above > 0 {
        let text = format!("{n_above} trials lie above the plot and are drawn at its upper edge.");
        content.push(note(text));
    }
    if every > 1 {
        content.push(note(format!("Of the points, one in {every} is drawn; the lines are exact.")));
    }
    content.push(best_table(&round.trials));
    content
}

/// Where the plot ends: at the largest loss, unless a few are far above the others.
fn y_top(trials: &[Trial]) -> f64 {
    let finite = trials.iter().map(|trial| trial.loss).filter(|loss| loss.is_finite());
    let mut losses: Vec<f64> = finite.collect();
    losses.sort_by(f64::total_cmp);
    let (Some(&min), Some(&max)) = (losses.first(), losses.last()) else { return 1.0 };
    let most = losses[losses.len() * 9 / 10];
    let limit = most + 2.0 * (most - min);
    if limit > min { max.min(limit) } else { max }
}

fn points(class: &str, trials: &[&Trial], x: &Scale, y: &Scale, every: usize) -> Element {
    let mut path = String::new();
    for trial in trials.iter().step_by(every).filter(|trial| trial.loss.is_finite()) {
        let (x, y) = (x.at(trial.trial as f64 + 0.5), y.at(trial.loss));
        let _ = write!(path, "M{} {}h0", xy(x), xy(y));
    }
    el("path").class(class).attr("d", path)
}

fn running_best(class: &str, trials: &[&Trial], x: &Scale, y: &Scale) -> Element {
    let mut path = String::new();
    let mut best: Option<f64> = None;
    for trial in trials.iter().filter(|trial| trial.loss.is_finite()) {
        if best.is_none_or(|best| trial.loss < best) {
            let at = x.at(trial.trial as f64 + 0.5);
            let step = if best.is_none() { "M" } else { "H" };
            let _ = write!(path, "{step}{}", xy(at));
            let step = if best.is_none() { " " } else { "V" };
            let _ = write!(path, "{step}{}", xy(y.at(trial.loss)));
            best = Some(trial.loss);
        }
    }
    if let Some(last) = trials.last()
        && best.is_some()
    {
        let _ = write!(path, "H{}", xy(x.at(last.trial as f64 + 1.0)));
    }
    el("path").class(class).attr("d", path)
}

fn legend(series: &BTreeMap<Option<usize>, Vec<&Trial>>) -> Element {
    let mut items: Vec<Element> = Vec::new();
    for (idx, (fold, trials)) in series.iter().enumerate().take(COLOURS) {
        let name = series_name(*fold);
        items.push(legend_item(idx, &format!("{name} ({})", count(trials.len() as u64))));
    }
    if series.len() > COLOURS {
        items.push(legend_item(COLOURS, &format!("{} more folds", series.len() - COLOURS)));
    }
    el("ul").class("legend").add_all(items)
}

fn series_name(fold: Option<usize>) -> String {
    fold.map_or_else(|| "all folds".to_owned(), |fold| format!("fold {}", fold.saturating_add(1)))
}

fn legend_item(idx: usize, text: &str) -> Element {
    let key = el("svg")
        .attr("viewBox", "0 0 24 10")
        .attr("aria-hidden", "true")
        .add(svg::line(&format!("best l{idx}"), (0.0, 5.0), (24.0, 5.0)))
        .add(svg::dot(&format!("f{idx}"), (12.0, 5.0), 3.5));
    el("li").add(key).text(text)
}

fn best_table(trials: &[Trial]) -> Element {
    let mut best: Vec<&Trial> = trials.iter().collect();
    best.sort_by(|a, b| a.loss.total_cmp(&b.loss).then(a.trial.cmp(&b.trial)));
    let row = |trial: &&Trial| {
        vec![
            row_head(series_name(trial.fold)),
            number_cell(trial.trial),
            number_cell(number(trial.loss, 4)),
            cell(shortened(&trial.what, 4 * NAME_CHARS_MAX)),
        ]
    };
    let rows = best.iter().take(LISTED_MAX).map(row).collect();
    let head = ["Where", "Trial", "Loss", "What was tried"];
    table("The best trials", &head, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(number: u64, loss: f64) -> Trial {
        Trial { fold: Some(0), trial: number, loss, what: String::new() }
    }

    #[test]
    fn the_running_best_never_rises() {
        let trials = [3.0, 4.0, f64::NAN, 2.0, 2.5, 1.0].map(|loss| trial(0, loss));
        let trials: Vec<Trial> =
            (0..).zip(trials).map(|(number, trial)| Trial { trial: number, ..trial }).collect();
        let (x, y) = (Scale::exact((0.0, 6.0), (0.0, 60.0)), Scale::exact((0.0, 4.0), (40.0, 0.0)));
        let path = running_best("best", &trials.iter().collect::<Vec<_>>(), &x, &y);
        assert!(path.into_string().contains("d=\"M5 10H35V20H55V30H60\""));
    }

    #[test]
    fn a_few_losses_far_off_do_not_flatten_the_plot() {
        let mut trials: Vec<Trial> = (0..100).map(|n| trial(n, 1.0 + n as f64 / 100.0)).collect();
        assert!((y_top(&trials) - 1.99).abs() < 1e-12);
        trials.push(trial(100, 1e300));
        let top = y_top(&trials);
        assert!((1.99..4.0).contains(&top), "{top}");
        assert!((y_top(&[]) - 1.0).abs() < 1e-12);
        assert!((y_top(&[trial(0, 5.0), trial(1, 5.0)]) - 5.0).abs() < 1e-12);
    }
}
