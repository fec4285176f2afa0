//! The control socket's server: connections, limits and peers; what requests mean is the
//! [`Handler`]'s.
//!
//! Owns the socket file from bind to stop. Never blocks the runtime: requests are parsed and
//! handled on blocking threads, one at a time per connection.
//!
//! *Invariants*: whatever a peer sends, the daemon stays up and other connections are served. A
//! peer that is neither root, nor the daemon's user, nor allowed by the caller gets one refusal
//! and no request of it is read.
//!
//! *Limits*: [`limits::CONTROL_BYTES_MAX`] per line both ways, connections at once and idle time
//! by [`ServerOptions`].

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::messages::{ControlFailure, FailureCode, Reply, ReplyLine, Request};
use crate::limits;

/// Carries requests out. A panic in it becomes an error reply.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request; may block.
    ///
    /// # Errors
    /// Whatever the peer is to be told.
    fn handle(&self, request: Request) -> Result<Reply, ControlFailure>;
}

/// How a server treats its peers.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Permissions of the socket file.
    pub mode: u32,
    /// Users that may connect besides root and the daemon's own.
    pub allowed_uids: Vec<u32>,
    /// A connection is closed when no whole request comes, or no reply is taken, for this long.
    pub idle_timeout: Duration,
    /// Connections at once, at most.
    pub connections_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            mode: 0o660,
            allowed_uids: Vec::new(),
            idle_timeout: Duration::from_secs(60),
            connections_max: limits::CONTROL_CONNECTIONS_MAX,
        }
    }
}

/// Wait after a failed accept (no file descriptors left), so that it does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long requests under way may take once the server stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// A bound control socket. Peers can connect from [`ControlServer::bind`] on; they are served
/// once [`ControlServer::run`] runs.
#[derive(Debug)]
pub struct ControlServer {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
    options: ServerOptions,
}

impl ControlServer {
    /// Binds the socket. A socket file that is there already is taken for a dead daemon's and
    /// replaced: the caller holds the lock of the runtime folder.
    ///
    /// # Errors
    /// The path is taken by something that is no socket, or cannot be bound.
    pub fn bind(path: &Path, options: ServerOptions) -> io::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => std::fs::remove_file(path)?,
            Ok(_) => {
                let message = format!("{} is there and is no socket; remove it", path.display());
                return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(options.mode))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path: path.to_owned(), options })
    }

    /// Serves until `stop` becomes true or its sender is gone; then removes the socket file,
    /// finishes the requests under way, and closes all connections.
    ///
    /// # Errors
    /// The listener cannot be given to the runtime.
    pub async fn run(
        self,
        handler: Arc<dyn Handler>,
        mut stop: watch::Receiver<bool>,
    ) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener)?;
        let permits = Arc::new(Semaphore::new(self.options.connections_max));
        let options = Arc::new(self.options);
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the control socket cannot accept");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            if let Err(failure) = check_peer(&stream, &options) {
                refuse(&stream, failure);
                continue;
            }
            let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
                refuse(&stream, too_many(&options));
                continue;
            };
            let connection = Connection {
                handler: Arc::clone(&handler),
                options: Arc::clone(&options),
                stop: stop.clone(),
            };
            connections.spawn(async move {
                let _permit = permit;
                if let Err(error) = connection.serve(stream).await {
                    tracing::debug!(%error, "a control connection broke");
                }
            });
        }
        drop(listener);
        let _ = std::fs::remove_file(&self.path);
        let drained =
            timeout(STOP_GRACE, async { while connections.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            tracing::warn!("a control request did not finish in time and was given up");
        }
        Ok(())
    }
}

/// Refuses users that may not control the daemon.
fn check_peer(stream: &UnixStream, options: &ServerOptions) -> Result<(), ControlFailure> {
    let uid = match stream.peer_cred() {
        Ok(credentials) => credentials.uid(),
        Err(error) => {
            let message = format!("the kernel does not say who connects: {error}");
            return Err(ControlFailure::new(FailureCode::Forbidden, message));
        }
    };
    let own = rustix::process::geteuid().as_raw();
    if uid == 0 || uid == own || options.allowed_uids.contains(&uid) {
        return Ok(());
    }
    tracing::warn!(uid, "refused a control connection");
    let message = format!("user {uid} may not control this daemon");
    Err(ControlFailure::new(FailureCode::Forbidden, message)
        .with_hint("run it as root or as the daemon's user, or allow that user in its config"))
}

fn too_many(options: &ServerOptions) -> ControlFailure {
    let message = format!("{} control connections are open already", options.connections_max);
    ControlFailure::new(FailureCode::Exhausted, message).with_hint("try again in a moment")
}

/// One line to a peer that is not served. It fits an empty socket buffer, so nothing waits.
fn refuse(stream: &UnixStream, failure: ControlFailure) {
    let _ = stream.try_write(&encode(&ReplyLine::Error(failure)));
}

/// What a connection shares with the server.
struct Connection {
    handler: Arc<dyn Handler>,
    options: Arc<ServerOptions>,
    stop: watch::Receiver<bool>,
}

impl Connection {
    async fn serve(mut self, stream: UnixStream) -> io::Result<()> {
        let (read, mut write) = stream.into_split();
        let mut reader = BufReader::new(read);
        loop {
            let line = tokio::select! {
                biased;
                _ = self.stop.wait_for(|stop| *stop) => return Ok(()),
                line = timeout(self.options.idle_timeout, read_line(&mut reader)) => line,
            };
            let (reply, is_last) = match line {
                Err(_elapsed) => return Ok(()),
                Ok(line) => match line? {
                    Line::End => return Ok(()),
                    Line::TooLong => (encode(&ReplyLine::Error(too_long())), true),
                    Line::Whole(line) => (self.answer(line).await, false),
                },
            };
            timeout(self.options.idle_timeout, write.write_all(&reply)).await??;
            if is_last {
                return Ok(());
            }
        }
    }

    async fn answer(&self, line: Vec<u8>) -> Vec<u8> {
        let handler = Arc::clone(&self.handler);
        let answered = tokio::task::spawn_blocking(move || {
            let result = serde_json::from_slice::<Request>(&line)
                .map_err(|error| malformed(&error))
                .and_then(|request| handler.handle(request));
            encode(&match result {
                Ok(reply) => ReplyLine::Ok(reply),
                Err(failure) => ReplyLine::Error(failure),
            })
        });
        answered.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a control request failed");
            let message = "the daemon failed over this request; its log says where";
            encode(&ReplyLine::Error(ControlFailure::new(FailureCode::Internal, message)))
        })
    }
}

fn malformed(error: &serde_json::Error) -> ControlFailure {
    ControlFailure::new(FailureCode::Invalid, format!("not a request: {error}"))
        .with_hint("a request is one JSON object on one line, like {\"request\": \"status\"}")
}

fn too_long() -> ControlFailure {
    let limit = limits::CONTROL_BYTES_MAX;
    ControlFailure::new(FailureCode::Invalid, format!("a request has at most {limit} bytes"))
}

enum Line {
    Whole(Vec<u8>),
    TooLong,
    End,
}

/// Reads up to a line feed, or the peer's end, without holding more than the limit.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Line> {
    let mut line = Vec::new();
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(if line.is_empty() { Line::End } else { Line::Whole(line) });
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let part = &chunk[..end.unwrap_or(chunk.len())];
        if line.len() + part.len() > limits::CONTROL_BYTES_MAX {
            return Ok(Line::TooLong);
        }
        line.extend_from_slice(part);
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            return Ok(Line::Whole(line));
        }
    }
}

/// A reply with its line feed, or the failure that it is too long.
fn encode(reply: &ReplyLine) -> Vec<u8> {
    let failure = match serde_json::to_vec(reply) {
        Ok(mut bytes) if bytes.len() < limits::CONTROL_BYTES_MAX => {
            bytes.push(b'\n');
            return bytes;
        }
        Ok(bytes) => format!("the reply of {} bytes is over the limit", bytes.len()),
        Err(error) => format!("the reply cannot be written as JSON: {error}"),
    };
    // The text has nothing that JSON would escape but what serde_json escapes here.
    let message = serde_json::Value::from(failure);
    format!("{{\"error\":{{\"code\":\"internal\",\"message\":{message},\"hint\":\"\"}}}}\n")
        .into_bytes()
}
