//! Which policy an epoch of a run was begun with, so that all ranks agree and a resumed epoch goes
//! on with it.
//!
//! Runs with a name are kept in `DIR/<hash of dataset and run>.json`, a file a run; runs of a
//! single connection in memory only. Owns nothing else: what a reference means is the store's.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{PolicyError, store_files};
use crate::limits::{PINNED_EPOCHS_MAX, PINNED_RUNS_MAX};

/// See the module.
#[derive(Debug)]
pub struct EpochPins {
    dir: PathBuf,
    runs: Mutex<Runs>,
}

#[derive(Debug, Default)]
struct Runs {
    pins: HashMap<RunKey, RunPins>,
    /// Oldest first, for forgetting.
    order: VecDeque<RunKey>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RunKey {
    dataset: String,
    run: String,
}

/// A run's file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunPins {
    dataset: String,
    run: String,
    /// Epoch → reference.
    epochs: BTreeMap<u64, String>,
}

impl EpochPins {
    /// Pins of named runs are kept in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made or cleaned.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, PolicyError> {
        let dir = dir.into();
        store_files::create_dir(&dir)?;
        store_files::remove_leftovers(&dir)?;
        Ok(Self { dir, runs: Mutex::default() })
    }

    /// The reference pinned for an epoch of a run; if there is none, what `decide` says is pinned
    /// and returned. `decide` is told the run's other pins, by epoch. `is_named` runs survive a
    /// restart.
    ///
    /// # Errors
    /// `decide`'s, or the run's file cannot be read or written.
    pub fn pinned_or(
        &self,
        dataset: &str,
        run: &str,
        is_named: bool,
        epoch: u64,
        decide: impl FnOnce(&BTreeMap<u64, String>) -> Result<String, PolicyError>,
    ) -> Result<String, PolicyError> {
        let key = RunKey { dataset: dataset.to_owned(), run: run.to_owned() };
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if !runs.pins.contains_key(&key) {
            let path = self.path(&key);
            let pins = if is_named && path.exists() { read(&path)? } else { RunPins::default() };
            runs.pins.insert(key.clone(), pins);
            runs.order.push_back(key.clone());
            if runs.order.len() > PINNED_RUNS_MAX
                && let Some(oldest) = runs.order.pop_front()
            {
                runs.pins.remove(&oldest);
            }
        }
        let pins = runs.pins.entry(key.clone()).or_default();
        if let Some(reference) = pins.epochs.get(&epoch) {
            return Ok(reference.clone());
        }
        let reference = decide(&pins.epochs)?;
        pins.dataset.clone_from(&key.dataset);
        pins.run.clone_from(&key.run);
        pins.epochs.insert(epoch, reference.clone());
        while pins.epochs.len() > PINNED_EPOCHS_MAX {
            pins.epochs.pop_first();
        }
        if is_named {
            store_files::write_json(&self.path(&key), pins)?;
        }
        Ok(reference)
    }

    fn path(&self, key: &RunKey) -> PathBuf {
        // The length of the first part keeps ("a", "bc") and ("ab", "c") apart.
        let text = format!("{}:{}{}", key.dataset.len(), key.dataset, key.run);
        let hash = Sha256::digest(text.as_bytes());
        let name: String = hash[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        self.dir.join(name + ".json")
    }
}

fn read(path: &Path) -> Result<RunPins, PolicyError> {
    let text = std::fs::read_to_string(path).map_err(|error| PolicyError::io(path, error))?;
    serde_json::from_str(&text).map_err(|error| PolicyError::Damaged {
        path: path.display().to_string(),
        problem: format!("{error}; remove it to let the run choose its policies anew"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(pins: &EpochPins, run: &str, is_named: bool, epoch: u64, now: &str) -> String {
        pins.pinned_or("d", run, is_named, epoch, |_| Ok(now.to_owned())).expect("pinned")
    }

    #[test]
    fn an_epoch_keeps_the_policy_it_began_with() {
        let dir = tempfile::tempdir().expect("a folder");
        let pins = EpochPins::open(dir.path()).expect("opens");
        assert_eq!(pin(&pins, "run", true, 0, "d@1"), "d@1");
        assert_eq!(pin(&pins, "run", true, 0, "d@2"), "d@1");
        assert_eq!(pin(&pins, "run", true, 1, "d@2"), "d@2");
        assert_eq!(pin(&pins, "other", true, 0, "d@2"), "d@2");
        assert_eq!(pin(&pins, "connection", false, 0, "d@2"), "d@2");

        let again = EpochPins::open(dir.path()).expect("opens again");
        assert_eq!(pin(&again, "run", true, 0, "d@3"), "d@1");
        assert_eq!(pin(&again, "connection", false, 0, "d@3"), "d@3");
    }

    #[test]
    fn who_decides_knows_the_run_s_other_epochs_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("a folder");
        let pins = EpochPins::open(dir.path()).expect("opens");
        pin(&pins, "run", true, 0, "d@1");
        pin(&pins, "run", true, 3, "d@2");
        pin(&pins, "other", true, 1, "d@9");
        let again = EpochPins::open(dir.path()).expect("opens again");
        let told = again.pinned_or("d", "run", true, 4, |epochs| Ok(format!("{epochs:?}")));
        assert_eq!(told.expect("pinned"), r#"{0: "d@1", 3: "d@2"}"#);
    }

    #[test]
    fn a_refused_decision_pins_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        let pins = EpochPins::open(dir.path()).expect("opens");
        let refused = pins.pinned_or("d", "r", true, 0, |_| Err(PolicyError::not_found("no")));
        assert!(refused.is_err());
        assert_eq!(pin(&pins, "r", true, 0, "d@1"), "d@1");
    }

    #[test]
    fn a_damaged_file_is_named_with_its_cure() {
        let dir = tempfile::tempdir().expect("a folder");
        let pins = EpochPins::open(dir.path()).expect("opens");
        pin(&pins, "r", true, 0, "d@1");
        let file = std::fs::read_dir(dir.path()).expect("reads").next().expect("a file");
        std::fs::write(file.expect("an entry").path(), "{").expect("writes");
        let again = EpochPins::open(dir.path()).expect("opens again");
        let error = again.pinned_or("d", "r", true, 0, |_| Ok("d@2".to_owned()));
        let message = error.expect_err("must be refused").to_string();
        assert!(message.contains(".json is damaged") && message.contains("remove it"), "{message}");
    }

    #[test]
    fn old_epochs_and_runs_are_forgotten() {
        let dir = tempfile::tempdir().expect("a folder");
        let pins = EpochPins::open(dir.path()).expect("opens");
        for epoch in 0..=PINNED_EPOCHS_MAX as u64 {
            pin(&pins, "r", false, epoch, "d@1");
        }
        assert_eq!(pin(&pins, "r", false, 0, "d@2"), "d@2");
        for run in 0..=PINNED_RUNS_MAX {
            pin(&pins, &format!("r{run}"), false, 0, "d@1");
        }
        assert_eq!(pin(&pins, "r0", false, 0, "d@2"), "d@2");
    }
}
