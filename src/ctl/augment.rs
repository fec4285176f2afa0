//! `fastaa-ctl augment`.

use super::{Context, CtlError};

/// Arguments of `augment`.
#[derive(Debug, clap::Args)]
pub(crate) struct AugmentArgs {}

pub(crate) fn run(_context: &Context, _args: AugmentArgs) -> Result<(), CtlError> {
    Err(CtlError::failed("not there yet"))
}
