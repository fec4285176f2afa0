//! `fastaa-ctl search`: against a searcher whose worker is a script, and without a daemon.

#![allow(clippy::unwrap_used, reason = "a helper of a test is a test")]

mod control_harness;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use control_harness::{Ran, TestServer};
use fastaa::control::ServerOptions;
use fastaa::daemon::searcher::{Backoff, Searcher, SearcherOptions, StartWhen, WorkerCommand};
use serde_json::{Value, json};

/// Two rounds that ended, and a third under way.
const EVENTS: &str = r#"
echo '{"event": "round", "round": 1, "version": 7, "cpu_seconds": 61,' \
    '"summary": "published: +1.2 points"}'
echo '{"event": "round", "round": 2, "summary": "kept: no better"}'
echo '{"event": "progress", "algorithm": "ranged", "round": 3, "n_rounds": 4, "stage": "gate",' \
    '"part": "pair 2", "done": 30, "total": 100, "best": "81.2 %", "eta_seconds": 65,' \
    '"cpu_seconds": 3700, "seconds_today": 59}'
"#;

fn start(script: &str) -> TestServer {
    let args = ["-c", script].map(Into::into).into();
    let searcher = Searcher::start(SearcherOptions {
        command: WorkerCommand { program: "/bin/sh".into(), args, env: vec![] },
        start: StartWhen::AtOnce,
        backoff: Backoff::default(),
        dataset: "mnist".to_owned(),
        budget_seconds: 3600,
        idle: None,
        pause_mark: None,
    });
    TestServer::start_with(&["mnist"], ServerOptions::default(), Some(searcher.unwrap()))
}

/// The status once it is as wanted; there is no event to wait for instead.
fn wait_for(server: &TestServer, state: &str) -> Value {
    let began = Instant::now();
    loop {
        let report = server.ctl(&["search", "status", "--json"]).json();
        if report["state"] == state {
            return report;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "waited in vain: {report}");
    }
}

#[test]
fn status_tells_how_far_the_search_is() {
    let server = start(&format!("{EVENTS} exec sleep 1000"));
    let report = wait_for(&server, "running");
    assert_eq!(report["progress"]["done"], 30);
    assert_eq!(report["rounds"][0]["version"], 7);
    let page = server.ctl(&["search", "status"]).good();
    for expected in [
        "search      running: round 3 of 4, gate, pair 2, 30/100\n",
        "dataset     mnist\n",
        "algorithm   ranged\n",
        "best        81.2 %\n",
        "left        1 min 5 s of this round\n",
        "computed    1 h 1 min CPU\n",
        "today       59 s, of 1 h 0 min\n",
        "    1        7  1 min 1 s  published: +1.2 points\n",
        "    2        -  0 s        kept: no better\n",
    ] {
        assert!(page.contains(expected), "'{page}' lacks '{expected}'");
    }
    assert!(page.contains(&format!("worker      pid {}\n", report["pid"])), "{page}");
    let status = server.ctl(&["status"]).good();
    assert!(status.contains("\nsearch running: round 3 of 4, gate, pair 2, 30/100\n"), "{status}");
    let status = server.ctl(&["status", "--json"]).json();
    assert_eq!(status["search"]["state"], "running");
}

#[test]
fn pause_resume_and_run_say_what_they_did() {
    let server = start(&format!("{EVENTS} exec sleep 1000"));
    wait_for(&server, "running");
    let paused = server.ctl(&["search", "pause"]).good();
    assert!(paused.starts_with("search paused (until 'fastaa-ctl search resume')"), "{paused}");
    assert_eq!(server.ctl(&["--json", "search", "status"]).json()["state"], "paused");
    let resumed = server.ctl(&["search", "resume"]).good();
    assert!(resumed.starts_with("search running: round 3"), "{resumed}");
    server.ctl(&["search", "pause"]).good();
    assert_eq!(server.ctl(&["--json", "search", "run"]).json()["state"], "running");

    let finished = start("exit 0");
    wait_for(&finished, "finished");
    finished
        .ctl(&["search", "pause"])
        .check_failed(1, &["nothing to pause", "hint: ", "search run"]);
    finished.ctl(&["search", "run"]).good();
}

#[test]
fn the_report_is_written_whole_or_to_stdout() {
    let server = start("exit 0");
    let path = server.dir.path().join("report.html");
    let path = path.to_str().unwrap();
    server.ctl(&["search", "report", "-o", path]).good();
    assert_eq!(fs::read_to_string(path).unwrap(), "<p>report</p>\n");
    assert_eq!(server.ctl(&["search", "report", "-o", "-"]).good(), "<p>report</p>\n");
    let written = server.ctl(&["search", "report", "-o", path, "--json"]).json();
    assert_eq!(written, json!({"path": path, "bytes": 14}));
    server
        .ctl(&["search", "report", "-o", "/nowhere/r.html"])
        .check_failed(1, &["/nowhere/r.html"]);
    server.ctl(&["search", "report"]).check_failed(2, &["--output"]);
    server.ctl(&["search", "run", "--offline"]).check_failed(2, &["--config"]);
}

/// A folder with fastaa-ctl and, beside it, a script under the daemon's name.
struct Programs {
    dir: tempfile::TempDir,
}

impl Programs {
    fn new(script: Option<&str>) -> Self {
        // Beside the build, so that the link needs no copy.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::hard_link(env!("CARGO_BIN_EXE_fastaa-ctl"), dir.path().join("fastaa-ctl")).unwrap();
        if let Some(script) = script {
            let worker = dir.path().join("fastaa-loaderd");
            fs::write(&worker, format!("#!/bin/sh\necho \"$@\" > \"$0.args\"\n{script}\n"))
                .unwrap();
            fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("fastaa-ctl"));
        command.args(args).env("PATH", "/usr/bin:/bin");
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    fn args(&self) -> String {
        fs::read_to_string(self.path("fastaa-loaderd.args")).unwrap()
    }
}

const OFFLINE: [&str; 5] = ["search", "run", "--offline", "--config", "c.toml"];

#[test]
fn offline_the_worker_runs_in_the_terminal() {
    let programs = Programs::new(Some(&format!(
        "{EVENTS}{EVENTS}echo nonsense; echo '{{\"event\": \"note\", \"text\": \"a note\"}}'"
    )));
    let ran = programs.run(&OFFLINE);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(programs.args(), "search-worker --config c.toml --offline\n");
    let round = "round 1: published: +1.2 points\nround 2: kept: no better\n";
    assert_eq!(ran.stdout, round.repeat(2));
    assert_eq!(ran.stderr.matches("round 3: gate\n").count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("what is no event") && ran.stderr.contains("a note\n"), "{ran:?}");
    let mut with_json = OFFLINE.to_vec();
    with_json.push("--json");
    let json: Value = serde_json::from_str(&programs.run(&with_json).stdout).unwrap();
    assert_eq!(json["rounds"][0]["version"], 7);
}

#[test]
fn offline_failures_come_in_words() {
    let failing = "echo '{\"event\": \"failed\", \"message\": \"no split\"}'; exit 78";
    Programs::new(Some(failing)).run(&OFFLINE).check_failed(78, &["error: no split\n"]);
    let crashing = Programs::new(Some("exit 5")).run(&OFFLINE);
    crashing.check_failed(1, &["error: the search worker: exit status: 5"]);
    let missing = Programs::new(None).run(&OFFLINE);
    missing.check_failed(1, &["no fastaa-loaderd beside fastaa-ctl, nor in $PATH", "hint: "]);
}

#[test]
fn offline_the_report_comes_from_the_worker() {
    // The last argument is where to.
    let script = "for to; do :; done; echo '<p>offline</p>' > \"$to\"";
    let programs = Programs::new(Some(script));
    let path = programs.path("report.html");
    let output = path.to_str().unwrap();
    let report = ["search", "report", "--offline", "--config", "c.toml", "-o"];
    let ran = programs.run(&[&report[..], &[output]].concat());
    assert_eq!(ran.good(), "");
    assert_eq!(fs::read_to_string(&path).unwrap(), "<p>offline</p>\n");
    assert!(programs.args().starts_with("search-worker --config c.toml --report /"));
    let ran = programs.run(&[&report[..], &["-"]].concat());
    assert_eq!(ran.good(), "<p>offline</p>\n");
    let failing = "echo '{\"event\": \"failed\", \"message\": \"no journal\"}'; exit 1";
    let ran = Programs::new(Some(failing)).run(&[&report[..], &["-"]].concat());
    ran.check_failed(1, &["error: no journal"]);
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn an_interrupt_ends_the_worker_and_says_how_to_go_on() {
    let script = "echo '{\"event\": \"round\", \"summary\": \"'$$'\"}'; exec sleep 1000";
    let programs = Programs::new(Some(script));
    let mut child =
        programs.command(&OFFLINE).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let worker: u32 = first.strip_prefix("round 0: ").unwrap().parse().unwrap();
    assert!(is_alive(worker));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("hint: the same command goes on where it was"), "{stderr}");
    assert!(!is_alive(worker), "the worker is ended and reaped");
}
