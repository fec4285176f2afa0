//! The last round's candidate: how much it uses each operation, and its sub-policies.
//!
//! Owns how a policy is shown. Never changes or judges one.

use std::collections::BTreeMap;

use super::affinity::is_used;
use super::data::ReportInput;
use super::markup::{
    Element, cell, count, el, note, number, number_cell, paragraph, percent, row_head, shortened,
    signed, table,
};
use super::svg;
use super::{NAME_CHARS_MAX, TEXT_CHARS_MAX};
use crate::policy::{Magnitude, Op, OpStep, Policy, SubPolicy};
use crate::search::affinity::{AffinityTable, Cell, PROFILE};

/// Sub-policies in the table.
const SUB_POLICIES_LISTED_MAX: usize = 64;
/// Levels of an operation that are told one by one.
const LEVELS_LISTED_MAX: usize = 6;

/// How a policy uses one operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct OpUse {
    /// How often it is applied to an image, on average.
    pub(super) per_image: f64,
    /// Its levels and ranges of levels.
    pub(super) levels: Vec<(f64, f64)>,
}

/// Every operation that a policy can apply.
pub(super) fn uses(policy: &Policy) -> BTreeMap<Op, OpUse> {
    let mut uses: BTreeMap<Op, OpUse> = BTreeMap::new();
    for (share, sub_policy) in shares(policy) {
        for step in sub_policy.ops.iter().filter(|step| step.probability > 0.0) {
            let op = uses.entry(step.op).or_default();
            op.per_image += share * step.probability * f64::from(policy.draws());
            let level = match step.magnitude {
                Magnitude::Fixed(level) => (level, level),
                Magnitude::Range(lo, hi) => (lo, hi),
            };
            if step.op.has_magnitude() && !op.levels.contains(&level) {
                op.levels.push(level);
            }
        }
    }
    for op in uses.values_mut() {
        op.levels.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    }
    uses
}

/// Sub-policies with their shares of the weight, the heaviest first.
pub(super) fn shares(policy: &Policy) -> Vec<(f64, &SubPolicy)> {
    let total: f64 = policy.sub_policies().iter().map(|sub_policy| sub_policy.weight).sum();
    let mut shares: Vec<(f64, &SubPolicy)> = policy
        .sub_policies()
        .iter()
        .map(|sub_policy| (sub_policy.weight / total, sub_policy))
        .collect();
    // Stable: equal shares keep the policy's order.
    shares.sort_by(|a, b| b.0.total_cmp(&a.0));
    shares
}

pub(super) fn operations(input: &ReportInput) -> Vec<Element> {
    let policy = match input.candidate() {
        Ok(policy) => policy,
        Err(why) => return vec![paragraph(shortened(&why, TEXT_CHARS_MAX))],
    };
    let mut uses: Vec<(Op, OpUse)> = uses(&policy).into_iter().collect();
    if uses.is_empty() {
        return vec![paragraph("The candidate applies no operation at all.")];
    }
    uses.sort_by(|a, b| b.1.per_image.total_cmp(&a.1.per_image));
    let most = uses[0].1.per_image;
    let affinity = input.affinity.as_ref().filter(|_| policy.ops_profile() == PROFILE);
    let rows = uses.iter().map(|(op, used)| operation_row(*op, used, most, affinity)).collect();
    let unused: Vec<&str> = Op::ALL
        .iter()
        .filter(|op| uses.iter().all(|(used, _)| used != *op))
        .map(|op| op.name())
        .collect();
    let mut content = vec![
        paragraph(
            "How often the last round’s candidate applies each operation (weight × probability × \
             draws), how strongly, and what that costs a clean model.",
        ),
        table(
            "Operations of the candidate, the most used first",
            &["Operation", "Times per image", "Levels λ", "Points lost: mean, worst"],
            rows,
        ),
    ];
    if !unused.is_empty() {
        content.push(note(format!("Not used: {}.", unused.join(", "))));
    }
    content.push(note(if affinity.is_some() {
        "Points lost are those of the measured strengths that it uses, from the affinity table."
    } else {
        "The affinity table does not speak of this candidate’s magnitudes, or is not there."
    }));
    content
}

fn operation_row(
    op: Op,
    used: &OpUse,
    most: f64,
    affinity: Option<&AffinityTable>,
) -> Vec<Element> {
    let drops: Vec<f64> = affinity
        .and_then(|table| table.rows.get(&op))
        .into_iter()
        .flatten()
        .filter(|cell| is_used(used, op, cell.strength))
        .map(Cell::drop)
        .collect();
    let lost = if drops.is_empty() {
        "–".to_owned()
    } else {
        let mean = drops.iter().sum::<f64>() / drops.len() as f64;
        let worst = drops.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        format!("{}, {}", signed(mean, 1), signed(worst, 1))
    };
    let mut levels = cell(levels_text(op, used));
    if op.has_magnitude() {
        levels = levels.add(level_track(used));
    }
    vec![
        row_head(op.name()),
        cell(number(used.per_image, 3)).add(bar(used.per_image / most, "f0")),
        levels,
        number_cell(lost),
    ]
}

fn levels_text(op: Op, used: &OpUse) -> String {
    if !op.has_magnitude() {
        return "has none".to_owned();
    }
    let text = |&(lo, hi): &(f64, f64)| {
        if lo >= hi { number(lo, 2) } else { format!("{}–{}", number(lo, 2), number(hi, 2)) }
    };
    let levels: Vec<String> = used.levels.iter().take(LEVELS_LISTED_MAX).map(text).collect();
    let n_more = used.levels.len().saturating_sub(LEVELS_LISTED_MAX);
    let more = if n_more > 0 { format!(" and {n_more} more") } else { String::new() };
    format!("{}{more}", levels.join(", "))
}

/// A bar that fills this share of its cell.
pub(super) fn bar(share: f64, class: &str) -> Element {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    small_chart().add(svg::rect("track", (0.0, 2.0), (100.0, 8.0))).add(svg::rect(
        class,
        (0.0, 2.0),
        (100.0 * share, 8.0),
    ))
}

/// Levels on a track from 0 to 1.
fn level_track(used: &OpUse) -> Element {
    let mut track = small_chart().add(svg::rect("track", (0.0, 4.0), (100.0, 4.0)));
    for &(lo, hi) in used.levels.iter().take(SUB_POLICIES_LISTED_MAX) {
        let (from, width) = (98.0 * lo, (98.0 * (hi - lo)).max(0.0) + 2.0);
        let rect = svg::rect("f1", (from, 1.0), (width, 10.0)).attr("fill-opacity", "0.7");
        track = track.add(rect);
    }
    track
}

/// Beside a number that says the same, so that nothing reads it aloud.
fn small_chart() -> Element {
    el("svg")
        .class("bar")
        .attr("viewBox", "0 0 100 12")
        .attr("preserveAspectRatio", "none")
        .attr("aria-hidden", "true")
}

pub(super) fn sub_policies(input: &ReportInput) -> Vec<Element> {
    let Ok(policy) = input.candidate() else { return Vec::new() };
    let round = input.rounds.last().map_or(0, |round| round.round);
    let shares = shares(&policy);
    let mut content = vec![paragraph(format!(
        "{} (id {}): the candidate of round {round}. {} sub-policies; {} drawn per image; \
         magnitudes of the profile {}.",
        shortened(policy.name(), NAME_CHARS_MAX),
        policy.id(),
        count(shares.len() as u64),
        policy.draws(),
        policy.ops_profile().name()
    ))];
    let rows = shares.iter().take(SUB_POLICIES_LISTED_MAX).enumerate();
    let rows = rows.map(|(idx, (share, sub_policy))| {
        vec![
            row_head(idx + 1),
            number_cell(percent(*share)),
            steps(&sub_policy.ops, |step| step.op.name().to_owned()),
            steps(&sub_policy.ops, |step| number(step.probability, 2)),
            steps(&sub_policy.ops, magnitude_text),
        ]
    });
    let head = ["No.", "Weight", "Operations, in order", "Probability p", "Magnitude λ"];
    content.push(table("Sub-policies, the heaviest first", &head, rows.collect()));
    let n_more = shares.len().saturating_sub(SUB_POLICIES_LISTED_MAX);
    if n_more > 0 {
        content.push(note(format!("{} more sub-policies are not listed.", count(n_more as u64))));
    }
    content
}

/// A cell with a line for each step; an identity has one that says so.
fn steps(ops: &[OpStep], text: impl Fn(&OpStep) -> String) -> Element {
    let lines: Vec<String> = ops.iter().map(text).collect();
    if lines.is_empty() {
        return cell("identity");
    }
    lines.iter().enumerate().fold(el("td"), |cell, (idx, line)| {
        let cell = if idx > 0 { cell.add(el("br")) } else { cell };
        cell.text(line)
    })
}

fn magnitude_text(step: &OpStep) -> String {
    match step.magnitude {
        _ if !step.op.has_magnitude() => "–".to_owned(),
        Magnitude::Fixed(level) => number(level, 2),
        Magnitude::Range(lo, hi) => format!("{}–{}", number(lo, 2), number(hi, 2)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::from_value;

    #[test]
    fn uses_are_weight_times_probability_times_draws() {
        let value = serde_json::json!({
            "ops_profile": "trivial-wide", "draws": 2,
            "sub_policies": [
                {"weight": 1.0, "ops": [["Rotate", 0.5, [0.0, 0.4]], ["Invert", 1.0, 0.0]]},
                {"weight": 3.0, "ops": [["Rotate", 0.2, 0.7], ["ShearX", 0.0, 0.5]]},
            ],
        });
        let policy = from_value(&value, "p").unwrap();
        let uses = uses(&policy);
        assert_eq!(uses.keys().copied().collect::<Vec<_>>(), [Op::Rotate, Op::Invert]);
        assert!((uses[&Op::Rotate].per_image - 2.0 * (0.125 + 0.15)).abs() < 1e-12);
        assert_eq!(uses[&Op::Rotate].levels, [(0.0, 0.4), (0.7, 0.7)]);
        assert!((uses[&Op::Invert].per_image - 0.5).abs() < 1e-12);
        assert!(uses[&Op::Invert].levels.is_empty());
        assert!((shares(&policy)[0].0 - 0.75).abs() < 1e-12);
        assert_eq!(levels_text(Op::Rotate, &uses[&Op::Rotate]), "0.00–0.40, 0.70");
    }
}
