//! From a journal's records to what the page shows.
//!
//! Owns which unit is which. Never fails for what is not there yet or cannot be read: the page
//! leaves it out and says so.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ReportError;
use crate::image::Image;
use crate::policy::{self, Policy, rfc3339_utc};
use crate::search::affinity::AffinityTable;
use crate::search::folds::FoldSummary;
use crate::search::journal::{JournalHeader, read_records};
use crate::search::ledger::{JOURNAL_VERSION, Record};
use crate::search::round::{Cost, FoldRecord, RoundRecord};

/// Parts of a search's cost, in the order of a round; what is none of them is `other`.
pub const PARTS: [&str; 5] = ["folds", "affinity", "proposals", "gate", "other"];

/// All that a page is made from.
#[derive(Clone, Debug, Default)]
pub struct ReportInput {
    /// Name of the dataset.
    pub dataset: String,
    /// Which search it is.
    pub header: Option<JournalHeader>,
    /// How the samples are split.
    pub folds: Option<FoldSummary>,
    /// The trained fold models, by fold, from 0.
    pub fold_models: BTreeMap<usize, FoldRecord>,
    /// What operations cost a clean model.
    pub affinity: Option<AffinityTable>,
    /// The finished rounds, ascending.
    pub rounds: Vec<RoundRecord>,
    /// CPU time and image passes of the finished units, by [part](PARTS); empty parts are left out.
    pub costs: BTreeMap<&'static str, Cost>,
    /// Finished units of work.
    pub n_units: usize,
    /// When the last unit was done, as RFC 3339; empty if there is none.
    pub finished: String,
    /// What of the journal is not shown, and why; one sentence each.
    pub notes: Vec<String>,
    /// Images to show sub-policies on; without any, that section is left out.
    pub samples: Vec<Image>,
}

impl ReportInput {
    /// Reads a journal, also while a search is writing it.
    ///
    /// # Errors
    /// There is no journal, or it cannot be read.
    pub fn from_journal(path: &Path, dataset: &str) -> Result<Self, ReportError> {
        let read = read_records::<Record>(path, JOURNAL_VERSION)
            .map_err(|error| ReportError::from_journal(error, dataset, path))?;
        let mut input = Self::from_records(dataset, &read.records);
        input.header = Some(read.header);
        if let Some(tail) = read.tail {
            input.notes.push(format!(
                "The journal's last line ({}) is half-written: a search may be at it right now, or \
                 was killed there. It is left out.",
                tail.line
            ));
        }
        Ok(input)
    }

    /// From records alone, in the order of the journal.
    pub fn from_records(dataset: &str, records: &[Record]) -> Self {
        let mut input = Self { dataset: dataset.to_owned(), ..Self::default() };
        // A key is written once; if not, the last one is what the search goes on with.
        let by_key: HashMap<&str, &Record> =
            records.iter().map(|record| (record.key.as_str(), record)).collect();
        let mut keys: Vec<&&str> = by_key.keys().collect();
        keys.sort_unstable();
        for key in keys {
            input.take(by_key[*key]);
        }
        input.n_units = by_key.len();
        input.finished = records.iter().map(|record| record.finished).max().map_or_else(
            String::new,
            |seconds| {
                let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
                rfc3339_utc(time.unwrap_or(UNIX_EPOCH))
            },
        );
        input.rounds.sort_by_key(|round| round.round);
        input
    }

    /// CPU time and image passes of the whole search.
    pub fn total(&self) -> Cost {
        sum(self.costs.values())
    }

    /// The candidate of the last round.
    ///
    /// # Errors
    /// Why there is none to show, in one sentence.
    pub fn candidate(&self) -> Result<Policy, String> {
        let round = self.rounds.last().ok_or("No round has finished yet.")?;
        policy::from_value(&round.candidate, "candidate").map_err(|error| {
            format!("The candidate of round {} cannot be read: {error}.", round.round)
        })
    }

    fn take(&mut self, record: &Record) {
        if let Some(part) = part(&record.key) {
            let cost = self.costs.entry(part).or_default();
            cost.cpu_seconds += record.cpu_seconds;
            cost.passes = cost.passes.saturating_add(record.passes);
        }
        let number = |prefix| record.key.strip_prefix(prefix)?.parse::<usize>().ok();
        if record.key == "folds" {
            self.folds = self.read(record);
        } else if record.key == "affinity/table" {
            self.affinity = self.read(record);
        } else if let Some(fold) = number("fold/") {
            if let Some(model) = self.read(record) {
                self.fold_models.insert(fold, model);
            }
        } else if number("round/").is_some()
            && let Some(round) = self.read(record)
        {
            self.rounds.push(round);
        }
    }

    fn read<T: DeserializeOwned>(&mut self, record: &Record) -> Option<T> {
        // By reference: a round can be large.
        let value: &Value = &record.value;
        match T::deserialize(value) {
            Ok(value) => Some(value),
            Err(error) => {
                self.notes.push(format!(
                    "The value of '{}' in the journal is none of this program's ({error}). It is \
                     left out.",
                    record.key
                ));
                None
            }
        }
    }
}

/// To which part of the cost a unit belongs. The units that only gather others' results
/// (`affinity/table`, `round/N`) belong to none: their time contains the others'.
fn part(key: &str) -> Option<&'static str> {
    if key == "affinity/table" || key.starts_with("round/") {
        return None;
    }
    let is_in_round = key.starts_with("round-");
    Some(match key.split('/').next().unwrap_or_default() {
        "folds" | "fold" => "folds",
        "affinity" => "affinity",
        "train" if key.starts_with("train/searched/") => "gate",
        "train" => "proposals",
        _ if is_in_round => "proposals",
        _ => "other",
    })
}

/// Costs together.
pub(super) fn sum<'a>(costs: impl Iterator<Item = &'a Cost>) -> Cost {
    costs.fold(Cost::default(), |sum, cost| Cost {
        cpu_seconds: sum.cpu_seconds + cost.cpu_seconds,
        passes: sum.passes.saturating_add(cost.passes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_has_its_part() {
        for (key, expected) in [
            ("folds", Some("folds")),
            ("fold/0", Some("folds")),
            ("fold/0/epoch/3", Some("folds")),
            ("affinity/0/clean", Some("affinity")),
            ("affinity/table", None),
            ("round-3/trial/7", Some("proposals")),
            ("train/fold-2/0a1b/0", Some("proposals")),
            ("round-3/gated", Some("proposals")),
            ("train/searched/0a1b/0", Some("gate")),
            ("round/3", None),
            ("rounds", Some("other")),
            ("", Some("other")),
        ] {
            assert_eq!(part(key), expected, "{key}");
        }
    }
}
