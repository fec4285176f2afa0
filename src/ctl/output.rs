//! How commands print: data on stdout, errors with a `hint:` line on stderr, exit codes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
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
    print(&json_text(value)?)
}

/// A value as indented JSON.
pub(crate) fn json_text(value: &impl serde::Serialize) -> Result<String, CtlError> {
    Ok(serde_json::to_string_pretty(value).map_err(io::Error::from)?)
}

/// Prints a message to stderr; it does not matter if nobody reads it.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes a file whole or not at all: a temp file beside it, fsync, rename. A link is followed;
/// what is no regular file (a device, a pipe, a folder) is refused: the rename would replace it.
pub(crate) fn replace_file(
    path: &Path,
    write: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<()> {
    let path = match fs::canonicalize(path) {
        Ok(real) if !fs::metadata(&real)?.is_file() => {
            return Err(io::Error::other("it is there and is no regular file"));
        }
        Ok(real) => real,
        Err(_) => path.to_owned(),
    };
    let name = path.file_name().ok_or_else(|| io::Error::other("this is no file name"))?;
    let mut temporary_name = OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(temporary_name);
    let written = File::create_new(&temporary).and_then(|file| {
        write(&file)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    });
    written.inspect_err(|_| {
        // It may never have been made; the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
    })
}

/// Reports a command's error and gives its exit code.
pub(crate) fn exit_code(result: Result<(), CtlError>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let (code, hint) = match &error {
        CtlError::Failed { hint, .. } => (1, hint.as_str()),
        CtlError::Usage { hint, .. } => (2, hint.as_str()),
        CtlError::NoDaemon { hint, .. } => (69, hint.as_str()),
        CtlError::Config(_) => (78, ""),
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
