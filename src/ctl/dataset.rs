//! `fastaa-ctl dataset`.

use super::{Context, CtlError};

/// Subcommands of `dataset`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DatasetCommand {
    /// List
    List,
}

pub(crate) fn run(_context: &Context, _command: DatasetCommand) -> Result<(), CtlError> {
    Err(CtlError::failed("not there yet"))
}
