//! The search with real models: killed and resumed, beside a stream, and what it refuses.

#![cfg(feature = "torch")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use fastaa::random::mix64;
use serde_json::Value;
use support::{Host, read_epoch, request};

const SIDE: usize = 12;
const N_CLASSES: usize = 4;
/// Everything small: a round takes seconds.
const QUICK: &str = "\
    [search]\nenabled = false\nfolds = 2\nreduced = 0\nfold_epochs = 2\ngate_epochs = 1\n\
    gate_seeds = 2\ngate_images = 60\nrounds = 1\nthreads = 2\n";

/// IDX files of noise with one bright quarter, which is the class.
fn write_quarters(dir: &Path, n_samples: usize, class_of: impl Fn(usize) -> usize) {
    let number = |value: usize| u32::try_from(value).expect("small").to_be_bytes();
    let mut images = vec![0, 0, 8, 3];
    for value in [n_samples, SIDE, SIDE] {
        images.extend(number(value));
    }
    let mut labels = vec![0, 0, 8, 1];
    labels.extend(number(n_samples));
    for sample_idx in 0..n_samples {
        let class = class_of(sample_idx);
        for at in 0..SIDE * SIDE {
            let (row, column) = (at / SIDE, at % SIDE);
            let quarter = 2 * (row / (SIDE / 2)) + column / (SIDE / 2);
            let noise = mix64((sample_idx * SIDE * SIDE + at) as u64) % 150;
            let bright = if quarter == class % 4 { 60 } else { 0 };
            images.push(u8::try_from(noise + bright).expect("small"));
        }
        labels.push(u8::try_from(class).expect("small"));
    }
    fs::write(dir.join("train-images-idx3-ubyte"), images).expect("writes");
    fs::write(dir.join("train-labels-idx1-ubyte"), labels).expect("writes");
}

/// A folder with a dataset of 240 samples and a configuration.
struct Search {
    dir: tempfile::TempDir,
}

impl Search {
    fn new() -> Self {
        Self::with(240, |sample_idx| sample_idx % N_CLASSES, "", QUICK)
    }

    fn with(
        n_samples: usize,
        class_of: impl Fn(usize) -> usize,
        top: &str,
        sections: &str,
    ) -> Self {
        let dir = tempfile::Builder::new().prefix("fs").tempdir_in("/tmp").expect("a folder");
        fs::create_dir(dir.path().join("data")).expect("makes a folder");
        write_quarters(&dir.path().join("data"), n_samples, class_of);
        let search = Self { dir };
        search.configure(top, sections);
        search
    }

    fn configure(&self, top: &str, sections: &str) {
        let state = if top.contains("state_dir") { "" } else { "state_dir = \"state\"\n" };
        let stream = if sections.contains("[stream.defaults]") {
            ""
        } else {
            "[stream.defaults]\ncrop = { kind = \"pad\", size = 12, pad = 1 }\n\
             normalize = { mean = [0.3], std = [0.2] }\n"
        };
        let text = format!(
            "runtime_dir = \"run\"\n{state}{top}[[dataset]]\nname = \"quarters\"\npath = \"data\"\n\
             {stream}{sections}"
        );
        fs::write(self.dir.path().join("c.toml"), text).expect("writes");
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastaa-loaderd"));
        command
            .args(["search-worker", "--offline", "--config"])
            .arg(self.dir.path().join("c.toml"));
        command
    }

    fn spawn(&self) -> Child {
        let mut command = self.command();
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("the worker starts")
    }

    fn run(&self) -> Output {
        self.command().output().expect("the worker starts")
    }

    /// Runs a search that must fail for good: the message of its last event.
    fn refused(&self) -> String {
        let output = self.run();
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{stdout}{stderr}");
        let last: Value =
            serde_json::from_str(stdout.lines().last().expect("an event")).expect("JSON");
        assert_eq!(last["event"], "failed", "{last}");
        last["message"].as_str().expect("a message").to_owned()
    }

    fn journal(&self) -> PathBuf {
        let searches = self.dir.path().join("state/search/quarters");
        let mut found: Vec<PathBuf> = fs::read_dir(searches)
            .expect("a search")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0).join("journal")
    }

    /// Every unit's value by key, without what it cost.
    fn results(&self) -> BTreeMap<String, Value> {
        let text = fs::read_to_string(self.journal()).expect("reads");
        let record = |line: &str| -> Value {
            let mut line: Value = serde_json::from_str(line).expect("a line is JSON");
            line["record"].take()
        };
        text.lines()
            .skip(1)
            .map(record)
            .map(|mut record| {
                let key = record["key"].as_str().expect("a key").to_owned();
                let mut value = record["value"].take();
                if key.starts_with("round/") {
                    let round = value.as_object_mut().expect("a round");
                    round.remove("costs");
                    round.remove("paper_cost");
                }
                if key.starts_with("fold/") {
                    // The mean over the last attempt, for the report only.
                    value.as_object_mut().expect("a fold").remove("train_loss");
                }
                (key, value)
            })
            .collect()
    }
}

#[test]
fn a_search_killed_twenty_times_ends_like_an_undisturbed_one() {
    let (whole, cut) = (Search::new(), Search::new());
    let began = std::time::Instant::now();
    let output = whole.run();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let undisturbed = began.elapsed();
    let mut n_killed = 0;
    while n_killed < 20 {
        let mut child = cut.spawn();
        // Between a tenth and a half of what a whole search takes; a start alone takes longer than
        // the shortest.
        let share = 0.1 + 0.4 * (mix64(n_killed) % 1000) as f64 / 1000.0;
        if wait(&mut child, undisturbed.mul_f64(share)) {
            break;
        }
        child.kill().expect("is killed");
        child.wait().expect("ends");
        n_killed += 1;
    }
    let output = cut.run();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(n_killed >= 3, "it ended after {n_killed} kills: nothing was cut");
    let (expected, found) = (whole.results(), cut.results());
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (key, value) in &expected {
        assert_eq!(value, &found[key], "unit '{key}'");
    }
}

/// Waits for the end of a process, at most so long; whether it ended.
fn wait(child: &mut Child, limit: Duration) -> bool {
    let end = std::time::Instant::now() + limit;
    while std::time::Instant::now() < end {
        if child.try_wait().expect("can be asked").is_some() {
            return true;
        }
        #[allow(clippy::disallowed_methods, reason = "a random moment is what is waited for")]
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn threads_and_algorithms() {
    let (one, two) = (Search::new(), Search::new());
    one.configure("", &QUICK.replace("threads = 2", "threads = 1"));
    assert!(one.run().status.success());
    assert!(two.run().status.success());
    let differing: Vec<String> = one
        .results()
        .into_iter()
        .filter(|(key, value)| two.results().get(key) != Some(value))
        .map(|(key, _)| key)
        .collect();
    assert_eq!(differing, [""; 0], "the result depends on the number of threads");
    let structured = Search::new();
    structured.configure("", &QUICK.replace("folds = 2", "folds = 2\nalgorithm = \"structured\""));
    let output = structured.run();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let round = &structured.results()["round/1"];
    assert!(!round["candidate"]["sub_policies"].as_array().expect("a policy").is_empty());
}

#[test]
fn datasets_that_cannot_be_searched_are_refused_in_words() {
    let tiny = Search::with(7, |sample_idx| sample_idx % 4, "", QUICK);
    let message = tiny.refused();
    assert!(
        message.contains("class 0 has 2 samples") && message.contains("too few for 2 folds"),
        "{message}"
    );
    let one_class = Search::with(40, |_| 0, "", QUICK);
    let message = one_class.refused();
    assert!(message.contains("the train split has 1 class(es)"), "{message}");
    let reduced = Search::new();
    reduced.configure("", &QUICK.replace("reduced = 0", "reduced = 5000"));
    assert!(reduced.refused().contains("search.reduced = 5000"));
}

#[test]
fn a_model_that_does_not_fit_is_refused_in_words() {
    let large = Search::new();
    let stream = "[stream.defaults]\ncrop = { kind = \"pad\", size = 8000, pad = 4000 }\n";
    large.configure(
        "",
        &format!("{stream}{}", QUICK.replace("folds", "model = \"wrn-28-10\"\nfolds")),
    );
    let message = large.refused();
    assert!(message.contains("memory"), "{message}");
    let script = Search::new();
    fs::write(script.dir.path().join("m.pt"), b"no module").expect("writes");
    script.configure("", &QUICK.replace("folds", "model = \"m.pt\"\nfolds"));
    let message = script.refused();
    assert!(message.contains("m.pt"), "{message}");
}

#[test]
fn a_torchscript_module_is_trained_and_one_of_another_output_size_refused() {
    let python = std::env::var("FASTAA_PYTHON").unwrap_or_else(|_| ".venv/bin/python".to_owned());
    let make = |path: &Path, n_out: usize, scale: &str| {
        let code = "import sys, torch\nfrom torch import nn\n\
             class Scaled(nn.Module):\n\
             \x20   def __init__(self, n_out: int, scale: float):\n\
             \x20       super().__init__()\n\
             \x20       self.net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), \
             nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n_out))\n\
             \x20       self.scale = scale\n\
             \x20   def forward(self, x):\n\
             \x20       return self.net(x) * self.scale\n\
             torch.manual_seed(0)\n\
             net = Scaled(int(sys.argv[2]), float(sys.argv[3]))\n\
             torch.jit.script(net).save(sys.argv[1])";
        let mut command = Command::new(&python);
        let made = command.args(["-c", code]).arg(path).args([&n_out.to_string(), scale]).status();
        made.is_ok_and(|status| status.success())
    };
    let search = Search::new();
    let path = search.dir.path().join("net.pt");
    if !make(&path, 7, "1") {
        eprintln!("SKIPPED: {python} with torch is not at hand");
        return;
    }
    search.configure("", &QUICK.replace("folds", "model = \"net.pt\"\nfolds"));
    let message = search.refused();
    assert!(
        message.contains("net.pt") && message.contains('7') && message.contains('4'),
        "{message}"
    );
    assert!(make(&path, 4, "nan"));
    let message = search.refused();
    assert!(message.contains("is not finite"), "{message}");
    assert!(make(&path, 4, "1e38"));
    let message = search.refused();
    assert!(message.contains("the model of fold 1: the loss became"), "{message}");
    assert!(make(&path, 4, "1"));
    let output = search.run();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{stdout}");
    assert!(!stdout.contains("trained again"), "its models were found again: {stdout}");
}

#[test]
fn journals_are_kept_refused_and_cut() {
    let search = Search::new();
    assert!(search.run().status.success());
    let path = search.journal();
    let good = fs::read_to_string(&path).expect("reads");
    // The same data, written anew, are the same dataset.
    write_quarters(&search.dir.path().join("data"), 240, |sample_idx| sample_idx % N_CLASSES);
    assert!(search.run().status.success());
    assert_eq!(fs::read_to_string(&path).expect("reads"), good);
    // Half a line at the end: cut, told, and computed again.
    fs::write(&path, format!("{good}{{\"crc\":\"0000")).expect("writes");
    let output = search.run();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && stdout.contains("was cut off"), "{stdout}");
    assert_eq!(fs::read_to_string(&path).expect("reads"), good);
    // Damage in the middle, another version: refused, kept.
    for (from, to, expected) in
        [("\"n\":3,", "\"n\":4,", "is damaged"), ("\"version\":1", "\"version\":9", "")]
    {
        let bad = good.replacen(from, to, 1);
        fs::write(&path, &bad).expect("writes");
        let message = search.refused();
        assert!(message.contains(expected) && message.contains("kept"), "{message}");
        assert_eq!(fs::read_to_string(&path).expect("reads"), bad);
    }
    // Another dataset under the same name and settings.
    fs::write(&path, &good).expect("writes");
    write_quarters(&search.dir.path().join("data"), 244, |sample_idx| sample_idx % N_CLASSES);
    let message = search.refused();
    assert!(message.contains("its dataset is") && message.contains("move it away"), "{message}");
    assert_eq!(fs::read_to_string(&path).expect("reads"), good);
}

#[test]
fn a_report_of_another_search_says_so() {
    let search = Search::new();
    assert!(search.run().status.success());
    let report = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastaa-loaderd"));
        command.arg("search-worker").arg("--config").arg(search.dir.path().join("c.toml"));
        command.arg("--report").arg(search.dir.path().join("r.html"));
        let output = command.output().expect("the worker starts");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert_eq!(report(), "");
    write_quarters(&search.dir.path().join("data"), 240, |sample_idx| sample_idx / 60);
    assert!(report().contains("the report is of other data"), "{}", report());
    search.configure("", &QUICK.replace("gate_seeds = 2", "gate_seeds = 3"));
    assert!(report().contains("a search with other settings"), "{}", report());
}

#[test]
fn an_unwritable_state_folder_is_named() {
    let search = Search::new();
    fs::write(search.dir.path().join("state"), b"a file").expect("writes");
    let output = search.run();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(stdout.contains("state/") && stdout.contains("state_dir"), "{stdout}");
}

/// With a daemon: it runs the search beside a stream, survives the worker's death, and shows all.
#[test]
fn a_daemon_searches_beside_its_streams() {
    let host = Host::new("");
    let text = fs::read_to_string(host.config()).expect("reads");
    // Beside other tests no processor is idle.
    let quick =
        QUICK.replace("enabled = false", "enabled = true") + "[idle]\npolicy = \"always\"\n";
    fs::write(host.config(), text.replace("[search]\nenabled = false\n", &quick)).expect("writes");
    let daemon = host.start();
    let mut client = host.connect(request(32, "{}")).expect("connects");
    let before = read_epoch(&mut client, 0);
    let running = wait_for_search(&host, |status| status["pid"].is_u64());
    let pid = i32::try_from(running["pid"].as_u64().expect("a pid")).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("above zero");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("is killed");
    let again = read_epoch(&mut client, 1);
    assert_eq!(before.indices.len(), again.indices.len());
    let ended = wait_for_search(&host, |status| status["state"] == "finished");
    assert!(ended["restarts"].as_u64().is_some_and(|n| n >= 1), "{ended}");
    assert_eq!(ended["rounds"].as_array().map(Vec::len), Some(1), "{ended}");
    let (code, page, _) = host.ctl(&["search", "report", "-o", "-"]);
    assert!(code == 0 && page.contains("<svg") && page.contains("What the gate saw"), "{code}");
    assert_eq!(daemon.stop(), 0);
}

/// The end of the day's budget is told: it looks like a hang otherwise.
#[test]
fn a_search_that_is_out_of_budget_says_so() {
    let host = Host::new("");
    let text = fs::read_to_string(host.config()).expect("reads");
    let quick = QUICK
        .replace("enabled = false", "enabled = true\nbudget_seconds = 1")
        .replace("fold_epochs = 2", "fold_epochs = 60")
        + "[idle]\npolicy = \"always\"\n";
    fs::write(host.config(), text.replace("[search]\nenabled = false\n", &quick)).expect("writes");
    let daemon = host.start();
    let status = wait_for_search(&host, |status| status["state"] == "out-of-budget");
    let reason = status["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("goes on tomorrow"), "{status}");
    assert_eq!(daemon.stop(), 0);
}

/// Asks until the search is as wanted.
fn wait_for_search(host: &Host, is_wanted: impl Fn(&Value) -> bool) -> Value {
    let end = std::time::Instant::now() + support::WAIT_MAX;
    loop {
        let (code, stdout, stderr) = host.ctl(&["--json", "search", "status"]);
        assert_eq!(code, 0, "{stderr}");
        let status: Value = serde_json::from_str(&stdout).expect("JSON");
        if is_wanted(&status) {
            return status;
        }
        assert!(std::time::Instant::now() < end, "{status}");
        #[allow(clippy::disallowed_methods, reason = "the daemon tells only who asks")]
        std::thread::sleep(Duration::from_millis(20));
    }
}
