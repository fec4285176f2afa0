//! Watches whether the device is idle, for the search's supervision.
//!
//! Owns the sources (demand, processors, NVML), the decider, and the count of yields. Never touches
//! the search's process: `searcher` carries the decisions out.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, info};

use crate::config::{IdleConfig, SearchDevice};
use crate::control::{GpuReport, IdleReport};
use crate::idle::cpu::CpuWatch;
use crate::idle::decision::{Decider, Decision, Place, Reason, Rules, Seen};
use crate::idle::demand::{Consumer, Demand, DemandBoard};
use crate::idle::gpu::Gpu;
use crate::idle::nvml::{Look, NvmlOptions, NvmlWatch, Own};

/// How long the first look at the GPUs may keep the daemon.
const FIRST_LOOK_MAX: Duration = Duration::from_secs(2);
/// Demand that is older decides nothing.
const DEMAND_HORIZON: Duration = Duration::from_secs(60);

/// What the supervision knows of its worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SearchProcess {
    /// Its number, if there is one.
    pub(super) pid: Option<u32>,
    /// Whether it computes on a GPU, as it says itself; `None` before it said anything.
    pub(super) is_on_gpu: Option<bool>,
    /// Whether it may have computed since the last decision.
    pub(super) has_run: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct IdleWatch {
    board: Arc<DemandBoard>,
    cpu: CpuWatch,
    nvml: NvmlWatch,
    decider: Decider,
    began: Instant,
    interval: Duration,
    /// The configuration names a GPU: that one decides, whatever computes where.
    is_gpu_named: bool,
    /// What the search may compute on: a GPU is believed until it says otherwise.
    device: SearchDevice,
    last: Option<Decision>,
    n_yields: u64,
    /// From the demand to the signal, of the last yield to a consumer, and the longest.
    latency: Option<Duration>,
    latency_max: Option<Duration>,
    report: Arc<Mutex<IdleReport>>,
}

impl IdleWatch {
    /// Begins to watch. `threads` is how many cores the search takes, `device` what it may compute
    /// on.
    ///
    /// # Errors
    /// The system is out of threads.
    pub(super) fn start(
        config: &IdleConfig,
        threads: usize,
        device: SearchDevice,
        board: Arc<DemandBoard>,
    ) -> std::io::Result<Self> {
        let interval = Duration::from_millis(config.sample_ms);
        let rules = Rules {
            quiet: Duration::from_secs_f64(config.quiet_seconds),
            cores_wanted: threads as f64,
            ..Rules::default()
        };
        let options = NvmlOptions {
            library: config.nvml_library.clone(),
            gpu: config.gpu.clone(),
            visible: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
            interval,
        };
        Ok(Self {
            board,
            cpu: CpuWatch::new(Path::new("/proc")),
            nvml: NvmlWatch::start(options, FIRST_LOOK_MAX)?,
            decider: Decider::new(rules, Duration::ZERO),
            began: Instant::now(),
            interval,
            is_gpu_named: config.gpu.is_some(),
            device,
            last: None,
            n_yields: 0,
            latency: None,
            latency_max: None,
            report: Arc::default(),
        })
    }

    /// Time between two decisions, if nothing happens.
    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    /// What CUDA is to show to the search: the UUID of the GPU that is watched, or nothing where
    /// none is, so that none is used unwatched. `None`: as CUDA likes.
    pub(super) fn gpu(&self) -> Option<String> {
        match (self.device, self.nvml.look().info) {
            (SearchDevice::Cpu, _) | (SearchDevice::Cuda, None) => None,
            (_, Some(info)) => Some(info.uuid),
            (SearchDevice::Auto, None) => Some(String::new()),
        }
    }

    /// Where the last decision can be read, by any thread.
    pub(super) fn report(&self) -> Arc<Mutex<IdleReport>> {
        Arc::clone(&self.report)
    }

    /// Decides anew.
    pub(super) fn decide(&mut self, search: SearchProcess) -> Decision {
        let look = self.nvml.look();
        let may_be = match self.device {
            SearchDevice::Cpu => false,
            SearchDevice::Auto => look.info.is_some(),
            SearchDevice::Cuda => true,
        };
        let is_on_gpu = search.is_on_gpu.unwrap_or(may_be);
        self.nvml.own(Own { search: search.pid, is_on_gpu });
        let now = self.began.elapsed();
        let seen = Seen {
            demands: self.demands(&look),
            cpu: self.cpu.look(now, search.pid, search.has_run),
            gpu: match &look.gpu {
                Gpu::None if is_on_gpu => Gpu::Blind("there is no NVML".to_owned()),
                gpu if is_on_gpu || self.is_gpu_named => gpu.clone(),
                _ => Gpu::None,
            },
        };
        let decision = self.decider.decide(now, &seen);
        let before = self.last.replace(decision.clone());
        if before.as_ref().map(|before| before.verdict) != Some(decision.verdict) {
            info!(verdict = decision.verdict.name(), reason = %decision.reason, "the device");
        } else if before.is_some_and(|before| before.reason != decision.reason) {
            debug!(verdict = decision.verdict.name(), reason = %decision.reason, "the device");
        }
        self.tell(&decision, Some(&look));
        decision
    }

    /// The worker has just been stopped because of a decision.
    pub(super) fn yielded(&mut self, decision: &Decision) {
        self.n_yields += 1;
        // Only a consumer's batch has a moment that is known; a sample says nothing of when.
        if matches!(decision.reason, Reason::Consumer { .. }) {
            let latency = self.board.since_wake();
            self.latency = latency;
            self.latency_max = self.latency_max.max(latency);
        }
        self.tell(decision, None);
    }

    /// Who takes batches, and whether it is where the search computes.
    fn demands(&self, look: &Look) -> Vec<(Demand, Place)> {
        let uuid = look.info.as_ref().map(|info| info.uuid.as_str());
        let place = |Consumer(pid): Consumer| {
            let (Some(uuid), Some(pid)) = (uuid, pid) else {
                return Place::HereOrUnknown;
            };
            let is_on = |(_, pids): &(&String, &BTreeSet<u32>)| pids.contains(&pid);
            let mut devices = look.processes.iter().filter(is_on).peekable();
            // On no device at all: it has not begun to compute, or is hidden from here.
            if devices.peek().is_none() || devices.any(|(device, _)| device == uuid) {
                Place::HereOrUnknown
            } else {
                Place::Elsewhere
            }
        };
        let demands = self.board.recent(DEMAND_HORIZON).into_iter();
        demands.map(|demand| (demand, place(demand.consumer))).collect()
    }

    /// Somebody says that the search is to run, whatever is decided; or no longer.
    pub(super) fn overridden(&self, is_overridden: bool) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.is_overridden = is_overridden;
    }

    fn tell(&self, decision: &Decision, look: Option<&Look>) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        let millis = |latency: Option<Duration>| latency.map(|latency| 1e3 * latency.as_secs_f64());
        decision.verdict.name().clone_into(&mut report.decision);
        report.reason = decision.reason.to_string();
        report.yields = self.n_yields;
        report.yield_ms_last = millis(self.latency);
        report.yield_ms_max = millis(self.latency_max);
        if let Some(look) = look {
            report.gpu = gpu_report(look);
            report.note.clone_from(&look.note);
        }
    }
}

fn gpu_report(look: &Look) -> Option<GpuReport> {
    let info = look.info.clone()?;
    let mut report = GpuReport {
        uuid: info.uuid,
        name: info.name,
        temperature: info.temperature,
        power_watts: info.power,
        ..GpuReport::default()
    };
    if let Gpu::Seen(sample) = &look.gpu {
        report.utilisation = Some(sample.utilisation);
        report.multiprocessors = sample.multiprocessors;
        report.memory_free = Some(sample.memory_free);
        report.memory_total = Some(sample.memory_total);
        report.others = sample.others.iter().map(|process| process.pid).collect();
    }
    Some(report)
}
