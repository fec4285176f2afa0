//! A real daemon in a folder of its own, and real data for it.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use fastaa::transport::client::{ClientBatch, ClientError, ClientEvent, StreamClient};
use fastaa::transport::wire::{EpochBegin, GroupMode, StreamRequest};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine; reaching it is a failure.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);
/// Log lines that may wait for their reader.
const LOG_LINES_MAX: usize = 10_000;

/// A folder with a dataset and a configuration; daemons come and go in it.
pub(crate) struct Host {
    pub(crate) dir: TempDir,
}

/// A running daemon; dropping it kills it.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) log: Receiver<String>,
}

/// Shape and size of the synthetic dataset.
pub(crate) const N_SAMPLES: usize = 1000;
pub(crate) const SIDE: usize = 12;

impl Host {
    /// A host whose configuration has these extra lines.
    pub(crate) fn new(extra_toml: &str) -> Self {
        // In /tmp, because a Unix socket's path has little room.
        let dir = tempfile::Builder::new().prefix("fa").tempdir_in("/tmp").expect("a folder");
        write_idx(dir.path(), "train", N_SAMPLES);
        write_idx(dir.path(), "t10k", N_SAMPLES / 5);
        let host = Self { dir };
        host.configure(extra_toml);
        host
    }

    /// Writes the configuration anew.
    pub(crate) fn configure(&self, extra_toml: &str) {
        let text = format!(
            "runtime_dir = \"run\"\nstate_dir = \"state\"\n[[dataset]]\nname = \"digits\"\n\
             path = \".\"\n[search]\nenabled = false\n{extra_toml}\n"
        );
        fs::write(self.config(), text).expect("writes the configuration");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.path("c.toml")
    }

    pub(crate) fn hello_socket(&self) -> PathBuf {
        self.path("run/hello.sock")
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastaa-loaderd"));
        command.arg("--config").arg(self.config());
        command
    }

    /// Starts a daemon and waits until it is ready.
    pub(crate) fn start(&self) -> Daemon {
        let mut child = self.command().stderr(Stdio::piped()).spawn().expect("the daemon starts");
        let stderr = child.stderr.take().expect("stderr is piped");
        let (sender, log) = sync_channel(LOG_LINES_MAX);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // A full queue or a gone reader only means that nobody looks at the log.
                let _ = sender.try_send(line);
            }
        });
        let daemon = Daemon { child, log };
        daemon.wait_for_log(" ready");
        daemon
    }

    /// Runs a daemon that must refuse to start: its exit code and stderr.
    pub(crate) fn start_refused(&self) -> (i32, String) {
        let output = self.command().output().expect("the daemon starts");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().expect("an exit code"), stderr)
    }

    /// `fastaa-ctl` with this host's runtime folder: exit code, stdout, stderr.
    pub(crate) fn ctl(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_fastaa-ctl"))
            .arg("--runtime-dir")
            .arg(self.path("run"))
            .args(args)
            .output()
            .expect("fastaa-ctl starts");
        (
            output.status.code().expect("an exit code"),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    pub(crate) fn connect(&self, request: StreamRequest) -> Result<StreamClient, ClientError> {
        StreamClient::connect(&self.hello_socket(), request)
    }
}

impl Daemon {
    /// Waits for a log line that contains `text`, and gives it.
    pub(crate) fn wait_for_log(&self, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.log.recv_timeout(WAIT_MAX) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("no {text:?} in the log ({error}):\n{}", seen.join("\n")),
            }
        }
    }

    /// SIGTERM, then waits for the end; gives the exit code.
    pub(crate) fn stop(mut self) -> i32 {
        self.signal(rustix::process::Signal::TERM);
        self.child.wait().expect("ends").code().expect("an exit code")
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().expect("is killed");
        self.child.wait().expect("ends");
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("is signalled");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The byte of a synthetic image: no two images are equal.
pub(crate) fn pixel(sample_idx: usize, at: usize) -> u8 {
    u8::try_from((sample_idx * 31 + at * 7 + (sample_idx / 256) * (at % 5)) % 256).expect("a byte")
}

pub(crate) fn label(sample_idx: usize) -> u8 {
    u8::try_from(sample_idx % 10).expect("a digit")
}

/// Writes `<prefix>-images-idx3-ubyte` and its labels.
pub(crate) fn write_idx(dir: &Path, prefix: &str, n_samples: usize) {
    let number = |value: usize| u32::try_from(value).expect("small").to_be_bytes();
    let create = |name: String| fs::File::create(dir.join(name)).expect("creates a file");
    let mut images = create(format!("{prefix}-images-idx3-ubyte"));
    images.write_all(&[0, 0, 8, 3]).expect("writes");
    for value in [n_samples, SIDE, SIDE] {
        images.write_all(&number(value)).expect("writes");
    }
    let mut labels = create(format!("{prefix}-labels-idx1-ubyte"));
    labels.write_all(&[0, 0, 8, 1]).expect("writes");
    labels.write_all(&number(n_samples)).expect("writes");
    for sample_idx in 0..n_samples {
        let image: Vec<u8> = (0..SIDE * SIDE).map(|at| pixel(sample_idx, at)).collect();
        images.write_all(&image).expect("writes");
        labels.write_all(&[label(sample_idx)]).expect("writes");
    }
}

/// A subscription to the synthetic dataset with these recipe keys.
pub(crate) fn request(batch_size: u32, recipe_json: &str) -> StreamRequest {
    StreamRequest {
        dataset: "digits".to_owned(),
        split: "train".to_owned(),
        batch_size,
        seed: 7,
        rank: 0,
        world_size: 1,
        drop_last: false,
        shuffle: true,
        group: String::new(),
        mode: GroupMode::Shard,
        recipe_json: recipe_json.to_owned(),
        n_slots: 0,
        replay: false,
        gpu: None,
    }
}

/// Everything of one epoch.
pub(crate) struct Epoch {
    pub(crate) begin: EpochBegin,
    pub(crate) pixels: Vec<u8>,
    pub(crate) labels: Vec<u8>,
    pub(crate) indices: Vec<u64>,
}

/// Reads an epoch to its end.
pub(crate) fn read_epoch(client: &mut StreamClient, epoch: u64) -> Epoch {
    client.start(epoch, 0, "").expect("starts");
    let ClientEvent::Begin(begin) = client.next_event().expect("an event") else {
        panic!("an epoch begins with its policy")
    };
    let mut read = Epoch { begin, pixels: vec![], labels: vec![], indices: vec![] };
    while let Some(batch) = next_batch(client) {
        assert_eq!(batch.descriptor.policy_id, read.begin.policy_id, "one policy per epoch");
        read.pixels.extend_from_slice(batch.pixels());
        read.labels.extend_from_slice(batch.labels());
        read.indices.extend(batch.indices());
    }
    read
}

/// The next batch, or `None` at the epoch's end.
pub(crate) fn next_batch(client: &mut StreamClient) -> Option<ClientBatch> {
    match client.next_event().expect("an event") {
        ClientEvent::Batch(batch) => Some(batch),
        ClientEvent::End => None,
        ClientEvent::Begin(begin) => panic!("unexpected {begin:?}"),
    }
}
