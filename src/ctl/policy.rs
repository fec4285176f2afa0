//! `fastaa-ctl policy`.

use super::{Context, CtlError};

/// Subcommands of `policy`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum PolicyCommand {
    /// List
    List,
}

pub(crate) fn run(_context: &Context, _command: PolicyCommand) -> Result<(), CtlError> {
    Err(CtlError::failed("not there yet"))
}
