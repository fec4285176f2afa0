//! One writer of a store at a time, over all processes that have it open.
//!
//! Owns the lock file. Never touches versions or heads.
//!
//! Writers are the daemon, its search worker, and a search worker that a user started by hand. Each
//! opens the lock file anew for a write and holds an exclusive `flock` on it for that write, some
//! milliseconds. The kernel lets go when the holder dies. Readers need no lock: every file of a
//! store is replaced whole.

use std::fs::{File, OpenOptions};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use super::PolicyError;

/// The dot keeps it from being a dataset's name.
const LOCK_FILE: &str = ".lock";

/// The right to write; given back when dropped.
#[derive(Debug)]
pub(super) struct WriteLock {
    file: File,
}

impl WriteLock {
    /// Waits for the right to write to the store in `dir`.
    ///
    /// # Errors
    /// The lock file cannot be made or locked.
    pub(super) fn take(dir: &Path) -> Result<Self, PolicyError> {
        let path = dir.join(LOCK_FILE);
        let failed = |error| PolicyError::io(&path, error);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
            .map_err(|error| failed(error.into()))?;
        Ok(Self { file })
    }
}

impl Drop for WriteLock {
    fn drop(&mut self) {
        // Closing lets go as well, but not while a child that is just being started has a copy.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}
