//! What the search has cost so far, by part and by round, training included.
//!
//! Owns the tables. Costs are those of finished units; what was lost to a kill is in none of them.

use super::NAME_CHARS_MAX;
use super::data::{PARTS, ReportInput, sum};
use super::markup::{
    Element, cell, count, note, number, number_cell, paragraph, percent, row_head, seconds,
    shortened, table,
};
use super::policy::bar;
use crate::search::round::RoundRecord;

/// Rounds in the table; the newest ones.
const ROUNDS_MAX: usize = 100;
/// Parts of a round that are told; a round has four.
const PARTS_MAX: usize = 8;

pub(super) fn section(input: &ReportInput) -> Vec<Element> {
    if input.costs.is_empty() {
        return vec![paragraph("No unit of work has finished yet.")];
    }
    let total = input.total();
    let mut rows: Vec<Vec<Element>> = PARTS
        .iter()
        .filter_map(|part| input.costs.get(part).map(|cost| (part, cost)))
        .map(|(part, cost)| {
            let share = cost.cpu_seconds / total.cpu_seconds;
            vec![
                row_head(part),
                number_cell(seconds(cost.cpu_seconds)),
                cell(percent(share)).add(bar(share, "f0")),
                number_cell(count(cost.passes)),
            ]
        })
        .collect();
    rows.push(vec![
        row_head("together"),
        number_cell(seconds(total.cpu_seconds)),
        cell(""),
        number_cell(count(total.passes)),
    ]);
    let mut content = vec![
        paragraph(
            "CPU time and image passes of all finished units, over all rounds. A forward pass of \
             an image counts one, an image of a training step three.",
        ),
        table("Costs of the whole search", &["Part", "CPU time", "Share", "Image passes"], rows),
    ];
    if !input.rounds.is_empty() {
        content.push(rounds(&input.rounds));
        content.push(note(
            "What an earlier round paid for, such as fold models, is not counted again. The \
             paper’s algorithm is computed, not run.",
        ));
    }
    content
}

fn rounds(rounds: &[RoundRecord]) -> Element {
    let row = |round: &RoundRecord| {
        let parts: Vec<String> = round
            .costs
            .iter()
            .take(PARTS_MAX)
            .map(|(part, cost)| {
                format!("{} {} s", shortened(part, NAME_CHARS_MAX), number(cost.cpu_seconds, 1))
            })
            .collect();
        let own = sum(round.costs.values());
        vec![
            row_head(round.round),
            cell(parts.join(", ")),
            number_cell(seconds(own.cpu_seconds)),
            number_cell(count(own.passes)),
            number_cell(if round.paper_cost.cpu_seconds > 0.0 {
                seconds(round.paper_cost.cpu_seconds)
            } else {
                "–".to_owned()
            }),
        ]
    };
    let rows = rounds.iter().rev().take(ROUNDS_MAX).map(row).collect();
    let head = ["Round", "By part", "CPU time", "Image passes", "The paper’s algorithm"];
    table("Costs by round, newest first", &head, rows)
}
