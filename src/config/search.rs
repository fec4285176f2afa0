//! What the configuration says of the search: `[search]` and `[idle]`.
//!
//! Owns the keys, their defaults and their checks. Never acts on them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::limits::{FOLDS_MAX, WORKER_THREADS_MAX};

/// Names of the models that the search brings along.
pub const SEARCH_MODELS: [&str; 4] = ["small-cnn", "wrn-40-2", "wrn-28-10", "resnet18"];
/// Longest time that a device must have been unused.
const QUIET_SECONDS_MAX: f64 = 86_400.0;
/// How the file of a TorchScript module ends.
const SCRIPT_EXTENSIONS: [&str; 3] = ["pt", "pth", "ts"];

/// A key and what is wrong with its value.
type Problem = (String, String);

fn refuse(key: &str, problem: impl Into<String>) -> Result<(), Problem> {
    Err((key.to_owned(), problem.into()))
}

/// `[search]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SearchConfig {
    /// Whether to search at all.
    pub enabled: bool,
    /// Which dataset; default: the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// How.
    pub algorithm: SearchAlgorithm,
    /// `small-cnn`, `wrn-40-2`, `wrn-28-10`, `resnet18`, or the path of a TorchScript module.
    pub model: String,
    /// What it computes on.
    pub device: SearchDevice,
    /// Search on this many samples, stratified; 0: all.
    pub reduced: u64,
    /// Number of folds K.
    pub folds: u32,
    /// Rounds T; 0: as long as the budget lasts.
    pub rounds: u32,
    /// Keys everything random in the search.
    pub seed: u64,
    /// Epochs that a fold model is trained.
    pub fold_epochs: u32,
    /// Paired trainings per arm in the gate.
    pub gate_seeds: u32,
    /// Epochs of each of them.
    pub gate_epochs: u32,
    /// Size of D_gate, in samples.
    pub gate_images: u64,
    /// Compute per day, in seconds; 0: no limit. It pauses the search, it never changes a result.
    pub budget_seconds: u64,
    /// CPU threads of the search worker.
    pub threads: usize,
    /// A run that follows `active` switches to what the search published at most once per so many
    /// epochs; 0 and 1: at each.
    pub min_epochs_between: u64,
    /// Share of a run's epochs, at its end, without such a switch, in [0, 1]. Needs the run's
    /// length (the recipe's `total_epochs`).
    pub freeze_last: f64,
    /// Take back a version of the search after which a run's reported metric fell.
    pub auto_rollback: bool,
}

impl Default for SearchConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            dataset: None,
            algorithm: SearchAlgorithm::Ranged,
            model: "small-cnn".to_owned(),
            device: SearchDevice::Auto,
            reduced: 4000,
            folds: 5,
            rounds: 0,
            seed: 0,
            fold_epochs: 30,
            gate_seeds: 5,
            gate_epochs: 30,
            gate_images: 10_000,
            budget_seconds: 0,
            threads: 1,
            min_epochs_between: 3,
            freeze_last: 0.1,
            auto_rollback: true,
        }
    }
}

/// How the search proposes policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SearchAlgorithm {
    /// The paper's Algorithm 1.
    #[serde(rename = "fast-autoaugment")]
    FastAutoaugment,
    /// Density matching on sub-policies.
    Structured,
    /// Ranges cut by affinity.
    Ranged,
}

/// What the search computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SearchDevice {
    /// A GPU if libtorch can use one, else the processors.
    Auto,
    /// The processors.
    Cpu,
    /// A GPU; without one the search fails.
    Cuda,
}

/// `[idle]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdleConfig {
    /// When the search may compute.
    pub policy: IdlePolicy,
    /// GPU for the search: index or UUID; default: any idle one.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "index_or_uuid")]
    pub gpu: Option<String>,
    /// Path of `libnvidia-ml.so.1`, if the loader does not find it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvml_library: Option<PathBuf>,
    /// A device counts as idle after this long without use, in seconds.
    pub quiet_seconds: f64,
    /// Time between two looks, in milliseconds.
    pub sample_ms: u64,
}

impl Default for IdleConfig {
    fn default() -> Self {
        Self {
            policy: IdlePolicy::Auto,
            gpu: None,
            nvml_library: None,
            quiet_seconds: 5.0,
            sample_ms: 200,
        }
    }
}

/// An index may be written as a number.
fn index_or_uuid<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a GPU's index or UUID, as 'nvidia-smi -L' lists them")]
    enum Name {
        Index(u32),
        Uuid(String),
    }
    Ok(Some(match Name::deserialize(deserializer)? {
        Name::Index(index) => index.to_string(),
        Name::Uuid(uuid) => uuid,
    }))
}

/// When the search may compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IdlePolicy {
    /// On idle devices.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl SearchConfig {
    /// Checks what can be checked without looking at files.
    pub(super) fn check<'a>(&self, datasets: impl Iterator<Item = &'a str>) -> Result<(), Problem> {
        let datasets: Vec<&str> = datasets.collect();
        if let Some(dataset) = &self.dataset
            && !datasets.contains(&dataset.as_str())
        {
            let problem = format!("no dataset '{dataset}'; there is {}", datasets.join(", "));
            return refuse("search.dataset", problem);
        }
        if self.folds < 2 {
            return refuse("search.folds", "at least 2: one part is held out");
        }
        if self.folds > FOLDS_MAX {
            let problem = format!("at most {FOLDS_MAX}: each costs a trained model");
            return refuse("search.folds", problem);
        }
        for (key, value) in
            [("search.fold_epochs", self.fold_epochs), ("search.gate_epochs", self.gate_epochs)]
        {
            if value == 0 {
                return refuse(key, "at least 1");
            }
        }
        if self.gate_seeds < 2 {
            return refuse("search.gate_seeds", "at least 2: one pair has no interval");
        }
        if self.gate_images == 0 {
            return refuse(
                "search.gate_images",
                "at least 1: without images that nothing was searched on, no policy can be shown \
                 to be better; write enabled = false to search nothing",
            );
        }
        if !(1..=WORKER_THREADS_MAX).contains(&self.threads) {
            return refuse("search.threads", format!("between 1 and {WORKER_THREADS_MAX}"));
        }
        if !(0.0..=1.0).contains(&self.freeze_last) {
            return refuse("search.freeze_last", "a share of a run's epochs, between 0 and 1");
        }
        Ok(())
    }

    /// Looks for the model; the path of a TorchScript module becomes relative to `base`.
    pub(super) fn find_model(&mut self, base: &Path) -> Result<(), Problem> {
        if SEARCH_MODELS.contains(&self.model.as_str()) {
            return Ok(());
        }
        let known = format!(
            "known are {}, and the path of a TorchScript module that ends in .pt, .pth or .ts",
            SEARCH_MODELS.join(", ")
        );
        let path = base.join(&self.model);
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !extension.is_some_and(|extension| SCRIPT_EXTENSIONS.contains(&extension)) {
            return refuse("search.model", format!("no model '{}'; {known}", self.model));
        }
        if !path.is_file() {
            return refuse("search.model", format!("no file {}; {known}", path.display()));
        }
        match path.into_os_string().into_string() {
            Ok(path) => self.model = path,
            Err(path) => {
                let problem = format!("the path {} is no UTF-8 text", Path::new(&path).display());
                return refuse("search.model", problem);
            }
        }
        Ok(())
    }
}

impl IdleConfig {
    pub(super) fn check(&self) -> Result<(), Problem> {
        let quiet = self.quiet_seconds;
        if !(0.0..=QUIET_SECONDS_MAX).contains(&quiet) {
            let problem = format!("between 0 and {QUIET_SECONDS_MAX} seconds (a day)");
            return refuse("idle.quiet_seconds", problem);
        }
        if self.gpu.as_deref() == Some("") {
            return refuse("idle.gpu", "a GPU's index or UUID, as 'nvidia-smi -L' lists them");
        }
        if !(10..=60_000).contains(&self.sample_ms) {
            return refuse("idle.sample_ms", "between 10 and 60000 milliseconds");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const DATASET: &str = "[[dataset]]\nname = \"d\"\ntrain = \"train.arrow\"\n";

    fn check_refused(section: &str, expected: &[&str]) {
        let text = format!("{section}\n{DATASET}");
        let error = Config::parse(&text, Path::new("/etc/f.toml")).expect_err("must be refused");
        let message = error.to_string();
        for part in expected {
            assert!(message.contains(part), "{message:?} does not contain {part:?}");
        }
    }

    #[test]
    fn wrong_values_name_the_key_and_the_cure() {
        check_refused("[search]\ndataset = \"e\"", &["no dataset 'e'; there is d"]);
        check_refused("[search]\nfolds = 1", &["search.folds", "at least 2"]);
        check_refused("[search]\nfolds = 65", &["search.folds", "at most 64"]);
        check_refused("[search]\nfold_epochs = 0", &["search.fold_epochs", "at least 1"]);
        check_refused("[search]\ngate_epochs = 0", &["search.gate_epochs", "at least 1"]);
        check_refused("[search]\ngate_seeds = 1", &["search.gate_seeds", "at least 2"]);
        check_refused("[search]\ngate_images = 0", &["search.gate_images", "enabled = false"]);
        check_refused("[search]\nthreads = 0", &["search.threads", "between 1 and 1024"]);
        check_refused("[search]\nthreads = 1025", &["search.threads"]);
        for share in ["-0.1", "1.5", "nan"] {
            let section = format!("[search]\nfreeze_last = {share}");
            check_refused(&section, &["search.freeze_last", "between 0 and 1"]);
        }
        check_refused("[search]\nmin_epochs_between = -1", &["line 2"]);
        for seconds in ["-1.0", "1e20", "inf", "nan"] {
            let section = format!("[idle]\nquiet_seconds = {seconds}");
            check_refused(&section, &["idle.quiet_seconds", "between 0 and 86400"]);
        }
        check_refused("[idle]\ngpu = \"\"", &["idle.gpu", "index or UUID"]);
        check_refused("[idle]\ngpu = [1]", &["index or UUID"]);
        check_refused("[idle]\nsample_ms = 5", &["idle.sample_ms"]);
    }

    #[test]
    fn a_gpu_s_index_may_be_a_number() {
        for gpu in ["0", "\"0\""] {
            let text = format!("[idle]\ngpu = {gpu}\n{DATASET}");
            let config = Config::parse(&text, Path::new("/etc/f.toml")).expect("valid");
            assert_eq!(config.idle.gpu.as_deref(), Some("0"));
        }
    }

    #[test]
    fn a_model_is_a_known_name_or_a_script_that_is_there() {
        let known = ["search.model", "small-cnn, wrn-40-2, wrn-28-10, resnet18"];
        check_refused("[search]\nmodel = \"small-cn\"", &known);
        check_refused("[search]\nmodel = \"\"", &known);
        check_refused("[search]\nmodel = \"net.pt\"", &["no file /etc/net.pt", known[1]]);

        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("net.pt"), "").expect("writes");
        std::fs::write(dir.path().join("net.onnx"), "").expect("writes");
        let parse = |model: &str| {
            let text = format!("[search]\nmodel = \"{model}\"\n{DATASET}");
            Config::parse(&text, &dir.path().join("f.toml"))
        };
        let found = parse("net.pt").expect("valid").search.model;
        assert_eq!(Path::new(&found), dir.path().join("net.pt"));
        assert!(parse("net.onnx").expect_err("no script").to_string().contains("no model"));
        assert_eq!(parse("resnet18").expect("valid").search.model, "resnet18");
    }
}
