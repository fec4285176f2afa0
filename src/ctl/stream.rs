//! `fastaa-ctl stream`.

use super::{Context, CtlError};

/// Subcommands of `stream`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum StreamCommand {
    /// List
    List,
}

pub(crate) fn run(_context: &Context, _command: &StreamCommand) -> Result<(), CtlError> {
    Err(CtlError::failed("not there yet"))
}
