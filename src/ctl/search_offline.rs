//! `fastaa-ctl search … --offline`: runs the search worker in this terminal, without a daemon.
//!
//! Owns the worker's process and what is shown of its events. Never links what the worker does:
//! `fastaa-loaderd` is another program, found beside this one or in `$PATH`.

use std::io::{self, BufRead, BufReader, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::status::duration_text;
use super::{Context, CtlError, output};
use crate::search::progress::{Event, Progress, RoundOutcome};

const WORKER_PROGRAM: &str = "fastaa-loaderd";
/// Exit code of a worker whose new start would fail in the same way.
const EXIT_CONFIG: i32 = 78;
/// Lines that may wait to be shown.
const LINES_MAX: usize = 64;

/// Runs the search to its end.
pub(crate) fn run(context: &Context, config: &Path) -> Result<(), CtlError> {
    let mut shown = Shown::new(context.json);
    run_worker(config, &["--offline".as_ref()], &mut shown)?;
    if context.json {
        return output::print_json(&json!({ "rounds": shown.rounds }));
    }
    Ok(())
}

/// The search's report, as the worker makes it.
pub(crate) fn report(config: &Path) -> Result<String, CtlError> {
    let path = std::env::temp_dir().join(format!("fastaa-report-{}.html", std::process::id()));
    let mut shown = Shown::new(true);
    let done = run_worker(config, &["--report".as_ref(), path.as_ref()], &mut shown);
    let read = done.and_then(|()| {
        std::fs::read_to_string(&path)
            .map_err(|error| CtlError::failed(format!("cannot read {}: {error}", path.display())))
    });
    // It is not there if the worker failed.
    let _ = std::fs::remove_file(&path);
    read
}

/// The daemon's program: beside this one, else in `$PATH`.
fn find_program() -> Result<PathBuf, CtlError> {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = beside.into_iter().chain(std::env::split_paths(&path));
    let found = places.find_map(|dir| Some(dir.join(WORKER_PROGRAM)).filter(|file| file.is_file()));
    found.ok_or_else(|| CtlError::Failed {
        message: format!("there is no {WORKER_PROGRAM} beside fastaa-ctl, nor in $PATH"),
        hint: "install both programs into one folder".to_owned(),
    })
}

fn run_worker(config: &Path, args: &[&std::ffi::OsStr], shown: &mut Shown) -> Result<(), CtlError> {
    let program = find_program()?;
    let failed =
        |error: io::Error| CtlError::failed(format!("cannot run {}: {error}", program.display()));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let mut child = Command::new(&program)
        .arg("search-worker")
        .arg("--config")
        .arg(config)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A Ctrl-C is for this program, which ends the worker.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let lines = lines_of(&mut child);
    let is_interrupted = runtime.block_on(watch(lines, shown));
    shown.bar.finish_and_clear();
    if !matches!(is_interrupted, Ok(false)) {
        // Fails only if it has ended by itself.
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed)?;
    if is_interrupted.map_err(failed)? {
        return Err(CtlError::Failed {
            message: "interrupted; what was computed is kept".to_owned(),
            hint: "the same command goes on where it was".to_owned(),
        });
    }
    if status.success() {
        return Ok(());
    }
    let message = shown.failure.take().unwrap_or_else(|| format!("the search worker: {status}"));
    Err(match status.code() {
        Some(EXIT_CONFIG) => CtlError::Config(message),
        _ => CtlError::failed(message),
    })
}

/// The worker's lines, read by a thread of their own.
fn lines_of(child: &mut Child) -> mpsc::Receiver<Vec<u8>> {
    let (sender, lines) = mpsc::channel(LINES_MAX);
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender.blocking_send(line).is_err() {
                    return;
                }
            }
        });
    }
    lines
}

/// Shows events until the worker closes its output; whether a signal came before that.
async fn watch(mut lines: mpsc::Receiver<Vec<u8>>, shown: &mut Shown) -> io::Result<bool> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            line = lines.recv() => match line {
                Some(line) => shown.take(&line)?,
                None => return Ok(false),
            },
            _ = interrupt.recv() => return Ok(true),
            _ = terminate.recv() => return Ok(true),
            _ = hangup.recv() => return Ok(true),
        }
    }
}

/// What is told of the events: a bar where stderr is a terminal, else a line per stage; outcomes
/// of rounds on stdout.
struct Shown {
    is_json: bool,
    bar: ProgressBar,
    /// Round and stage that were told last.
    stage: (u32, String),
    rounds: Vec<RoundOutcome>,
    failure: Option<String>,
    has_bad_lines: bool,
}

impl Shown {
    fn new(is_json: bool) -> Self {
        let bar = if io::stderr().is_terminal() {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("[{bar:24}] {percent:>3} %  {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        Self {
            is_json,
            bar,
            stage: (0, String::new()),
            rounds: Vec::new(),
            failure: None,
            has_bad_lines: false,
        }
    }

    fn take(&mut self, line: &[u8]) -> io::Result<()> {
        match serde_json::from_slice(line) {
            Ok(Event::Progress(progress)) => self.progress(&progress),
            Ok(Event::Note { text }) => self.note(&text),
            Ok(Event::Round(outcome)) => {
                if !self.is_json {
                    let text = format!("round {}: {}", outcome.round, outcome.summary);
                    let printed = self.bar.suspend(|| output::print(&text));
                    printed.map_err(|error| io::Error::other(error.to_string()))?;
                }
                self.rounds.push(outcome);
            }
            Ok(Event::Failed { message }) => self.failure = Some(message),
            Ok(Event::Finished) => {}
            Err(_) if self.has_bad_lines => {}
            Err(error) => {
                self.has_bad_lines = true;
                self.note(&format!("the search worker wrote what is no event: {error}"));
            }
        }
        Ok(())
    }

    fn progress(&mut self, progress: &Progress) {
        if self.bar.is_hidden() {
            let stage = (progress.round, progress.stage.clone());
            if !stage.1.is_empty() && stage != self.stage {
                output::note(&format!("round {}: {}", stage.0, stage.1));
                self.stage = stage;
            }
            return;
        }
        if progress.round_passes_total > 0 {
            self.bar.set_length(progress.round_passes_total);
            self.bar.set_position(progress.round_passes);
        }
        let mut parts = vec![format!("round {}", progress.round)];
        parts.extend([&progress.stage, &progress.part].map(String::clone));
        parts.push(
            progress
                .eta_seconds
                .map_or_else(String::new, |seconds| format!("{} left", duration_text(seconds))),
        );
        if progress.is_out_of_budget {
            parts.push("out of budget until tomorrow (UTC)".to_owned());
        }
        parts.retain(|part| !part.is_empty());
        self.bar.set_message(parts.join(", "));
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| output::note(text));
    }
}
