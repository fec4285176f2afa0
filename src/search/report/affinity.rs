//! The affinity table as a heat map: what a clean model loses by operation and strength.
//!
//! Owns its colours. Orange: accuracy lost; blue: won. The two are told apart by people who see
//! red and green alike, and every cell has its number.

use super::data::ReportInput;
use super::markup::{Element, el, note, number, paragraph, percent, shortened, signed};
use super::policy::{OpUse, uses};
use super::{TEXT_CHARS_MAX, svg};
use crate::policy::{Op, Policy};
use crate::search::affinity::{AffinityTable, Cell, PROFILE};

const LEFT: f64 = 105.0;
const TOP: f64 = 40.0;
const CELL: (f64, f64) = (62.0, 26.0);
/// Cells of a row that are drawn; a table has ten.
const COLUMNS_MAX: usize = 20;
/// Colours of no, much lost and much won accuracy, as red, green and blue.
const NEUTRAL: [f64; 3] = [247.0, 247.0, 247.0];
const LOST: [f64; 3] = [178.0, 78.0, 0.0];
const WON: [f64; 3] = [0.0, 84.0, 148.0];
/// The colours span at least this many points either way.
const SPAN_MIN: f64 = 2.0;

pub(super) fn section(input: &ReportInput) -> Vec<Element> {
    let Some(table) = &input.affinity else {
        return vec![paragraph("The affinity table is not measured yet.")];
    };
    let mut content = vec![paragraph(format!(
        "How many points of accuracy a model that never saw augmentation loses on held-out images \
         under each operation at each strength (mean over the folds; on clean images it has {}, \
         with a loss of {} nats). Strengths are those of the profile {}.",
        percent(table.clean.accuracy),
        number(table.clean.loss, 4),
        PROFILE.name()
    ))];
    let candidate = input.candidate();
    content.push(svg::in_box(heat_map(table, candidate.as_ref().ok())));
    content.push(note(
        "Orange: accuracy lost. Blue: accuracy won. The colours follow the square root, so that \
         small numbers differ. Resting on a cell shows it by fold.",
    ));
    content.push(note(match &candidate {
        Ok(policy) if policy.ops_profile() == PROFILE => {
            "Black frames: strengths that the last round’s candidate uses.".to_owned()
        }
        Ok(policy) => format!(
            "The candidate’s magnitudes are of the profile {}, which are not this table’s \
             strengths; so it has no frames.",
            policy.ops_profile().name()
        ),
        Err(why) => {
            format!("{} So no strengths are framed.", shortened(why, TEXT_CHARS_MAX))
        }
    }));
    content
}

/// Largest change that the colours show, in points.
fn span(table: &AffinityTable) -> f64 {
    let drops = table.rows.values().flatten().map(|cell| cell.drop().abs());
    drops.filter(|drop| drop.is_finite()).fold(SPAN_MIN, f64::max)
}

fn heat_map(table: &AffinityTable, candidate: Option<&Policy>) -> Element {
    let framed = candidate.filter(|policy| policy.ops_profile() == PROFILE).map(uses);
    let n_columns = table.rows.values().map(Vec::len).max().unwrap_or(0).min(COLUMNS_MAX);
    let width = LEFT + CELL.0 * n_columns as f64 + 4.0;
    let height = TOP + CELL.1 * table.rows.len() as f64 + 4.0;
    let mut chart = svg::chart(width, height, "Accuracy lost by operation and strength");
    chart = chart.add(svg::label("axis-title start", (LEFT, 14.0), "strength λ"));
    let widest = table.rows.values().find(|row| row.len().min(COLUMNS_MAX) == n_columns);
    for (idx, cell) in widest.into_iter().flatten().take(n_columns).enumerate() {
        let x = LEFT + CELL.0 * (idx as f64 + 0.5);
        chart = chart.add(svg::label("tick middle", (x, TOP - 8.0), &number(cell.strength, 2)));
    }
    let span = span(table);
    let mut frames = Vec::new();
    for (row, (&op, cells)) in table.rows.iter().enumerate() {
        let y = TOP + CELL.1 * row as f64;
        chart = chart.add(svg::label("end", (LEFT - 8.0, y + 17.0), op.name()));
        let used = framed.as_ref().and_then(|uses| uses.get(&op));
        // What has no strength has one cell, for all of them.
        let cell_width = if op.has_magnitude() { CELL.0 } else { CELL.0 * n_columns as f64 };
        for (column, cell) in cells.iter().take(COLUMNS_MAX).enumerate() {
            let at = (LEFT + CELL.0 * column as f64, y);
            chart = chart.add(heat_cell(op, cell, at, cell_width, span));
            if used.is_some_and(|used| is_used(used, op, cell.strength)) {
                let inner = (cell_width - 5.0, CELL.1 - 5.0);
                frames.push(svg::rect("used", (at.0 + 2.0, at.1 + 2.0), inner));
            }
        }
    }
    chart.add_all(frames)
}

/// Whether the cell of this strength is the nearest to one that the candidate can draw.
pub(super) fn is_used(used: &OpUse, op: Op, strength: f64) -> bool {
    let half = if strength < 0.1 { 0.5 / 30.0 } else { 0.05 };
    let is_near = |&(lo, hi): &(f64, f64)| strength - half <= hi && lo < strength + half;
    !op.has_magnitude() || used.levels.iter().any(is_near)
}

fn heat_cell(op: Op, cell: &Cell, at: (f64, f64), width: f64, span: f64) -> Element {
    let drop = cell.drop();
    let (fill, is_dark) = colour(drop, span);
    let by_fold: Vec<String> = cell.drop_by_fold.iter().map(|&drop| signed(drop, 2)).collect();
    let strength = if op.has_magnitude() {
        format!(" at λ = {}", number(cell.strength, 2))
    } else {
        String::new()
    };
    let tip = format!(
        "{}{strength}: {} points lost; by fold {}; loss {} nats; {} of the images change, by {} \
         on average",
        op.name(),
        signed(drop, 2),
        by_fold.join(", "),
        signed(cell.loss_gain, 4),
        percent(cell.change.changed),
        number(cell.change.distance, 4)
    );
    let class = if is_dark { "middle light-text" } else { "middle dark-text" };
    let mut text = number(drop, 1);
    if !op.has_magnitude() {
        text += " (no strength)";
    }
    el("g")
        .add(el("title").text(tip))
        .add(svg::rect("cell", at, (width - 1.0, CELL.1 - 1.0)).attr("fill", fill))
        .add(svg::label(class, (at.0 + width / 2.0, at.1 + 17.0), &text))
}

/// The colour of a drop in points, and whether it is so dark that text on it must be light.
fn colour(drop: f64, span: f64) -> (String, bool) {
    let share = (drop.abs() / span).sqrt();
    let share = if share.is_finite() { share.min(1.0) } else { 0.0 };
    let end = if drop > 0.0 { LOST } else { WON };
    let mix = |idx: usize| NEUTRAL[idx] + share * (end[idx] - NEUTRAL[idx]);
    let rgb = [0, 1, 2].map(mix);
    let fill = format!("rgb({:.0},{:.0},{:.0})", rgb[0], rgb[1], rgb[2]);
    (fill, luminance(rgb) < 0.18)
}

/// Relative luminance, in [0, 1]; black and white text have equal contrast at about 0.18.
///
/// *Source*: Web Content Accessibility Guidelines 2.2, "relative luminance".
fn luminance(rgb: [f64; 3]) -> f64 {
    let linear = rgb.map(|value| {
        let value = value / 255.0;
        if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
    });
    0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_on_every_colour_has_contrast() {
        for step in -100..=100 {
            let drop = f64::from(step);
            let (fill, is_dark) = colour(drop, 100.0);
            let rgb: Vec<f64> = fill
                .trim_start_matches("rgb(")
                .trim_end_matches(')')
                .split(',')
                .map(|value| value.parse().unwrap())
                .collect();
            let light = luminance([rgb[0], rgb[1], rgb[2]]);
            let ink = if is_dark { 1.0 } else { luminance([17.0; 3]) };
            let (hi, lo) = (light.max(ink), light.min(ink));
            let contrast = (hi + 0.05) / (lo + 0.05);
            assert!(contrast >= 4.0, "{drop}: {fill} has {contrast}");
            let is_orange = rgb[0] > rgb[2];
            assert_eq!(is_orange, drop > 0.0, "{drop}: {fill}");
        }
        assert_eq!(colour(f64::NAN, 1.0).0, "rgb(247,247,247)");
    }

    #[test]
    fn frames_are_on_the_strengths_that_can_be_drawn() {
        let used = OpUse { levels: vec![(0.0, 0.32), (0.9, 0.9)], ..OpUse::default() };
        let framed: Vec<u32> =
            (1..=10).filter(|&n| is_used(&used, Op::Rotate, f64::from(n) / 10.0)).collect();
        assert_eq!(framed, [1, 2, 3, 9]);
        assert!(is_used(&OpUse::default(), Op::Invert, 1.0));
        assert!(!is_used(&OpUse::default(), Op::Rotate, 1.0));
    }
}
