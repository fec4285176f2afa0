//! `fastaa-ctl search`: where the policy search is, and what it should do.
//!
//! Owns the words. What runs without a daemon is in `search_offline`.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::daemon::connect;
use super::status::duration_text;
use super::table::table;
use super::{Context, CtlError, output, search_offline};
use crate::control::{IdleReport, Reply, Request, SearchReport, SearchRoundReport};

/// Subcommands of `search`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum SearchCommand {
    /// Show what the search does, how far it is, and how its rounds ended
    Status,
    /// Stop the search where it is, until it is resumed, also over restarts of the daemon
    Pause,
    /// Let a paused search go on, and end what 'run' began: it runs when the device is idle
    Resume,
    /// Start the search now, whoever uses the device (but for full GPU memory), until it ends or
    /// 'resume' or 'pause' says otherwise
    Run(OfflineArgs),
    /// Write the search's report as a page
    Report {
        /// Where to; `-` is stdout
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        #[command(flatten)]
        offline: OfflineArgs,
    },
}

/// How to do without a daemon.
#[derive(Debug, clap::Args)]
pub(crate) struct OfflineArgs {
    /// Without a daemon, in this terminal
    #[arg(long, requires = "config")]
    offline: bool,
    /// The daemon's configuration file, for --offline
    #[arg(long, value_name = "FILE", requires = "offline")]
    config: Option<PathBuf>,
}

impl OfflineArgs {
    /// The configuration, if there is to be no daemon.
    fn config(&self) -> Option<&Path> {
        self.config.as_deref().filter(|_| self.offline)
    }
}

pub(crate) fn run(context: &Context, command: SearchCommand) -> Result<(), CtlError> {
    match command {
        SearchCommand::Status => ask(context, &Request::SearchStatus, page),
        SearchCommand::Pause => ask(context, &Request::SearchPause, line),
        SearchCommand::Resume => ask(context, &Request::SearchResume, line),
        SearchCommand::Run(offline) => match offline.config() {
            Some(config) => search_offline::run(context, config),
            None => ask(context, &Request::SearchRun, line),
        },
        SearchCommand::Report { output, offline } => {
            let html = match offline.config() {
                Some(config) => search_offline::report(config)?,
                None => fetch_report(context)?,
            };
            write_report(context, &output, &html)
        }
    }
}

fn ask(
    context: &Context,
    request: &Request,
    text: fn(&SearchReport) -> String,
) -> Result<(), CtlError> {
    let mut client = connect(context)?;
    match client.call(request)? {
        Reply::Search(report) if context.json => output::print_json(&report),
        Reply::Search(report) => output::print(&text(&report)),
        other => Err(client.unexpected(&other).into()),
    }
}

fn fetch_report(context: &Context) -> Result<String, CtlError> {
    let mut client = connect(context)?;
    match client.call(&Request::SearchReport)? {
        Reply::SearchHtml { html } => Ok(html),
        other => Err(client.unexpected(&other).into()),
    }
}

fn write_report(context: &Context, path: &Path, html: &str) -> Result<(), CtlError> {
    if path == Path::new("-") {
        return if context.json {
            output::print_json(&serde_json::json!({ "html": html }))
        } else {
            output::print(html)
        };
    }
    output::replace_file(path, |mut file| file.write_all(html.as_bytes()))
        .map_err(|error| CtlError::failed(format!("cannot write {}: {error}", path.display())))?;
    if !context.json {
        return Ok(());
    }
    let path = path.display().to_string();
    output::print_json(&serde_json::json!({ "path": path, "bytes": html.len() }))
}

/// The search in one line.
pub(super) fn summary(report: &SearchReport) -> String {
    let state = report.state.replace('-', " ");
    let reason = match report.reason.as_str() {
        "" => String::new(),
        reason => format!(" ({reason})"),
    };
    // Where it stood last says nothing of a search that has ended.
    let progress = report.progress.as_ref().filter(|_| report.state != "finished");
    let Some(progress) = progress else { return format!("{state}{reason}") };
    let rounds = match progress.n_rounds {
        0 => progress.round.to_string(),
        n_rounds => format!("{} of {n_rounds}", progress.round),
    };
    let mut parts = vec![format!("{state}{reason}: round {rounds}")];
    for part in [&progress.stage, &progress.part] {
        if !part.is_empty() {
            parts.push(part.clone());
        }
    }
    if progress.total > 0 {
        parts.push(format!("{}/{}", progress.done, progress.total));
    }
    parts.join(", ")
}

fn line(report: &SearchReport) -> String {
    format!("search {}", summary(report))
}

/// What the idle watch sees and decides.
fn device_text(idle: &IdleReport) -> String {
    let Some(gpu) = &idle.gpu else {
        return format!("processors: {} ({})", idle.decision, idle.reason);
    };
    let mut parts = vec![gpu.name.clone()];
    parts.extend(gpu.utilisation.map(|share| format!("{:.0} % used", 100.0 * share)));
    if let (Some(free), Some(total)) = (gpu.memory_free, gpu.memory_total) {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        parts.push(format!("{:.1} of {:.1} GiB free", gib(free), gib(total)));
    }
    parts.extend(gpu.temperature.map(|degrees| format!("{degrees} °C")));
    parts.extend(gpu.power_watts.map(|watts| format!("{watts:.0} W")));
    format!("{}: {} ({})", parts.join(", "), idle.decision, idle.reason)
}

fn yields_text(idle: &IdleReport) -> String {
    match (idle.yield_ms_last, idle.yield_ms_max) {
        (Some(last), Some(longest)) => format!(
            "{}; to a batch, the last after {last:.1} ms, the longest after {longest:.1} ms",
            idle.yields
        ),
        _ => idle.yields.to_string(),
    }
}

fn page(report: &SearchReport) -> String {
    let mut lines = vec![format!("search      {}", summary(report))];
    let mut add = |name: &str, value: String| lines.push(format!("{name:<10}  {value}"));
    add("dataset", report.dataset.clone());
    let crashes = match report.restarts {
        0 => String::new(),
        1 => ", crashed once".to_owned(),
        restarts => format!(", crashed {restarts} times"),
    };
    match report.pid {
        Some(pid) => add("worker", format!("pid {pid}{crashes}")),
        None => add("worker", format!("none{crashes}")),
    }
    if let Some(idle) = &report.idle {
        add("device", device_text(idle));
        if idle.is_overridden {
            add(
                "told to run",
                "by 'search run', until 'search resume' or 'search pause'".to_owned(),
            );
        }
        if !idle.note.is_empty() {
            add("warning", idle.note.clone());
        }
        add("yields", yields_text(idle));
    }
    if report.bad_lines > 0 {
        add("bad lines", format!("{} of its output", report.bad_lines));
    }
    if let Some(progress) = &report.progress {
        add("algorithm", progress.algorithm.clone());
        if !progress.best.is_empty() {
            add("best", progress.best.clone());
        }
        if report.state != "finished" {
            let left = progress.eta_seconds.map_or("not known yet".to_owned(), duration_text);
            add("left", format!("{left} of this round"));
        }
        let gpu = match progress.gpu_seconds {
            0.0 => String::new(),
            seconds => format!(", {} GPU", duration_text(seconds)),
        };
        add("computed", format!("{} CPU{gpu}", duration_text(progress.cpu_seconds)));
        let budget = match report.budget_seconds {
            0 => "no limit".to_owned(),
            seconds => format!("of {}", duration_text(seconds as f64)),
        };
        add("today", format!("{}, {budget}", duration_text(progress.seconds_today)));
    }
    if !report.rounds.is_empty() {
        lines.push(format!("\nrounds\n{}", rounds_table(&report.rounds).trim_end()));
    }
    if !report.notes.is_empty() {
        lines.push("\nnotes".to_owned());
        lines.extend(report.notes.iter().cloned());
    }
    lines.join("\n")
}

fn rounds_table(rounds: &[SearchRoundReport]) -> String {
    let rows: Vec<_> = rounds
        .iter()
        .map(|round| {
            [
                round.round.to_string(),
                round.version.map_or_else(|| "-".to_owned(), |version| version.to_string()),
                duration_text(round.cpu_seconds),
                round.summary.clone(),
            ]
        })
        .collect();
    table(["round", "version", "CPU", "outcome"], &rows)
}
