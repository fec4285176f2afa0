//! The token that TCP clients must present, in a file that only the daemon's user may read.

use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Random bytes of a token that the daemon makes.
const TOKEN_BYTES: usize = 32;

/// Reads the token; makes one if the file is not there.
pub(super) fn read_or_make(path: &Path) -> std::io::Result<String> {
    let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match made {
        Ok(mut file) => {
            let mut bytes = [0u8; TOKEN_BYTES];
            let flags = rustix::rand::GetRandomFlags::empty();
            // The kernel fills up to 256 bytes at once.
            let n_bytes = rustix::rand::getrandom(&mut bytes, flags)?;
            if n_bytes != TOKEN_BYTES {
                return Err(std::io::Error::other("the kernel gave too few random bytes"));
            }
            let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(file, "{token}")?;
            file.sync_all()?;
            Ok(token)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            if !std::fs::metadata(path)?.is_file() {
                return Err(std::io::Error::other("the token file is no regular file"));
            }
            let token = std::fs::read_to_string(path)?.trim().to_owned();
            if token.is_empty() {
                return Err(std::io::Error::other("the token is empty; remove the file"));
            }
            Ok(token)
        }
        Err(error) => Err(error),
    }
}
