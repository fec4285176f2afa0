//! Policies as text for people.
//!
//! Owns layout only.

use serde_json::Value;

use super::table::table;
use crate::control::{LineageReport, PolicyVersionReport};
use crate::policy::{Policy, ops_text};

/// One policy: what is known of it, and its sub-policies as a table.
pub(crate) fn show(report: &PolicyVersionReport, policy: &Policy) -> String {
    let state = match (report.is_active, report.is_pinned) {
        (_, true) => " (active, pinned)",
        (true, false) => " (active)",
        (false, false) => "",
    };
    let line = |key: &str, value: &str| format!("{key:<12}{value}\n");
    let mut parts = vec![
        format!("{}{state}\n", report.reference),
        line("name", policy.name()),
        line("id", &report.id),
        line("version", &report.version.to_string()),
        line("profile", policy.ops_profile().name()),
        line("draws", &policy.draws().to_string()),
    ];
    if let Some(published_at) = &report.published_at {
        let parent = report.parent.unwrap_or(0);
        parts.push(line("published", &format!("{published_at}, after version {parent}")));
    }
    if !policy.provenance().is_empty() {
        let provenance = Value::from(policy.provenance().clone());
        parts.push(line("provenance", &provenance.to_string()));
    }
    if !report.evidence.is_null() {
        parts.push(line("evidence", &report.evidence.to_string()));
    }
    let total: f64 = policy.sub_policies().iter().map(|sub_policy| sub_policy.weight).sum();
    let rows: Vec<_> = policy
        .sub_policies()
        .iter()
        .enumerate()
        .map(|(index, sub_policy)| {
            let share = 100.0 * sub_policy.weight / total;
            [(index + 1).to_string(), format!("{share:.2} %"), ops_text(&sub_policy.ops)]
        })
        .collect();
    parts.push(format!("\n{}", table(["#", "share", "operations"], &rows)));
    parts.concat()
}

/// All versions of each dataset, the active one starred.
pub(crate) fn list(lineages: &[LineageReport]) -> String {
    let parts: Vec<String> = lineages.iter().map(lineage).collect();
    parts.join("\n")
}

fn lineage(lineage: &LineageReport) -> String {
    let state = match (&lineage.problem, lineage.pinned) {
        (Some(problem), _) => format!(": {problem}"),
        (None, Some(version)) => format!(": pinned at version {version}"),
        (None, None) => String::new(),
    };
    let rows: Vec<_> = lineage
        .versions
        .iter()
        .map(|version| {
            let is_active = lineage.active_version == Some(version.version);
            [
                if is_active { "*" } else { "" }.to_owned(),
                version.version.to_string(),
                version.id.clone(),
                version.n_sub_policies.to_string(),
                version.published_at.clone().unwrap_or_else(|| "-".to_owned()),
                version.problem.as_ref().unwrap_or(&version.name).clone(),
            ]
        })
        .collect();
    let headers = ["", "version", "id", "sub-policies", "published", "name"];
    format!("{}{state}\n{}", lineage.dataset, table(headers, &rows))
}
