//! One decision: may the search compute now? Pure: what was seen and the time go in, a verdict with
//! its reason comes out.
//!
//! Owns the rules and the hysteresis. Reads no clock, no file, and no device.
//!
//! *Invariants*, tested on random histories:
//!
//! * The search never runs on a device on which an active consumer computes.
//! * It runs again only after [`Rules::quiet`] without any obstacle, and then it does run.
//! * An obstacle stops it in the decision in which it is seen.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use super::cpu::CpuSample;
use super::demand::{ACTIVE, Demand};
use super::gpu::{Gpu, GpuSample, Sharing};

/// When a device is idle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// So long nothing must be in the way before the search runs (again).
    pub quiet: Duration,
    /// A consumer is active for so long after a batch.
    pub active: Duration,
    /// Most utilisation of the GPU by others, 0..=1, that still counts as none.
    pub foreign_max: f64,
    /// Least share of the GPU's memory that must stay free, 0..=1.
    pub memory_free_min: f64,
    /// Cores that the search takes: its threads.
    pub cores_wanted: f64,
    /// Cores that others may keep busy of those that the search takes.
    pub cores_slack: f64,
    /// Most pressure on the processors, 0..=1, before the search adds to it.
    pub pressure_max: f64,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            quiet: Duration::from_secs(5),
            active: ACTIVE,
            foreign_max: 0.05,
            memory_free_min: 0.1,
            cores_wanted: 2.0,
            cores_slack: 0.25,
            pressure_max: 0.1,
        }
    }
}

/// Where a consumer computes, seen from the device that the search may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On that device, or nobody knows.
    HereOrUnknown,
    /// On other devices only.
    Elsewhere,
}

/// Everything that was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Who takes batches, and where they compute.
    pub demands: Vec<(Demand, Place)>,
    /// The GPU that the search may use.
    pub gpu: Gpu,
    /// The processors; `None` before the second look, and where the kernel does not tell.
    pub cpu: Option<CpuSample>,
}

/// What the search is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Compute.
    Run,
    /// Stop where it is, and keep its memory.
    Pause,
    /// Stop, and free its memory on the GPU.
    Evict,
}

impl Verdict {
    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Pause => "pause",
            Self::Evict => "evict",
        }
    }
}

/// Why, for people: [`fmt::Display`] says it in words.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// Nothing is in the way.
    Idle,
    /// Consumers take batches, and leave the search as many cores as it takes.
    CoresLeft {
        /// Cores that the search takes.
        wanted: f64,
        /// Cores that there are.
        of: f64,
    },
    /// Nothing is in the way now; `of` must pass without an obstacle, and `after` was the last one.
    Quiet {
        /// So long it has been quiet.
        elapsed: Duration,
        /// So long it must be.
        of: Duration,
        /// What was in the way last; `None` at the start.
        after: Option<Box<Self>>,
    },
    /// A consumer that computes on the device, or may do so, takes batches.
    Consumer {
        /// Its process, if it is on this host.
        pid: Option<u32>,
    },
    /// Others use the GPU, by this share of its time.
    Foreign {
        /// One of them, if the driver tells.
        pid: Option<u32>,
        /// 0..=1.
        utilisation: f64,
    },
    /// A process came to the GPU.
    Arrived {
        /// Its number.
        pid: u32,
    },
    /// The GPU's memory is nearly full.
    Memory {
        /// Bytes free.
        free: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The GPU is shared in a way that hides who uses it.
    Shared(Sharing),
    /// The driver does not tell whose work the GPU does.
    Untold,
    /// The GPU no longer answers.
    Lost(String),
    /// The driver tells nothing.
    Blind(String),
    /// Others use the processors.
    Cores {
        /// Cores busy with others.
        busy: f64,
        /// Cores that the search takes.
        wanted: f64,
        /// Cores that there are.
        of: f64,
    },
    /// Tasks wait for a processor, for this share of the time.
    Pressure(f64),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| (100.0 * share).round();
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        match self {
            Self::Idle => f.write_str("nobody uses the device"),
            Self::CoresLeft { wanted, of } => {
                write!(f, "consumers leave the search the {wanted} of {of:.0} cores that it takes")
            }
            Self::Quiet { elapsed, of, after } => {
                let (elapsed, of) = (elapsed.as_secs_f64(), of.as_secs_f64());
                write!(f, "quiet for {elapsed:.1} of {of:.1} s")?;
                after.iter().try_for_each(|after| write!(f, " after: {after}"))
            }
            Self::Consumer { pid: Some(pid) } => write!(f, "process {pid} takes batches"),
            Self::Consumer { pid: None } => f.write_str("a client over TCP takes batches"),
            Self::Foreign { pid: Some(pid), utilisation } => {
                write!(f, "process {pid} uses the GPU, all others {} %", percent(*utilisation))
            }
            Self::Foreign { pid: None, utilisation } => {
                write!(f, "others use the GPU, {} %", percent(*utilisation))
            }
            Self::Arrived { pid } => write!(f, "process {pid} came to the GPU"),
            Self::Memory { free, total } => {
                let (free, total) = (gib(*free), gib(*total));
                write!(f, "only {free:.1} of {total:.1} GiB of the GPU's memory are free")
            }
            Self::Shared(Sharing::Mps) => {
                f.write_str("MPS shares the GPU, and hides who uses it without GPM")
            }
            Self::Shared(_) => {
                f.write_str("the GPU is cut by MIG, which hides who uses which part")
            }
            Self::Untold => f.write_str("the driver does not tell whose work the GPU does"),
            Self::Lost(error) => write!(f, "the GPU does not answer: {error}"),
            Self::Blind(error) => write!(f, "the driver tells nothing: {error}"),
            Self::Cores { busy, wanted, of } => {
                write!(f, "others keep {busy:.1} of {of:.0} cores busy, the search takes {wanted}")
            }
            Self::Pressure(share) => {
                write!(f, "tasks wait for a core {} % of the time", percent(*share))
            }
        }
    }
}

/// A verdict and its reason.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What to do.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
}

/// Something in the way.
struct Obstacle {
    verdict: Verdict,
    reason: Reason,
    /// How long ago it was there for sure.
    age: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Decider {
    rules: Rules,
    /// When something was in the way last, or the start.
    busy_at: Duration,
    last: Option<Reason>,
    verdict: Verdict,
    /// The processes that were on the GPU at the last look; `None` before the first.
    known: Option<BTreeSet<u32>>,
}

impl Decider {
    /// Begins at `now` with a pause: nothing is known of before.
    pub fn new(rules: Rules, now: Duration) -> Self {
        Self { rules, busy_at: now, last: None, verdict: Verdict::Pause, known: None }
    }

    /// Decides. `now` is of the clock of [`Self::new`] and never goes back.
    pub fn decide(&mut self, now: Duration, seen: &Seen) -> Decision {
        if let Some(Obstacle { verdict, reason, age }) = self.obstacle(seen) {
            // From the stop on it is quiet for the whole time, however old the news was.
            let age = if self.verdict == Verdict::Run { Duration::ZERO } else { age };
            self.busy_at = self.busy_at.max(now.saturating_sub(age));
            // What was evicted has no memory that a pause could keep.
            let is_evicted = self.verdict == Verdict::Evict;
            self.verdict = if is_evicted { Verdict::Evict } else { verdict };
            self.last = Some(reason.clone());
            return Decision { verdict: self.verdict, reason };
        }
        let elapsed = now.saturating_sub(self.busy_at);
        if elapsed < self.rules.quiet {
            if self.verdict == Verdict::Run {
                self.verdict = Verdict::Pause;
            }
            let after = self.last.clone().map(Box::new);
            let reason = Reason::Quiet { elapsed, of: self.rules.quiet, after };
            return Decision { verdict: self.verdict, reason };
        }
        self.verdict = Verdict::Run;
        Decision { verdict: Verdict::Run, reason: self.idle(seen) }
    }

    /// Why nothing is in the way.
    fn idle(&self, seen: &Seen) -> Reason {
        let is_active = |(demand, _): &(Demand, Place)| demand.age <= self.rules.active;
        match seen.cpu {
            Some(cpu) if seen.gpu == Gpu::None && seen.demands.iter().any(is_active) => {
                let wanted = self.rules.cores_wanted.min(cpu.n_cores);
                Reason::CoresLeft { wanted, of: cpu.n_cores }
            }
            _ => Reason::Idle,
        }
    }

    /// The gravest thing in the way, if there is any.
    fn obstacle(&mut self, seen: &Seen) -> Option<Obstacle> {
        let consumer = self.consumer(seen);
        let on_device = match &seen.gpu {
            Gpu::None => self.on_processors(seen),
            Gpu::Lost(error) => now(Verdict::Evict, Reason::Lost(error.clone())),
            Gpu::Blind(error) => now(Verdict::Pause, Reason::Blind(error.clone())),
            Gpu::Seen(sample) => self.on_gpu(sample),
        };
        // Full memory goes before everything: somebody's job is about to fail.
        match on_device {
            Some(found) if found.verdict == Verdict::Evict => Some(found),
            found => consumer.or(found),
        }
    }

    fn consumer(&self, seen: &Seen) -> Option<Obstacle> {
        let active = seen.demands.iter().filter(|(demand, _)| demand.age <= self.rules.active);
        let here = active.clone().filter(|(_, place)| *place == Place::HereOrUnknown);
        if seen.gpu == Gpu::None {
            // Each of them wants a core at least.
            let n_cores = seen.cpu.map_or(0.0, |cpu| cpu.n_cores);
            if active.count() as f64 + self.rules.cores_wanted <= n_cores {
                return None;
            }
        }
        let (demand, _) = here.min_by_key(|(demand, _)| demand.age)?;
        let reason = Reason::Consumer { pid: demand.consumer.0 };
        Some(Obstacle { verdict: Verdict::Pause, reason, age: demand.age })
    }

    fn on_gpu(&mut self, sample: &GpuSample) -> Option<Obstacle> {
        let pids: BTreeSet<u32> = sample.others.iter().map(|process| process.pid).collect();
        let known = self.known.replace(pids.clone());
        let arrived = known.and_then(|known| pids.difference(&known).next().copied());
        let (free, total) = (sample.memory_free, sample.memory_total);
        if (free as f64) < self.rules.memory_free_min * total as f64 {
            return now(Verdict::Evict, Reason::Memory { free, total });
        }
        if sample.sharing != Sharing::Whole && sample.multiprocessors.is_none() {
            return now(Verdict::Pause, Reason::Shared(sample.sharing));
        }
        let Some(utilisation) = foreign(sample) else {
            return now(Verdict::Pause, Reason::Untold);
        };
        if utilisation > self.rules.foreign_max {
            let using = |process: &&super::gpu::GpuProcess| process.utilisation.is_some();
            let by_use = |process: &&super::gpu::GpuProcess| process.utilisation.unwrap_or(0.0);
            let most = sample.others.iter().filter(using);
            let most = most.max_by(|a, b| by_use(a).total_cmp(&by_use(b)));
            let pid = most.map(|process| process.pid);
            return now(Verdict::Pause, Reason::Foreign { pid, utilisation });
        }
        arrived.and_then(|pid| now(Verdict::Pause, Reason::Arrived { pid }))
    }

    fn on_processors(&self, seen: &Seen) -> Option<Obstacle> {
        let cpu = seen.cpu?;
        let Rules { cores_wanted: wanted, cores_slack, pressure_max, .. } = self.rules;
        // With more threads than cores, the search takes all of them.
        let wanted = wanted.min(cpu.n_cores);
        if cpu.busy_others + wanted > cpu.n_cores + cores_slack {
            let reason = Reason::Cores { busy: cpu.busy_others, wanted, of: cpu.n_cores };
            return now(Verdict::Pause, reason);
        }
        let pressure = cpu.pressure.filter(|share| *share > pressure_max)?;
        now(Verdict::Pause, Reason::Pressure(pressure))
    }
}

/// An obstacle that is there now.
#[expect(clippy::unnecessary_wraps, reason = "every caller returns it as one that there may be")]
fn now(verdict: Verdict, reason: Reason) -> Option<Obstacle> {
    Some(Obstacle { verdict, reason, age: Duration::ZERO })
}

/// Use of the GPU by others, 0..=1; `None` if the driver does not tell it from the search's.
fn foreign(sample: &GpuSample) -> Option<f64> {
    // What is known for sure; a process that the driver says nothing of adds nothing.
    let named: f64 = sample.others.iter().filter_map(|process| process.utilisation).sum();
    match sample.own_utilisation {
        // What no process is named for may be one that is hidden from here. Rounded readings of two
        // calls: a little below zero is nothing.
        Some(own) => Some((sample.utilisation - own).max(named)),
        None if named > 0.0 => Some(named),
        // Nothing at all runs, whoever could have.
        None if sample.utilisation <= 0.0 => Some(0.0),
        None => None,
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
