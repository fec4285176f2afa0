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

mod brake;
mod supervisor;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use tracing::error;

use crate::config::{IdleConfig, SearchDevice};
use crate::control::{ControlFailure, FailureCode, IdleReport, SearchReport};
use crate::idle::demand::{ACTIVE, DemandBoard};
use crate::limits::CONTROL_CONNECTIONS_MAX;

use supervisor::Supervisor;

use super::idle_watch::IdleWatch;
pub use super::search_process::WorkerCommand;
use super::search_state::{Advance, SearchState};
pub use super::search_state::{Backoff, Phase};

/// Why a paused search does nothing.
const PAUSE_REASON: &str = "until 'fastaa-ctl search resume'";
/// How long the supervisor may take to answer; it only signals and starts processes.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);

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

/// What the search is to yield to.
#[derive(Clone, Debug)]
pub struct IdleOptions {
    config: IdleConfig,
    threads: usize,
    device: SearchDevice,
    board: Arc<DemandBoard>,
    wake: Arc<OwnedFd>,
}

impl IdleOptions {
    /// `threads`: those of the search. `device`: what it computes on.
    ///
    /// # Errors
    /// The system is out of file descriptors.
    pub fn new(config: IdleConfig, threads: usize, device: SearchDevice) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let theirs = Arc::clone(&wake);
        let board = DemandBoard::new(ACTIVE, move || wake_up(&theirs));
        Ok(Self { config, threads, device, board: Arc::new(board), wake })
    }

    /// Where those who take batches are written down.
    pub fn board(&self) -> Arc<DemandBoard> {
        Arc::clone(&self.board)
    }
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
    /// Whom it yields to; `None`: to nobody.
    pub idle: Option<IdleOptions>,
    /// A file that is there while a user has paused the search, so that a restart of the daemon
    /// does not end the pause; `None`: nothing is remembered.
    pub pause_mark: Option<PathBuf>,
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
    idle: Option<Arc<Mutex<IdleReport>>>,
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
        let is_paused = options.pause_mark.as_deref().is_some_and(Path::exists);
        let (phase, reason) = match &options.start {
            StartWhen::AtOnce if is_paused => (Phase::Paused, PAUSE_REASON.to_owned()),
            StartWhen::AtOnce => (Phase::Starting, String::new()),
            StartWhen::Told(why) => (Phase::Waiting, why.clone()),
            StartWhen::Never(why) => (Phase::Disabled, why.clone()),
        };
        let state = Arc::new(Mutex::new(SearchState::new(phase, reason)));
        let wake = match &options.idle {
            Some(idle) => Arc::clone(&idle.wake),
            None => Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
        };
        let idle = options.idle.filter(|_| phase != Phase::Disabled);
        let idle = idle
            .map(|idle| IdleWatch::start(&idle.config, idle.threads, idle.device, idle.board))
            .transpose()?;
        let idle_report = idle.as_ref().map(IdleWatch::report);
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
            restart_at: matches!(phase, Phase::Starting | Phase::Paused).then(Instant::now),
            pause_mark: options.pause_mark,
            is_yielding: idle.is_some(),
            idle,
            is_stopped: false,
            is_told: false,
        };
        let thread = if phase == Phase::Disabled {
            None
        } else {
            let builder = std::thread::Builder::new().name("searcher".to_owned());
            Some(builder.spawn(move || supervisor.run())?)
        };
        Ok(Self {
            state,
            asks,
            wake,
            thread: Mutex::new(thread),
            dataset,
            budget_seconds,
            idle: idle_report,
        })
    }

    /// Where the search is.
    pub fn report(&self) -> SearchReport {
        let idle = self.idle.as_ref().map(|idle| {
            let idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.clone()
        });
        SearchReport { idle, ..lock(&self.state).report(&self.dataset, self.budget_seconds) }
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
        wake_up(&self.wake);
    }
}

fn wake_up(wake: &OwnedFd) {
    // Fails only if the counter is full, and then the thread is awake already.
    let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
}

impl Drop for Searcher {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(state: &Mutex<SearchState>) -> MutexGuard<'_, SearchState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
