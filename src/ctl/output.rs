//! How commands print: data on stdout, errors with a `hint:` line on stderr, exit codes.

use std::io::{self, Write};
use std::process::ExitCode;

use super::CtlError;

/// Prints text to stdout, with a line feed at its end.
pub(crate) fn print(text: &str) -> Result<(), CtlError> {
    let mut out = io::stdout().lock();
    out.write_all(text.trim_end_matches('\n').as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

/// Prints a value as indented JSON to stdout.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), CtlError> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
    print(&text)
}

/// Prints a message to stderr; it does not matter if nobody reads it.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Reports a command's error and gives its exit code.
pub(crate) fn exit_code(result: Result<(), CtlError>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let (code, hint) = match &error {
        CtlError::Failed { hint, .. } => (1, hint.as_str()),
        CtlError::Usage { hint, .. } => (2, hint.as_str()),
        CtlError::NoDaemon { hint, .. } => (69, hint.as_str()),
        CtlError::Output(cause) if cause.kind() == io::ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        CtlError::Output(_) => (1, ""),
    };
    note(&format!("error: {error}"));
    if !hint.is_empty() {
        note(&format!("hint: {hint}"));
    }
    ExitCode::from(code)
}
