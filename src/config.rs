//! The configuration: the one place where it is parsed and validated.
//!
//! TOML, checked once and whole before any socket opens. Unknown keys are errors with a suggestion;
//! every message names file, key and cure. Relative paths are relative to the configuration file.
//!
//! *Not here*: what the values do. Each section is plain data for the module that uses it. What the
//! search is told is in `config/search.rs`, what holds of encoded images in `config/images.rs`.

mod images;
mod search;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::limits::{CONFIG_BYTES_MAX, NAME_BYTES_MAX, WORKER_THREADS_MAX};
use crate::pipeline::recipe::{Recipe, RecipeError};

pub use images::ImagesConfig;
pub use search::{
    IdleConfig, IdlePolicy, SEARCH_MODELS, SearchAlgorithm, SearchConfig, SearchDevice,
};

/// The whole configuration file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Sockets and lock; `None`: the default of `control::paths`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_dir: Option<PathBuf>,
    /// Policy store, search journal, cache; `None`: [`default_state_dir`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// Users who may subscribe and control, beside root and the daemon's own.
    #[serde(default)]
    pub allowed_uids: Vec<u32>,
    /// The datasets.
    #[serde(default, rename = "dataset")]
    pub datasets: Vec<DatasetConfig>,
    /// Streams.
    #[serde(default)]
    pub stream: StreamConfig,
    /// Encoded images.
    #[serde(default)]
    pub images: ImagesConfig,
    /// Worker threads.
    #[serde(default)]
    pub workers: WorkersConfig,
    /// Sockets beside the local ones.
    #[serde(default)]
    pub transport: TransportConfig,
    /// Batches on GPUs.
    #[serde(default)]
    pub gpu: GpuConfig,
    /// The policy search.
    #[serde(default)]
    pub search: SearchConfig,
    /// When the search may compute.
    #[serde(default)]
    pub idle: IdleConfig,
    /// Logs and metrics.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

/// One dataset: `path` holds all splits, or each split has its own path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the splits are named as usual")]
pub struct DatasetConfig {
    /// Name for subscriptions.
    pub name: String,
    /// A file or folder with all splits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<PathBuf>,
}

impl DatasetConfig {
    /// The splits that have a path of their own.
    pub fn splits(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let all = [("train", &self.train), ("val", &self.val), ("test", &self.test)];
        all.into_iter().filter_map(|(split, path)| path.as_deref().map(|path| (split, path)))
    }

    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        [&mut self.path, &mut self.train, &mut self.val, &mut self.test]
            .into_iter()
            .filter_map(Option::as_mut)
    }
}

/// `[stream]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamConfig {
    /// The recipe of subscriptions that say nothing else.
    pub defaults: Recipe,
}

/// `[workers]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkersConfig {
    /// 0: all cores less one, at least one.
    pub threads: usize,
}

impl WorkersConfig {
    /// The number of threads to start.
    pub fn n_threads(self) -> usize {
        if self.threads > 0 {
            return self.threads;
        }
        let n_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        n_cores.saturating_sub(1).clamp(1, WORKER_THREADS_MAX)
    }
}

/// `[transport]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TransportConfig {
    /// `HOST:PORT` to serve over TCP, too; port 0: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    /// File with the token that TCP clients must present; made if it does not exist. Default:
    /// `tcp-token` in the state folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Allow an address that other hosts can reach, although nothing is encrypted.
    pub insecure_remote: bool,
}

/// `[gpu]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuConfig {
    /// Most memory that the batches of all consumers may take of one GPU, in MiB; 0: none, so that
    /// consumers copy batches to their GPUs themselves.
    pub memory_mib: u64,
    /// Where what the policy does happens, for consumers whose batches lie on a GPU.
    pub augment_on: AugmentOn,
}

/// `augment_on`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AugmentOn {
    /// On the processors.
    #[default]
    Cpu,
    /// On the consumer's GPU.
    Gpu,
    /// Where more images a second are made, as measured when a consumer comes.
    Auto,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self { memory_mib: 2048, augment_on: AugmentOn::Cpu }
    }
}

impl GpuConfig {
    /// The same in bytes.
    pub const fn memory_bytes(self) -> u64 {
        self.memory_mib.saturating_mul(1 << 20)
    }
}

/// `[telemetry]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// `ADDRESS:PORT` of metrics and health; port 0: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// `text` or `json`.
    pub log_format: LogFormat,
    /// Least severe level that is logged, or a filter such as `info,fastaa::transport=debug`.
    pub log: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { http: None, log_format: LogFormat::Text, log: "info".to_owned() }
    }
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names say it")]
pub enum LogFormat {
    Text,
    Json,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is no such TOML.
    #[error("configuration {path}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, key, and a suggestion.
        message: String,
    },
    /// A value makes no sense.
    #[error("configuration {path}: {key}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let n_bytes = std::fs::metadata(path).map_err(read)?.len();
        if n_bytes > CONFIG_BYTES_MAX {
            return Err(ConfigError::Syntax {
                path: path.to_owned(),
                message: format!("{n_bytes} bytes is over the limit of {CONFIG_BYTES_MAX}"),
            });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, path)
    }

    /// Checks the text of the file at `path`; relative paths become relative to its folder.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            message: with_suggestion(error.to_string().trim_end()),
        })?;
        let refused = |(key, problem)| ConfigError::Value { path: path.to_owned(), key, problem };
        config.check().map_err(refused)?;
        let base = path.parent().unwrap_or(Path::new(""));
        config.search.find_model(base).map_err(refused)?;
        let dirs = [&mut config.runtime_dir, &mut config.state_dir];
        let files = [&mut config.transport.token_file, &mut config.idle.nvml_library];
        let own = dirs.into_iter().chain(files).filter_map(Option::as_mut);
        let datasets = config.datasets.iter_mut().flat_map(DatasetConfig::paths_mut);
        for relative in own.chain(datasets) {
            *relative = base.join(&*relative);
        }
        Ok(config)
    }

    fn check(&self) -> Result<(), (String, String)> {
        let refuse = |key: &str, problem: &str| Err((key.to_owned(), problem.to_owned()));
        self.check_datasets()?;
        for (key, dir) in [("runtime_dir", &self.runtime_dir), ("state_dir", &self.state_dir)] {
            if dir.as_ref().is_some_and(|dir| dir.as_os_str().is_empty()) {
                return refuse(key, "empty; leave it out for the default");
            }
        }
        self.stream.defaults.validate().map_err(|error| match error {
            RecipeError::Value { key, problem } => (format!("stream.defaults.{key}"), problem),
            RecipeError::Syntax(problem) => ("stream.defaults".to_owned(), problem),
        })?;
        self.images.check()?;
        if self.workers.threads > WORKER_THREADS_MAX {
            return refuse("workers.threads", &format!("at most {WORKER_THREADS_MAX}"));
        }
        if let Some(tcp) = &self.transport.tcp {
            let address: SocketAddr = tcp.parse().map_err(|_| {
                let problem = format!("'{tcp}' is no ADDRESS:PORT, such as 127.0.0.1:5555");
                ("transport.tcp".to_owned(), problem)
            })?;
            if !address.ip().is_loopback() && !self.transport.insecure_remote {
                return refuse(
                    "transport.tcp",
                    "other hosts can reach this address, and nothing is encrypted; use a loopback \
                     address and a tunnel, or set insecure_remote = true",
                );
            }
        }
        if let Some(http) = &self.telemetry.http
            && http.parse::<SocketAddr>().is_err()
        {
            let problem = format!("'{http}' is no ADDRESS:PORT, such as 127.0.0.1:9464");
            return refuse("telemetry.http", &problem);
        }
        self.search.check(self.datasets.iter().map(|known| known.name.as_str()))?;
        self.idle.check()
    }

    fn check_datasets(&self) -> Result<(), (String, String)> {
        let key = |idx: usize, key: &str| {
            format!("dataset {} ('{}'): {key}", idx + 1, { &self.datasets[idx].name })
        };
        if self.datasets.is_empty() {
            return Err(("dataset".to_owned(), "none; add a [[dataset]] section".to_owned()));
        }
        for (idx, dataset) in self.datasets.iter().enumerate() {
            let name = dataset.name.as_str();
            let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            if name.is_empty() || name.starts_with('.') || !name.chars().all(legal) {
                let problem = "may have letters, digits, '.', '_' and '-', and no dot first";
                return Err((key(idx, "name"), problem.to_owned()));
            }
            if name.len() > NAME_BYTES_MAX {
                return Err((key(idx, "name"), format!("at most {NAME_BYTES_MAX} bytes")));
            }
            if self.datasets[..idx].iter().any(|other| other.name == name) {
                return Err((key(idx, "name"), "there is another one of that name".to_owned()));
            }
            let has_splits = dataset.splits().next().is_some();
            if has_splits == dataset.path.is_some() {
                let problem = "give either 'path' (a folder with all splits), or 'train', 'val' \
                               and 'test' as far as there are any";
                return Err((key(idx, "path"), problem.to_owned()));
            }
        }
        Ok(())
    }

    /// The effective configuration, as TOML.
    ///
    /// # Panics
    /// Never: every section is a table that TOML can express.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("the configuration came from TOML")
    }
}

/// The state folder if none is configured: `$XDG_STATE_HOME/fastaa`, else `/var/lib/fastaa` for
/// root, else `~/.local/state/fastaa`. `env` looks up environment variables.
pub fn default_state_dir(env: impl Fn(&str) -> Option<PathBuf>, is_root: bool) -> PathBuf {
    match (env("XDG_STATE_HOME"), env("HOME")) {
        (Some(state_home), _) => state_home.join("fastaa"),
        (None, Some(home)) if !is_root => home.join(".local/state/fastaa"),
        _ => PathBuf::from("/var/lib/fastaa"),
    }
}

/// Adds `did you mean` to serde's messages about unknown fields and variants.
pub fn with_suggestion(message: &str) -> String {
    let quoted = |text: &str| -> Vec<String> {
        text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    };
    let unknown = ["unknown field", "unknown variant"];
    let Some(begin) = unknown.iter().find_map(|what| message.rfind(what)) else {
        return message.to_owned();
    };
    let names = quoted(&message[begin..]);
    let Some((wrong, known)) = names.split_first() else { return message.to_owned() };
    let nearest = known
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(wrong, a).total_cmp(&strsim::jaro_winkler(wrong, b)));
    match nearest {
        Some(name) if strsim::jaro_winkler(wrong, name) > 0.75 => {
            format!("{message}; did you mean `{name}`?")
        }
        _ => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATASET: &str = "[[dataset]]\nname = \"d\"\ntrain = \"train.arrow\"\n";

    fn check_refused(text: &str, expected: &[&str]) {
        let error = Config::parse(text, Path::new("/etc/f.toml")).expect_err("must be refused");
        let message = error.to_string();
        for part in expected {
            assert!(message.contains(part), "{message:?} does not contain {part:?}");
        }
    }

    fn check_refused_with_dataset(text: &str, expected: &[&str]) {
        check_refused(&format!("{text}\n{DATASET}"), expected);
    }

    #[test]
    fn the_design_s_example_is_accepted_and_round_trips() {
        let text = include_str!("../config/reference.toml");
        let config = Config::parse(text, Path::new("reference.toml")).expect("valid");
        let again = Config::parse(&config.to_toml(), Path::new("reference.toml")).expect("valid");
        assert_eq!(config, again);
    }

    #[test]
    fn misspelt_keys_get_a_suggestion() {
        check_refused_with_dataset(
            "runtme_dir = \"/x\"",
            &["line 1", "did you mean `runtime_dir`?"],
        );
        check_refused_with_dataset("[workers]\nthread = 1", &["did you mean `threads`?"]);
        check_refused_with_dataset("[stream.defaults]\npolcy = \"none\"", &["`policy`?"]);
        check_refused_with_dataset("[search]\nalgorithm = \"range\"", &["`ranged`?"]);
        check_refused_with_dataset("[serch]\n", &["did you mean `search`?"]);
    }

    #[test]
    fn wrong_types_and_values_name_the_key() {
        check_refused_with_dataset("[workers]\nthreads = \"two\"", &["line 2", "invalid type"]);
        check_refused_with_dataset("[workers]\nthreads = -1", &["line 2"]);
        check_refused_with_dataset(
            "[stream.defaults]\ndtype = \"f64\"",
            &["unknown variant `f64`"],
        );
        check_refused_with_dataset(
            "[stream.defaults]\ncrop = { kind = \"pad\", size = 0, pad = 1 }",
            &["stream.defaults.crop.size"],
        );
        check_refused_with_dataset("[transport]\ntcp = \"0.0.0.0:1\"", &["insecure_remote"]);
        check_refused_with_dataset("[transport]\ntcp = \"here\"", &["127.0.0.1:5555"]);
        check_refused("", &["add a [[dataset]] section"]);
        check_refused("[[dataset]]\nname = \"d\"\n", &["dataset 1 ('d'): path", "give either"]);
        check_refused(&format!("{DATASET}{DATASET}"), &["dataset 2 ('d')", "another one"]);
        check_refused("[[dataset]]\nname = \"../x\"\ntrain = \"t\"\n", &["letters, digits"]);
        check_refused("= 3", &["line 1"]);
    }

    #[test]
    fn relative_paths_belong_to_the_file_s_folder() {
        let config = Config::parse(DATASET, Path::new("/etc/fastaa/f.toml")).expect("valid");
        assert_eq!(config.datasets[0].train.as_deref(), Some(Path::new("/etc/fastaa/train.arrow")));
    }
}
