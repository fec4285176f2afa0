//! `fastaa-ctl stream headspace`: how fast a training would be if its batches cost nothing.
//!
//! Owns the training's process and the measurement. Runs the command twice, as it is and with
//! batches that are made once and then announced again and again, and compares the rates. The
//! daemon's own count of samples is the measure, so the command may be any program.

use std::ffi::OsString;
use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::daemon::connect;
use super::{Context, CtlError, output};
use crate::control::{ControlClient, Reply, Request, StreamReport};

/// What the clients look for.
const REPLAY_VARIABLE: &str = "FASTAA_REPLAY";
/// Time between two looks at the streams.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long the command may take to its first batch.
const FIRST_BATCH_MAX: Duration = Duration::from_secs(300);
/// A command that ends by itself must have been measured for so long.
const MEASURED_MIN: Duration = Duration::from_secs(1);
/// The first part of a training is no measure: caches, compilers, clocks. A quarter, at most this.
const WARM_UP_MAX: Duration = Duration::from_secs(5);
/// How long the command may take to end when it is asked to.
const END_MAX: Duration = Duration::from_secs(10);

/// Samples so far, and when they were counted.
type Count = (Instant, u64);

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct HeadspaceArgs {
    /// Seconds that each of the two runs is measured
    #[arg(long, default_value_t = 20.0, value_name = "S")]
    seconds: f64,
    /// The training, with its arguments; it is ended when it was measured
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) fn run(context: &Context, args: &HeadspaceArgs) -> Result<(), CtlError> {
    if !(1.0..=86_400.0).contains(&args.seconds) {
        let message = format!("--seconds {} is not between 1 and 86400", args.seconds);
        return Err(CtlError::Usage { message, hint: String::new() });
    }
    let mut client = connect(context)?;
    let as_it_is = measure(&mut client, context, args, false)?;
    let replayed = measure(&mut client, context, args, true)?;
    let ratio = replayed / as_it_is;
    if context.json {
        return output::print_json(&json!({
            "images_per_second": as_it_is,
            "replayed_images_per_second": replayed,
            "ratio": ratio,
        }));
    }
    output::print(&format!(
        "as it is                {as_it_is:.0} images/s\n\
         with cached batches     {replayed:.0} images/s: no loader can make this training faster\n\
         upper bound             {ratio:.2} x\n"
    ))
}

/// Images per second that the command's loaders take.
fn measure(
    client: &mut ControlClient,
    context: &Context,
    args: &HeadspaceArgs,
    is_replay: bool,
) -> Result<f64, CtlError> {
    let mut training = Training::start(context, &args.command, is_replay)?;
    let seconds = Duration::from_secs_f64(args.seconds);
    let warm_up = WARM_UP_MAX.min(seconds / 4);
    let began = Instant::now();
    let mut first: Option<Instant> = None;
    // When measuring began, and the samples of then; and the same of the last look.
    let (mut start, mut last): (Option<Count>, Option<Count>) = (None, None);
    loop {
        if training.has_ended()? {
            break;
        }
        let n_samples = training.samples(client)?;
        let now = Instant::now();
        if n_samples > 0 {
            let first = *first.get_or_insert(now);
            if now - first >= warm_up {
                start.get_or_insert((now, n_samples));
                last = Some((now, n_samples));
            }
        } else if began.elapsed() > FIRST_BATCH_MAX {
            return Err(training.without_batches(&format!("within {FIRST_BATCH_MAX:?}")));
        }
        if start.is_some_and(|(at, _)| now - at >= seconds) {
            break;
        }
        #[allow(clippy::disallowed_methods, reason = "the clock is the event")]
        std::thread::sleep(LOOK_INTERVAL);
    }
    let measured = start.zip(last).filter(|(start, last)| last.0 - start.0 >= MEASURED_MIN);
    let Some(((start, n_before), (end, n_after))) = measured else {
        return Err(if first.is_some() {
            CtlError::Failed {
                message: format!("the training ended before {MEASURED_MIN:?} of it were measured"),
                hint: "let it run for more epochs, or choose fewer --seconds".to_owned(),
            }
        } else {
            training.without_batches("before it ended")
        });
    };
    Ok(n_after.saturating_sub(n_before) as f64 / (end - start).as_secs_f64())
}

/// The command's process. Dropping it ends it.
struct Training {
    child: Child,
    program: String,
    /// Samples of its sessions that have ended: loaders come and go.
    ended: u64,
    sessions: Vec<(u64, u64)>,
}

impl Training {
    fn start(context: &Context, command: &[OsString], is_replay: bool) -> Result<Self, CtlError> {
        let (program, args) = command.split_first().expect("clap demands it");
        let mut process = Command::new(program);
        if let Some(dir) = &context.runtime_dir {
            process.env("FASTAA_RUNTIME_DIR", dir);
        }
        let child = process
            .args(args)
            .env(REPLAY_VARIABLE, if is_replay { "1" } else { "0" })
            .stdin(Stdio::null())
            // Stdout is for the result.
            .stdout(io::stderr())
            .spawn();
        let program = program.to_string_lossy().into_owned();
        match child {
            Ok(child) => Ok(Self { child, program, ended: 0, sessions: Vec::new() }),
            Err(error) => Err(CtlError::failed(format!("cannot run {program}: {error}"))),
        }
    }

    fn has_ended(&mut self) -> Result<bool, CtlError> {
        let status = self.child.try_wait();
        let status = status.map_err(|error| CtlError::failed(error.to_string()))?;
        match status {
            Some(status) if !status.success() => {
                Err(CtlError::failed(format!("{} failed: {status}", self.program)))
            }
            status => Ok(status.is_some()),
        }
    }

    /// Samples that it and its children took so far.
    fn samples(&mut self, client: &mut ControlClient) -> Result<u64, CtlError> {
        let streams = match client.call(&Request::StreamList)? {
            Reply::Streams { streams } => streams,
            other => return Err(client.unexpected(&other).into()),
        };
        let root = self.child.id();
        let is_its = |stream: &&StreamReport| stream.pid.is_some_and(|pid| descends(pid, root));
        let now: Vec<(u64, u64)> = streams
            .iter()
            .filter(is_its)
            .map(|stream| (stream.session, stream.samples_sent))
            .collect();
        let gone = self.sessions.iter().filter(|(id, _)| now.iter().all(|(other, _)| other != id));
        self.ended += gone.map(|(_, n_samples)| n_samples).sum::<u64>();
        self.sessions = now;
        Ok(self.ended + self.sessions.iter().map(|(_, n_samples)| n_samples).sum::<u64>())
    }

    fn without_batches(&self, when: &str) -> CtlError {
        CtlError::Failed {
            message: format!("{} took no batch of this daemon {when}", self.program),
            hint: "it must use fastaa.Loader on this host, with this daemon's runtime_dir"
                .to_owned(),
        }
    }
}

impl Drop for Training {
    fn drop(&mut self) {
        let began = Instant::now();
        // It may have ended by itself.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        while began.elapsed() < END_MAX {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            #[allow(clippy::disallowed_methods, reason = "there is no event to wait for here")]
            std::thread::sleep(LOOK_INTERVAL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a process is `root` or one of its descendants.
fn descends(mut pid: u32, root: u32) -> bool {
    while pid != root {
        // The parent is the second word after the name, which is in brackets.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        match parent.and_then(|parent| parent.parse().ok()) {
            Some(parent) if parent > 1 => pid = parent,
            _ => return false,
        }
    }
    true
}
