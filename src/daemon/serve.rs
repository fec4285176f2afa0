//! Brings the parts up, watches over them, and takes them down.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::config::{AugmentOn, Config, IdlePolicy, SearchDevice};
use crate::control::{ControlServer, ServerOptions};
use crate::idle::demand::DemandBoard;
use crate::pipeline::shared::DecodedWindow;
use crate::policy::{EpochPins, PolicyStore};
use crate::transport::server::{ServerConfig, ServerHandle, StreamServer};

use super::datasets::Datasets;
use super::handler::{DaemonFacts, DaemonHandler};
use super::metrics::Metrics;
use super::provider::Provider;
use super::quarantine::Quarantine;
use super::runtime_dir::RuntimeLock;
use super::searcher::{Backoff, IdleOptions, Searcher, SearcherOptions, StartWhen, WorkerCommand};
use super::switching::SwitchRules;
use super::{DaemonError, Places, token};

/// How often the parts are looked at.
const SUPERVISION_INTERVAL: Duration = Duration::from_secs(1);
/// The daemon's group may reach the control socket; who of it is heard, `allowed_uids` says.
const CONTROL_SOCKET_MODE: u32 = 0o660;

/// Runs until SIGTERM or SIGINT, or until a part fails.
pub(super) fn serve(
    config: &Config,
    config_path: &Path,
    places: &Places,
) -> Result<(), DaemonError> {
    let started = Instant::now();
    // Sockets for the group, nothing for others; who of the group may subscribe is checked by uid.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o007));
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    survive_signals(&runtime)?;
    let lock = RuntimeLock::take(&places.runtime)?;
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| DaemonError::File { path, source }
    };
    std::fs::create_dir_all(&places.state_dir).map_err(at(&places.state_dir))?;
    let store = Arc::new(PolicyStore::open(places.state_dir.join("policies"))?);
    let pins = EpochPins::open(places.state_dir.join("pins"))?;
    let datasets = Datasets::open(&config.datasets, &places.state_dir.join("cache"))?;
    check_default_policy(config, &datasets, &store)?;
    let n_threads = config.workers.n_threads();
    let idle = IdleOptions::new(config.idle.clone(), config.search.threads, config.search.device)?;
    let quarantine = Arc::new(Quarantine::new(places.state_dir.join("quarantine")));
    let provider = provider(config, &datasets, &store, pins, idle.board(), &quarantine);
    let tcp_token = tcp_token(config, places)?;
    let server = StreamServer::start(ServerConfig {
        hello_path: &places.runtime.hello_socket(),
        data_path: &places.runtime.data_socket(),
        tcp: config.transport.tcp.as_deref(),
        tcp_token,
        allowed_uids: config.allowed_uids.clone(),
        n_threads,
        provider: Arc::clone(&provider) as _,
        gpu_memory_bytes: config.gpu.memory_bytes(),
    })?;
    let facts = DaemonFacts {
        started,
        runtime_dir: places.runtime.dir().display().to_string(),
        state_dir: places.state_dir.display().to_string(),
        n_threads,
        tcp: server.tcp_endpoint().map(str::to_owned),
    };
    let counters = server.worker_counters();
    let searcher = Arc::new(Searcher::start(searcher_options(config, config_path, places, idle)?)?);
    let handler = DaemonHandler {
        facts,
        datasets,
        store,
        server: server.handle(),
        counters,
        quarantine,
        decoded: Arc::clone(&provider.decoded),
        searcher: Arc::clone(&searcher),
        metrics: Metrics::default(),
        auto_rollback: config.search.auto_rollback,
    };
    warn_of_what_is_missing(config);
    let ended = runtime.block_on(supervise(config, places, &server, handler));
    notify(&[sd_notify::NotifyState::Stopping]);
    searcher.stop();
    let joined = server.join();
    drop(lock);
    ended?;
    if !joined {
        return Err(DaemonError::ThreadDied);
    }
    info!("stopped");
    Ok(())
}

fn provider(
    config: &Config,
    datasets: &Datasets,
    store: &Arc<PolicyStore>,
    pins: EpochPins,
    demand: Arc<DemandBoard>,
    quarantine: &Arc<Quarantine>,
) -> Arc<Provider> {
    Arc::new(Provider {
        datasets: datasets.clone(),
        defaults: config.stream.defaults.clone(),
        limits: config.images.limits(),
        augment_on: config.gpu.augment_on,
        n_threads: config.workers.n_threads(),
        quarantine: Arc::clone(quarantine),
        decoded: DecodedWindow::new(config.images.shared_bytes()),
        store: Arc::clone(store),
        pins,
        demand,
        rules: switch_rules(config),
        prepared: Mutex::default(),
    })
}

/// A default policy that means nothing for a dataset is refused at the start.
fn check_default_policy(
    config: &Config,
    datasets: &Datasets,
    store: &PolicyStore,
) -> Result<(), DaemonError> {
    for name in datasets.names() {
        let policy = &config.stream.defaults.policy;
        store.resolve(policy, &name).map_err(DaemonError::DefaultPolicy)?;
    }
    Ok(())
}

fn switch_rules(config: &Config) -> SwitchRules {
    SwitchRules {
        min_epochs_between: config.search.min_epochs_between,
        freeze_last: config.search.freeze_last,
    }
}

/// Takes signals that would kill for nothing.
fn survive_signals(runtime: &tokio::runtime::Runtime) -> std::io::Result<()> {
    // Without a handler, a write beyond `ulimit -f` kills without a word; with one it fails, and
    // the error names the file. The handler outlives this stream.
    let signal_context = runtime.enter();
    drop(signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?);
    // They mean nothing here, and must not kill.
    drop(signal(SignalKind::user_defined1())?);
    drop(signal(SignalKind::user_defined2())?);
    drop(signal_context);
    Ok(())
}

/// The token of TCP clients; empty if there are none.
fn tcp_token(config: &Config, places: &Places) -> Result<String, DaemonError> {
    if config.transport.tcp.is_none() {
        return Ok(String::new());
    }
    let path = token_path(config, places);
    token::read_or_make(&path).map_err(|source| DaemonError::File { path, source })
}

fn token_path(config: &Config, places: &Places) -> PathBuf {
    let default = || places.state_dir.join("tcp-token");
    config.transport.token_file.clone().unwrap_or_else(default)
}

/// This program itself is the worker's: `fastaa-loaderd search-worker --config FILE`.
/// Each client takes some file descriptors, and the usual soft limit is meant for `select`.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: maximum, maximum };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        warn!(%error, "the limit of open files stays as it is");
    }
}

fn searcher_options(
    config: &Config,
    config_path: &Path,
    places: &Places,
    idle: IdleOptions,
) -> std::io::Result<SearcherOptions> {
    let search = &config.search;
    let first = config.datasets.first().map(|dataset| dataset.name.clone());
    let start = if !search.enabled {
        StartWhen::Never("search.enabled is false in the configuration".to_owned())
    } else if crate::search::backend().is_none() {
        StartWhen::Never("this program was built without the feature torch".to_owned())
    } else {
        match config.idle.policy {
            IdlePolicy::Never => StartWhen::Told(
                "idle.policy is \"never\"; 'fastaa-ctl search run' starts it".to_owned(),
            ),
            IdlePolicy::Auto | IdlePolicy::Always => StartWhen::AtOnce,
        }
    };
    let gpu = config.idle.gpu.as_ref().filter(|_| search.device != SearchDevice::Cpu);
    Ok(SearcherOptions {
        command: WorkerCommand {
            program: std::env::current_exe()?,
            args: vec!["search-worker".into(), "--config".into(), config_path.into()],
            // NVML's order, if the GPU is given by its number.
            env: gpu
                .map(|gpu| ("CUDA_VISIBLE_DEVICES".into(), gpu.into()))
                .into_iter()
                .chain([("CUDA_DEVICE_ORDER".into(), "PCI_BUS_ID".into())])
                .collect(),
        },
        start,
        backoff: Backoff::default(),
        dataset: search.dataset.clone().or(first).unwrap_or_default(),
        budget_seconds: search.budget_seconds,
        idle: (config.idle.policy == IdlePolicy::Auto).then_some(idle),
        pause_mark: Some(places.state_dir.join("search/paused")),
    })
}

fn warn_of_what_is_missing(config: &Config) {
    if config.gpu.augment_on != AugmentOn::Cpu && !cfg!(feature = "torch") {
        warn!("gpu.augment_on: this program was built without the feature torch: it stays \"cpu\"");
    }
    if config.telemetry.http.is_some() {
        warn!("telemetry.http: this version has no HTTP server; 'fastaa-ctl status' has counters");
    }
}

/// The control plane: control socket, signals, watchdog. Ends when the daemon is to stop.
async fn supervise(
    config: &Config,
    places: &Places,
    server: &StreamServer,
    handler: DaemonHandler,
) -> Result<(), DaemonError> {
    // Before readiness: whoever stops the daemon at once is heard, too.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // The terminal of a daemon in the foreground was closed.
    let mut hangup = signal(SignalKind::hangup())?;
    let path = places.runtime.control_socket();
    let options = ServerOptions {
        mode: CONTROL_SOCKET_MODE,
        allowed_uids: config.allowed_uids.clone(),
        ..ServerOptions::default()
    };
    let control = ControlServer::bind(&path, options)
        .map_err(|source| DaemonError::Control { path: path.clone(), source })?;
    let (stop, stopped) = watch::channel(false);
    let mut control = tokio::spawn(control.run(Arc::new(handler), stopped));
    info!(
        version = env!("CARGO_PKG_VERSION"),
        runtime_dir = %places.runtime.dir().display(),
        tcp = server.tcp_endpoint(),
        "ready"
    );
    notify(&[sd_notify::NotifyState::Ready]);
    let mut interval = tokio::time::interval(SUPERVISION_INTERVAL);
    let ended = loop {
        tokio::select! {
            _ = terminate.recv() => { info!("SIGTERM: draining"); break Ok(()); }
            _ = interrupt.recv() => { info!("SIGINT: draining"); break Ok(()); }
            _ = hangup.recv() => { info!("SIGHUP: draining"); break Ok(()); }
            result = &mut control => {
                error!(?result, "the control socket failed");
                return Err(DaemonError::ThreadDied);
            }
            _ = interval.tick() => {
                if server.has_ended() {
                    break Err(DaemonError::ThreadDied);
                }
                feed_watchdog(server.handle()).await;
            }
        }
    };
    // Fails only if the control server has ended, which is what is asked for.
    let _ = stop.send(true);
    let _ = control.await;
    ended
}

/// Tells systemd that the stream server still answers; silence makes it restart the daemon.
async fn feed_watchdog(server: ServerHandle) {
    let answered = tokio::task::spawn_blocking(move || server.report().is_some()).await;
    if matches!(answered, Ok(true)) {
        notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

fn notify(state: &[sd_notify::NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(state);
}
