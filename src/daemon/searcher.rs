//! Supervises the search worker: starts it, reads its events, pauses it, starts it again after a
//! crash, and ends it.
//!
//! Owns the worker's process and one thread. Knows nothing of searching, and never waits for the
//! worker: a worker that hangs, dies or talks nonsense costs the daemon nothing.
//!
//! *Invariants*
//!
//! * All workers are started by the supervisor's thread, which lives as long as the daemon: a
//!   worker asks the kernel to end it with the *thread* that started it.
//! * A worker and its children are a process group of their own: a Ctrl-C at the daemon's terminal
//!   is for the daemon, which ends the group.
//! * Only this thread signals and reaps the worker, so that no signal reaches a stranger.
//!
//! *Limits*: [`SEARCH_EVENT_BYTES_MAX`](crate::limits::SEARCH_EVENT_BYTES_MAX) and
//! [`SEARCH_BAD_LINES_MAX`](crate::limits::SEARCH_BAD_LINES_MAX).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::Signal;
use tracing::{error, info, warn};

use crate::control::{ControlFailure, FailureCode, SearchReport};
use crate::limits::{CONTROL_CONNECTIONS_MAX, QUOTE_CHARS_MAX, SEARCH_BAD_LINES_MAX};
use crate::search::progress::Event;

pub use super::search_process::WorkerCommand;
use super::search_process::{Output, Worker, describe, timespec};
use super::search_state::{Advance, SearchState};
pub use super::search_state::{Backoff, Phase};

/// Exit code of a worker whose new start would fail in the same way.
const EXIT_HOPELESS: i32 = 78;
/// How often a worker is looked at where the kernel has no pidfd.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// How long the supervisor may take to answer; it only signals and starts processes.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);
/// Reads of what a dead worker left in the pipe; a pipe of an ordinary user holds 1 MiB.
const LAST_READS_MAX: usize = 32;

/// When the first worker is started.
#[derive(Clone, Debug)]
pub enum StartWhen {
    /// Now.
    AtOnce,
    /// When [`Searcher::run`] says so; the text says why not before.
    Told(String),
    /// Never; the text says why.
    Never(String),
}

/// How a searcher works.
#[derive(Clone, Debug)]
pub struct SearcherOptions {
    /// What to run.
    pub command: WorkerCommand,
    /// When.
    pub start: StartWhen,
    /// Waits between crashes.
    pub backoff: Backoff,
    /// The dataset that is searched for, for reports.
    pub dataset: String,
    /// Compute per day, in seconds, for reports; 0: no limit.
    pub budget_seconds: u64,
}

/// The daemon's handle to the search. Dropping it ends the worker.
#[derive(Debug)]
pub struct Searcher {
    state: Arc<Mutex<SearchState>>,
    asks: SyncSender<Ask>,
    wake: Arc<OwnedFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
    dataset: String,
    budget_seconds: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Pause,
    Resume,
    Run,
}

#[derive(Debug)]
enum Ask {
    Wish(Wish, SyncSender<Result<(), ControlFailure>>),
    Stop,
}

impl Searcher {
    /// Starts the supervision and, if it is to be, the worker.
    ///
    /// # Errors
    /// The system is out of threads or file descriptors.
    pub fn start(options: SearcherOptions) -> io::Result<Self> {
        let (phase, reason) = match &options.start {
            StartWhen::AtOnce => (Phase::Starting, String::new()),
            StartWhen::Told(why) => (Phase::Waiting, why.clone()),
            StartWhen::Never(why) => (Phase::Disabled, why.clone()),
        };
        let state = Arc::new(Mutex::new(SearchState::new(phase, reason)));
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (asks, asked) = sync_channel(CONTROL_CONNECTIONS_MAX);
        let (dataset, budget_seconds) = (options.dataset.clone(), options.budget_seconds);
        let supervisor = Supervisor {
            state: Arc::clone(&state),
            asked,
            wake: Arc::clone(&wake),
            command: options.command,
            backoff: options.backoff,
            advance: Advance::default(),
            worker: None,
            restart_at: (phase == Phase::Starting).then(Instant::now),
        };
        let thread = if phase == Phase::Disabled {
            None
        } else {
            let builder = std::thread::Builder::new().name("searcher".to_owned());
            Some(builder.spawn(move || supervisor.run())?)
        };
        Ok(Self { state, asks, wake, thread: Mutex::new(thread), dataset, budget_seconds })
    }

    /// Where the search is.
    pub fn report(&self) -> SearchReport {
        lock(&self.state).report(&self.dataset, self.budget_seconds)
    }

    /// The dataset that is searched for.
    pub fn dataset(&self) -> &str {
        &self.dataset
    }

    /// Adds a sentence to what reports tell.
    pub fn note(&self, text: impl Into<String>) {
        lock(&self.state).note(text.into());
    }

    /// Stops the worker where it is, until it is resumed.
    ///
    /// # Errors
    /// There is no search that could be paused.
    pub fn pause(&self) -> Result<(), ControlFailure> {
        self.ask(Wish::Pause)
    }

    /// Lets a paused worker go on.
    ///
    /// # Errors
    /// There is no search that could be resumed.
    pub fn resume(&self) -> Result<(), ControlFailure> {
        self.ask(Wish::Resume)
    }

    /// Starts a worker if none runs, and resumes a paused one.
    ///
    /// # Errors
    /// This daemon never searches.
    pub fn run(&self) -> Result<(), ControlFailure> {
        self.ask(Wish::Run)
    }

    /// Ends the worker and the supervision. Idempotent.
    pub fn stop(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        self.send(Ask::Stop);
        if thread.join().is_err() {
            error!("the searcher's thread panicked");
        }
    }

    fn ask(&self, wish: Wish) -> Result<(), ControlFailure> {
        {
            let state = lock(&self.state);
            if state.phase == Phase::Disabled {
                let message = format!("this daemon does not search: {}", state.reason);
                return Err(ControlFailure::new(FailureCode::Conflict, message));
            }
        }
        let (answer, answered) = sync_channel(1);
        self.send(Ask::Wish(wish, answer));
        answered.recv_timeout(ANSWER_WAIT_MAX).unwrap_or_else(|_| {
            let message = "the search's supervision does not answer; the daemon's log may say why";
            Err(ControlFailure::new(FailureCode::Internal, message))
        })
    }

    fn send(&self, ask: Ask) {
        // Fails only when the thread has ended, and then nobody can be told.
        let _ = self.asks.send(ask);
        // Fails only if the counter is full, and then the thread is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Searcher {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(state: &Mutex<SearchState>) -> MutexGuard<'_, SearchState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Supervisor {
    state: Arc<Mutex<SearchState>>,
    asked: Receiver<Ask>,
    wake: Arc<OwnedFd>,
    command: WorkerCommand,
    backoff: Backoff,
    advance: Advance,
    worker: Option<Worker>,
    /// When the next worker is started; also while it is paused.
    restart_at: Option<Instant>,
}

impl Supervisor {
    fn run(mut self) {
        loop {
            if self.restart_at.is_some_and(|at| at <= Instant::now()) && !self.is_paused() {
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

    fn is_paused(&self) -> bool {
        lock(&self.state).phase == Phase::Paused
    }

    /// Until an ask, output, the worker's end, or the time of a restart.
    fn wait(&self) {
        let worker = self.worker.as_ref();
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let pidfd = worker.and_then(|worker| worker.pidfd.as_ref());
        let output = worker.and_then(|worker| worker.output.as_ref());
        fds.extend(pidfd.map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
        fds.extend(output.map(|output| PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)));
        let mut timeout = self.restart_at.filter(|_| !self.is_paused()).map(|at| {
            // Rounded up to whole milliseconds, so that the time has come when `poll` returns.
            at.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
        });
        if worker.is_some() && pidfd.is_none() {
            timeout = Some(POLL_INTERVAL);
        }
        // A signal that wakes the thread early does no harm.
        let _ = poll(&mut fds, timeout.and_then(timespec).as_ref());
    }

    fn launch(&mut self) {
        self.restart_at = None;
        match Worker::start(&self.command) {
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
            Err(error) => return self.crashed(&format!("it cannot be waited for: {error}")),
        };
        match status.code() {
            Some(0) => {
                info!("the search has finished");
                self.backoff.reset();
                lock(&self.state).enter(Phase::Finished, "all rounds are done");
            }
            Some(EXIT_HOPELESS) => {
                let silent = || "it did not say why; the daemon's log may".to_owned();
                let message = worker.failure.unwrap_or_else(silent);
                error!(message, "the search failed");
                lock(&self.state).enter(Phase::Failed, message);
            }
            _ => {
                let said =
                    worker.failure.map_or_else(String::new, |failure| format!(": {failure}"));
                self.crashed(&format!("{}{said}", describe(status)));
            }
        }
    }

    /// Plans the next start.
    fn crashed(&mut self, how: &str) {
        let wait = self.backoff.next();
        self.restart_at = Some(Instant::now() + wait);
        let mut state = lock(&self.state);
        state.pid = None;
        state.n_restarts += 1;
        warn!(how, restart_in = ?wait, "the search worker crashed");
        if state.phase == Phase::Paused {
            state.reason = format!("the worker crashed ({how}); a new one starts when resumed");
        } else {
            let reason = format!("the worker crashed ({how}); a new one starts after {wait:?}");
            state.enter(Phase::BackingOff, reason);
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
                }
                info!("the search is paused");
                lock(&self.state).enter(Phase::Paused, "until 'fastaa-ctl search resume'");
            }
            (Wish::Resume | Wish::Run, Phase::Paused) => {
                info!("the search goes on");
                match &self.worker {
                    Some(worker) => {
                        worker.signal(Signal::CONT);
                        lock(&self.state).enter_by_progress();
                    }
                    None => self.launch(),
                }
            }
            (Wish::Run, _) if self.worker.is_none() => {
                self.backoff.reset();
                self.launch();
            }
            (Wish::Resume | Wish::Run, _) => {}
        }
        Ok(())
    }
}
