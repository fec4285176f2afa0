//! Where the daemon's sockets are: the one rule for daemon, `fastaa-ctl` and the Python client.
//!
//! Owns names only. Never makes, opens or removes anything.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::limits;

/// The runtime folder, with room for every socket name in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimePaths {
    dir: PathBuf,
}

/// Why a folder cannot be the runtime folder.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathsError {
    /// A Unix socket's address has little room.
    #[error(
        "runtime_dir {dir}: the path of its socket {name} has {bytes} bytes, but at most \
         {} are safe; choose a shorter folder",
        limits::SOCKET_PATH_BYTES_MAX
    )]
    TooLong {
        /// The folder.
        dir: String,
        /// The longest socket's name.
        name: &'static str,
        /// Bytes of its path.
        bytes: usize,
    },
}

const CONTROL_SOCKET: &str = "control.sock";
const HELLO_SOCKET: &str = "hello.sock";
const DATA_SOCKET: &str = "data.sock";
const LOCK_FILE: &str = "lock";

impl RuntimePaths {
    /// The folder itself.
    ///
    /// # Errors
    /// Its sockets' paths would be longer than [`limits::SOCKET_PATH_BYTES_MAX`].
    pub fn new(dir: impl Into<PathBuf>) -> Result<Self, PathsError> {
        let paths = Self { dir: dir.into() };
        let bytes = paths.control_socket().as_os_str().as_bytes().len();
        if bytes > limits::SOCKET_PATH_BYTES_MAX {
            let dir = paths.dir.display().to_string();
            return Err(PathsError::TooLong { dir, name: CONTROL_SOCKET, bytes });
        }
        Ok(paths)
    }

    /// The rule: `flag` (a command-line flag, or the configuration), else `$FASTAA_RUNTIME_DIR`,
    /// else `$XDG_RUNTIME_DIR/fastaa`, else `/run/fastaa` for root, else `/tmp/fastaa-UID`. An
    /// empty variable counts as unset. `env` looks variables up; `uid` is the user's.
    ///
    /// # Errors
    /// As [`RuntimePaths::new`].
    pub fn choose(
        flag: Option<&Path>,
        env: impl Fn(&str) -> Option<OsString>,
        uid: u32,
    ) -> Result<Self, PathsError> {
        let env = |name| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = flag
            .map(Path::to_owned)
            .or_else(|| env("FASTAA_RUNTIME_DIR"))
            .or_else(|| env("XDG_RUNTIME_DIR").map(|dir| dir.join("fastaa")))
            .unwrap_or_else(|| match uid {
                0 => PathBuf::from("/run/fastaa"),
                uid => PathBuf::from(format!("/tmp/fastaa-{uid}")),
            });
        Self::new(dir)
    }

    /// [`RuntimePaths::choose`] with this process's environment and user.
    ///
    /// # Errors
    /// As [`RuntimePaths::new`].
    pub fn from_environment(flag: Option<&Path>) -> Result<Self, PathsError> {
        Self::choose(flag, |name| std::env::var_os(name), rustix::process::geteuid().as_raw())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Requests and replies of `fastaa-ctl`: a Unix stream socket.
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join(CONTROL_SOCKET)
    }

    /// Training clients say hello here: a Unix `SOCK_SEQPACKET` socket.
    pub fn hello_socket(&self) -> PathBuf {
        self.dir.join(HELLO_SOCKET)
    }

    /// Descriptors and releases: a ZeroMQ `ipc://` socket.
    pub fn data_socket(&self) -> PathBuf {
        self.dir.join(DATA_SOCKET)
    }

    /// Locked by the daemon before it binds any socket.
    pub fn lock_file(&self) -> PathBuf {
        self.dir.join(LOCK_FILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flag: Option<&str>, variables: &[(&str, &str)], uid: u32, expected: &str) {
        let env = |name: &str| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        };
        let paths = RuntimePaths::choose(flag.map(Path::new), env, uid).unwrap();
        assert_eq!(paths.dir(), Path::new(expected));
    }

    #[test]
    fn flag_then_variables_then_the_users_default() {
        let fastaa = ("FASTAA_RUNTIME_DIR", "/a");
        let xdg = ("XDG_RUNTIME_DIR", "/run/user/7");
        check(Some("/flag"), &[fastaa, xdg], 7, "/flag");
        check(None, &[fastaa, xdg], 7, "/a");
        check(None, &[xdg], 7, "/run/user/7/fastaa");
        check(None, &[xdg], 0, "/run/user/7/fastaa");
        check(None, &[], 0, "/run/fastaa");
        check(None, &[], 7, "/tmp/fastaa-7");
        check(None, &[("FASTAA_RUNTIME_DIR", ""), ("XDG_RUNTIME_DIR", "")], 7, "/tmp/fastaa-7");
    }

    #[test]
    fn sockets_fit_their_addresses_or_the_folder_is_refused() {
        let room = limits::SOCKET_PATH_BYTES_MAX - "/control.sock".len();
        let longest = format!("/{}", "x".repeat(room - 1));
        let paths = RuntimePaths::new(&longest).unwrap();
        for path in
            [paths.control_socket(), paths.hello_socket(), paths.data_socket(), paths.lock_file()]
        {
            assert!(path.as_os_str().len() <= limits::SOCKET_PATH_BYTES_MAX);
            assert_eq!(path.parent(), Some(Path::new(&longest)));
        }
        let error = RuntimePaths::new(format!("{longest}x")).unwrap_err().to_string();
        assert!(error.contains("has 81 bytes, but at most 80 are safe"), "{error}");
    }
}
