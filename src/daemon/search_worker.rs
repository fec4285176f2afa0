//! The search worker: `fastaa-loaderd search-worker --config FILE`, a child of the daemon or, with
//! `--offline`, of `fastaa-ctl`.
//!
//! Owns the translation of the configuration into a search, the process's priority, and its exit
//! code. Writes one JSON line per event to stdout ([`Event`]); its log goes to stderr. Holds no
//! state: it can be killed at any moment, and goes on from its journal.
//!
//! ```text
//! STATE_DIR/search/DATASET/ALGORITHM-DIGEST/journal     everything that is finished
//! STATE_DIR/search/DATASET/ALGORITHM-DIGEST/models/     fold models and checkpoints
//! ```
//!
//! DIGEST is of all settings that a result depends on: changed settings begin a search of their
//! own, and changing them back goes on with the old one.
//!
//! Exit codes: 0 all rounds are done; 1 failed, a new start may help; 78 a new start can't help.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use sha2::{Digest, Sha256};
use tracing::warn;

use super::datasets::{Datasets, OpenDatasetError};
use super::{DaemonError, EXIT_CONFIG, logging, places};
use crate::config::{Config, SearchAlgorithm, SearchConfig, SearchDevice};
use crate::dataset::{Content, DatasetError, ImageKind, Label, LabelKind, Pixels, Split};
use crate::pipeline::recipe::Recipe;
use crate::policy::{PolicyError, PolicyStore};
use crate::search::algorithm::{Algorithm, Paper, Ranged, Structured};
use crate::search::engine::{self, Plan};
use crate::search::gate::GateSettings;
use crate::search::ledger::{JOURNAL_VERSION, Ledger};
use crate::search::progress::{Event, Progress};
use crate::search::torch::{self, LabOptions, ModelSpec, Processor, TorchError, TorchLab};
use crate::search::{
    FoldOptions, FoldPlan, JournalError, JournalHeader, SearchError, plan_folds, read_records,
};

/// Bytes of the hash that says which dataset a journal is of.
const DIGEST_BYTES: usize = 16;
/// Progress is told at most so often; everything else at once.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Why the worker stops.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    Search(#[from] SearchError),
    #[error("search: {0}")]
    Torch(#[from] TorchError),
    #[error(transparent)]
    Dataset(#[from] OpenDatasetError),
    #[error("dataset '{name}': {problem}")]
    Unfit { name: String, problem: String },
    #[error("dataset '{name}': {source}")]
    Sample { name: String, source: DatasetError },
    #[error("state_dir: {0}")]
    Store(#[from] PolicyError),
    #[error("{path}: {source}; state_dir must be a folder that this user can write")]
    File { path: PathBuf, source: std::io::Error },
}

impl WorkerError {
    /// Whether another start would end in the same way: what the files or the disk refuse may be
    /// mended, what is computed comes out the same.
    fn is_final(&self) -> bool {
        match self {
            Self::Search(SearchError::Journal(error)) => !matches!(
                error,
                JournalError::Io { .. }
                    | JournalError::Unknown { .. }
                    | JournalError::Locked { .. }
            ),
            Self::Search(SearchError::Lab(crate::search::lab::LabError::Failed(_)))
            | Self::Torch(TorchError::Io { .. })
            | Self::Sample { .. }
            | Self::Store(_)
            | Self::File { .. } => false,
            _ => true,
        }
    }
}

/// Runs the search that the configuration describes. `offline`: one whole search, for a person who
/// waits.
pub(super) fn main(config: &Path, offline: bool) -> ExitCode {
    let result = work(config, offline);
    let (event, code) = match result {
        Ok(()) => (Event::Finished, ExitCode::SUCCESS),
        Err(error) if error.is_final() => {
            (Event::Failed { message: error.to_string() }, ExitCode::from(EXIT_CONFIG))
        }
        Err(error) => {
            // Another start may end better, which the code says; whoever runs it tells the reason.
            (Event::Failed { message: error.to_string() }, ExitCode::FAILURE)
        }
    };
    tell(&event);
    code
}

/// One line on stdout. A reader that is gone is no reason to stop: the journal has it all.
fn tell(event: &Event) {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    let _ = std::io::stdout().lock().write_all(&line);
}

fn work(config_path: &Path, offline: bool) -> Result<(), WorkerError> {
    let config = Config::load(config_path).map_err(DaemonError::from)?;
    let places = places(&config)?;
    logging::start(&config.telemetry).map_err(DaemonError::LogFilter)?;
    step_back();
    torch::use_one_thread();
    let search = &config.search;
    let dataset = search.dataset.clone().unwrap_or_else(|| config.datasets[0].name.clone());
    let of_dataset: Vec<_> =
        config.datasets.iter().filter(|known| known.name == dataset).cloned().collect();
    let datasets = Datasets::open(&of_dataset, &places.state_dir.join("cache"))?;
    let unfit = |problem: String| WorkerError::Unfit { name: dataset.clone(), problem };
    let split = datasets.find(&dataset, "train").map_err(|refusal| unfit(refusal.message))?;
    let LabelKind::Class { n_classes } = split.info().label_kind else {
        let problem = "its labels are vectors, but a search needs classes; set search.enabled = \
                       false, or search.dataset to another one";
        return Err(unfit(problem.to_owned()));
    };
    let labels =
        labels(&*split).map_err(|source| WorkerError::Sample { name: dataset.clone(), source })?;
    let plan = fold_plan(search, &labels, n_classes)?;
    let model = ModelSpec::parse(&search.model)?;
    let (processor, remark) = processor(search.device)?;
    let digest = settings_digest(&config, &model, processor)?;
    let name = format!("{}-{}", algorithm(search.algorithm).name(), &digest[..12]);
    let dir = places.state_dir.join("search").join(&dataset).join(name);
    std::fs::create_dir_all(&dir)
        .map_err(|source| WorkerError::File { path: dir.clone(), source })?;
    let header = JournalHeader {
        version: JOURNAL_VERSION,
        dataset: content_digest(&*split, &dataset)?,
        config: digest.clone(),
        seed: search.seed,
    };
    let ledger = open_ledger(search, &dir.join("journal"), &header)?;
    ledger.update(|progress| progress.is_on_gpu = processor == Processor::Cuda);
    remark.into_iter().chain(plan.gate_note()).for_each(|note| ledger.note(note));
    let store = PolicyStore::open(places.state_dir.join("policies"))?;
    let summary = plan.summary();
    let lab_options = LabOptions {
        limits: config.images.limits(),
        model,
        recipe: config.stream.defaults.clone(),
        fold_epochs: search.fold_epochs,
        gate_epochs: search.gate_epochs,
        n_judged_max: search.gate_images,
        seed: search.seed,
        processor,
        n_threads: search.threads,
    };
    let lab = TorchLab::new(split, n_classes, plan, lab_options, &dir.join("models"))?;
    let n_rounds = if offline { search.rounds.max(1) } else { search.rounds };
    let plan = Plan {
        dataset: &dataset,
        search_id: &digest,
        algorithm: &*algorithm(search.algorithm),
        n_rounds,
        seed: search.seed,
        gate: GateSettings { n_seeds: search.gate_seeds, seed: search.seed },
        folds: summary,
    };
    Ok(engine::run(&lab, &ledger, &store, &plan)?)
}

/// Where to compute, and what there is to say of it.
fn processor(device: SearchDevice) -> Result<(Processor, Option<String>), TorchError> {
    match device {
        SearchDevice::Cpu => Ok((Processor::Cpu, None)),
        SearchDevice::Cuda => Ok((Processor::gpu()?, None)),
        SearchDevice::Auto => Ok(match Processor::best() {
            Ok(processor) => (processor, None),
            Err(error) => {
                (Processor::Cpu, Some(format!("the search uses the processors: {error}")))
            }
        }),
    }
}

fn fold_plan(
    search: &SearchConfig,
    labels: &[i64],
    n_classes: u32,
) -> Result<FoldPlan, SearchError> {
    let options = FoldOptions {
        n_folds: search.folds,
        reduced: search.reduced,
        gate_images: search.gate_images,
        seed: search.seed,
    };
    Ok(plan_folds(labels, n_classes, &options)?)
}

/// Opens the search's journal, and says so if its last line was cut off.
fn open_ledger(
    search: &SearchConfig,
    path: &Path,
    header: &JournalHeader,
) -> Result<Ledger, SearchError> {
    let SearchConfig { threads, budget_seconds, .. } = *search;
    let (ledger, tail) = Ledger::open(path, header, threads, budget_seconds, throttled())?;
    if let Some(tail) = tail {
        let text = format!(
            "the journal's last line ({}) was cut off: {}; what it held is computed again",
            tail.line, tail.what
        );
        warn!("{text}");
        ledger.note(text);
    }
    Ok(ledger)
}

/// Lowest priority, and no life without the parent.
fn step_back() {
    use thread_priority::unix::{
        NormalThreadSchedulePolicy, ThreadSchedulePolicy, set_thread_priority_and_policy,
        thread_native_id,
    };
    // Threads that are started later inherit it.
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let lowest = thread_priority::ThreadPriority::Min;
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), lowest, idle) {
        warn!(?error, "no idle scheduling; the search runs at the lowest ordinary priority");
    }
    if let Err(error) = rustix::process::nice(19) {
        warn!(%error, "the search's priority could not be lowered");
    }
    let parent = rustix::process::getppid();
    let signal = Some(rustix::process::Signal::KILL);
    if let Err(error) = rustix::process::set_parent_process_death_signal(signal) {
        warn!(%error, "the search will not end with the daemon");
    }
    if rustix::process::getppid() != parent {
        // It died before it could be heard.
        std::process::exit(1);
    }
}

/// Tells events; progress not too often, but for what would otherwise be wrong for long: a new
/// stage, the end of one, the day's budget, and what was held back when something else is told.
fn throttled() -> impl Fn(&Event) + Send + Sync {
    let told: Mutex<(Option<Instant>, Progress, bool)> = Mutex::default();
    move |event| {
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, last, is_held_back) = &mut *told;
        if let Event::Progress(progress) = event {
            let is_recent = at.is_some_and(|at| at.elapsed() < PROGRESS_INTERVAL);
            let is_same = last.stage == progress.stage
                && last.is_out_of_budget == progress.is_out_of_budget
                && progress.done < progress.total;
            *last = progress.clone();
            *is_held_back = is_recent && is_same;
            if *is_held_back {
                return;
            }
            *at = Some(Instant::now());
        } else if std::mem::take(is_held_back) {
            tell(&Event::Progress(last.clone()));
        }
        tell(event);
    }
}

fn algorithm(kind: SearchAlgorithm) -> Box<dyn Algorithm> {
    match kind {
        SearchAlgorithm::FastAutoaugment => Box::new(Paper::default()),
        SearchAlgorithm::Structured => Box::new(Structured::default()),
        SearchAlgorithm::Ranged => Box::new(Ranged::default()),
    }
}

fn labels(split: &dyn Split) -> Result<Vec<i64>, DatasetError> {
    let label = |sample_idx| {
        Ok(match split.label(sample_idx)? {
            Label::Class(class) => class,
            // The split says that its labels are classes.
            Label::Vector(_) => -1,
        })
    };
    (0..split.info().n_samples).map(label).collect()
}

/// Says so if a journal is not of the search that the configuration describes now.
pub(super) fn stranger(
    config: &Config,
    name: &str,
    split: &dyn Split,
    journal: &Path,
) -> Option<String> {
    let header = read_records::<serde_json::Value>(journal, JOURNAL_VERSION).ok()?.header;
    let model = ModelSpec::parse(&config.search.model).ok()?;
    let journal = journal.display();
    let is_of_settings = |processor| {
        settings_digest(config, &model, processor).is_ok_and(|digest| digest == header.config)
    };
    let is_known = [Processor::Cpu, Processor::Cuda].into_iter().any(is_of_settings);
    if !is_known || header.seed != config.search.seed {
        return Some(format!(
            "the report is of a search with other settings than the configuration's, {journal}; \
             the present ones have finished nothing since"
        ));
    }
    (header.dataset != content_digest(split, name).ok()?).then(|| {
        format!(
            "the report is of other data than dataset '{name}' has now, {journal}; only its \
             pictures are of the present ones"
        )
    })
}

/// What the dataset is, whatever its files are called and whenever they were written: that of a
/// packed one is in its fingerprint; of others, all samples are read.
fn content_digest(split: &dyn Split, name: &str) -> Result<String, WorkerError> {
    let info = split.info();
    if info.format == "arrow" {
        return Ok(info.fingerprint.0.clone());
    }
    let mut hash = Sha256::new();
    match info.images {
        ImageKind::Raw { height, width, channels } => {
            hash.update(format!("{height}x{width}x{channels};"));
        }
        ImageKind::Encoded { turns_by_exif } => hash.update(format!("encoded{turns_by_exif};")),
    }
    let mut buffer = Vec::new();
    for sample_idx in 0..info.n_samples {
        let sample = split.sample(sample_idx, &mut buffer);
        let sample =
            sample.map_err(|source| WorkerError::Sample { name: name.to_owned(), source })?;
        let (order, bytes) = match sample.content {
            Content::Raw(image) => match image.pixels {
                Pixels::Hwc(bytes) => ("hwc", bytes),
                Pixels::Chw(bytes) => ("chw", bytes),
            },
            Content::Encoded(bytes) => ("file", bytes),
        };
        hash.update(format!("{order}{:?};", sample.label));
        hash.update(bytes);
    }
    Ok(hash.finalize()[..DIGEST_BYTES].iter().map(|byte| format!("{byte:02x}")).collect())
}

/// SHA-256 of every setting that a result depends on, but the seed; hexadecimal digits.
fn settings_digest(
    config: &Config,
    model: &ModelSpec,
    processor: Processor,
) -> Result<String, WorkerError> {
    let search = &config.search;
    let Recipe { crop, hflip, cutout, normalize, .. } = &config.stream.defaults;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut settings = json!({
        "algorithm": search.algorithm,
        "model": model.identity()?,
        "precision": processor.precision().name(),
        "reduced": search.reduced,
        "folds": search.folds,
        "fold_epochs": search.fold_epochs,
        "gate_seeds": search.gate_seeds,
        "gate_epochs": search.gate_epochs,
        "gate_images": search.gate_images,
        "recipe": { "crop": crop, "hflip": hflip, "cutout": cutout, "normalize": normalize },
    });
    if processor != Processor::Cpu {
        settings["device"] = processor.name().into();
    }
    Ok(hex(&Sha256::digest(settings.to_string())))
}
