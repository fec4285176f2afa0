//! The HELLO socket: who may subscribe, and who is still alive.
//!
//! One thread owns the listening socket and every connection. A connection sends one
//! [`ClientHello`], is answered, and then stays open as the sign of life: the kernel hangs it up
//! when the client dies. A forked child can keep the socket open after its parent's death, so the
//! client's pidfd is watched too. A slab on a GPU takes its time: another thread opens such a
//! session, and this one serves the others meanwhile.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::process::PidfdFlags;
use tracing::{debug, info, warn};

use crate::limits::{HELLO_BYTES_MAX, RESERVED_FDS, SESSION_FDS, SESSIONS_MAX};

use super::gpu_slab;
use super::opener::{LocalPeer, Opened, Opener};
use super::request::check_request;
use super::server::{ServerEvent, ServerHandle};
use super::waker::Waker;
use super::welcome::welcome;
use super::wire::{
    self, ClientHello, ErrorCode, HelloReply, PROTOCOL_VERSION, Refusal, ServerHello, WireError,
};

/// A connection that says nothing for this long is closed.
const HELLO_WAIT_MAX: Duration = Duration::from_secs(5);
/// File descriptors in a welcome: the slab's, the window's, and the pipe's of a slab on a GPU.
const FDS_MAX: usize = 3;
/// How long a daemon that cannot accept a client waits.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// What this thread waits for beside connections: two wakers and the listener.
const N_OWN_FDS: usize = 3;
/// Connections waiting to be accepted.
const BACKLOG: i32 = 128;

/// What was opened for the connection with this number.
pub(super) type Numbered = (u64, Opened);

/// Everything the HELLO thread works with.
pub(super) struct HelloThread {
    pub(super) listener: OwnedFd,
    pub(super) stop: Waker,
    pub(super) server: ServerHandle,
    pub(super) opener: Arc<Opener>,
    /// Tells of sessions that other threads have opened.
    pub(super) opened: (Sender<Numbered>, Receiver<Numbered>),
    /// Woken after each.
    pub(super) has_opened: Waker,
    /// Users who may subscribe, beside root and the daemon's own.
    pub(super) allowed_uids: Vec<u32>,
    /// Where clients connect their DEALER socket.
    pub(super) data_endpoint: String,
}

/// Binds the HELLO socket. The caller holds the lock on the directory.
///
/// # Errors
/// The path is too long or cannot be bound.
pub(super) fn bind(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// How many clients there may be: libzmq ends the process that has no file descriptor left for one.
fn n_connections_max() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let fitting = limit.map(|limit| limit.saturating_sub(RESERVED_FDS) / SESSION_FDS);
    let fitting = fitting.map_or(SESSIONS_MAX, |n| usize::try_from(n).unwrap_or(SESSIONS_MAX));
    fitting.clamp(1, SESSIONS_MAX)
}

struct Connection {
    /// No two have the same.
    number: u64,
    socket: OwnedFd,
    peer: LocalPeer,
    state: ConnectionState,
}

enum ConnectionState {
    Silent {
        since: Instant,
    },
    /// Its session is being opened.
    Opening,
    Live {
        session: u64,
    },
}

impl HelloThread {
    /// Serves until `stop` is woken.
    pub(super) fn run(self) {
        let mut connections: Vec<Connection> = Vec::new();
        let mut n_accepted = 0;
        loop {
            let timeout = next_timeout(&connections);
            let Ok(ready) = self.wait(&connections, timeout) else {
                continue;
            };
            if ready.stop {
                return refuse_waiting(&connections);
            }
            // Before anybody is served, which may take its time: what comes meanwhile is read next.
            let now = Instant::now();
            for connection_idx in ready.connections.into_iter().rev() {
                if !self.serve(&mut connections[connection_idx]) {
                    let gone = connections.swap_remove(connection_idx);
                    self.report_gone(&gone);
                }
            }
            connections.retain(|connection| match connection.state {
                ConnectionState::Silent { since } => now < since + HELLO_WAIT_MAX,
                ConnectionState::Opening | ConnectionState::Live { .. } => true,
            });
            if ready.opened {
                self.has_opened.clear();
                self.admit_opened(&mut connections);
            }
            if ready.listener {
                n_accepted += 1;
                self.accept(&mut connections, n_accepted);
            }
        }
    }

    fn accept(&self, connections: &mut Vec<Connection>, number: u64) {
        let accepted =
            rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let socket = match accepted {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Err(error) => {
                warn!(%error, "cannot accept a client: raise LimitNOFILE (ulimit -n)?");
                // The listener stays readable, and nothing else would slow this down.
                let _ = poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&ACCEPT_PAUSE));
                return;
            }
        };
        let Ok(peer) = rustix::net::sockopt::socket_peercred(&socket) else { return };
        let n_max = n_connections_max();
        // What is being opened counts for itself: its client may not have waited.
        let n_connected = connections.len() + Arc::strong_count(&self.opener) - 1;
        if n_connected >= n_max {
            let refusal = Refusal::new(
                ErrorCode::Exhausted,
                format!("{n_connected} clients are connected already, and the limit is {n_max}"),
            );
            return tell_refusal(socket.as_fd(), refusal.with_hint(
                "close some, or raise the daemon's limit of open files (LimitNOFILE, ulimit -n)",
            ));
        }
        let uid = peer.uid.as_raw();
        if !self.is_allowed(uid) {
            warn!(uid, pid = peer.pid.as_raw_nonzero(), "refused a client of a foreign user");
            let own = rustix::process::geteuid().as_raw();
            let refusal = Refusal::new(
                ErrorCode::Forbidden,
                format!("user {uid} may not subscribe to the daemon of user {own}"),
            );
            return tell_refusal(
                socket.as_fd(),
                refusal.with_hint("add the user to 'allowed_uids' in the daemon's configuration"),
            );
        }
        let process = match rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()) {
            Ok(process) => Some(Arc::new(process)),
            // It has gone already; a child may have the socket, but has not spoken yet.
            Err(Errno::SRCH) => return,
            Err(error) => {
                debug!(%error, "a client's process cannot be watched");
                None
            }
        };
        let peer = LocalPeer { pid: peer.pid, uid: peer.uid, process };
        let state = ConnectionState::Silent { since: Instant::now() };
        connections.push(Connection { number, socket, peer, state });
    }

    fn is_allowed(&self, uid: u32) -> bool {
        uid == 0 || uid == rustix::process::geteuid().as_raw() || self.allowed_uids.contains(&uid)
    }

    /// Handles an event of a connection; `false` ends it.
    fn serve(&self, connection: &mut Connection) -> bool {
        let ConnectionState::Silent { .. } = connection.state else {
            // Such a client has nothing more to say here: any event is its end.
            return false;
        };
        match read_hello(connection.socket.as_fd()) {
            Ok(None) => true,
            Ok(Some(hello)) if gpu_slab::is_wanted(&hello.request) => {
                self.begin_to_open(connection, hello)
            }
            Ok(Some(hello)) => {
                let opened = self.opener.open(hello, &connection.peer);
                self.admit(connection, opened)
            }
            Err(refusal) => refuse(connection, refusal),
        }
    }

    /// Has a thread of its own open the session.
    fn begin_to_open(&self, connection: &mut Connection, hello: ClientHello) -> bool {
        let (number, peer) = (connection.number, connection.peer.clone());
        let (opener, has_opened) = (Arc::clone(&self.opener), self.has_opened.clone());
        let sender = self.opened.0.clone();
        let work = move || {
            let opened = catch_unwind(AssertUnwindSafe(|| opener.open(hello, &peer)));
            let opened = opened.unwrap_or_else(|_| {
                let message = "opening the stream panicked; the daemon's log has more";
                Err(Refusal::new(ErrorCode::Internal, message))
            });
            // Fails only if the daemon has ended.
            let _ = sender.send((number, opened));
            has_opened.wake();
        };
        let begun = std::thread::Builder::new().name("open".into()).spawn(work);
        if let Err(error) = begun {
            let message = format!("no thread to open a slab on a GPU: {error}");
            return refuse(connection, Refusal::new(ErrorCode::Exhausted, message));
        }
        connection.state = ConnectionState::Opening;
        true
    }

    /// Lets those in whose session has been opened meanwhile. What was opened for a client that has
    /// gone is dropped.
    fn admit_opened(&self, connections: &mut Vec<Connection>) {
        for (number, opened) in self.opened.1.try_iter() {
            let found = connections.iter().position(|connection| connection.number == number);
            let Some(connection_idx) = found else { continue };
            if !self.admit(&mut connections[connection_idx], opened) {
                connections.swap_remove(connection_idx);
            }
        }
    }

    /// Registers the session and answers the client; `false` ends the connection.
    fn admit(&self, connection: &mut Connection, opened: Opened) -> bool {
        let (session, mut pipe) = match opened {
            Ok(opened) => opened,
            Err(refusal) => return refuse(connection, refusal),
        };
        let (session_id, slab) = (session.id, Arc::clone(&session.slab));
        let window = session.window.clone();
        let reply = HelloReply::Welcome(welcome(&session, &self.data_endpoint));
        info!(
            session = format_args!("{session_id:016x}"),
            client = session.peer.client,
            pid = session.peer.pid,
            dataset = session.request.dataset,
            split = session.request.split,
            batch_size = session.request.batch_size,
            rank = session.request.rank,
            world_size = session.request.world_size,
            is_on_gpu = session.gpu.is_some(),
            augments_on_gpu = session.gpu_layout.is_some(),
            "client subscribed"
        );
        let fds: Vec<BorrowedFd<'_>> = std::iter::once((*slab).as_fd())
            .chain(window.iter().map(|window| (*window.slab).as_fd()))
            .chain(pipe.iter().map(AsFd::as_fd))
            .collect();
        // Registered before the client knows its token, so that its first frame finds the session.
        if self.server.send(ServerEvent::Open(Box::new(session))).is_err() {
            let refusal = Refusal::new(ErrorCode::Stopping, "the daemon is stopping");
            return refuse(connection, refusal);
        }
        let answered = answer(connection.socket.as_fd(), reply, &fds);
        match answered {
            Ok(()) => {
                if let Some(pipe) = &mut pipe {
                    pipe.is_given();
                }
            }
            Err(error) => {
                debug!(%error, "the client left before its welcome");
                let _ = self.server.send(ServerEvent::HungUp { session: session_id });
            }
        }
        connection.state = ConnectionState::Live { session: session_id };
        true
    }

    fn report_gone(&self, connection: &Connection) {
        if let ConnectionState::Live { session, .. } = connection.state {
            // Fails only when the server has stopped, and then all sessions are gone.
            let _ = self.server.send(ServerEvent::HungUp { session });
        }
    }

    fn wait(
        &self,
        connections: &[Connection],
        timeout: Option<Duration>,
    ) -> rustix::io::Result<Ready> {
        let mut fds = Vec::with_capacity(N_OWN_FDS + 2 * connections.len());
        let own = [self.stop.as_fd(), self.has_opened.as_fd(), self.listener.as_fd()];
        fds.extend(own.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let mut owners = Vec::with_capacity(2 * connections.len());
        for (connection_idx, connection) in connections.iter().enumerate() {
            let (flags, process) = match &connection.state {
                ConnectionState::Silent { .. } => (PollFlags::IN, None),
                ConnectionState::Opening | ConnectionState::Live { .. } => {
                    (PollFlags::RDHUP, connection.peer.process.as_deref())
                }
            };
            fds.push(PollFd::new(&connection.socket, flags));
            owners.push(connection_idx);
            if let Some(process) = process {
                fds.push(PollFd::new(process, PollFlags::IN));
                owners.push(connection_idx);
            }
        }
        let timeout = timeout.map(|timeout| {
            // Rounded up to whole milliseconds: the deadline has passed when `poll` returns.
            let timeout = timeout + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(timeout.subsec_nanos()),
            }
        });
        poll(&mut fds, timeout.as_ref())?;
        let fired = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let mut connections: Vec<usize> = fds[N_OWN_FDS..]
            .iter()
            .zip(owners)
            .filter_map(|(fd, owner)| fired(fd).then_some(owner))
            .collect();
        connections.dedup();
        let [stop, opened, listener] = [0, 1, 2].map(|own| fired(&fds[own]));
        Ok(Ready { stop, opened, listener, connections })
    }
}

/// Tells those who wait for an answer that there will be none.
fn refuse_waiting(connections: &[Connection]) {
    let is_waiting = |connection: &&Connection| {
        matches!(connection.state, ConnectionState::Silent { .. } | ConnectionState::Opening)
    };
    for connection in connections.iter().filter(is_waiting) {
        refuse(connection, Refusal::new(ErrorCode::Stopping, "the daemon is stopping"));
    }
}

/// Reads the hello; `None`: it has not come yet.
fn read_hello(socket: BorrowedFd<'_>) -> Result<Option<ClientHello>, Refusal> {
    let mut buffer = vec![0; HELLO_BYTES_MAX];
    let n_bytes = match rustix::net::recv(socket, &mut buffer, RecvFlags::TRUNC) {
        Ok((_, 0)) => {
            return Err(Refusal::new(ErrorCode::Malformed, "the client sent an empty hello"));
        }
        Ok((_, n_bytes)) => n_bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(error) => return Err(Refusal::new(ErrorCode::Malformed, error.to_string())),
    };
    if n_bytes > HELLO_BYTES_MAX {
        let error = WireError::TooLong { bytes: n_bytes, limit: HELLO_BYTES_MAX };
        return Err(Refusal::new(ErrorCode::Malformed, error.to_string()));
    }
    let hello: ClientHello = wire::decode(&buffer[..n_bytes]).map_err(refusal_of)?;
    check_request(&hello.request)?;
    Ok(Some(hello))
}

/// A wire error as a refusal that tells which side is too old.
pub(super) fn refusal_of(error: WireError) -> Refusal {
    match error {
        WireError::Version { theirs } => {
            let older = if theirs < PROTOCOL_VERSION { "client" } else { "daemon" };
            Refusal::new(
                ErrorCode::Protocol,
                format!(
                    "the client speaks protocol version {theirs}, the daemon version \
                     {PROTOCOL_VERSION}"
                ),
            )
            .with_hint(format!("update the {older}"))
        }
        error => Refusal::new(ErrorCode::Malformed, error.to_string())
            .with_hint("only a fastaa client speaks here"),
    }
}

/// Answers with a refusal, which ends the connection.
fn refuse(connection: &Connection, refusal: Refusal) -> bool {
    debug!(?refusal, "refused a client");
    tell_refusal(connection.socket.as_fd(), refusal);
    false
}

fn tell_refusal(socket: BorrowedFd<'_>, refusal: Refusal) {
    if let Err(error) = answer(socket, HelloReply::Refused(refusal), &[]) {
        debug!(%error, "a refused client did not wait for the reason");
    }
}

fn answer(
    socket: BorrowedFd<'_>,
    reply: HelloReply,
    fds: &[BorrowedFd<'_>],
) -> Result<(), std::io::Error> {
    let message = wire::encode(&ServerHello { protocol: PROTOCOL_VERSION, reply })
        .map_err(std::io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(std::io::Error::other("no room for a file descriptor"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

struct Ready {
    stop: bool,
    opened: bool,
    listener: bool,
    /// Rising.
    connections: Vec<usize>,
}

fn next_timeout(connections: &[Connection]) -> Option<Duration> {
    let now = Instant::now();
    let deadlines = connections.iter().filter_map(|connection| match connection.state {
        ConnectionState::Silent { since } => Some(since + HELLO_WAIT_MAX),
        ConnectionState::Opening | ConnectionState::Live { .. } => None,
    });
    deadlines.min().map(|deadline| deadline.saturating_duration_since(now))
}

/// Receives one message and its file descriptors; the client's side of the HELLO.
///
/// # Errors
/// The socket fails or hangs up.
pub(super) fn receive_with_fds(
    socket: BorrowedFd<'_>,
) -> rustix::io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = vec![0; HELLO_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fds = control.drain().flat_map(|message| match message {
        rustix::net::RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let fds = fds.collect();
    buffer.truncate(message.bytes);
    Ok((buffer, fds))
}
