//! Answers requests on the control socket from what the parts tell.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::warn;

use crate::control::Handler;
use crate::control::{
    ControlFailure, DaemonReport, DatasetReport, ExpectedDigestReport, FailureCode, MetricReport,
    Reply, Request, SearchReport, StatusReport, StreamReport,
};
use crate::control::{handle_policy, policy_reports};
use crate::dataset::{ImageKind, LabelKind};
use crate::limits::{NAME_BYTES_MAX, POLICY_REFERENCE_BYTES_MAX};
use crate::pipeline::order::EpochOrder;
use crate::pipeline::plan::EpochPlan;
use crate::pipeline::shared::DecodedWindow;
use crate::pipeline::workers::WorkerCounters;
use crate::policy::{PolicyError, PolicyStore};
use crate::transport::server::{ServerHandle, ServerReport, SessionReport};

use super::datasets::{Datasets, OpenedSplit};
use super::metrics::{Evaluation, Fall, Metrics};
use super::provider::search_version;
use super::quarantine::Quarantine;
use super::search_report;
use super::searcher::Searcher;

/// Epochs of a run, by whose bits random draws are counted (`random`).
const EPOCHS_MAX: u64 = 1 << 40;

/// What does not change while the daemon runs.
#[derive(Clone, Debug)]
pub(super) struct DaemonFacts {
    pub(super) started: Instant,
    pub(super) runtime_dir: String,
    pub(super) state_dir: String,
    pub(super) n_threads: usize,
    pub(super) tcp: Option<String>,
}

/// See the module.
pub(super) struct DaemonHandler {
    pub(super) facts: DaemonFacts,
    pub(super) datasets: Datasets,
    pub(super) store: Arc<PolicyStore>,
    pub(super) server: ServerHandle,
    pub(super) counters: Arc<WorkerCounters>,
    pub(super) quarantine: Arc<Quarantine>,
    pub(super) decoded: Arc<DecodedWindow>,
    pub(super) searcher: Arc<Searcher>,
    pub(super) metrics: Metrics,
    /// Take back versions of the search that make a run's metric fall.
    pub(super) auto_rollback: bool,
}

impl Handler for DaemonHandler {
    fn handle(&self, request: Request) -> Result<Reply, ControlFailure> {
        match request {
            Request::Status => self.status().map(Reply::Status),
            Request::StreamList => Ok(Reply::Streams { streams: streams(self.report()?) }),
            Request::DatasetList => Ok(Reply::Datasets { datasets: self.dataset_reports() }),
            Request::ExpectedDigest { .. } => self.expected_digest(&request),
            Request::SearchStatus => Ok(Reply::Search(self.searcher.report())),
            Request::SearchPause => self.after(self.searcher.pause()),
            Request::SearchResume => self.after(self.searcher.resume()),
            Request::SearchRun => self.after(self.searcher.run()),
            Request::SearchReport => self.search_page(),
            Request::ReportMetric { dataset, run, epoch, policy, value } => {
                self.report_metric(&dataset, &run, epoch, Evaluation { policy, value })
            }
            request => handle_policy(&self.store, &self.datasets.names(), request),
        }
    }
}

/// What the search took of idle devices, and how often it gave them back.
#[allow(clippy::cast_possible_truncation, reason = "a float cast saturates")]
fn search_counters(search: &SearchReport) -> Vec<(String, u64)> {
    let progress = search.progress.clone().unwrap_or_default();
    let idle = search.idle.clone().unwrap_or_default();
    let micros = |millis: Option<f64>| (1e3 * millis.unwrap_or(0.0)) as u64;
    vec![
        ("search_cpu_ms".to_owned(), (1e3 * progress.cpu_seconds) as u64),
        ("search_gpu_ms".to_owned(), (1e3 * progress.gpu_seconds) as u64),
        ("search_yields".to_owned(), idle.yields),
        ("search_yield_us_last".to_owned(), micros(idle.yield_ms_last)),
        ("search_yield_us_max".to_owned(), micros(idle.yield_ms_max)),
    ]
}

impl DaemonHandler {
    fn search_page(&self) -> Result<Reply, ControlFailure> {
        let dataset = self.searcher.dataset();
        let split = self.datasets.find(dataset, "train").ok();
        search_report::page(Path::new(&self.facts.state_dir), dataset, split.as_deref())
            .map(|html| Reply::SearchHtml { html })
            .map_err(|message| ControlFailure::new(FailureCode::NotFound, message))
    }

    fn report(&self) -> Result<ServerReport, ControlFailure> {
        self.server.report().ok_or_else(|| {
            ControlFailure::new(FailureCode::Internal, "the stream server has stopped")
                .with_hint("the daemon's log has the reason")
        })
    }

    fn status(&self) -> Result<StatusReport, ControlFailure> {
        let report = self.report()?;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let search = self.searcher.report();
        let mut counters = BTreeMap::from([
            ("transport_bad_frames".to_owned(), report.n_bad_frames),
            ("transport_orphan_frames".to_owned(), report.n_orphan_frames),
            ("transport_stale_releases".to_owned(), report.n_stale_releases),
            ("pipeline_samples".to_owned(), load(&self.counters.samples)),
            ("pipeline_busy_ns".to_owned(), load(&self.counters.busy_ns)),
            ("pipeline_panics".to_owned(), load(&self.counters.panics)),
            ("samples_substituted".to_owned(), load(&self.counters.substituted)),
            ("samples_skipped".to_owned(), load(&self.counters.skipped)),
            ("images_decoded_for_several".to_owned(), load(&self.decoded.counters().decoded)),
            ("images_taken_decoded".to_owned(), load(&self.decoded.counters().taken)),
            ("samples_bad".to_owned(), self.quarantine.n_bad()),
        ]);
        counters.extend(search_counters(&search));
        Ok(StatusReport {
            daemon: DaemonReport {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                uptime_seconds: self.facts.started.elapsed().as_secs_f64(),
                runtime_dir: self.facts.runtime_dir.clone(),
                state_dir: self.facts.state_dir.clone(),
                torch: crate::search::backend(),
                threads: u32::try_from(self.facts.n_threads).unwrap_or(u32::MAX),
                http: None,
                tcp: self.facts.tcp.clone(),
            },
            datasets: self.dataset_reports(),
            streams: streams(report),
            policies: policy_reports(&self.store, &self.datasets.names()),
            counters,
            search,
        })
    }

    /// Where the search is after a wish.
    fn after(&self, done: Result<(), ControlFailure>) -> Result<Reply, ControlFailure> {
        done.map(|()| Reply::Search(self.searcher.report()))
    }

    fn report_metric(
        &self,
        dataset: &str,
        run: &str,
        epoch: u64,
        evaluation: Evaluation,
    ) -> Result<Reply, ControlFailure> {
        if !self.datasets.names().iter().any(|name| name == dataset) {
            let message = format!("there is no dataset '{dataset}'");
            return Err(ControlFailure::new(FailureCode::NotFound, message));
        }
        let is_good = evaluation.value.is_finite()
            && (1..=NAME_BYTES_MAX).contains(&run.len())
            && evaluation.policy.len() <= POLICY_REFERENCE_BYTES_MAX
            && epoch < EPOCHS_MAX;
        if !is_good {
            let message = format!(
                "a report has a finite value, an epoch below 2^40, a run's name of 1 to \
                 {NAME_BYTES_MAX} bytes, and a policy's reference"
            );
            return Err(ControlFailure::new(FailureCode::Invalid, message));
        }
        let fall = self.metrics.report(dataset, run, epoch, evaluation);
        let report = match fall {
            Some(fall) if self.auto_rollback => self.roll_back(dataset, run, &fall)?,
            _ => MetricReport::default(),
        };
        Ok(Reply::Metric(report))
    }

    /// Takes back the version that a run's metric fell with, if the search published it and it is
    /// still active and not pinned.
    fn roll_back(
        &self,
        dataset: &str,
        run: &str,
        fall: &Fall,
    ) -> Result<MetricReport, ControlFailure> {
        let failed = |error: PolicyError| {
            ControlFailure::new(FailureCode::Internal, format!("rollback: {error}"))
        };
        let version = search_version(&self.store, dataset, &fall.policy).map_err(failed)?;
        let Some(version) = version else { return Ok(MetricReport::default()) };
        let head = match self.store.rollback_from(dataset, version) {
            Ok(Some(head)) => head,
            // Somebody has chosen another one since, or holds this one.
            Ok(None) | Err(PolicyError::Conflict { .. }) => return Ok(MetricReport::default()),
            Err(error) => return Err(failed(error)),
        };
        let note = format!(
            "{} was taken back, {dataset}@{} is active: the metric of run '{run}' fell from \
             {:.4} (noise ±{:.4}) to {:.4} and {:.4}",
            fall.policy, head.active, fall.before, fall.band, fall.after[0], fall.after[1]
        );
        warn!("{note}");
        self.searcher.note(note);
        let (rolled_back, active_version) = (Some(fall.policy.clone()), Some(head.active));
        Ok(MetricReport { rolled_back, active_version })
    }

    fn dataset_reports(&self) -> Vec<DatasetReport> {
        self.datasets.0.iter().map(dataset_report).collect()
    }

    fn expected_digest(&self, request: &Request) -> Result<Reply, ControlFailure> {
        let Request::ExpectedDigest {
            dataset,
            split,
            seed,
            epoch,
            batch_size,
            world_size,
            rank,
            drop_last,
            shuffle,
            start_offset,
        } = request
        else {
            return Err(ControlFailure::new(FailureCode::Internal, "not a digest request"));
        };
        let found = self.datasets.find(dataset, split).map_err(|refusal| {
            ControlFailure::new(FailureCode::NotFound, refusal.message).with_hint(refusal.hint)
        })?;
        let n_samples = found.info().n_samples;
        if *batch_size == 0 || rank >= world_size || *start_offset > n_samples {
            let message = "batch_size must be above 0, rank below world_size, and start_offset \
                           within the epoch";
            return Err(ControlFailure::new(FailureCode::Invalid, message));
        }
        let plan = EpochPlan {
            n_samples,
            batch_size: *batch_size,
            world_size: *world_size,
            rank: *rank,
            drop_last: *drop_last,
            start_offset: *start_offset,
        };
        let order = EpochOrder::new(n_samples, *seed, *epoch, *shuffle);
        let (mut digest, mut n_visited) = (0u64, 0);
        for step in 0..plan.n_steps() {
            let part = plan.step(step);
            for position in part.first_position..part.first_position + u64::from(part.n_local) {
                digest = digest.wrapping_add(crate::random::mix64(order.sample_at(position) + 1));
                n_visited += 1;
            }
        }
        Ok(Reply::ExpectedDigest(ExpectedDigestReport {
            digest: format!("{digest:016x}"),
            n_samples: n_visited,
            n_steps: plan.n_steps(),
        }))
    }
}

fn dataset_report(opened: &OpenedSplit) -> DatasetReport {
    let info = opened.data.info();
    let (label_kind, n_classes) = match info.label_kind {
        LabelKind::Class { n_classes } => ("class", n_classes),
        LabelKind::Vector { len } => ("vector", len),
    };
    DatasetReport {
        name: opened.dataset.clone(),
        split: opened.split.clone(),
        format: info.format.to_owned(),
        n_samples: info.n_samples,
        shape: match info.images {
            ImageKind::Raw { height, width, channels } => {
                Some([height as u64, width as u64, channels as u64])
            }
            ImageKind::Encoded { .. } => None,
        },
        label_kind: label_kind.to_owned(),
        n_classes,
        class_names: info.class_names.clone(),
        fingerprint: info.fingerprint.0.clone(),
        path: opened.path.display().to_string(),
        mapped_bytes: info.mapped_bytes,
    }
}

fn streams(report: ServerReport) -> Vec<StreamReport> {
    report.sessions.into_iter().map(stream_report).collect()
}

fn stream_report(session: SessionReport) -> StreamReport {
    StreamReport {
        session: session.session,
        dataset: session.dataset,
        split: session.split,
        client: session.client,
        pid: session.pid.and_then(|pid| u32::try_from(pid).ok()),
        uid: session.uid,
        transport: if session.is_tcp { "tcp" } else { "local" }.to_owned(),
        rank: session.rank,
        world_size: session.world_size,
        group: session.group,
        batch_size: session.batch_size,
        epoch: session.epoch,
        step: session.step,
        next_offset: session.next_offset,
        batches_sent: session.batches_sent,
        samples_sent: session.samples_sent,
        leased_slots: session.n_leased,
        free_slots: session.n_free,
        n_slots: session.n_slots,
        policy: session.policy,
        policy_version: session.policy_version,
        images_per_second: session.images_per_second,
        window: match (session.is_broadcast, session.is_beyond_window) {
            (false, _) => "",
            (true, false) => "shared",
            (true, true) => "beyond",
        }
        .to_owned(),
        is_replay: session.is_replay,
        batches_shared: session.batches_shared,
    }
}
