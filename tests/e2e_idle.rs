//! The search yields to others: the real nvml-wrapper on a driver's library that plays a script, a
//! real process as the worker, and the daemon's supervision between them.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastaa::config::{IdleConfig, SearchDevice};
use fastaa::control::SearchReport;
use fastaa::daemon::searcher::{
    Backoff, IdleOptions, Searcher, SearcherOptions, StartWhen, WorkerCommand,
};
use fastaa::idle::demand::{Consumer, DemandBoard};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
const QUIET: f64 = 0.3;
const SAMPLE_MS: u64 = 20;
const STRANGER: u32 = 4_000_000;
const WAIT_MAX: Duration = Duration::from_secs(60);
/// NVML's codes.
const NO_PERMISSION: u32 = 4;
const GPU_IS_LOST: u32 = 15;

/// The library that plays a driver, beside its script.
struct FakeDriver {
    folder: tempfile::TempDir,
}

impl FakeDriver {
    fn new(script: &Value) -> Self {
        let driver = Self { folder: tempfile::tempdir().unwrap() };
        let target = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
        let library = target.join("examples/libfake_nvml.so");
        assert!(
            library.is_file(),
            "{} is missing: run 'cargo build --examples'",
            library.display()
        );
        std::fs::copy(library, driver.library()).unwrap();
        driver.play(script);
        driver
    }

    fn library(&self) -> PathBuf {
        self.folder.path().join("libnvidia-ml.so.1")
    }

    /// From now on the GPUs do this.
    fn play(&self, script: &Value) {
        let partial = self.folder.path().join("partial");
        std::fs::write(&partial, script.to_string()).unwrap();
        std::fs::rename(partial, self.folder.path().join("script.json")).unwrap();
    }
}

/// A GPU on which nothing runs, with some keys set otherwise.
fn gpu(changes: &Value) -> Value {
    let mut gpu = json!({
        "uuid": "GPU-11111111-2222-3333-4444-555555555555",
        "name": "Fake H100",
        "utilisation": 0,
        "memory_free": 70 * GIB,
        "memory_total": 80 * GIB,
        "tells_processes": true,
    });
    for (key, value) in changes.as_object().unwrap() {
        gpu[key] = value.clone();
    }
    json!({ "devices": [gpu] })
}

fn idle() -> Value {
    gpu(&json!({}))
}

/// A supervised worker that only sleeps, on the GPU of a driver's library.
struct Host {
    searcher: Searcher,
    board: Arc<DemandBoard>,
}

impl Host {
    fn start(library: &Path) -> Self {
        Self::start_with(library, "exec sleep 1000")
    }

    /// With a shell script as the worker.
    fn start_with(library: &Path, script: &str) -> Self {
        Self::start_on(library, Some("0"), SearchDevice::Auto, script)
    }

    /// With or without a GPU in the configuration, and one that the search may use.
    fn start_on(library: &Path, gpu: Option<&str>, device: SearchDevice, script: &str) -> Self {
        let config = IdleConfig {
            nvml_library: Some(library.to_owned()),
            gpu: gpu.map(str::to_owned),
            quiet_seconds: QUIET,
            sample_ms: SAMPLE_MS,
            ..IdleConfig::default()
        };
        let idle = IdleOptions::new(config, 1, device).unwrap();
        let board = idle.board();
        let command = WorkerCommand {
            program: "/bin/sh".into(),
            args: ["-c", script].map(Into::into).into(),
            env: vec![],
        };
        let searcher = Searcher::start(SearcherOptions {
            command,
            start: StartWhen::AtOnce,
            backoff: Backoff::default(),
            dataset: "digits".to_owned(),
            budget_seconds: 0,
            idle: Some(idle),
            pause_mark: None,
        });
        Self { searcher: searcher.unwrap(), board }
    }

    /// Waits for a report; there is no event to wait for instead.
    fn wait_for(&self, what: &str, wanted: impl Fn(&SearchReport) -> bool) -> SearchReport {
        let began = Instant::now();
        loop {
            let report = self.searcher.report();
            if wanted(&report) {
                return report;
            }
            assert!(began.elapsed() < WAIT_MAX, "waited in vain for {what}: {report:?}");
            pause(Duration::from_millis(1));
        }
    }

    fn wait_for_decision(&self, decision: &str, words: &str) -> SearchReport {
        self.wait_for(&format!("{decision}: {words}"), |report| {
            let idle = report.idle.as_ref().unwrap();
            idle.decision == decision && idle.reason.contains(words)
        })
    }

    /// The worker's process, once it computes.
    fn computing(&self) -> u32 {
        let computes = |report: &SearchReport| report.pid.is_some_and(|pid| state_of(pid) != 'T');
        self.wait_for("a worker that computes", |report| {
            computes(report) && report.idle.as_ref().unwrap().decision == "run"
        })
        .pid
        .unwrap()
    }
}

fn pause(time: Duration) {
    #[allow(clippy::disallowed_methods, reason = "what others do has no event to wait for")]
    std::thread::sleep(time);
}

/// `S`: sleeps, `T`: stopped, `X`: there is none.
fn state_of(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('X')
}

fn wait_until_stopped(pid: u32) -> Duration {
    let began = Instant::now();
    while state_of(pid) != 'T' {
        assert!(began.elapsed() < WAIT_MAX, "process {pid} is not stopped");
        std::thread::yield_now();
    }
    began.elapsed()
}

#[test]
fn it_waits_for_the_quiet_time_and_says_so() {
    let driver = FakeDriver::new(&idle());
    let host = Host::start(&driver.library());
    let report = host.wait_for_decision("pause", "quiet for");
    assert_eq!((report.state.as_str(), report.pid), ("yielding", None));
    host.computing();
    let report = host.wait_for("the state", |report| report.state == "starting");
    let idle = report.idle.unwrap();
    assert_eq!(idle.reason, "nobody uses the device");
    let gpu = idle.gpu.unwrap();
    assert_eq!(
        (gpu.name.as_str(), gpu.temperature, gpu.power_watts),
        ("Fake H100", Some(41), Some(92.5))
    );
    assert_eq!(gpu.memory_free, Some(70 * GIB));
}

#[test]
fn a_batch_stops_it_and_the_gap_after_it_lets_it_go_on() {
    let driver = FakeDriver::new(&idle());
    let host = Host::start(&driver.library());
    for trial in 1..=3 {
        let pid = host.computing();
        host.board.took(Consumer(Some(std::process::id())));
        wait_until_stopped(pid);
        // It is counted just after the signal.
        let counted = |report: &SearchReport| report.idle.as_ref().unwrap().yields == trial;
        let idle = host.wait_for("the count", counted).idle.unwrap();
        assert!(idle.yield_ms_last.is_some() && idle.yield_ms_max >= idle.yield_ms_last);
        host.wait_for_decision("pause", &format!("process {} takes", std::process::id()));
    }
}

#[test]
fn a_consumer_on_another_gpu_is_not_in_the_way() {
    let mut script = idle();
    let own = std::process::id();
    let busy = json!([{ "pid": own, "sm": 90 }]);
    let other = gpu(&json!({ "uuid": "GPU-b", "utilisation": 90, "processes": busy }));
    script["devices"].as_array_mut().unwrap().push(other["devices"][0].clone());
    let driver = FakeDriver::new(&script);
    let host = Host::start(&driver.library());
    let pid = host.computing();
    for _ in 0..20 {
        host.board.took(Consumer(Some(own)));
        pause(Duration::from_millis(SAMPLE_MS));
    }
    let report = host.searcher.report();
    assert_eq!(report.idle.unwrap().yields, 0);
    assert_ne!(state_of(pid), 'T');
}

#[test]
fn another_user_s_job_pauses_it_and_full_memory_ends_its_process() {
    let driver = FakeDriver::new(&idle());
    let host = Host::start(&driver.library());
    let pid = host.computing();
    driver.play(&gpu(&json!({ "processes": [{ "pid": STRANGER }] })));
    host.wait_for_decision("pause", "process 4000000 came to the GPU");
    wait_until_stopped(pid);
    let busy = json!([{ "pid": STRANGER, "sm": 100 }]);
    driver.play(&gpu(&json!({ "utilisation": 100, "processes": busy })));
    host.wait_for_decision("pause", "process 4000000 uses the GPU, all others 100 %");
    assert_eq!(host.searcher.report().pid, Some(pid), "its memory is kept");
    driver.play(&gpu(&json!({
        "utilisation": 100, "processes": busy, "memory_free": 2 * GIB
    })));
    let report = host.wait_for("eviction", |report| report.pid.is_none());
    assert_eq!(report.state, "yielding");
    assert_eq!(report.reason, "only 2.0 of 80.0 GiB of the GPU's memory are free");
    assert_eq!(state_of(pid), 'X');
    driver.play(&idle());
    assert_ne!(host.computing(), pid);
    assert_eq!(host.searcher.report().restarts, 0, "an eviction is no crash");
}

#[test]
fn one_small_kernel_after_the_other_keeps_it_away() {
    let busy = json!([{ "pid": STRANGER, "sm": 99 }]);
    let script = gpu(&json!({ "utilisation": 100, "processes": busy, "gpm": 1.0 }));
    let driver = FakeDriver::new(&script);
    let host = Host::start(&driver.library());
    let report = host.wait_for("GPM", |report| {
        let gpu = report.idle.as_ref().unwrap().gpu.as_ref();
        gpu.is_some_and(|gpu| gpu.multiprocessors == Some(0.01))
    });
    assert_eq!(report.pid, None);
    host.wait_for_decision("pause", "process 4000000 uses the GPU, all others 100 %");
}

#[test]
fn a_driver_that_does_not_tell_processes_is_believed_only_when_nothing_runs() {
    let driver = FakeDriver::new(&gpu(&json!({ "tells_processes": false })));
    let on_gpu = r#"echo '{"event": "progress", "is_on_gpu": true}'; exec sleep 1000"#;
    let host = Host::start_with(&driver.library(), on_gpu);
    host.wait_for("progress", |report| report.progress.is_some());
    let pid = host.computing();
    driver.play(&gpu(&json!({ "tells_processes": false, "utilisation": 30 })));
    host.wait_for_decision("pause", "the driver does not tell whose work the GPU does");
    wait_until_stopped(pid);
}

#[test]
fn a_search_that_may_use_a_gpu_is_believed_on_it_until_it_says_otherwise() {
    let busy = json!([{ "pid": STRANGER, "sm": 100 }]);
    let busy = gpu(&json!({ "utilisation": 100, "processes": busy }));
    let driver = FakeDriver::new(&busy);
    let script = r#"
        echo "{\"event\": \"note\", \"text\": \"CUDA sees $CUDA_VISIBLE_DEVICES\"}"
        until [ -e "$0" ]; do sleep 0.01; done
        echo '{"event": "progress", "is_on_gpu": false}'
        exec sleep 1000"#;
    let told = driver.folder.path().join("told");
    let script = script.replace("$0", told.to_str().unwrap());
    let host = Host::start_on(&driver.library(), None, SearchDevice::Auto, &script);
    host.wait_for_decision("pause", "process 4000000 uses the GPU");
    assert_eq!(host.searcher.report().pid, None, "it was started on a GPU that others use");
    driver.play(&idle());
    // It is told which GPU it was, that was watched.
    let uuid = "CUDA sees GPU-11111111-2222-3333-4444-555555555555";
    host.wait_for("the GPU's name", |report| report.notes.iter().any(|note| note == uuid));
    driver.play(&busy);
    host.wait_for_decision("pause", "process 4000000 uses the GPU");
    driver.play(&idle());
    std::fs::write(&told, "").unwrap();
    host.wait_for("progress", |report| report.progress.is_some());
    // From now on the processors decide, whatever the GPU does.
    driver.play(&busy);
    host.wait_for("a look at the busy GPU", |report| {
        let idle = report.idle.as_ref().unwrap();
        idle.gpu.as_ref().is_some_and(|gpu| gpu.utilisation == Some(1.0))
            && !idle.reason.contains("GPU")
    });
}

#[test]
fn a_search_on_processors_leaves_gpus_alone() {
    let busy = json!([{ "pid": STRANGER, "sm": 100 }]);
    let driver = FakeDriver::new(&gpu(&json!({ "utilisation": 100, "processes": busy })));
    let script = r#"
        echo "{\"event\": \"note\", \"text\": \"CUDA sees ${CUDA_VISIBLE_DEVICES-what it likes}\"}"
        exec sleep 1000"#;
    let host = Host::start_on(&driver.library(), None, SearchDevice::Cpu, script);
    // Whether the processors are idle is not asked: other tests use them.
    host.searcher.run().unwrap();
    let words = "CUDA sees what it likes";
    let report = host.wait_for("its start", |report| report.notes.iter().any(|note| note == words));
    assert!(!report.idle.unwrap().reason.contains("GPU"));
}

#[test]
fn mig_and_mps_without_gpm_are_left_alone() {
    let driver = FakeDriver::new(&gpu(&json!({ "mig": true })));
    let host = Host::start(&driver.library());
    host.wait_for_decision("pause", "the GPU is cut by MIG");
    driver.play(&gpu(&json!({ "processes": [{ "pid": STRANGER, "mps": true }] })));
    host.wait_for_decision("pause", "MPS shares the GPU");
    assert_eq!(host.searcher.report().pid, None);
}

#[test]
fn a_lost_gpu_and_a_driver_without_rights_are_survived() {
    let driver = FakeDriver::new(&idle());
    let host = Host::start(&driver.library());
    let pid = host.computing();
    driver.play(&gpu(&json!({ "fails": GPU_IS_LOST })));
    host.wait_for_decision("evict", "device fell off the bus");
    host.wait_for("the end of the worker", |report| report.pid.is_none());
    assert_eq!(state_of(pid), 'X');
    driver.play(&idle());
    host.computing();
    driver.play(&gpu(&json!({ "fails": NO_PERMISSION })));
    host.wait_for_decision("pause", "the current user does not have permission");
    driver.play(&idle());
    host.computing();
}

#[test]
fn a_driver_that_hangs_hinders_nobody() {
    let driver = FakeDriver::new(&idle());
    let host = Host::start(&driver.library());
    let pid = host.computing();
    driver.play(&gpu(&json!({ "takes_ms": 100_000 })));
    pause(Duration::from_millis(4 * SAMPLE_MS));
    host.board.took(Consumer(None));
    wait_until_stopped(pid);
    host.wait_for_decision("pause", "a client over TCP takes batches");
    // What was seen before it hung tells nothing of now, however quiet it is.
    host.wait_for_decision("pause", "NVML has not answered for");
    wait_until_stopped(pid);
    let began = Instant::now();
    drop(host);
    assert!(began.elapsed() < Duration::from_secs(20), "the driver was waited for");
}

#[test]
fn without_a_usable_library_only_processors_are_watched() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.so");
    std::fs::write(&text, "no library").unwrap();
    // A library without NVML's functions: the program interpreter's sibling is on every system.
    for library in [Path::new("/nowhere/libnvidia-ml.so.1"), &text, Path::new("libc.so.6")] {
        let host = Host::start(library);
        let report = host
            .wait_for("a decision", |report| !report.idle.as_ref().unwrap().decision.is_empty());
        let idle = report.idle.unwrap();
        assert_eq!(idle.gpu, None, "{}", library.display());
        let expected = format!("idle.nvml_library = \"{}\" has no effect", library.display());
        assert!(idle.note.starts_with(&expected), "{}", idle.note);
    }
}

#[test]
fn a_user_s_word_goes_before_the_watch_s() {
    let busy = json!([{ "pid": STRANGER, "sm": 100 }]);
    let busy = gpu(&json!({ "utilisation": 100, "processes": busy }));
    let driver = FakeDriver::new(&busy);
    let host = Host::start(&driver.library());
    host.wait_for_decision("pause", "uses the GPU");
    // `run`: now, whoever else computes.
    host.searcher.run().unwrap();
    let report = host.wait_for("a worker", |report| report.pid.is_some());
    let pid = report.pid.unwrap();
    pause(Duration::from_millis(4 * SAMPLE_MS));
    assert_ne!(state_of(pid), 'T');
    // `pause`: not even on an idle device.
    host.searcher.pause().unwrap();
    driver.play(&idle());
    host.wait_for_decision("run", "nobody uses the device");
    pause(Duration::from_millis(4 * SAMPLE_MS));
    assert_eq!(state_of(pid), 'T');
    assert_eq!(host.searcher.report().state, "paused");
    // `resume`: as the watch says.
    driver.play(&busy);
    host.wait_for_decision("pause", "uses the GPU");
    host.searcher.resume().unwrap();
    pause(Duration::from_millis(4 * SAMPLE_MS));
    assert_eq!(state_of(pid), 'T');
    assert_eq!(host.searcher.report().state, "yielding");
    driver.play(&idle());
    host.wait_for("the worker", |_| state_of(pid) != 'T');
}

#[test]
fn a_word_to_run_ends_with_a_word_to_resume_and_never_keeps_full_memory() {
    let busy = json!([{ "pid": STRANGER, "sm": 100 }]);
    let busy = json!({ "utilisation": 100, "processes": busy });
    let driver = FakeDriver::new(&gpu(&busy));
    let host = Host::start(&driver.library());
    host.wait_for_decision("pause", "uses the GPU");
    let is_overridden = |report: &SearchReport| report.idle.as_ref().unwrap().is_overridden;
    assert!(!is_overridden(&host.searcher.report()));
    host.searcher.run().unwrap();
    let report = host.wait_for("a worker", |report| report.pid.is_some());
    assert!(is_overridden(&report));
    host.searcher.resume().unwrap();
    assert!(!is_overridden(&host.searcher.report()));
    wait_until_stopped(report.pid.unwrap());
    // Again, and the memory fills: somebody's job is about to fail.
    host.searcher.run().unwrap();
    host.wait_for("a worker that computes", |report| {
        report.pid.is_some_and(|pid| state_of(pid) != 'T')
    });
    let mut full = busy;
    full["memory_free"] = json!(GIB);
    driver.play(&gpu(&full));
    host.wait_for("the end of the worker", |report| report.pid.is_none());
}

#[test]
fn a_named_gpu_that_is_not_there_is_waited_for() {
    let driver = FakeDriver::new(&json!({ "devices": [] }));
    let host = Host::start(&driver.library());
    host.wait_for_decision("evict", "NVML knows no GPU");
    assert_eq!(host.searcher.report().pid, None);
    driver.play(&idle());
    let pid = host.computing();
    // It goes, and the list is empty: the processors' idleness is not the GPU's.
    driver.play(&gpu(&json!({ "fails": GPU_IS_LOST })));
    host.wait_for_decision("evict", "device fell off the bus");
    driver.play(&json!({ "devices": [] }));
    host.wait_for_decision("evict", "NVML knows no GPU");
    assert_eq!(state_of(pid), 'X');
    driver.play(&idle());
    host.computing();
}

#[test]
fn a_worker_that_somebody_else_stops_or_continues_is_set_right() {
    let driver = FakeDriver::new(&idle());
    let host = Host::start(&driver.library());
    let pid = host.computing();
    let signal = |signal| {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    };
    signal(rustix::process::Signal::STOP);
    host.wait_for("the worker", |_| state_of(pid) != 'T');
    host.searcher.pause().unwrap();
    wait_until_stopped(pid);
    signal(rustix::process::Signal::CONT);
    wait_until_stopped(pid);
    assert_eq!(host.searcher.report().state, "paused");
}
