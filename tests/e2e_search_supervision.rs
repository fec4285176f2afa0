//! The supervision of the search worker, with shell scripts as the worker; and, with the real
//! daemon, how the versions of a search reach runs and are taken back.

#![allow(clippy::unwrap_used, reason = "a helper of a test is a test")]

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastaa::control::{
    ControlClient, ControlFailure, MetricReport, Reply, Request, RuntimePaths, SearchReport,
};
use fastaa::daemon::searcher::{Backoff, Searcher, SearcherOptions, StartWhen, WorkerCommand};
use serde_json::json;
use support::{Host, WAIT_MAX, read_epoch, request};

const SLEEP: &str = "exec sleep 1000";
const HOUR: Duration = Duration::from_secs(3600);
const MOMENT: Duration = Duration::from_millis(1);

/// A searcher whose worker is a shell script.
fn searcher_that(start: StartWhen, script: &str, backoff: Backoff) -> Searcher {
    let args = ["-c", script].map(Into::into).into();
    let command = WorkerCommand { program: "/bin/sh".into(), args, env: vec![] };
    searcher_with(command, start, backoff, None)
}

fn searcher_with(
    command: WorkerCommand,
    start: StartWhen,
    backoff: Backoff,
    pause_mark: Option<PathBuf>,
) -> Searcher {
    let dataset = "digits".to_owned();
    Searcher::start(SearcherOptions {
        command,
        start,
        backoff,
        dataset,
        budget_seconds: 60,
        idle: None,
        pause_mark,
    })
    .unwrap()
}

fn searcher(script: &str) -> Searcher {
    searcher_that(StartWhen::AtOnce, script, Backoff::new(HOUR, HOUR))
}

/// Waits until a report is as wanted; there is no event to wait for instead.
fn wait_for(searcher: &Searcher, wanted: impl Fn(&SearchReport) -> bool) -> SearchReport {
    let began = Instant::now();
    loop {
        let report = searcher.report();
        if wanted(&report) {
            return report;
        }
        assert!(began.elapsed() < WAIT_MAX, "waited in vain: {report:?}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn wait_for_state(searcher: &Searcher, state: &str) -> SearchReport {
    wait_for(searcher, |report| report.state == state)
}

/// The letter of a process's state in /proc (`T`: stopped), or `None` if there is no process.
fn process_state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn wait_for_process(pid: u32, wanted: impl Fn(Option<char>) -> bool) {
    let began = Instant::now();
    while !wanted(process_state(pid)) {
        assert!(began.elapsed() < WAIT_MAX, "process {pid} is {:?}", process_state(pid));
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Lines of a file, 0 if it is not there.
fn n_lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

fn check_refused(result: Result<(), ControlFailure>, expected: &str) {
    let failure = result.unwrap_err();
    let text = format!("{} {}", failure.message, failure.hint);
    assert!(text.contains(expected), "'{text}' lacks '{expected}'");
}

#[test]
fn events_become_state_and_the_end_reaps() {
    let script = r#"
        echo '{"event": "note", "text": "hello"}'
        echo '{"event": "round", "round": 1, "version": 4, "summary": "published"}'
        echo '{"event": "progress", "round": 2, "stage": "gate", "done": 3, "total": 10}'
        exec sleep 1000"#;
    let searcher = searcher(script);
    let report = wait_for_state(&searcher, "running");
    let progress = report.progress.clone().unwrap();
    assert_eq!((progress.round, progress.stage.as_str(), progress.done), (2, "gate", 3));
    assert_eq!(
        (report.rounds[0].version, report.notes.as_slice()),
        (Some(4), &["hello".into()][..])
    );
    assert_eq!((report.dataset.as_str(), report.budget_seconds), ("digits", 60));
    let pid = report.pid.unwrap();
    assert!(process_state(pid).is_some());
    searcher.run().unwrap();
    assert_eq!(searcher.report().pid, Some(pid), "it runs already");
    searcher.stop();
    assert_eq!(process_state(pid), None, "ended and reaped");
    searcher.stop();
}

#[test]
fn a_finished_search_stays_finished_until_it_is_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let starts = dir.path().join("starts");
    let script = format!("echo >> {}; exit 0", starts.display());
    let never = StartWhen::Told("idle.policy".to_owned());
    let searcher = searcher_that(never, &script, Backoff::default());
    let report = searcher.report();
    assert_eq!((report.state.as_str(), report.reason.as_str()), ("waiting", "idle.policy"));
    check_refused(searcher.pause(), "'fastaa-ctl search run' starts it");
    assert_eq!(n_lines(&starts), 0);
    for n_starts in 1..=2 {
        searcher.run().unwrap();
        wait_for(&searcher, |report| report.state == "finished" && n_lines(&starts) == n_starts);
    }
    check_refused(searcher.resume(), "the search is finished");
    assert_eq!(searcher.report().restarts, 0);
}

#[test]
fn a_crashed_worker_is_started_again_and_a_hopeless_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let starts = dir.path().join("starts");
    // Three crashes, one by a signal; then it fails for good.
    let script = format!(
        r#"echo >> {0}
        case $(wc -l < {0}) in
            1) exit 3;;
            2) kill -9 $$;;
            3) exit 1;;
            *) echo '{{"event": "failed", "message": "the dataset is too small; take another"}}'
               exit 78;;
        esac"#,
        starts.display()
    );
    let searcher = searcher_that(StartWhen::AtOnce, &script, Backoff::new(MOMENT, MOMENT));
    let report = wait_for_state(&searcher, "failed");
    assert_eq!(report.reason, "the dataset is too small; take another");
    assert_eq!((report.restarts, n_lines(&starts), report.pid), (3, 4, None));
    check_refused(searcher.resume(), "the search is failed");
    searcher.run().unwrap();
    wait_for(&searcher, |report| report.state == "failed" && n_lines(&starts) == 5);
}

#[test]
fn a_crash_loop_waits_and_a_person_need_not() {
    let dir = tempfile::tempdir().unwrap();
    let starts = dir.path().join("starts");
    let searcher = searcher(&format!("echo >> {}; exit 3", starts.display()));
    let report = wait_for_state(&searcher, "backing-off");
    assert_eq!(report.reason, "the worker crashed (exit code 3); a new worker starts after 3600s");
    assert_eq!((report.restarts, n_lines(&starts)), (1, 1));
    searcher.run().unwrap();
    wait_for(&searcher, |report| report.restarts == 2);
    assert_eq!(n_lines(&starts), 2);
    // Paused while it waits: it does not start, and goes on when resumed.
    searcher.pause().unwrap();
    assert_eq!(searcher.report().state, "paused");
    searcher.resume().unwrap();
    wait_for(&searcher, |report| report.restarts == 3);
}

#[test]
fn a_pause_outlives_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("search/paused");
    let start = || {
        let args = ["-c", SLEEP].map(Into::into).into();
        let command = WorkerCommand { program: "/bin/sh".into(), args, env: vec![] };
        let backoff = Backoff::new(HOUR, HOUR);
        searcher_with(command, StartWhen::AtOnce, backoff, Some(mark.clone()))
    };
    let searcher = start();
    wait_for(&searcher, |report| report.pid.is_some());
    searcher.pause().unwrap();
    drop(searcher);
    let searcher = start();
    let report = searcher.report();
    assert_eq!((report.state.as_str(), report.pid), ("paused", None));
    assert!(report.reason.contains("fastaa-ctl search resume"), "{}", report.reason);
    searcher.resume().unwrap();
    wait_for(&searcher, |report| report.pid.is_some());
    drop(searcher);
    wait_for(&start(), |report| report.pid.is_some());
}

#[test]
fn what_cannot_be_started_is_a_crash_with_its_reason() {
    let command =
        WorkerCommand { program: "/nowhere/fastaa-loaderd".into(), args: vec![], env: vec![] };
    let searcher = searcher_with(command, StartWhen::AtOnce, Backoff::new(HOUR, HOUR), None);
    let report = wait_for_state(&searcher, "backing-off");
    assert!(report.reason.contains("/nowhere/fastaa-loaderd cannot be started"), "{report:?}");
}

#[test]
fn pause_really_stops_the_worker_and_a_paused_one_still_dies() {
    let dir = tempfile::tempdir().unwrap();
    let child = dir.path().join("child");
    // The worker has a child of its own, which must not outlive it.
    let script = format!("sleep 1000 & echo $! > {}; wait", child.display());
    let searcher = searcher(&script);
    let pid = wait_for(&searcher, |report| report.pid.is_some()).pid.unwrap();
    wait_for(&searcher, |_| n_lines(&child) == 1);
    let child: u32 = std::fs::read_to_string(&child).unwrap().trim().parse().unwrap();
    for _ in 0..2 {
        searcher.pause().unwrap();
        searcher.pause().unwrap();
        wait_for_process(pid, |state| state == Some('T'));
        wait_for_process(child, |state| state == Some('T'));
        assert_eq!(searcher.report().state, "paused");
        searcher.resume().unwrap();
        wait_for_process(pid, |state| state == Some('S'));
        searcher.resume().unwrap();
    }
    searcher.pause().unwrap();
    wait_for_process(pid, |state| state == Some('T'));
    searcher.stop();
    assert_eq!(process_state(pid), None);
    // Its parent is gone: whoever adopts it reaps it, or nobody does.
    wait_for_process(child, |state| matches!(state, None | Some('Z')));
}

#[test]
fn a_paused_worker_that_is_killed_starts_anew_when_resumed() {
    let searcher = searcher_that(StartWhen::AtOnce, SLEEP, Backoff::new(MOMENT, MOMENT));
    let pid = wait_for(&searcher, |report| report.pid.is_some()).pid.unwrap();
    searcher.pause().unwrap();
    let victim = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();
    let report = wait_for(&searcher, |report| report.pid.is_none());
    assert_eq!(report.state, "paused");
    assert!(report.reason.contains("signal 9") && report.reason.contains("resumed"), "{report:?}");
    searcher.resume().unwrap();
    let report = wait_for(&searcher, |report| report.pid.is_some());
    assert_eq!((report.state.as_str(), report.restarts), ("starting", 1));
}

#[test]
fn garbage_is_counted_and_survived() {
    // No text, an endless line, JSON that is no event; then an event.
    let script = r#"
        head -c 100000 /dev/urandom | tr '\n' ' '; echo
        head -c 3000000 /dev/zero | tr '\0' x; echo
        echo '{"event": "unheard-of"}'; echo '[]'; echo
        echo '{"event": "progress", "stage": "gate", "new_field": 1}'
        exec sleep 1000"#;
    let searcher = searcher(script);
    let report = wait_for_state(&searcher, "running");
    // The long lines are counted by pieces of 64 KiB.
    assert_eq!(report.bad_lines, 100_000 / 65_536 + 3_000_000 / 65_536 + 3);
    assert_eq!(report.progress.unwrap().stage, "gate");
}

#[test]
fn a_worker_that_writes_nothing_but_garbage_is_ended() {
    let searcher = searcher("exec yes garbage");
    searcher.report();
    let report = wait_for_state(&searcher, "backing-off");
    assert!(report.reason.contains("it wrote no events"), "{report:?}");
    assert!(report.bad_lines > 1000);
}

#[test]
fn a_daemon_that_does_not_search_says_why() {
    let host = Host::new("");
    let daemon = host.start();
    let (code, stdout, stderr) = host.ctl(&["search", "status"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("disabled (search.enabled is false in the configuration)"), "{stdout}");
    let (code, _, stderr) = host.ctl(&["search", "run"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("does not search: search.enabled is false"), "{stderr}");
    let (code, stdout, _) = host.ctl(&["--json", "status"]);
    assert_eq!(code, 0);
    let status: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(status["search"]["state"], "disabled");
    assert_eq!(daemon.stop(), 0);
}

// --- with the real daemon ---

fn control(host: &Host) -> ControlClient {
    ControlClient::connect(&RuntimePaths::new(host.path("run")).unwrap()).unwrap()
}

/// Publishes a policy that differs by its magnitude, as the search or as a person would.
fn publish(host: &Host, magnitude: f64, source: &str) -> u64 {
    let request = Request::PolicyPublish {
        dataset: None,
        policy: json!([[["Solarize", 1.0, magnitude]]]),
        evidence: json!({ "source": source }),
    };
    match control(host).call(&request).unwrap() {
        Reply::PolicyPublished(report) => report.version,
        other => panic!("{other:?}"),
    }
}

#[test]
fn versions_of_the_search_reach_a_run_slowly_and_a_person_s_at_once() {
    let host = Host::new("min_epochs_between = 3\nfreeze_last = 0.2");
    let daemon = host.start();
    let recipe = r#"{"dtype": "u8", "total_epochs": 10}"#;
    let mut run = request(500, recipe);
    run.group = "slow".to_owned();
    let mut client = host.connect(run.clone()).unwrap();
    let policy_of = |client: &mut _, epoch| read_epoch(client, epoch).begin.policy;
    assert_eq!(policy_of(&mut client, 0), "none");
    publish(&host, 0.1, "search");
    assert_eq!(policy_of(&mut client, 1), "digits@1");
    publish(&host, 0.2, "search");
    assert_eq!(policy_of(&mut client, 2), "digits@1");
    // The rule holds over a restart: the run has a name.
    drop(client);
    daemon.kill();
    let _daemon = host.start();
    let mut client = host.connect(run).unwrap();
    assert_eq!(policy_of(&mut client, 3), "digits@1");
    assert_eq!(policy_of(&mut client, 4), "digits@2");
    publish(&host, 0.3, "search");
    publish(&host, 0.4, "a person");
    assert_eq!(policy_of(&mut client, 5), "digits@4");
    let (code, _, stderr) = host.ctl(&["policy", "rollback"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(policy_of(&mut client, 6), "digits@3", "by a person, although the search made it");
    publish(&host, 0.5, "search");
    assert_eq!(policy_of(&mut client, 7), "digits@3");
    // The last two of ten epochs are frozen; another run is not.
    assert_eq!(policy_of(&mut client, 9), "digits@3");
    let mut fresh = host.connect(request(500, r#"{"dtype": "u8"}"#)).unwrap();
    assert_eq!(policy_of(&mut fresh, 9), "digits@5");
}

/// Reports values of a run's epochs under one policy; gives the last answer.
fn report(host: &Host, epochs: std::ops::Range<u64>, policy: &str, value: f64) -> MetricReport {
    let mut last = MetricReport::default();
    for epoch in epochs {
        let request = Request::ReportMetric {
            dataset: "digits".to_owned(),
            run: "r".to_owned(),
            epoch,
            policy: policy.to_owned(),
            // Some noise.
            value: value + if epoch % 2 == 0 { 0.001 } else { 0.0 },
        };
        match control(host).call(&request).unwrap() {
            Reply::Metric(report) => last = report,
            other => panic!("{other:?}"),
        }
    }
    last
}

fn active(host: &Host) -> u64 {
    let (_, stdout, _) = host.ctl(&["--json", "policy", "list"]);
    let lineages: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    lineages[0]["active_version"].as_u64().unwrap()
}

#[test]
fn a_version_of_the_search_that_makes_a_run_worse_is_taken_back() {
    let host = Host::new("");
    let daemon = host.start();
    publish(&host, 0.1, "a person");
    report(&host, 0..4, "digits@1", 0.8);
    // A person's version is not touched, however bad it is.
    publish(&host, 0.2, "a person");
    assert_eq!(report(&host, 4..8, "digits@2", 0.7).rolled_back, None);
    publish(&host, 0.3, "search");
    assert_eq!(report(&host, 8..11, "digits@3", 0.75).rolled_back, None, "it is better");
    publish(&host, 0.4, "search");
    assert_eq!(report(&host, 11..12, "digits@4", 0.5).rolled_back, None, "once is chance");
    assert_eq!(active(&host), 4);
    let answer = report(&host, 12..13, "digits@4", 0.5);
    assert_eq!(answer.rolled_back.as_deref(), Some("digits@4"));
    assert_eq!((answer.active_version, active(&host)), (Some(3), 3));
    daemon.wait_for_log("digits@4 was taken back, digits@3 is active");
    let (_, stdout, _) = host.ctl(&["search", "status"]);
    assert!(stdout.contains("the metric of run 'r' fell from"), "{stdout}");
    // Said again, it takes nothing more back.
    assert_eq!(report(&host, 13..14, "digits@4", 0.5).rolled_back, None);
    assert_eq!(active(&host), 3);
}

#[test]
fn nothing_is_taken_back_if_the_configuration_says_so_and_bad_reports_are_refused() {
    let host = Host::new("auto_rollback = false");
    let _daemon = host.start();
    publish(&host, 0.1, "search");
    report(&host, 0..4, "none", 0.8);
    assert_eq!(report(&host, 4..8, "digits@1", 0.1).rolled_back, None);
    assert_eq!(active(&host), 1);
    for (dataset, run, epoch) in [("digit", "r", 0), ("digits", "", 0), ("digits", "r", u64::MAX)] {
        let request = Request::ReportMetric {
            dataset: dataset.to_owned(),
            run: run.to_owned(),
            epoch,
            policy: "none".to_owned(),
            value: 0.5,
        };
        assert!(control(&host).call(&request).is_err(), "{request:?}");
    }
}
