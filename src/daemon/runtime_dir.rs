//! The runtime folder and its lock: who may serve there.
//!
//! The lock comes before any bind: libzmq unlinks and takes over the path of a living daemon's
//! socket. What a dead daemon left behind is replaced under the lock.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::control::RuntimePaths;

/// Why the runtime folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RuntimeDirError {
    /// It cannot be made or opened.
    #[error("runtime_dir {path}: {source}")]
    Io {
        /// The folder, or the part of it that is in the way.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It belongs to somebody else, who could take over the sockets.
    #[error("runtime_dir {path} belongs to user {owner}, not to user {own}")]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The daemon's user.
        own: u32,
    },
    /// Everybody may write there, and could take over the sockets.
    #[error("runtime_dir {path} can be written to by everybody")]
    Open {
        /// The folder.
        path: PathBuf,
    },
    /// A daemon lives there.
    #[error("another fastaa-loaderd{pid} serves {path}")]
    Taken {
        /// The folder.
        path: PathBuf,
        /// ` (pid N)`, or empty if it is not known.
        pid: String,
    },
}

impl RuntimeDirError {
    /// What to do about it.
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::Io { .. } => {
                "choose a folder that can be made, with runtime_dir in the \
                                configuration or $FASTAA_RUNTIME_DIR"
            }
            Self::Foreign { .. } => "remove it, or choose another runtime_dir",
            Self::Open { .. } => "chmod o-w it, or choose another runtime_dir",
            Self::Taken { .. } => "stop it, or choose another runtime_dir",
        }
    }
}

/// The lock on a runtime folder; the sockets in it go when it is dropped.
#[derive(Debug)]
pub(super) struct RuntimeLock {
    paths: RuntimePaths,
    /// The lock lives as long as the open file.
    _file: File,
}

impl RuntimeLock {
    /// Makes the folder if it is not there, takes its lock, and removes dead sockets.
    pub(super) fn take(paths: &RuntimePaths) -> Result<Self, RuntimeDirError> {
        let dir = paths.dir();
        let failed = |source| RuntimeDirError::Io { path: dir.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o750).create(dir).map_err(failed)?;
        let own = rustix::process::geteuid().as_raw();
        // Not following a link: in /tmp it would be anybody's.
        let metadata = std::fs::symlink_metadata(dir).map_err(failed)?;
        let owner = metadata.uid();
        if owner != own {
            return Err(RuntimeDirError::Foreign { path: dir.to_owned(), owner, own });
        }
        if metadata.mode() & 0o002 != 0 && metadata.is_dir() {
            return Err(RuntimeDirError::Open { path: dir.to_owned() });
        }
        let lock_path = paths.lock_file();
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(|source| RuntimeDirError::Io { path: lock_path, source })?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                // Only for the message; a daemon that is just starting has not written it yet.
                let _ = file.read_to_string(&mut pid);
                let pid = pid.trim();
                let pid = if pid.is_empty() { String::new() } else { format!(" (pid {pid})") };
                return Err(RuntimeDirError::Taken { path: dir.to_owned(), pid });
            }
            Err(error) => return Err(failed(error.into())),
        }
        let write_pid = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write_pid(&mut file).map_err(failed)?;
        let lock = Self { paths: paths.clone(), _file: file };
        lock.remove_sockets().map_err(failed)?;
        Ok(lock)
    }

    fn sockets(&self) -> [PathBuf; 3] {
        [self.paths.control_socket(), self.paths.hello_socket(), self.paths.data_socket()]
    }

    fn remove_sockets(&self) -> io::Result<()> {
        self.sockets().iter().try_for_each(|path| remove_if_there(path))
    }
}

impl Drop for RuntimeLock {
    fn drop(&mut self) {
        // The lock file stays: removing it would let two daemons lock two files of one name.
        let _ = self.remove_sockets();
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    let is_socket = |metadata: std::fs::Metadata| metadata.file_type().is_socket();
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| !is_socket(metadata)) {
        let message = format!("{} is in the way and no socket; move it away", path.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
