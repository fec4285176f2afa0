//! The search worker's process: start, output, signals, end.
//!
//! Owns one child and its process group. Never decides when (`searcher` does), and waits for
//! nothing but the kernel's end of a killed process, for some seconds at most.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tracing::{debug, warn};

use super::search_state::Lines;

/// How long the kernel may take to end a killed worker.
const KILL_WAIT_MAX: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 64 * 1024;

/// What to run as the worker.
#[derive(Clone, Debug)]
pub struct WorkerCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables of its environment, beside the daemon's.
    pub env: Vec<(OsString, OsString)>,
}

/// What a look at the worker's output gave.
pub(super) enum Output {
    /// Some bytes.
    Bytes(Vec<u8>),
    /// Nothing now, or for ever.
    Nothing,
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A worker's life.
pub(super) struct Worker {
    child: Child,
    pid: Pid,
    /// Readable when the process has ended; `None` where the kernel has none.
    pub(super) pidfd: Option<OwnedFd>,
    /// `None` when the worker closed it.
    pub(super) output: Option<ChildStdout>,
    pub(super) lines: Lines,
    /// What the worker's last event or the supervisor said of its failure.
    pub(super) failure: Option<String>,
    pub(super) n_bad_lines: u64,
}

impl Worker {
    /// Starts it, with `gpu` as the one that CUDA shows to it.
    pub(super) fn start(command: &WorkerCommand, gpu: Option<&str>) -> io::Result<Self> {
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .envs(command.env.iter().map(|(name, value)| (name, value)))
            .envs(gpu.map(|gpu| ("CUDA_VISIBLE_DEVICES", gpu)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let pid = Pid::from_child(&child);
        let output = child.stdout.take();
        let worker = Self {
            pid,
            pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok(),
            output,
            child,
            lines: Lines::default(),
            failure: None,
            n_bad_lines: 0,
        };
        if let Some(Err(error)) =
            worker.output.as_ref().map(|output| rustix::io::ioctl_fionbio(output, true))
        {
            worker.kill();
            return Err(error.into());
        }
        Ok(worker)
    }

    /// To the worker and its children. It is not reaped yet, so its number is still its own.
    pub(super) fn signal(&self, signal: Signal) {
        if let Err(error) = rustix::process::kill_process_group(self.pid, signal) {
            debug!(%error, ?signal, "the search worker was not signalled");
        }
    }

    /// Whether the process has ended; it stays unreaped.
    pub(super) fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let found = rustix::process::waitid(WaitId::Pid(self.pid), options);
        // Whose SIGCHLD is ignored has no child left to wait for.
        !matches!(found, Ok(None) | Err(rustix::io::Errno::INTR))
    }

    /// Its process id.
    pub(super) fn number(&self) -> u32 {
        self.child.id()
    }

    /// What it has written since the last look, at most 64 KiB; never waits.
    pub(super) fn read(&mut self) -> Output {
        let Some(output) = &mut self.output else { return Output::Nothing };
        let mut bytes = vec![0; READ_BYTES];
        match output.read(&mut bytes) {
            Ok(0) => {}
            Ok(n_bytes) => {
                bytes.truncate(n_bytes);
                return Output::Bytes(bytes);
            }
            Err(error) if is_passing(&error) => return Output::Nothing,
            Err(error) => warn!(%error, "the search worker's output cannot be read"),
        }
        self.output = None;
        Output::Nothing
    }

    /// How a process that [`Self::has_ended`] ended.
    pub(super) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Ends the worker and waits for the kernel to do it.
    pub(super) fn kill(mut self) {
        self.signal(Signal::KILL);
        let fds = self.pidfd.as_ref().map(|pidfd| PollFd::new(pidfd, PollFlags::IN));
        if let Some(mut fd) = fds {
            let timeout = timespec(KILL_WAIT_MAX);
            let ended =
                rustix::io::retry_on_intr(|| poll(std::slice::from_mut(&mut fd), timeout.as_ref()));
            if matches!(ended, Ok(0)) {
                return warn!(pid = self.number(), "the killed search worker does not end");
            }
        }
        if let Err(error) = self.child.wait() {
            warn!(%error, "the search worker was not reaped");
        }
    }
}

pub(super) fn timespec(time: Duration) -> Option<Timespec> {
    Timespec::try_from(time).ok()
}

/// How a process ended, in words.
pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}
