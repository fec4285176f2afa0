//! A control server in this process, over a real socket and a real policy store.

#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses a part")]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;

use fastaa::control::{
    ControlClient, ControlFailure, ControlServer, DaemonReport, DatasetReport, FailureCode,
    Handler, Reply, Request, RuntimePaths, ServerOptions, StatusReport, StreamReport,
    handle_policy, policy_reports,
};
use fastaa::daemon::searcher::Searcher;
use fastaa::policy::PolicyStore;
use tokio::sync::watch;

pub(crate) struct TestHandler {
    pub(crate) store: PolicyStore,
    pub(crate) datasets: Vec<String>,
    pub(crate) searcher: Option<Searcher>,
}

impl TestHandler {
    fn streams() -> Vec<StreamReport> {
        vec![StreamReport {
            session: 3,
            dataset: "mnist".to_owned(),
            split: "train".to_owned(),
            client: "python 0.1.0".to_owned(),
            pid: Some(77),
            transport: "local".to_owned(),
            world_size: 2,
            batch_size: 256,
            n_slots: 4,
            leased_slots: 1,
            policy: "mnist@1".to_owned(),
            images_per_second: 1234.4,
            ..StreamReport::default()
        }]
    }

    fn search(
        &self,
        wish: impl FnOnce(&Searcher) -> Result<(), ControlFailure>,
    ) -> Result<Reply, ControlFailure> {
        let searcher = self.searcher.as_ref().expect("this test has a searcher");
        wish(searcher).map(|()| Reply::Search(searcher.report()))
    }

    fn datasets(&self) -> Vec<DatasetReport> {
        let report = |name: &String| DatasetReport {
            name: name.clone(),
            split: "train".to_owned(),
            format: "arrow".to_owned(),
            n_samples: 60_000,
            shape: Some([28, 28, 1]),
            label_kind: "class".to_owned(),
            n_classes: 10,
            ..DatasetReport::default()
        };
        self.datasets.iter().map(report).collect()
    }
}

impl Handler for TestHandler {
    fn handle(&self, request: Request) -> Result<Reply, ControlFailure> {
        match request {
            Request::Status => Ok(Reply::Status(StatusReport {
                daemon: DaemonReport {
                    version: "9.9.9".to_owned(),
                    pid: std::process::id(),
                    uptime_seconds: 61.5,
                    threads: 2,
                    http: Some("127.0.0.1:9464".to_owned()),
                    ..DaemonReport::default()
                },
                datasets: self.datasets(),
                streams: Self::streams(),
                policies: policy_reports(&self.store, &self.datasets),
                counters: [("batches".to_owned(), 12)].into(),
                search: self.searcher.as_ref().map(Searcher::report).unwrap_or_default(),
            })),
            Request::StreamList => Ok(Reply::Streams { streams: Self::streams() }),
            Request::DatasetList => Ok(Reply::Datasets { datasets: self.datasets() }),
            Request::ExpectedDigest { dataset, .. } if dataset == "panic" => {
                panic!("a handler that fails")
            }
            Request::ExpectedDigest { .. } => {
                Err(ControlFailure::new(FailureCode::NotFound, "no such dataset"))
            }
            Request::SearchReport => Ok(Reply::SearchHtml { html: "<p>report</p>\n".to_owned() }),
            Request::SearchStatus => self.search(|_| Ok(())),
            Request::SearchPause => self.search(Searcher::pause),
            Request::SearchResume => self.search(Searcher::resume),
            Request::SearchRun => self.search(Searcher::run),
            other => handle_policy(&self.store, &self.datasets, other),
        }
    }
}

/// Serves until dropped.
pub(crate) struct TestServer {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) paths: RuntimePaths,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    pub(crate) fn start(datasets: &[&str], options: ServerOptions) -> Self {
        Self::start_with(datasets, options, None)
    }

    /// With a search worker.
    pub(crate) fn start_with(
        datasets: &[&str],
        options: ServerOptions,
        searcher: Option<Searcher>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = RuntimePaths::new(dir.path()).unwrap();
        let handler: Arc<dyn Handler> = Arc::new(TestHandler {
            store: PolicyStore::open(dir.path().join("policies")).unwrap(),
            datasets: datasets.iter().map(|name| (*name).to_owned()).collect(),
            searcher,
        });
        let server = ControlServer::bind(&paths.control_socket(), options).unwrap();
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(server.run(handler, stopped)).unwrap();
        });
        Self { dir, paths, stop, thread: Some(thread) }
    }

    pub(crate) fn client(&self) -> ControlClient {
        ControlClient::connect(&self.paths).unwrap()
    }

    /// Stops the server and waits for its end.
    pub(crate) fn stop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Runs `fastaa-ctl` against this server.
    pub(crate) fn ctl(&self, args: &[&str]) -> Ran {
        ctl(self.paths.dir(), args)
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// Its output, if it was successful and said nothing on stderr.
    pub(crate) fn good(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self.stdout
    }

    /// Its JSON output.
    pub(crate) fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.good()).unwrap()
    }

    pub(crate) fn check_failed(&self, code: i32, expected: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{self:?}");
        for expected in expected {
            assert!(self.stderr.contains(expected), "'{}' lacks '{expected}'", self.stderr);
        }
    }
}

pub(crate) fn ctl(runtime_dir: &Path, args: &[&str]) -> Ran {
    Command::new(env!("CARGO_BIN_EXE_fastaa-ctl"))
        .arg("--runtime-dir")
        .arg(runtime_dir)
        .args(args)
        .output()
        .unwrap()
        .into()
}
