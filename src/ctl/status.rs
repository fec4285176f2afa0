//! `fastaa-ctl status`: the daemon on one page.

use super::daemon::connect;
use super::stream::streams_table;
use super::table::table;
use super::{Context, CtlError, output, search};
use crate::control::{DatasetReport, PolicyReport, Reply, Request, StatusReport};

pub(crate) fn run(context: &Context) -> Result<(), CtlError> {
    output::print(&text(context)?)
}

/// The page, or one line of JSON if that is asked for.
pub(super) fn text(context: &Context) -> Result<String, CtlError> {
    let mut client = connect(context)?;
    match client.call(&Request::Status)? {
        Reply::Status(report) if context.json => output::json_text(&report),
        Reply::Status(report) => Ok(page(&report)),
        other => Err(client.unexpected(&other).into()),
    }
}

fn page(report: &StatusReport) -> String {
    let daemon = &report.daemon;
    let torch = daemon.torch.as_deref().unwrap_or("built without torch");
    let mut parts = vec![
        format!(
            "fastaa-loaderd {}, pid {}, up {}, {} worker threads, {torch}\n",
            daemon.version,
            daemon.pid,
            duration_text(daemon.uptime_seconds),
            daemon.threads,
        ),
        format!("runtime {}, state {}\n", daemon.runtime_dir, daemon.state_dir),
        daemon.http.as_ref().map_or_else(String::new, |http| format!("http {http}\n")),
        daemon.tcp.as_ref().map_or_else(String::new, |tcp| format!("streams also on {tcp}\n")),
        match report.search.state.as_str() {
            "" => String::new(),
            _ => format!("search {}\n", search::summary(&report.search)),
        },
        format!("\ndatasets\n{}", datasets_table(&report.datasets)),
        format!("\npolicies\n{}", policies_table(&report.policies)),
        format!("\nstreams\n{}", streams_table(&report.streams)),
    ];
    if !report.counters.is_empty() {
        let counters = report.counters.iter();
        let rows: Vec<_> =
            counters.map(|(name, count)| [name.clone(), count.to_string()]).collect();
        parts.push(format!("\n{}", table(["counter", "count"], &rows)));
    }
    parts.concat()
}

pub(super) fn datasets_table(datasets: &[DatasetReport]) -> String {
    let rows: Vec<_> = datasets
        .iter()
        .map(|dataset| {
            let shape = dataset.shape.map_or_else(
                || "encoded".to_owned(),
                |[height, width, channels]| format!("{height}x{width}x{channels}"),
            );
            [
                dataset.name.clone(),
                dataset.split.clone(),
                dataset.n_samples.to_string(),
                shape,
                format!("{} {}", dataset.n_classes, dataset.label_kind),
                dataset.format.clone(),
                dataset.path.clone(),
            ]
        })
        .collect();
    table(["name", "split", "samples", "shape", "labels", "format", "path"], &rows)
}

fn policies_table(policies: &[PolicyReport]) -> String {
    let rows: Vec<_> = policies
        .iter()
        .map(|policy| {
            let state = match (&policy.problem, policy.pinned) {
                (Some(problem), _) => problem.clone(),
                (None, Some(version)) => format!("pinned at {version}"),
                (None, None) => String::new(),
            };
            [
                policy.dataset.clone(),
                policy.active_version.to_string(),
                policy.name.clone(),
                policy.n_sub_policies.to_string(),
                policy.published_at.clone().unwrap_or_else(|| "-".to_owned()),
                state,
            ]
        })
        .collect();
    table(["dataset", "active", "name", "sub-policies", "published", "state"], &rows)
}

/// `3 d 4 h`, `4 h 5 min`, `5 min 6 s` or `6 s`.
#[allow(
    clippy::cast_possible_truncation,
    reason = "a float cast saturates, and no daemon runs 2^64 seconds"
)]
pub(super) fn duration_text(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        for (seconds, expected) in [
            (-1.0, "0 s"),
            (59.9, "59 s"),
            (60.0, "1 min 0 s"),
            (3_725.0, "1 h 2 min"),
            (90_000.0, "1 d 1 h"),
        ] {
            assert_eq!(duration_text(seconds), expected);
        }
    }
}
