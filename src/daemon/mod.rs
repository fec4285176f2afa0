//! The daemon: start-up, supervision, shutdown.
//!
//! Wires the parts and owns no logic of theirs. Start-up goes: configuration, lock, datasets,
//! policy store, stream server, control socket, readiness; shutdown goes the other way.

mod datasets;
mod handler;
mod idle_watch;
mod logging;
mod metrics;
mod provider;
mod quarantine;
mod runtime_dir;
mod search_process;
mod search_report;
mod search_state;
#[cfg(feature = "torch")]
mod search_worker;
/// Public for the tests, which let scripts be the worker.
pub mod searcher;
mod serve;
mod switching;
mod token;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError, default_state_dir};
use crate::control::{PathsError, RuntimePaths};
use crate::policy::{PolicyError, StoredReference, load_reference};
use crate::transport::server::ServerError;

use datasets::{Datasets, OpenDatasetError};
use runtime_dir::RuntimeDirError;

/// Exit code for a configuration that cannot work, as in `sysexits.h`: restarting does not help.
const EXIT_CONFIG: u8 = 78;

/// Stream policy-augmented image batches to the training processes of this host.
#[derive(Debug, Parser)]
#[command(name = "fastaa-loaderd", version, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Args {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Check the configuration, print what is in effect, and exit; datasets are looked for, but not
    /// opened
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Search the policy; the daemon and 'fastaa-ctl search run --offline' start this
    #[command(hide = true)]
    SearchWorker {
        /// Configuration file (TOML)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// One whole search, if the configuration does not say how many rounds
        #[arg(long)]
        offline: bool,
        /// Write the report of the newest search to this file instead of searching
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
    },
}

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
enum DaemonError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Paths(#[from] PathsError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Dataset(#[from] OpenDatasetError),
    #[error("state_dir: {0}")]
    State(#[from] PolicyError),
    #[error("dataset '{name}': {path} does not exist")]
    MissingDataset { name: String, path: PathBuf },
    #[error("stream.defaults.policy: {0}")]
    DefaultPolicy(#[source] PolicyError),
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{0}")]
    LogFilter(String),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("control socket {path}: {source}")]
    Control { path: PathBuf, source: std::io::Error },
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
    #[error("{0}")]
    Report(String),
    #[error("a thread of the daemon ended by itself; its log has the reason")]
    ThreadDied,
}

impl DaemonError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_)
            | Self::Dataset(_)
            | Self::MissingDataset { .. }
            | Self::DefaultPolicy(_)
            | Self::LogFilter(_)
            | Self::Paths(_) => EXIT_CONFIG,
            _ => 1,
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::RuntimeDir(error) => error.hint(),
            Self::Dataset(_) | Self::MissingDataset { .. } => {
                "'fastaa-ctl dataset inspect PATH' shows what is there, 'fastaa-ctl dataset pack' \
                 makes a dataset"
            }
            Self::Config(ConfigError::Read { .. }) => "give an existing file with --config",
            Self::Config(_) => "config/reference.toml has every key",
            Self::File { .. } => "choose another place in the configuration",
            Self::LogFilter(_) => "levels are error, warn, info, debug and trace",
            Self::Paths(_) => "$FASTAA_RUNTIME_DIR or runtime_dir in the configuration chooses it",
            Self::DefaultPolicy(_) => "write policy = \"none\" to start without one",
            _ => "",
        }
    }
}

/// Where the daemon's files are, once defaults are filled in.
#[derive(Clone, Debug)]
struct Places {
    runtime: RuntimePaths,
    state_dir: PathBuf,
}

/// Parses the arguments and runs the daemon until it is told to stop.
///
/// Exit codes: 0 stopped as told, 1 failed, 2 usage, 78 bad configuration.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let result = match (args.command, args.config) {
        (Some(Command::SearchWorker { config, report: Some(path), .. }), _) => {
            report(&config, &path)
        }
        (Some(Command::SearchWorker { config, offline, report: None }), _) => {
            return search(&config, offline);
        }
        (None, Some(config)) if args.check => check(&config),
        (None, config) => run(&config.expect("clap demands it where there is no subcommand")),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    let mut stderr = std::io::stderr();
    // Nobody may be reading; the exit code says it, too.
    let _ = writeln!(stderr, "error: {error}");
    if !error.hint().is_empty() {
        let _ = writeln!(stderr, "hint: {}", error.hint());
    }
    ExitCode::from(error.exit_code())
}

fn run(path: &Path) -> Result<(), DaemonError> {
    let config = Config::load(path)?;
    let places = places(&config)?;
    logging::start(&config.telemetry).map_err(DaemonError::LogFilter)?;
    serve::serve(&config, path, &places)
}

#[cfg(feature = "torch")]
fn search(config: &Path, offline: bool) -> ExitCode {
    search_worker::main(config, offline)
}

#[cfg(not(feature = "torch"))]
fn search(_config: &Path, _offline: bool) -> ExitCode {
    let message = "this program was built without the feature torch, and cannot search";
    let _ = writeln!(std::io::stderr(), "error: {message}");
    ExitCode::from(EXIT_CONFIG)
}

/// Writes the report of the newest search, by temp file and rename.
fn report(config: &Path, path: &Path) -> Result<(), DaemonError> {
    let config = Config::load(config)?;
    let places = places(&config)?;
    let first = || config.datasets[0].name.clone();
    let dataset = config.search.dataset.clone().unwrap_or_else(first);
    let of_dataset: Vec<_> =
        config.datasets.iter().filter(|known| known.name == dataset).cloned().collect();
    let datasets = Datasets::open(&of_dataset, &places.state_dir.join("cache"))?;
    let split = datasets.find(&dataset, "train").ok();
    let html = search_report::page(&places.state_dir, &dataset, split.as_deref())
        .map_err(DaemonError::Report)?;
    #[cfg(feature = "torch")]
    if let Some(split) = split.as_deref()
        && let journal = search_report::newest_journal(&places.state_dir, &dataset)
        && let Some(text) = search_worker::stranger(&config, &dataset, split, &journal)
    {
        let _ = writeln!(std::io::stderr(), "warning: {text}");
    }
    let at = |source| DaemonError::File { path: path.to_owned(), source };
    let partial = path.with_extension("partial");
    std::fs::write(&partial, html).map_err(at)?;
    std::fs::rename(&partial, path).map_err(at)
}

/// Validates and prints the effective configuration; opens no dataset and no socket.
fn check(path: &Path) -> Result<(), DaemonError> {
    let mut config = Config::load(path)?;
    let places = places(&config)?;
    for dataset in &config.datasets {
        let paths = dataset.splits().map(|(_, path)| path).chain(dataset.path.as_deref());
        for path in paths {
            if !path.exists() {
                let (name, path) = (dataset.name.clone(), path.to_owned());
                return Err(DaemonError::MissingDataset { name, path });
            }
        }
    }
    let policy = config.stream.defaults.policy.as_str();
    // What is in the store, only a running daemon knows.
    let is_stored = matches!(StoredReference::parse(policy), Ok(Some(_)));
    if !is_stored && !policy.starts_with("id:") {
        load_reference(policy).map_err(DaemonError::DefaultPolicy)?;
    }
    config.runtime_dir = Some(places.runtime.dir().to_owned());
    config.state_dir = Some(places.state_dir);
    config.workers.threads = config.workers.n_threads();
    let mut stdout = std::io::stdout();
    stdout.write_all(config.to_toml().as_bytes())?;
    Ok(())
}

fn places(config: &Config) -> Result<Places, DaemonError> {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let runtime = RuntimePaths::from_environment(config.runtime_dir.as_deref())?;
    let is_root = rustix::process::geteuid().is_root();
    let default = || default_state_dir(|name| env(name).map(PathBuf::from), is_root);
    let state_dir = config.state_dir.clone().unwrap_or_else(default);
    Ok(Places { runtime, state_dir })
}
