//! What the gate saw: all rounds in a table, and of each every comparison and every training.
//!
//! Owns how evidence is drawn. Never computes any: a verdict's numbers are shown as they are.

use super::data::ReportInput;
use super::markup::{
    Element, cell, count, el, note, number, number_cell, paragraph, percent, row_head, shortened,
    signed, table,
};
use super::svg::{self, Scale};
use super::{DETAILED_ROUNDS_MAX, NAME_CHARS_MAX, TEXT_CHARS_MAX};
use crate::search::gate::{Arm, Comparison, Verdict};
use crate::search::round::RoundRecord;

/// Rounds in the table; the newest ones.
const ROUNDS_LISTED_MAX: usize = 500;
/// Comparisons and arms that are drawn for a round; a gate has two and three.
const ROWS_MAX: usize = 6;
/// Trainings of an arm that are drawn and told one by one.
const SEEDS_MAX: usize = 64;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 560.0;
const ROW: f64 = 30.0;
const TOP: f64 = 14.0;

pub(super) fn section(input: &ReportInput) -> Vec<Element> {
    if input.rounds.is_empty() {
        return vec![paragraph("No round has finished yet, so the gate has seen nothing.")];
    }
    let mut content = vec![
        paragraph(
            "A candidate is published only if the lower bound of its gain is above zero against \
             every rival. Pairs of models are trained from the same seeds, with the candidate and \
             with a rival, and judged on the same clean images of D_gate.",
        ),
        rounds_table(&input.rounds),
    ];
    let n_rounds = input.rounds.len();
    let detailed = input.rounds.iter().rev().take(DETAILED_ROUNDS_MAX);
    content.extend(detailed.flat_map(round));
    if n_rounds > DETAILED_ROUNDS_MAX {
        content.push(note(format!(
            "The {} older rounds are drawn no more; the newest {ROUNDS_LISTED_MAX} are in the \
             table.",
            n_rounds - DETAILED_ROUNDS_MAX
        )));
    }
    content
}

fn rounds_table(rounds: &[RoundRecord]) -> Element {
    let rows = rounds.iter().rev().take(ROUNDS_LISTED_MAX).map(|round| {
        let (gains, test) = match &round.verdict {
            None => ("not put to the gate".to_owned(), String::new()),
            Some(verdict) => {
                let gains: Vec<String> =
                    verdict.comparisons.iter().take(ROWS_MAX).map(gain_text).collect();
                let test = format!("{} at α = {}", verdict.test, level(verdict.alpha));
                (gains.join("; "), test)
            }
        };
        let outcome = round
            .version
            .map_or_else(|| "not published".to_owned(), |version| format!("published @{version}"));
        vec![
            row_head(round.round),
            cell(outcome),
            cell(shortened(&round.incumbent, NAME_CHARS_MAX)),
            cell(gains),
            cell(test),
        ]
    });
    let head = ["Round", "Outcome", "Incumbent", "Gain in points (lower bound)", "Test"];
    table("All rounds, newest first", &head, rows.collect())
}

fn gain_text(comparison: &Comparison) -> String {
    format!(
        "{} against {} ({})",
        signed(comparison.gain, 2),
        shortened(&comparison.rival, NAME_CHARS_MAX),
        signed(comparison.lower, 2)
    )
}

/// A level of significance, which can be very small.
fn level(alpha: f64) -> String {
    if alpha.is_finite() && alpha > 0.0 && alpha < 1e-4 {
        return format!("{alpha:.1e}");
    }
    number(alpha, 4)
}

fn round(round: &RoundRecord) -> Vec<Element> {
    let outcome = match round.version {
        Some(version) => format!("published as version {version}"),
        None => "not published".to_owned(),
    };
    let mut content = vec![el("h3").text(format!("Round {}: {outcome}", round.round))];
    if !round.summary.is_empty() {
        content.push(paragraph(shortened(&round.summary, TEXT_CHARS_MAX)));
    }
    if let Some(value) = &round.training_value {
        content.push(paragraph(format!(
            "In the algorithm’s own trainings the candidate had {} and the incumbent {}, as means \
             over the same seeds ({} points).",
            percent(value.candidate),
            percent(value.incumbent),
            signed(100.0 * (value.candidate - value.incumbent), 2)
        )));
    }
    match &round.verdict {
        None => content.push(paragraph("The candidate was not put to the gate.")),
        Some(verdict) => content.extend(evidence(round.round, verdict)),
    }
    content.extend(details(round));
    content
}

fn evidence(round: u32, verdict: &Verdict) -> Vec<Element> {
    let mut content = Vec::new();
    // The reason often is the summary's; then once is enough.
    content.push(note(format!(
        "{} Test {} of the search, at a one-sided level of {}; {} of at most {} pairs of \
         trainings, {} images. Gains of {} points or more would have been seen 4 times in 5.",
        shortened(&verdict.reason, TEXT_CHARS_MAX),
        verdict.test,
        level(verdict.alpha),
        verdict.n_seeds,
        verdict.n_seeds_max,
        count(verdict.n_images),
        number(verdict.detectable_gain, 2)
    )));
    if !verdict.comparisons.is_empty() {
        content.push(svg::in_box(comparison_chart(round, &verdict.comparisons)));
        content.push(note(
            "Dot: mean gain. Blue line: two-sided 95 % interval, for people. Orange bar: the lower \
             bound that decides; it must be right of the dashed line at zero.",
        ));
        content.push(comparison_table(&verdict.comparisons));
    }
    if !verdict.arms.is_empty() {
        content.push(svg::in_box(seed_chart(round, &verdict.arms)));
        content.push(note(
            "Each dot is one training; thin lines join trainings from the same seed, bars are \
             means.",
        ));
        content.push(arm_table(&verdict.arms));
    }
    content
}

fn comparison_chart(round: u32, comparisons: &[Comparison]) -> Element {
    let shown = &comparisons[..comparisons.len().min(ROWS_MAX)];
    let values = shown
        .iter()
        .flat_map(|c| [c.gain, c.lower, c.interval.0, c.interval.1])
        .chain(std::iter::once(0.0));
    let scale = Scale::around(values, (LEFT, RIGHT));
    let bottom = TOP + ROW * shown.len() as f64;
    let title = format!("Round {round}: gain of the candidate against each rival");
    let mut chart = svg::chart(WIDTH, bottom + 36.0, &title);
    chart = chart.add(svg::x_axis(&scale, TOP - 6.0, bottom, "gain in accuracy, points"));
    let zero = scale.at(0.0);
    chart = chart.add(svg::line("zero", (zero, TOP - 6.0), (zero, bottom)));
    for (idx, comparison) in shown.iter().enumerate() {
        chart = chart.add(comparison_row(comparison, &scale, TOP + ROW * (idx as f64 + 0.5)));
    }
    chart
}

fn comparison_row(comparison: &Comparison, scale: &Scale, y: f64) -> Element {
    let (lo, hi) = comparison.interval;
    let rival = format!("against {}", comparison.rival);
    let tip = format!(
        "{rival}: gain {} points, 95 % interval {} to {}, lower bound {}",
        signed(comparison.gain, 3),
        signed(lo, 3),
        signed(hi, 3),
        signed(comparison.lower, 3)
    );
    let numbers = format!("{} [{}, {}]", signed(comparison.gain, 2), signed(lo, 2), signed(hi, 2));
    let bound = scale.at(comparison.lower);
    el("g")
        .add(el("title").text(shortened(&tip, TEXT_CHARS_MAX)))
        .add(svg::label("end", (LEFT - 10.0, y + 4.0), &shortened(&rival, 20)))
        .add(svg::line("interval", (scale.at(lo), y), (scale.at(hi), y)))
        .add(svg::line("bound", (bound, y - 8.0), (bound, y + 8.0)))
        .add(svg::dot("dot f0", (scale.at(comparison.gain), y), 5.0))
        .add(svg::label("start", (RIGHT + 14.0, y + 4.0), &numbers))
}

fn comparison_table(comparisons: &[Comparison]) -> Element {
    let row = |comparison: &Comparison| {
        let (lo, hi) = comparison.interval;
        vec![
            row_head(shortened(&comparison.rival, NAME_CHARS_MAX)),
            number_cell(signed(comparison.gain, 3)),
            number_cell(signed(comparison.lower, 3)),
            number_cell(format!("{} to {}", signed(lo, 3), signed(hi, 3))),
            number_cell(number(comparison.se_seeds, 3)),
            number_cell(number(comparison.se_images, 3)),
            number_cell(number(comparison.degrees, 1)),
            cell(if comparison.lower > 0.0 { "beaten" } else { "not beaten" }),
        ]
    };
    let head = [
        "Rival",
        "Gain",
        "Lower bound",
        "95 % interval",
        "SE, seeds",
        "SE, images",
        "Degrees of freedom",
        "",
    ];
    let rows = comparisons.iter().take(ROWS_MAX).map(row).collect();
    table("Gains of the candidate, in points of accuracy", &head, rows)
}

fn seed_chart(round: u32, arms: &[Arm]) -> Element {
    let shown = &arms[..arms.len().min(ROWS_MAX)];
    let seeds = |arm: &Arm| -> Vec<f64> {
        arm.accuracy.iter().take(SEEDS_MAX).map(|accuracy| 100.0 * accuracy).collect()
    };
    let scale = Scale::around(shown.iter().flat_map(seeds), (LEFT, RIGHT));
    let bottom = TOP + ROW * shown.len() as f64;
    let title = format!("Round {round}: accuracy of every training, by policy");
    let mut chart = svg::chart(WIDTH, bottom + 36.0, &title).add(svg::x_axis(
        &scale,
        TOP - 6.0,
        bottom,
        "clean accuracy on D_gate, %",
    ));
    let y = |idx: usize| TOP + ROW * (idx as f64 + 0.5);
    for (idx, pair) in shown.windows(2).enumerate() {
        for (upper, lower) in seeds(&pair[0]).into_iter().zip(seeds(&pair[1])) {
            let (from, to) = ((scale.at(upper), y(idx)), (scale.at(lower), y(idx + 1)));
            chart = chart.add(svg::line("pair", from, to));
        }
    }
    for (idx, arm) in shown.iter().enumerate() {
        let (y, seeds) = (y(idx), seeds(arm));
        let role = shortened(&arm.role, 20);
        chart = chart.add(svg::label("end", (LEFT - 10.0, y + 4.0), &role));
        let class = format!("dot f{}", idx % 8);
        for (seed, &accuracy) in seeds.iter().enumerate() {
            let tip = format!("{role}, training {}: {} %", seed + 1, number(accuracy, 2));
            let tip = el("title").text(tip);
            chart = chart.add(svg::dot(&class, (scale.at(accuracy), y), 4.0).add(tip));
        }
        let mean = scale.at(100.0 * mean(&arm.accuracy));
        chart = chart.add(svg::line("mean", (mean, y - 10.0), (mean, y + 10.0))).add(svg::label(
            "start",
            (RIGHT + 14.0, y + 4.0),
            &percent(self::mean(&arm.accuracy)),
        ));
    }
    chart
}

fn arm_table(arms: &[Arm]) -> Element {
    let row = |arm: &Arm| {
        let seeds: Vec<String> =
            arm.accuracy.iter().take(SEEDS_MAX).map(|&share| number(100.0 * share, 2)).collect();
        vec![
            row_head(shortened(&arm.role, NAME_CHARS_MAX)),
            cell(shortened(&arm.policy, NAME_CHARS_MAX)),
            cell(shortened(&arm.policy_id, 8)),
            number_cell(percent(mean(&arm.accuracy))),
            cell(seeds.join(", ")),
        ]
    };
    let head = ["Role", "Policy", "Id", "Mean accuracy", "By seed, %"];
    let rows = arms.iter().take(ROWS_MAX).map(row).collect();
    table("Clean accuracy on D_gate", &head, rows)
}

/// NaN for none, which is written as no number.
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// What else the algorithm tells, folded away.
fn details(round: &RoundRecord) -> Option<Element> {
    let is_empty = match &round.details {
        serde_json::Value::Null => true,
        serde_json::Value::Object(object) => object.is_empty(),
        serde_json::Value::Array(list) => list.is_empty(),
        _ => false,
    };
    let text = serde_json::to_string_pretty(&round.details).unwrap_or_default();
    let head = el("summary").text("What else the algorithm tells");
    let text = el("pre").text(shortened(&text, 2 * TEXT_CHARS_MAX));
    (!is_empty).then(|| el("details").add(head).add(text))
}
