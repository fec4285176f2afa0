//! Looks at the GPUs through NVML.
//!
//! Owns the thread that calls the driver, and the last look that others read. A call that hangs
//! costs the daemon nothing: nobody waits for this thread but whoever ends it. Decides nothing.
//!
//! * A look that is too old is none: a driver that hangs tells nothing.
//! * A look that failed is an answer, too: lost devices, missing rights and a restarted driver are
//!   reported, and the library is opened anew after a while.
//! * The daemon's own processes are never among the others.
//! * NVML gives the host's process numbers. In a container the search is then not found on the
//!   device; its use is unknown, not zero.
//!
//! *Source*: NVIDIA, NVML API Reference Guide: nvmlDeviceGetUtilizationRates,
//! nvmlDeviceGetProcessUtilization (`NOT_FOUND`: nothing ran), nvmlGpmMetricsGet (two samples, at
//! least 100 ms apart).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::gpm::GpmMetricId;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::gpm::{GpmSample, gpm_metrics_get};
use nvml_wrapper::{Device, Nvml};
use tracing::{info, warn};

use super::gpu::{Gpu, GpuProcess, GpuSample, Sharing};
use super::nvml_choice::{Choice, choose};
use crate::limits::GPUS_MAX;

/// After so long a driver that failed is asked again.
const RETRY: Duration = Duration::from_secs(2);
/// A look that is older than so many intervals, and this, tells nothing of now.
const STALE_INTERVALS: u32 = 5;
const STALE_MIN: Duration = Duration::from_secs(1);
/// GPM needs its two samples so far apart.
const GPM_INTERVAL: Duration = Duration::from_millis(100);

/// How to look.
#[derive(Clone, Debug)]
pub struct NvmlOptions {
    /// Path of the library; `None`: where the loader finds `libnvidia-ml.so.1`.
    pub library: Option<PathBuf>,
    /// The GPU that is wanted: index or UUID.
    pub gpu: Option<String>,
    /// `CUDA_VISIBLE_DEVICES`, if it is set.
    pub visible: Option<String>,
    /// Time between two looks.
    pub interval: Duration,
}

/// The GPU that the search may use, for people.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuInfo {
    /// The driver's name of it that lasts.
    pub uuid: String,
    /// Its model.
    pub name: String,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Watts.
    pub power: Option<f64>,
}

/// What was seen at the last look.
#[derive(Clone, Debug, PartialEq)]
pub struct Look {
    /// The GPU that the search may use.
    pub gpu: Gpu,
    /// For people; `None` if there is none.
    pub info: Option<GpuInfo>,
    /// The processes on each GPU of the host that answered.
    pub processes: BTreeMap<String, BTreeSet<u32>>,
    /// Whether all GPUs answered: only then is a process that is on none of them nowhere.
    pub is_complete: bool,
    /// Why no GPU is watched, though the configuration asks for it; else empty.
    pub note: String,
}

impl Look {
    fn none() -> Self {
        Self {
            gpu: Gpu::None,
            info: None,
            processes: BTreeMap::new(),
            is_complete: false,
            note: String::new(),
        }
    }

    fn failed(gpu: Gpu, info: Option<GpuInfo>) -> Self {
        Self { gpu, info, ..Self::none() }
    }
}

/// Who is not counted among the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// The search's process, if there is one.
    pub search: Option<u32>,
    /// Whether it computes on the GPU, as it says itself.
    pub is_on_gpu: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Says that there was a look, or that the thread is to end.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    look: Look,
    /// When it was told.
    at: Instant,
    /// It was said that the driver hangs.
    is_stale_told: bool,
    has_looked: bool,
    own: Own,
    is_to_end: bool,
}

/// The daemon's handle to the thread. Dropping it asks the thread to end, and does not wait for a
/// driver that hangs.
#[derive(Debug)]
pub struct NvmlWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    stale_after: Duration,
}

impl NvmlWatch {
    /// Starts to look, and waits a moment for the first look.
    ///
    /// # Errors
    /// The system is out of threads.
    pub fn start(options: NvmlOptions, first: Duration) -> std::io::Result<Self> {
        let state = State {
            look: Look::none(),
            at: Instant::now(),
            is_stale_told: false,
            has_looked: false,
            own: Own::default(),
            is_to_end: false,
        };
        let stale_after = STALE_MIN.max(options.interval * STALE_INTERVALS);
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("nvml".to_owned())
            .spawn(move || look_until_told(&options, &theirs))?;
        let guard = lock(&shared);
        let waited = shared.changed.wait_timeout_while(guard, first, |state| !state.has_looked);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Ok(Self { shared, thread: Some(thread), stale_after })
    }

    /// The last look. Of a GPU that was seen too long ago, nothing is known.
    pub fn look(&self) -> Look {
        let mut state = lock(&self.shared);
        let mut look = state.look.clone();
        let age = state.at.elapsed();
        if matches!(look.gpu, Gpu::Seen(_)) && age > self.stale_after {
            if !std::mem::replace(&mut state.is_stale_told, true) {
                warn!("NVML has not answered for {age:.1?}; the search waits until it does");
            }
            look.gpu = Gpu::Blind(format!("NVML has not answered for {:.0} s", age.as_secs_f64()));
        }
        look
    }

    /// Tells whose use is the search's own.
    pub fn own(&self, own: Own) {
        lock(&self.shared).own = own;
    }
}

impl Drop for NvmlWatch {
    fn drop(&mut self) {
        lock(&self.shared).is_to_end = true;
        self.shared.changed.notify_all();
        // A thread inside a driver's call that hangs ends with the process.
        if let Some(thread) = self.thread.take()
            && thread.is_finished()
        {
            let _ = thread.join();
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Tells a look; gives who is the daemon's own, or `None` if it is to end.
    fn tell(&self, look: Look) -> Option<Own> {
        let mut state = lock(self);
        state.look = look;
        state.at = Instant::now();
        state.is_stale_told = false;
        state.has_looked = true;
        self.changed.notify_all();
        (!state.is_to_end).then_some(state.own)
    }

    /// Waits; whether to go on.
    fn wait(&self, time: Duration) -> bool {
        let guard = lock(self);
        let waited = self.changed.wait_timeout_while(guard, time, |state| !state.is_to_end);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_to_end
    }
}

/// Opens the library as often as it is needed.
fn look_until_told(options: &NvmlOptions, shared: &Shared) {
    let mut last_words = String::new();
    // A driver that was there is being restarted; one that was not, is not there.
    let mut had_gpu = false;
    loop {
        let mut builder = Nvml::builder();
        if let Some(path) = &options.library {
            builder.lib_path(path.as_os_str());
        }
        let error = match builder.init() {
            Ok(nvml) => match Session::new(&nvml, options) {
                Ok(Ok(session)) => {
                    had_gpu = true;
                    match session.run(options, shared) {
                        Some(failed) => failed,
                        None => return,
                    }
                }
                // A driver that had the GPU may be starting again, and a named one may come.
                Ok(Err(why)) if had_gpu || options.gpu.is_some() => {
                    shared.tell(Look::failed(Gpu::Lost(why.clone()), None));
                    why
                }
                Ok(Err(why)) => {
                    info!("{why}: the processors decide when the search runs");
                    shared.tell(Look::none());
                    return;
                }
                Err(error) => error.to_string(),
            },
            // Without a driver there is no GPU; it does not come while the daemon runs.
            Err(error) if is_absent(&error) && !had_gpu => {
                let library = options.library.as_ref().map(|path| path.display().to_string());
                let library = library.unwrap_or_else(|| "libnvidia-ml.so.1".to_owned());
                shared.tell(Look { note: absent(options, &library, &error), ..Look::none() });
                return;
            }
            Err(error) => {
                let lost = Look::failed(Gpu::Lost(error.to_string()), None);
                shared.tell(if had_gpu { lost } else { Look::none() });
                error.to_string()
            }
        };
        if error != last_words {
            warn!(error, "NVML failed; it is asked again every {RETRY:?}");
            last_words = error;
        }
        if !shared.wait(RETRY) {
            return;
        }
    }
}

/// Says that there is no NVML, loudly where the configuration asks for it; gives what reports say.
fn absent(options: &NvmlOptions, library: &str, error: &NvmlError) -> String {
    let (key, value) = match options {
        NvmlOptions { library: Some(_), .. } => ("idle.nvml_library", library),
        NvmlOptions { gpu: Some(gpu), .. } => ("idle.gpu", gpu.as_str()),
        _ => {
            info!(library, %error, "no NVML: the processors decide when the search runs");
            return String::new();
        }
    };
    let note = format!(
        "{key} = \"{value}\" has no effect: NVML cannot be loaded from {library} ({error}); the \
         processors decide when the search runs"
    );
    warn!("{note}");
    note
}

fn is_absent(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::LibloadingError(_)
            | NvmlError::LibraryNotFound
            | NvmlError::FailedToLoadSymbol(_)
            | NvmlError::FunctionNotFound
            | NvmlError::DriverNotLoaded
    )
}

/// The time from opening the library to its first failure.
struct Session<'nvml> {
    nvml: &'nvml Nvml,
    devices: Vec<(String, Device<'nvml>)>,
    chosen: usize,
    /// Of the driver's samples, the newest that was seen, in its microseconds.
    seen_until: u64,
    gpm: Option<(Instant, GpmSample<'nvml>)>,
    multiprocessors: Option<f64>,
}

impl<'nvml> Session<'nvml> {
    /// The inner error: there is no GPU for the search, and why.
    fn new(nvml: &'nvml Nvml, options: &NvmlOptions) -> Result<Result<Self, String>, NvmlError> {
        let mut devices = Vec::new();
        for index in 0..nvml.device_count()?.min(GPUS_MAX) {
            let device = nvml.device_by_index(index)?;
            devices.push((device.uuid()?, device));
        }
        let uuids: Vec<&str> = devices.iter().map(|(uuid, _)| uuid.as_str()).collect();
        // The emptiest one: whoever uses the others is not disturbed there.
        let n_users = |idx: usize| {
            let found = devices[idx].1.running_compute_processes();
            found.map_or(usize::MAX, |processes| processes.len())
        };
        match choose(&uuids, options.gpu.as_deref(), options.visible.as_deref(), n_users) {
            Choice::One(chosen) => Ok(Ok(Self {
                nvml,
                devices,
                chosen,
                seen_until: 0,
                gpm: None,
                multiprocessors: None,
            })),
            Choice::None(why) => Ok(Err(why)),
        }
    }

    /// Looks until told to end (`None`), or until the driver fails, with its words.
    fn run(mut self, options: &NvmlOptions, shared: &Shared) -> Option<String> {
        let info = GpuInfo { temperature: None, power: None, ..self.info() };
        info!(gpu = info.name, uuid = info.uuid, "looking at this GPU");
        let mut own = lock(shared).own;
        loop {
            match self.look(own) {
                Ok(look) => own = shared.tell(look)?,
                Err(NvmlError::NoPermission) => {
                    let error = NvmlError::NoPermission.to_string();
                    own = shared.tell(Look::failed(Gpu::Blind(error), Some(info.clone())))?;
                }
                Err(error) => {
                    let error = error.to_string();
                    let lost = Look::failed(Gpu::Lost(error.clone()), Some(info.clone()));
                    return shared.tell(lost).map(|_| error);
                }
            }
            if !shared.wait(options.interval) {
                return None;
            }
        }
    }

    fn device(&self) -> &Device<'nvml> {
        &self.devices[self.chosen].1
    }

    fn info(&self) -> GpuInfo {
        let device = self.device();
        GpuInfo {
            uuid: self.devices[self.chosen].0.clone(),
            name: device.name().unwrap_or_default(),
            temperature: device.temperature(TemperatureSensor::Gpu).ok(),
            power: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
        }
    }

    fn look(&mut self, own: Own) -> Result<Look, NvmlError> {
        let daemon = std::process::id();
        let mut processes = BTreeMap::new();
        let mut is_complete = true;
        for (idx, (uuid, device)) in self.devices.iter().enumerate() {
            match pids(device) {
                Ok(pids) => drop(processes.insert(uuid.clone(), pids)),
                Err(error) if idx == self.chosen => return Err(error),
                Err(_) => is_complete = false,
            }
        }
        let here = processes.get(&self.devices[self.chosen].0).cloned().unwrap_or_default();
        let use_by_pid = self.use_by_pid()?;
        let device = self.device();
        let utilisation = f64::from(device.utilization_rates()?.gpu) / 100.0;
        let memory = device.memory_info()?;
        let sharing = sharing(device);
        let is_found = own.search.is_some_and(|pid| here.contains(&pid));
        let own_utilisation = match (&use_by_pid, own.search) {
            (_, None) => Some(0.0),
            _ if !own.is_on_gpu => Some(0.0),
            (Some(use_by_pid), Some(pid)) if is_found => {
                Some(use_by_pid.get(&pid).copied().unwrap_or(0.0))
            }
            _ => None,
        };
        // Use is told of processes that the list has not, too: of those that just ended.
        let listed = here.iter().copied();
        let used = use_by_pid.iter().flat_map(|by_pid| by_pid.keys().copied());
        let others: BTreeSet<u32> =
            listed.chain(used).filter(|pid| *pid != daemon && Some(*pid) != own.search).collect();
        let other = |pid| GpuProcess {
            pid,
            utilisation: use_by_pid.as_ref().map(|by_pid| by_pid.get(&pid).copied().unwrap_or(0.0)),
        };
        let sample = GpuSample {
            utilisation,
            own_utilisation,
            multiprocessors: None,
            others: others.into_iter().map(other).collect(),
            sharing,
            memory_free: memory.free,
            memory_total: memory.total,
        };
        let multiprocessors = self.multiprocessors();
        let gpu = Gpu::Seen(GpuSample { multiprocessors, ..sample });
        Ok(Look { gpu, info: Some(self.info()), processes, is_complete, note: String::new() })
    }

    /// Use since the last look by process, 0..=1; `None` where the driver does not tell it.
    fn use_by_pid(&mut self) -> Result<Option<BTreeMap<u32, f64>>, NvmlError> {
        let samples = match self.device().process_utilization_stats(self.seen_until) {
            Ok(samples) => samples,
            // Nothing ran in that time.
            Err(NvmlError::NotFound) => return Ok(Some(BTreeMap::new())),
            Err(
                NvmlError::NotSupported
                | NvmlError::NoPermission
                | NvmlError::FailedToLoadSymbol(_)
                | NvmlError::FunctionNotFound,
            ) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut by_pid: BTreeMap<u32, f64> = BTreeMap::new();
        for sample in samples {
            self.seen_until = self.seen_until.max(sample.timestamp);
            let most = by_pid.entry(sample.pid).or_insert(0.0);
            // Some drivers tell use above 100 for what they can't measure.
            *most = most.max(f64::from(sample.sm_util.min(100)) / 100.0);
        }
        Ok(Some(by_pid))
    }

    /// Share of busy multiprocessors between the last two samples that are far enough apart.
    fn multiprocessors(&mut self) -> Option<f64> {
        if self.gpm.as_ref().is_some_and(|(at, _)| at.elapsed() < GPM_INTERVAL) {
            return self.multiprocessors;
        }
        let device = self.device();
        // MIG instances have samples of their own, and this process does not know which is its.
        if !device.gpm_support().unwrap_or(false) || sharing(device) == Sharing::Mig {
            return None;
        }
        let sample = device.gpm_sample().ok()?;
        let before = self.gpm.take();
        if let Some((_, before)) = &before {
            let ids = [GpmMetricId::SmUtil];
            let metrics = gpm_metrics_get(self.nvml, before, &sample, &ids).ok();
            let metric = metrics.and_then(|metrics| metrics.into_iter().next()?.ok());
            self.multiprocessors = metric.map(|metric| metric.value / 100.0);
        }
        self.gpm = Some((Instant::now(), sample));
        self.multiprocessors
    }
}

/// The processes with a context on a device.
fn pids(device: &Device<'_>) -> Result<BTreeSet<u32>, NvmlError> {
    let mut pids: BTreeSet<u32> =
        device.running_compute_processes()?.into_iter().map(|process| process.pid).collect();
    // Not every device or library has the others.
    let graphics = device.running_graphics_processes().unwrap_or_default();
    let shared = device.mps_running_compute_processes().unwrap_or_default();
    pids.extend(graphics.into_iter().chain(shared).map(|process| process.pid));
    Ok(pids)
}

fn sharing(device: &Device<'_>) -> Sharing {
    // Devices that know neither answer with an error.
    if device.mig_mode().is_ok_and(|mode| mode.current == 1) {
        Sharing::Mig
    } else if device.mps_running_compute_processes().is_ok_and(|found| !found.is_empty()) {
        Sharing::Mps
    } else {
        Sharing::Whole
    }
}
