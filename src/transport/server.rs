//! The stream server from outside: start, speak to it, ask it, end it.
//!
//! Owns the sockets' set-up and the threads. *Not here*: what happens in them (`event_loop`,
//! `hello`), what a stream contains (the provider knows), pixels (the pool writes them).

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, TrySendError, bounded};

use crate::gpu::Gpus;
use crate::limits::{FRAME_BYTES_MAX, SERVER_EVENTS_MAX, SESSIONS_MAX};
use crate::pipeline::workers::{WorkerCounters, WorkerPool};

use super::event_loop::EventLoop;
use super::hello::{self, HelloThread};
use super::opener::Opener;
use super::provider::StreamProvider;
use super::session::Session;
use super::waker::Waker;

/// How long the last frames may take to leave.
const LINGER_MS: i32 = 1000;
/// ZMTP heartbeat over TCP: every this often, dead after three.
const HEARTBEAT_MS: i32 = 5000;

/// What the server listens on and works with.
pub struct ServerConfig<'a> {
    /// Path of the HELLO socket.
    pub hello_path: &'a Path,
    /// Path of the data socket.
    pub data_path: &'a Path,
    /// `HOST:PORT` for TCP, if wanted.
    pub tcp: Option<&'a str>,
    /// What TCP clients must know.
    pub tcp_token: String,
    /// Users who may subscribe, beside root and the daemon's own.
    pub allowed_uids: Vec<u32>,
    /// Worker threads.
    pub n_threads: usize,
    /// Datasets and policies.
    pub provider: Arc<dyn StreamProvider>,
    /// Most memory of batches on one GPU, in bytes.
    pub gpu_memory_bytes: u64,
}

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A socket cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The system refuses a thread, a descriptor or memory.
    #[error("cannot start the stream server: {0}")]
    System(#[from] io::Error),
}

/// What other threads tell the server.
pub(super) enum ServerEvent {
    /// A client was let in.
    Open(Box<Session>),
    /// A client is dead.
    HungUp { session: u64 },
    /// Describe all sessions.
    Report(Sender<ServerReport>),
    /// Finish what is being filled, say good-bye, end.
    Drain,
}

/// What the server tells about itself.
#[derive(Clone, Debug, Default)]
pub struct ServerReport {
    /// Every session.
    pub sessions: Vec<SessionReport>,
    /// Frames that were no message, or not at their place.
    pub n_bad_frames: u64,
    /// Frames of no session: late words of a client that has gone, or a guess.
    pub n_orphan_frames: u64,
    /// Releases that named a slot's former life, or none.
    pub n_stale_releases: u64,
}

/// What is known of one consumer.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names and wire.rs say it")]
pub struct SessionReport {
    pub session: u64,
    pub dataset: String,
    pub split: String,
    pub client: String,
    pub pid: Option<i32>,
    pub uid: Option<u32>,
    pub is_tcp: bool,
    pub rank: u32,
    pub world_size: u32,
    pub group: String,
    pub batch_size: u32,
    pub epoch: u64,
    pub step: u64,
    pub next_offset: u64,
    pub batches_sent: u64,
    pub samples_sent: u64,
    pub n_leased: u32,
    pub n_free: u32,
    pub n_slots: u32,
    pub policy: String,
    pub policy_version: u64,
    pub images_per_second: f64,
    pub is_replay: bool,
    pub is_broadcast: bool,
    pub batches_shared: u64,
    pub is_beyond_window: bool,
}

/// Speaks to the server thread; cheap to clone.
#[derive(Clone)]
pub struct ServerHandle {
    events: Sender<ServerEvent>,
    waker: Waker,
}

impl ServerHandle {
    /// Queues an event; `Err`: the server has ended.
    pub(super) fn send(&self, event: ServerEvent) -> Result<(), ()> {
        let result = match self.events.try_send(event) {
            Ok(()) => Ok(()),
            // The server drains without blocking, so waiting for room is short.
            Err(TrySendError::Full(event)) => self.events.send(event).map_err(|_| ()),
            Err(TrySendError::Disconnected(_)) => Err(()),
        };
        self.waker.wake();
        result
    }

    /// Asks the server thread for its state; `None`: it has ended.
    pub fn report(&self) -> Option<ServerReport> {
        let (sender, receiver) = bounded(1);
        self.send(ServerEvent::Report(sender)).ok()?;
        receiver.recv().ok()
    }

    /// Begins a graceful end: batches that are being filled are delivered, then good-bye.
    pub fn drain(&self) {
        // Fails only if it has ended already.
        let _ = self.send(ServerEvent::Drain);
    }
}

/// The running server; [`StreamServer::join`] waits for its end.
pub struct StreamServer {
    handle: ServerHandle,
    hello_stop: Waker,
    counters: Arc<WorkerCounters>,
    tcp_endpoint: Option<String>,
    server_thread: JoinHandle<()>,
    hello_thread: JoinHandle<()>,
}

impl StreamServer {
    /// Binds the sockets and starts the threads.
    ///
    /// # Errors
    /// A socket cannot be bound, or the system refuses a resource.
    pub fn start(config: ServerConfig<'_>) -> Result<Self, ServerError> {
        let waker = Waker::new()?;
        let pool_waker = waker.clone();
        let pool = WorkerPool::start(config.n_threads, move || pool_waker.wake())?;
        let counters = Arc::clone(pool.counters());
        let gpu_waker = waker.clone();
        let (gpus, gpu_news) = Gpus::new(config.gpu_memory_bytes, move || gpu_waker.wake());
        let (events, event_receiver) = bounded(SERVER_EVENTS_MAX);
        let handle = ServerHandle { events, waker: waker.clone() };

        let context = zmq::Context::new();
        let data_endpoint = format!("ipc://{}", config.data_path.display());
        let local = bind_router(&context, &data_endpoint, None)?;
        let (tcp, tcp_endpoint) = match config.tcp {
            None => (None, None),
            Some(address) => {
                let endpoint = format!("tcp://{address}");
                let socket = bind_router(&context, &endpoint, Some(HEARTBEAT_MS))?;
                let bound = socket.get_last_endpoint().ok().and_then(Result::ok);
                (Some(socket), Some(bound.unwrap_or(endpoint)))
            }
        };
        let listener = hello::bind(config.hello_path).map_err(|error| ServerError::Bind {
            address: config.hello_path.display().to_string(),
            source: error.into(),
        })?;
        let hello_stop = Waker::new()?;
        let hello_thread = HelloThread {
            listener,
            stop: hello_stop.clone(),
            server: handle.clone(),
            opener: Arc::new(Opener::new(Arc::clone(&config.provider), gpus)),
            opened: bounded(SESSIONS_MAX),
            has_opened: Waker::new()?,
            allowed_uids: config.allowed_uids,
            data_endpoint,
        };
        let event_loop = EventLoop::new(
            local,
            tcp.map(|socket| (socket, config.tcp_token)),
            waker,
            event_receiver,
            (pool, gpu_news),
            config.provider,
        );
        let hello_thread =
            std::thread::Builder::new().name("hello".into()).spawn(move || hello_thread.run())?;
        let server_thread =
            std::thread::Builder::new().name("server".into()).spawn(move || event_loop.run())?;
        Ok(Self { handle, hello_stop, counters, tcp_endpoint, server_thread, hello_thread })
    }

    /// For other threads to speak to it.
    pub fn handle(&self) -> ServerHandle {
        self.handle.clone()
    }

    /// Counters of its worker pool.
    pub fn worker_counters(&self) -> Arc<WorkerCounters> {
        Arc::clone(&self.counters)
    }

    /// Where TCP clients connect, with the real port.
    pub fn tcp_endpoint(&self) -> Option<&str> {
        self.tcp_endpoint.as_deref()
    }

    /// Whether a thread ended without being asked to.
    pub fn has_ended(&self) -> bool {
        self.server_thread.is_finished() || self.hello_thread.is_finished()
    }

    /// Drains and waits until all threads have ended; `false`: one of them panicked.
    pub fn join(self) -> bool {
        // The server first: a client takes the end of its HELLO socket for the daemon's death, and
        // would not wait for the good-bye.
        self.handle.drain();
        let server_ok = self.server_thread.join().is_ok();
        self.hello_stop.wake();
        let hello_ok = self.hello_thread.join().is_ok();
        server_ok && hello_ok
    }
}

fn bind_router(
    context: &zmq::Context,
    endpoint: &str,
    heartbeat_ms: Option<i32>,
) -> Result<zmq::Socket, ServerError> {
    let bind = || -> zmq::Result<zmq::Socket> {
        let socket = context.socket(zmq::ROUTER)?;
        socket.set_linger(LINGER_MS)?;
        // A frame to a client that is not there is an error, not a silent loss.
        socket.set_router_mandatory(true)?;
        socket.set_maxmsgsize(i64::try_from(FRAME_BYTES_MAX).expect("64 KiB"))?;
        // Credits bound what is queued; a high-water mark would only drop.
        socket.set_sndhwm(0)?;
        if let Some(interval_ms) = heartbeat_ms {
            socket.set_heartbeat_ivl(interval_ms)?;
            socket.set_heartbeat_timeout(3 * interval_ms)?;
        }
        socket.bind(endpoint)?;
        Ok(socket)
    };
    bind().map_err(|error| ServerError::Bind {
        address: endpoint.to_owned(),
        source: io::Error::from_raw_os_error(error.to_raw()),
    })
}
