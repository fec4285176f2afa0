//! The blocking client of the control socket, as `fastaa-ctl` uses it.
//!
//! Owns one connection. Never retries: a control command is repeated by whoever gave it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::messages::{ControlFailure, Reply, ReplyLine, Request};
use super::paths::RuntimePaths;
use crate::limits;

/// Longest wait for the daemon to take a request or to send more of its reply.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlClientError {
    /// No socket, or nobody behind it.
    #[error("no daemon answers on {path}: {source}")]
    NoDaemon {
        /// The control socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket's permissions keep this user out.
    #[error("this user may not connect to {path}: {source}")]
    Denied {
        /// The control socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the daemon on {path} does not answer: {source}")]
    Broken {
        /// The control socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What came is no reply, or not one to this request.
    #[error("the daemon on {path} sent no valid reply: {problem}")]
    Malformed {
        /// The control socket.
        path: String,
        /// What is wrong.
        problem: String,
    },
    /// The daemon refused.
    #[error(transparent)]
    Failure(#[from] ControlFailure),
}

impl ControlClientError {
    /// What to do about it, or empty.
    pub fn hint(&self) -> &str {
        match self {
            Self::NoDaemon { .. } => "start one: fastaa-loaderd --config FILE",
            Self::Denied { .. } => "run it as root or as the daemon's user",
            Self::Broken { .. } => "see the daemon's log",
            Self::Malformed { .. } => "use fastaa-ctl of the daemon's version",
            Self::Failure(failure) => &failure.hint,
        }
    }
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl ControlClient {
    /// Connects to the daemon of that runtime folder.
    ///
    /// # Errors
    /// Nobody listens there, or this user may not connect.
    pub fn connect(paths: &RuntimePaths) -> Result<Self, ControlClientError> {
        let path = paths.control_socket();
        let connected = UnixStream::connect(&path).and_then(|stream| {
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => Ok(Self { stream: BufReader::new(stream), path }),
            Err(source) => {
                let path = path.display().to_string();
                Err(match source.kind() {
                    io::ErrorKind::PermissionDenied => ControlClientError::Denied { path, source },
                    _ => ControlClientError::NoDaemon { path, source },
                })
            }
        }
    }

    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// The daemon refuses, hangs up, stays silent for 30 s, or talks nonsense.
    pub fn call(&mut self, request: &Request) -> Result<Reply, ControlClientError> {
        let mut line = serde_json::to_vec(request)
            .map_err(|error| self.malformed(format!("the request is no JSON: {error}")))?;
        line.push(b'\n');
        let written = self.stream.get_mut().write_all(&line);
        // A server that refuses closes early, but has said why: its line is read all the same.
        match (written, self.read_reply()) {
            (Err(source), Err(ControlClientError::Broken { .. })) => Err(self.broken(source)),
            (_, reply) => reply,
        }
    }

    fn read_reply(&mut self) -> Result<Reply, ControlClientError> {
        let mut line = Vec::new();
        let limit = limits::CONTROL_BYTES_MAX as u64 + 1;
        let read = self.stream.by_ref().take(limit).read_until(b'\n', &mut line);
        read.map_err(|source| self.broken(source))?;
        if line.last() != Some(&b'\n') {
            if line.len() as u64 == limit {
                return Err(self.malformed(format!("it is longer than {limit} bytes")));
            }
            return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_slice(&line) {
            Ok(ReplyLine::Ok(reply)) => Ok(reply),
            Ok(ReplyLine::Error(failure)) => Err(failure.into()),
            Err(error) => Err(self.malformed(error.to_string())),
        }
    }

    /// The error for a reply that does not fit its request.
    pub fn unexpected(&self, reply: &Reply) -> ControlClientError {
        let name = serde_json::to_value(reply).ok();
        let name = name.as_ref().and_then(|value| value["reply"].as_str()).unwrap_or("?");
        self.malformed(format!("'{name}' is no reply to this request"))
    }

    fn broken(&self, source: io::Error) -> ControlClientError {
        ControlClientError::Broken { path: self.path.display().to_string(), source }
    }

    fn malformed(&self, problem: String) -> ControlClientError {
        ControlClientError::Malformed { path: self.path.display().to_string(), problem }
    }
}
