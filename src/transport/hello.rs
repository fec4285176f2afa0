//! The HELLO socket: who may subscribe, and who is still alive.
//!
//! One thread owns the listening socket and every connection. A connection sends one
//! [`ClientHello`], is answered, and then stays open as the sign of life: the kernel hangs it up
//! when the client dies. A forked child can keep the socket open after its parent's death, so the
//! client's pidfd is watched too.

use std::cell::RefCell;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags};
use tracing::{debug, info, warn};

use crate::gpu::Gpus;
use crate::limits::{HELLO_BYTES_MAX, RESERVED_FDS, SESSION_FDS, SESSIONS_MAX};

use super::gpu_slab;
use super::provider::StreamProvider;
use super::request::check_request;
use super::server::{ServerEvent, ServerHandle};
use super::session::{Peer, Session};
use super::waker::Waker;
use super::welcome::welcome;
use super::windows::Windows;
use super::wire::{
    self, ClientHello, ErrorCode, HelloReply, PROTOCOL_VERSION, Refusal, ServerHello,
    StreamRequest, WireError,
};

/// A connection that says nothing for this long is closed.
const HELLO_WAIT_MAX: Duration = Duration::from_secs(5);
/// File descriptors in a welcome: the slab's, the window's, and the pipe's of a slab on a GPU.
const FDS_MAX: usize = 3;
/// How long a daemon that cannot accept a client waits.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Connections waiting to be accepted.
const BACKLOG: i32 = 128;

/// Everything the HELLO thread works with.
pub(super) struct HelloThread {
    pub(super) listener: OwnedFd,
    pub(super) stop: Waker,
    pub(super) server: ServerHandle,
    pub(super) provider: Arc<dyn StreamProvider>,
    /// Users who may subscribe, beside root and the daemon's own.
    pub(super) allowed_uids: Vec<u32>,
    /// Where clients connect their DEALER socket.
    pub(super) data_endpoint: String,
    /// What the members of broadcast groups share.
    pub(super) windows: RefCell<Windows>,
    pub(super) gpus: Gpus,
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
    socket: OwnedFd,
    state: ConnectionState,
}

enum ConnectionState {
    Silent { since: Instant, peer: rustix::net::UCred },
    Live { session: u64, process: Option<OwnedFd> },
}

impl HelloThread {
    /// Serves until `stop` is woken.
    pub(super) fn run(self) {
        let mut connections: Vec<Connection> = Vec::new();
        loop {
            let timeout = next_timeout(&connections);
            let Ok(ready) = wait(&self.listener, &self.stop, &connections, timeout) else {
                continue;
            };
            if ready.stop {
                return;
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
                ConnectionState::Silent { since, .. } => now < since + HELLO_WAIT_MAX,
                ConnectionState::Live { .. } => true,
            });
            if ready.listener {
                self.accept(&mut connections);
            }
        }
    }

    fn accept(&self, connections: &mut Vec<Connection>) {
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
        if connections.len() >= n_max {
            let n_connected = connections.len();
            let refusal = Refusal::new(
                ErrorCode::Exhausted,
                format!("{n_connected} clients are connected already, and the limit is {n_max}"),
            );
            return refuse(socket.as_fd(), refusal.with_hint(
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
            return refuse(
                socket.as_fd(),
                refusal.with_hint("add the user to 'allowed_uids' in the daemon's configuration"),
            );
        }
        let state = ConnectionState::Silent { since: Instant::now(), peer };
        connections.push(Connection { socket, state });
    }

    fn is_allowed(&self, uid: u32) -> bool {
        uid == 0 || uid == rustix::process::geteuid().as_raw() || self.allowed_uids.contains(&uid)
    }

    /// Handles an event of a connection; `false` ends it.
    fn serve(&self, connection: &mut Connection) -> bool {
        let ConnectionState::Silent { peer, .. } = connection.state else {
            // A live client has nothing more to say here: any event is its end.
            return false;
        };
        let socket = connection.socket.as_fd();
        match self.open_session(socket, peer) {
            Ok(None) => true,
            Ok(Some(session)) => {
                // Fails if the process has gone already; then the socket has hung up, too.
                let process = rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()).ok();
                connection.state = ConnectionState::Live { session, process };
                true
            }
            Err(refusal) => {
                debug!(?refusal, "refused a client");
                refuse(socket, refusal);
                false
            }
        }
    }

    /// Reads the hello and answers it; `None`: it has not come yet.
    fn open_session(
        &self,
        socket: BorrowedFd<'_>,
        peer: rustix::net::UCred,
    ) -> Result<Option<u64>, Refusal> {
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
        let own_pid = peer.pid;
        let peer = Peer {
            client: hello.client,
            pid: Some(pid_number(peer.pid)),
            uid: Some(peer.uid.as_raw()),
        };
        let (session, pipe) = self.session_of(&hello.request, &peer, own_pid)?;
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
        self.server
            .send(ServerEvent::Open(Box::new(session)))
            .map_err(|()| Refusal::new(ErrorCode::Stopping, "the daemon is stopping"))?;
        if let Err(error) = answer(socket, reply, &fds) {
            debug!(%error, "the client left before its welcome");
            let _ = self.server.send(ServerEvent::HungUp { session: session_id });
        }
        Ok(Some(session_id))
    }

    /// Opens a session, with a slab on the GPU that is asked for, if that can be, and the end of
    /// the pipe for it. Where batches cannot be finished there, they are finished here.
    fn session_of(
        &self,
        request: &StreamRequest,
        peer: &Peer,
        pid: Pid,
    ) -> Result<(Session, Option<OwnedFd>), Refusal> {
        let open = |has_gpu| {
            let stream = self.provider.open(request, has_gpu)?;
            let mut session = Session::open(request.clone(), stream, peer.clone())?;
            session.window = self.windows.borrow_mut().window_of(&session);
            let pipe = gpu_slab::open(&self.gpus, &mut session, pid)?;
            Ok::<_, Refusal>((session, pipe))
        };
        let (session, pipe) = open(gpu_slab::is_wanted(request))?;
        if session.stream.finish.is_none() {
            return Ok((session, pipe));
        }
        if pipe.is_none() {
            warn!(reason = session.gpu_refused, "batches are augmented by the processors");
        } else if gpu_slab::pays(&session) {
            return Ok((session, pipe));
        }
        // Its memory there is not to be in the way of the next one's.
        drop((session, pipe));
        open(false)
    }

    fn report_gone(&self, connection: &Connection) {
        if let ConnectionState::Live { session, .. } = connection.state {
            // Fails only when the server has stopped, and then all sessions are gone.
            let _ = self.server.send(ServerEvent::HungUp { session });
        }
    }
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

fn refuse(socket: BorrowedFd<'_>, refusal: Refusal) {
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
    listener: bool,
    /// Rising.
    connections: Vec<usize>,
}

fn next_timeout(connections: &[Connection]) -> Option<Duration> {
    let now = Instant::now();
    let deadlines = connections.iter().filter_map(|connection| match connection.state {
        ConnectionState::Silent { since, .. } => Some(since + HELLO_WAIT_MAX),
        ConnectionState::Live { .. } => None,
    });
    deadlines.min().map(|deadline| deadline.saturating_duration_since(now))
}

fn wait(
    listener: &OwnedFd,
    stop: &Waker,
    connections: &[Connection],
    timeout: Option<Duration>,
) -> rustix::io::Result<Ready> {
    let mut fds = Vec::with_capacity(2 + 2 * connections.len());
    fds.push(PollFd::new(stop, PollFlags::IN));
    fds.push(PollFd::new(listener, PollFlags::IN));
    let mut owners = Vec::with_capacity(2 * connections.len());
    for (connection_idx, connection) in connections.iter().enumerate() {
        let (flags, process) = match &connection.state {
            ConnectionState::Silent { .. } => (PollFlags::IN, None),
            ConnectionState::Live { process, .. } => (PollFlags::RDHUP, process.as_ref()),
        };
        fds.push(PollFd::new(&connection.socket, flags));
        owners.push(connection_idx);
        if let Some(process) = process {
            fds.push(PollFd::new(process, PollFlags::IN));
            owners.push(connection_idx);
        }
    }
    let timeout = timeout.map(|timeout| {
        // Rounded up to whole milliseconds, so that the deadline has passed when `poll` returns.
        let timeout = timeout + Duration::from_millis(1);
        Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        }
    });
    poll(&mut fds, timeout.as_ref())?;
    let fired = |fd: &PollFd<'_>| !fd.revents().is_empty();
    let mut connections: Vec<usize> =
        fds[2..].iter().zip(owners).filter_map(|(fd, owner)| fired(fd).then_some(owner)).collect();
    connections.dedup();
    Ok(Ready { stop: fired(&fds[0]), listener: fired(&fds[1]), connections })
}

fn pid_number(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
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
