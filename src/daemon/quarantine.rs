//! Samples that cannot be read: listed once each, in a file for each split, and logged.
//!
//! Owns `state_dir/quarantine/DATASET/SPLIT.jsonl`, one JSON object a line:
//!
//! ```json
//! {"sample": 17, "name": "train/cat/b.jpg", "reason": "damaged or cut off: …",
//!  "fingerprint": "…", "found": "2026-01-31T12:00:00Z"}
//! ```
//! Lines of other fingerprints are of an earlier state of the dataset. Deleting a file is safe.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde_json::{Value, json};
use tracing::warn;

use crate::limits::QUARANTINE_LINES_MAX;
use crate::pipeline::sample::BadSamples;
use crate::policy::rfc3339_utc;

use super::datasets::OpenedSplit;

/// The lists of all splits.
#[derive(Debug)]
pub(super) struct Quarantine {
    dir: PathBuf,
    lists: Mutex<HashMap<(String, String), Arc<List>>>,
    n_bad: Arc<AtomicU64>,
}

/// The list of one split.
#[derive(Debug)]
struct List {
    dataset: String,
    split: String,
    fingerprint: String,
    path: PathBuf,
    known: Mutex<HashSet<u64>>,
    n_bad: Arc<AtomicU64>,
}

impl Quarantine {
    /// Lists below `dir`, which need not exist.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, lists: Mutex::default(), n_bad: Arc::default() }
    }

    /// Bad samples of all splits that streams were opened on.
    pub(super) fn n_bad(&self) -> u64 {
        self.n_bad.load(Ordering::Relaxed)
    }

    /// The list of a split.
    pub(super) fn of(&self, opened: &OpenedSplit) -> Arc<dyn BadSamples> {
        let key = (opened.dataset.clone(), opened.split.clone());
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        let list = lists.entry(key).or_insert_with(|| {
            let path = self.dir.join(&opened.dataset).join(format!("{}.jsonl", opened.split));
            let fingerprint = opened.data.info().fingerprint.0.clone();
            let known = read_known(&path, &fingerprint);
            self.n_bad.fetch_add(known.len() as u64, Ordering::Relaxed);
            Arc::new(List {
                dataset: opened.dataset.clone(),
                split: opened.split.clone(),
                fingerprint,
                path,
                known: Mutex::new(known),
                n_bad: Arc::clone(&self.n_bad),
            })
        });
        Arc::<List>::clone(list)
    }
}

impl BadSamples for List {
    fn found(&self, sample_idx: u64, name: &str, reason: &str) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= QUARANTINE_LINES_MAX || !known.insert(sample_idx) {
            return;
        }
        self.n_bad.fetch_add(1, Ordering::Relaxed);
        let (dataset, split) = (&self.dataset, &self.split);
        warn!(
            dataset,
            split,
            sample = sample_idx,
            "{}: {}",
            name.escape_debug(),
            reason.escape_debug()
        );
        let line = json!({
            "sample": sample_idx,
            "name": name,
            "reason": reason,
            "fingerprint": self.fingerprint,
            "found": rfc3339_utc(SystemTime::now()),
        });
        if let Err(error) = append(&self.path, &line) {
            warn!(dataset, split, %error, "cannot write {}", self.path.display());
        }
    }
}

fn append(path: &Path, line: &Value) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new("")))?;
    let mut file: File = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(format!("{line}\n").as_bytes())
}

/// The samples that are listed already for this very content.
fn read_known(path: &Path, fingerprint: &str) -> HashSet<u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of_this = lines.filter(|line| line["fingerprint"] == fingerprint);
    of_this.filter_map(|line| line["sample"].as_u64()).take(QUARANTINE_LINES_MAX).collect()
}
