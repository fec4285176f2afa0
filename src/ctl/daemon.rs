//! How commands reach the daemon, and how its errors become exit codes.
//!
//! Owns the connection's errors. What is asked is each command's matter.

use super::{Context, CtlError};
use crate::control::{ControlClient, ControlClientError, PathsError, RuntimePaths};
use crate::policy::PolicyError;

/// Connects to the daemon that `--runtime-dir`, `$FASTAA_RUNTIME_DIR` or the default names.
///
/// # Errors
/// The folder's name is too long (exit 2), or no daemon answers there (exit 69).
pub(crate) fn connect(context: &Context) -> Result<ControlClient, CtlError> {
    let paths = RuntimePaths::from_environment(context.runtime_dir.as_deref())?;
    Ok(ControlClient::connect(&paths)?)
}

impl From<PathsError> for CtlError {
    fn from(error: PathsError) -> Self {
        Self::Usage { message: error.to_string(), hint: String::new() }
    }
}

impl From<ControlClientError> for CtlError {
    fn from(error: ControlClientError) -> Self {
        let (message, hint) = (error.to_string(), error.hint().to_owned());
        match error {
            ControlClientError::NoDaemon { .. } => Self::NoDaemon { message, hint },
            _ => Self::Failed { message, hint },
        }
    }
}

impl From<PolicyError> for CtlError {
    fn from(error: PolicyError) -> Self {
        Self::failed(error.to_string())
    }
}
