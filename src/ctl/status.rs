//! `fastaa-ctl status`.

use super::{Context, CtlError};

pub(crate) fn run(_context: &Context) -> Result<(), CtlError> {
    Err(CtlError::failed("not there yet"))
}
