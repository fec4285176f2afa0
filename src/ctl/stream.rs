//! `fastaa-ctl stream`: the running streams.

use super::daemon::connect;
use super::headspace::{self, HeadspaceArgs};
use super::table::table;
use super::{Context, CtlError, output};
use crate::control::{Reply, Request, StreamReport};

/// Subcommands of `stream`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum StreamCommand {
    /// One line per connected consumer
    List,
    /// Measure how fast a training would be if its batches cost nothing
    ///
    /// Runs the command twice, as it is and with batches that are made once and then come again
    /// and again. The difference is what any loader could gain. The second run learns nonsense: let
    /// it write no checkpoint that you need.
    Headspace(HeadspaceArgs),
}

pub(crate) fn run(context: &Context, command: &StreamCommand) -> Result<(), CtlError> {
    if let StreamCommand::Headspace(args) = command {
        return headspace::run(context, args);
    }
    let mut client = connect(context)?;
    match client.call(&Request::StreamList)? {
        Reply::Streams { streams } if context.json => output::print_json(&streams),
        Reply::Streams { streams } => output::print(&streams_table(&streams)),
        other => Err(client.unexpected(&other).into()),
    }
}

/// The streams as aligned columns; `none` where there are none.
pub(crate) fn streams_table(streams: &[StreamReport]) -> String {
    if streams.is_empty() {
        return "none\n".to_owned();
    }
    let rows: Vec<_> = streams
        .iter()
        .map(|stream| {
            let peer = match stream.pid {
                Some(pid) => format!("{} pid {pid}", stream.transport),
                None => stream.transport.clone(),
            };
            [
                stream.session.to_string(),
                format!("{}/{}", stream.dataset, stream.split),
                peer,
                format!("{}/{}", stream.rank, stream.world_size),
                if stream.group.is_empty() { "-".to_owned() } else { stream.group.clone() },
                stream.batch_size.to_string(),
                stream.epoch.to_string(),
                stream.next_offset.to_string(),
                format!("{}/{}", stream.leased_slots, stream.n_slots),
                if stream.window.is_empty() { "-".to_owned() } else { stream.window.clone() },
                stream.policy.clone(),
                format!("{:.0}", stream.images_per_second),
            ]
        })
        .collect();
    let headers = [
        "session", "stream", "client", "rank", "group", "batch", "epoch", "offset", "leased",
        "window", "policy", "images/s",
    ];
    table(headers, &rows)
}
