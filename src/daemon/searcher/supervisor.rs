//! The supervision's loop: one thread that starts, hears, signals and reaps the worker.
//!
//! Owns the worker's process. Waits for nothing but the next event: an ask, output, the worker's
//! end, or the time of a restart or of a look at the device. The invariants are the parent's.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use tracing::{error, info, warn};

use super::{Advance, Ask, Backoff, PAUSE_REASON, Phase, SearchState, Wish, lock};
use crate::control::{ControlFailure, FailureCode};
use crate::daemon::idle_watch::IdleWatch;
use crate::daemon::search_process::{Output, Worker, WorkerCommand, describe, timespec};
use crate::limits::{QUOTE_CHARS_MAX, SEARCH_BAD_LINES_MAX};
use crate::search::progress::Event;

/// Exit code of a worker whose new start would fail in the same way.
const EXIT_HOPELESS: i32 = 78;
/// How often a worker is looked at where the kernel has no pidfd.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Reads of what a dead worker left in the pipe; a pipe of an ordinary user holds 1 MiB.
const LAST_READS_MAX: usize = 32;

/// See the module.
pub(super) struct Supervisor {
    pub(super) state: Arc<Mutex<SearchState>>,
    pub(super) asked: Receiver<Ask>,
    pub(super) wake: Arc<OwnedFd>,
    pub(super) command: WorkerCommand,
    pub(super) backoff: Backoff,
    pub(super) advance: Advance,
    pub(super) worker: Option<Worker>,
    /// When the next worker is started; also while it is paused.
    pub(super) restart_at: Option<Instant>,
    /// Says when the device is idle; `None`: it does not matter.
    pub(super) idle: Option<IdleWatch>,
    /// The device is not idle: no worker may compute.
    pub(super) is_yielding: bool,
    /// The worker has SIGSTOP.
    pub(super) is_stopped: bool,
    /// Somebody said that it is to run, whatever the idle watch says.
    pub(super) is_told: bool,
    /// There while a user has paused it.
    pub(super) pause_mark: Option<PathBuf>,
}

impl Supervisor {
    /// Until it is told to stop.
    pub(super) fn run(mut self) {
        loop {
            self.look();
            if self.restart_at.is_some_and(|at| at <= Instant::now()) && self.may_run() {
                self.launch();
            }
            self.wait();
            let mut count = [0; 8];
            // Nothing to take if something else woke the thread.
            let _ = rustix::io::read(&self.wake, &mut count);
            while let Ok(ask) = self.asked.try_recv() {
                match ask {
                    Ask::Wish(wish, answer) => {
                        // Whoever asked may have given up.
                        let _ = answer.send(self.carry_out(wish));
                    }
                    Ask::Stop => {
                        if let Some(worker) = self.worker.take() {
                            worker.kill();
                        }
                        return;
                    }
                }
            }
            self.read();
            if self.worker.as_ref().is_some_and(Worker::has_ended) {
                self.bury();
            }
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        lock(&self.state).phase == Phase::Paused
    }

    /// Ends a user's pause. If others use the device, it goes on when they have done.
    fn resume(&mut self) {
        info!("the search goes on");
        if self.is_yielding {
            lock(&self.state).enter(Phase::Yielding, "");
        } else if self.worker.is_some() {
            self.go_on();
        } else {
            self.launch();
        }
    }

    /// Until an ask, output, the worker's end, or the time of a restart.
    fn wait(&self) {
        let worker = self.worker.as_ref();
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let pidfd = worker.and_then(|worker| worker.pidfd.as_ref());
        let output = worker.and_then(|worker| worker.output.as_ref());
        fds.extend(pidfd.map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
        fds.extend(output.map(|output| PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)));
        let mut timeout = self.restart_at.filter(|_| self.may_run()).map(|at| {
            // Rounded up to whole milliseconds, so that the time has come when `poll` returns.
            at.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
        });
        if worker.is_some() && pidfd.is_none() {
            timeout = Some(POLL_INTERVAL);
        }
        if let Some(idle) = &self.idle {
            let interval = idle.interval();
            timeout = Some(timeout.map_or(interval, |timeout| timeout.min(interval)));
        }
        // A signal that wakes the thread early does no harm.
        let _ = poll(&mut fds, timeout.and_then(timespec).as_ref());
    }

    fn launch(&mut self) {
        self.restart_at = None;
        self.is_stopped = false;
        let gpu = self.idle.as_ref().and_then(IdleWatch::gpu);
        match Worker::start(&self.command, gpu.as_deref()) {
            Ok(worker) => {
                let pid = worker.number();
                info!(pid, "search worker started");
                let mut state = lock(&self.state);
                state.pid = Some(pid);
                state.enter(Phase::Starting, "");
                drop(state);
                self.worker = Some(worker);
            }
            Err(error) => {
                let program = self.command.program.display();
                self.crashed(&format!("{program} cannot be started: {error}"));
            }
        }
    }

    /// Takes what the worker has written, once: asks come in between, whatever it writes. Whether
    /// there was anything.
    fn read(&mut self) -> bool {
        let Some(worker) = &mut self.worker else { return false };
        let Output::Bytes(bytes) = worker.read() else { return false };
        let mut lines = std::mem::take(&mut worker.lines);
        lines.feed(&bytes, |line| self.take_line(line));
        if let Some(worker) = &mut self.worker {
            worker.lines = lines;
            if worker.n_bad_lines > SEARCH_BAD_LINES_MAX && !worker.has_ended() {
                let failure = "it wrote no events, but other things, and was ended";
                warn!(pid = worker.number(), "the search worker failed: {failure}");
                worker.failure = Some(failure.to_owned());
                worker.signal(Signal::KILL);
                worker.output = None;
            }
        }
        true
    }

    fn take_line(&mut self, line: Option<&[u8]>) {
        let Some(worker) = &mut self.worker else { return };
        let mut state = lock(&self.state);
        let event = line.and_then(|line| serde_json::from_slice::<Event>(line).ok());
        let Some(event) = event else {
            if state.n_bad_lines == 0 {
                let line = String::from_utf8_lossy(line.unwrap_or(b"(a line without end)"));
                let line: String = line.chars().take(QUOTE_CHARS_MAX).collect();
                warn!(?line, "the search worker wrote what is no event; told once");
            }
            state.n_bad_lines += 1;
            worker.n_bad_lines += 1;
            return;
        };
        match &event {
            Event::Progress(progress) if self.advance.is_seen_in(progress) => self.backoff.reset(),
            Event::Progress(_) | Event::Finished => {}
            Event::Note { text } => info!(text, "search"),
            Event::Round(round) => {
                info!(round = round.round, version = round.version, round.summary, "search");
            }
            Event::Failed { message } => worker.failure = Some(message.clone()),
        }
        state.take(event);
    }

    /// The worker has ended: takes its last words, reaps it, and decides what comes next.
    fn bury(&mut self) {
        for _ in 0..LAST_READS_MAX {
            if !self.read() {
                break;
            }
        }
        let Some(mut worker) = self.worker.take() else { return };
        // Its children, if it left any.
        worker.signal(Signal::KILL);
        let status = worker.reap();
        lock(&self.state).pid = None;
        let status = match status {
            Ok(status) => status,
            Err(error) => {
                return self.crashed(&format!("the worker cannot be waited for: {error}"));
            }
        };
        match status.code() {
            Some(0) => {
                info!("the search has finished");
                self.tell_override(false);
                self.backoff.reset();
                lock(&self.state).enter(Phase::Finished, "all rounds are done");
            }
            Some(EXIT_HOPELESS) => {
                let silent = || "it did not say why; the daemon's log may".to_owned();
                let message = worker.failure.unwrap_or_else(silent);
                error!(message, "the search failed");
                lock(&self.state).enter(Phase::Failed, message);
            }
            _ => match worker.failure {
                // It said why: another search has the journal, the disk is full, …
                Some(failure) => self.crashed(&failure),
                None => self.crashed(&format!("the worker crashed ({})", describe(status))),
            },
        }
    }

    /// Plans the next start.
    fn crashed(&mut self, how: &str) {
        let wait = self.backoff.next();
        self.restart_at = Some(Instant::now() + wait);
        let mut state = lock(&self.state);
        state.pid = None;
        state.n_restarts += 1;
        warn!(how, restart_in = ?wait, "the search worker ended");
        if state.phase == Phase::Paused {
            state.reason = format!("{how}; a new worker starts when resumed");
        } else {
            let reason = format!("{how}; a new worker starts after {wait:?}");
            state.enter(Phase::BackingOff, reason);
        }
    }

    /// Remembers over restarts whether a user has paused the search.
    fn mark_pause(&self, is_paused: bool) {
        let Some(path) = &self.pause_mark else { return };
        let done = if is_paused {
            let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            made.and_then(|()| std::fs::write(path, ""))
        } else if path.exists() {
            std::fs::remove_file(path)
        } else {
            Ok(())
        };
        if let Err(error) = done {
            let path = path.display();
            warn!("{path}: {error}; after a restart, the daemon will not know of this");
        }
    }

    /// Whether the search is to run whatever the idle watch says.
    fn tell_override(&mut self, is_told: bool) {
        self.is_told = is_told;
        if let Some(idle) = &self.idle {
            idle.overridden(is_told);
        }
    }

    fn carry_out(&mut self, wish: Wish) -> Result<(), ControlFailure> {
        let phase = lock(&self.state).phase;
        match (wish, phase) {
            (Wish::Pause, Phase::Paused) => {}
            (Wish::Pause | Wish::Resume, Phase::Waiting | Phase::Failed | Phase::Finished) => {
                let verb = if wish == Wish::Pause { "pause" } else { "resume" };
                let message = format!("there is nothing to {verb}: the search is {}", phase.name());
                return Err(ControlFailure::new(FailureCode::Conflict, message)
                    .with_hint("'fastaa-ctl search run' starts it"));
            }
            (Wish::Pause, _) => {
                if let Some(worker) = &self.worker {
                    worker.signal(Signal::STOP);
                    self.is_stopped = true;
                }
                self.tell_override(false);
                info!("the search is paused");
                self.mark_pause(true);
                lock(&self.state).enter(Phase::Paused, PAUSE_REASON);
            }
            (Wish::Resume | Wish::Run, _) => {
                self.tell_override(wish == Wish::Run);
                self.mark_pause(false);
                if self.is_told {
                    self.is_yielding = false;
                }
                if phase == Phase::Paused || self.is_stopped && !self.is_yielding {
                    self.resume();
                } else if wish == Wish::Run && self.worker.is_none() {
                    self.backoff.reset();
                    self.launch();
                }
            }
        }
        Ok(())
    }
}
