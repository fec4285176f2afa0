//! The stream server's thread: it owns the ZeroMQ sockets and every session.
//!
//! An event loop with one owner of all state. Its events are frames of clients, finished jobs of
//! the worker pool, and [`ServerEvent`]s of other threads; after each it asks the session concerned
//! for its next work until there is none. It never blocks but in `zmq::poll`.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use tracing::{debug, info, warn};

use crate::gpu::GpuNews;
use crate::limits::SESSIONS_MAX;
use crate::pipeline::workers::{FinishedJob, JobTag, WorkerPool};

use super::gpu_slab;
use super::hello::refusal_of;
use super::live::{LiveSession, Rate};
use super::provider::{Run, StreamProvider};
use super::request::{check_request, equal_in_constant_time};
use super::server::{ServerEvent, ServerReport, SessionReport};
use super::session::{Peer, Session, Work};
use super::waker::Waker;
use super::welcome::welcome;
use super::window::Window;
use super::wire::{
    self, BatchDescriptor, ClientBody, ClientFrame, ClientHello, DaemonBody, DaemonFrame,
    EpochBegin, ErrorCode, HelloReply, PROTOCOL_VERSION, Refusal, ServerHello, Start,
};

/// Frames read from one socket before the other sources have their turn.
const FRAMES_PER_TURN_MAX: usize = 256;
/// How long a drain waits for batches that are being filled.
const DRAIN_WAIT_MAX: Duration = Duration::from_secs(5);

/// The socket for TCP clients, and what they must know.
struct TcpSocket {
    socket: zmq::Socket,
    token: String,
}

/// See the module.
pub(super) struct EventLoop {
    local: zmq::Socket,
    tcp: Option<TcpSocket>,
    waker: Waker,
    events: Receiver<ServerEvent>,
    pool: WorkerPool,
    gpu_news: Receiver<GpuNews>,
    provider: Arc<dyn StreamProvider>,
    sessions: HashMap<u64, LiveSession>,
    /// By the id of their memory.
    windows: HashMap<u64, Window>,
    jobs_in_flight: usize,
    draining: Option<Instant>,
    n_bad_frames: u64,
    n_orphan_frames: u64,
    n_stale_releases: u64,
}

impl EventLoop {
    /// A loop that owns these.
    pub(super) fn new(
        local: zmq::Socket,
        tcp: Option<(zmq::Socket, String)>,
        waker: Waker,
        events: Receiver<ServerEvent>,
        (pool, gpu_news): (WorkerPool, Receiver<GpuNews>),
        provider: Arc<dyn StreamProvider>,
    ) -> Self {
        Self {
            local,
            tcp: tcp.map(|(socket, token)| TcpSocket { socket, token }),
            waker,
            events,
            pool,
            gpu_news,
            provider,
            sessions: HashMap::new(),
            windows: HashMap::new(),
            jobs_in_flight: 0,
            draining: None,
            n_bad_frames: 0,
            n_orphan_frames: 0,
            n_stale_releases: 0,
        }
    }

    /// Runs until it has drained.
    pub(super) fn run(mut self) {
        loop {
            self.waker.clear();
            self.take_events();
            while let Some(job) = self.pool.try_finished() {
                self.on_finished(&job);
            }
            while let Ok(news) = self.gpu_news.try_recv() {
                self.on_gpu_news(news);
            }
            let mut more = self.take_frames(false);
            more |= self.take_frames(true);
            if let Some(since) = self.draining
                && (self.jobs_in_flight == 0 || since.elapsed() > DRAIN_WAIT_MAX)
            {
                return self.say_goodbye();
            }
            if !more {
                self.wait();
            }
        }
    }

    fn socket(&self, is_tcp: bool) -> Option<&zmq::Socket> {
        if is_tcp { self.tcp.as_ref().map(|tcp| &tcp.socket) } else { Some(&self.local) }
    }

    fn wait(&self) {
        let mut items = vec![
            zmq::PollItem::from_fd(self.waker.as_raw_fd(), zmq::POLLIN),
            self.local.as_poll_item(zmq::POLLIN),
        ];
        items.extend(self.tcp.iter().map(|tcp| tcp.socket.as_poll_item(zmq::POLLIN)));
        let timeout_ms = if self.draining.is_some() { 50 } else { -1 };
        // An interrupted poll is as good as a wake-up: the loop looks at every source anyway.
        let _ = zmq::poll(&mut items, timeout_ms);
    }

    fn take_events(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            match event {
                ServerEvent::Open(session) => {
                    let route = session.token.to_vec();
                    self.insert(*session, route, false);
                }
                ServerEvent::HungUp { session } => self.remove(session, "hung up"),
                ServerEvent::Report(reply) => {
                    // Fails only if the asker has given up.
                    let _ = reply.send(self.report());
                }
                ServerEvent::Drain => {
                    self.draining.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    fn insert(&mut self, session: Session, route: Vec<u8>, is_tcp: bool) {
        if let Some(memory) = &session.window {
            let window = self.windows.entry(memory.id);
            let window = window.or_insert_with(|| Window::new(Arc::clone(memory)));
            window.join(session.n_slots());
        }
        let rate = Rate::default();
        self.sessions.insert(session.id, LiveSession { session, route, is_tcp, rate });
    }

    fn remove(&mut self, session_id: u64, why: &str) {
        let Some(mut live) = self.sessions.remove(&session_id) else { return };
        if let Some(window) = window_of(&mut self.windows, &live.session) {
            let returned = live.session.take_returned();
            live.session.held_in_window().chain(returned).for_each(|slot| window.release(slot));
            window.leave(session_id, live.session.n_slots());
            self.end_windows();
        }
        // Jobs under way keep the slab alive until they are done; nothing else holds it.
        info!(
            session = format_args!("{session_id:016x}"),
            why,
            batches = live.session.batches_sent,
            samples = live.session.samples_sent,
            "client left"
        );
    }

    fn end_windows(&mut self) {
        self.windows.retain(|_, window| !window.is_over());
    }

    fn on_finished(&mut self, job: &FinishedJob) {
        if job.error.is_none()
            && let Some(live) = self.sessions.get_mut(&job.tag.session)
            && live.session.upload(job.tag)
        {
            // In flight until it is there.
            return;
        }
        self.jobs_in_flight -= 1;
        let Some(window) = self.windows.get_mut(&job.tag.session) else {
            return self.on_filled(job.tag, job.error.as_deref());
        };
        for tag in window.filled(job.tag.slot, job.error.is_none()) {
            self.on_filled(tag, job.error.as_deref());
        }
        self.end_windows();
    }

    fn on_gpu_news(&mut self, news: GpuNews) {
        match news {
            GpuNews::Uploaded { slab, slot, problem } => {
                self.jobs_in_flight -= 1;
                let Some(live) = self.sessions.get_mut(&slab) else { return };
                let Some(tag) = live.session.uploaded(slot) else { return };
                match problem {
                    None => self.on_filled(tag, None),
                    Some(problem) => self.on_failed(tag, gpu_slab::failure(&problem)),
                }
            }
            GpuNews::Reclaimed { slab, slot } => {
                let Some(live) = self.sessions.get_mut(&slab) else { return };
                live.session.reclaimed(slot);
                self.advance(slab);
            }
        }
    }

    /// A session's slot is filled, be it in its own slab or in its window.
    fn on_filled(&mut self, tag: JobTag, error: Option<&str>) {
        if let Some(error) = error {
            let refusal = Refusal::new(ErrorCode::Data, error)
                .with_hint("run 'fastaa-ctl dataset verify' on the dataset");
            return self.on_failed(tag, refusal);
        }
        let Some(live) = self.sessions.get_mut(&tag.session) else { return };
        live.session.finished(tag);
        self.advance(tag.session);
    }

    /// A session's slot cannot be filled.
    fn on_failed(&mut self, tag: JobTag, refusal: Refusal) {
        let Some(live) = self.sessions.get_mut(&tag.session) else { return };
        // A failure in an epoch that was given up must not end the one that came after it.
        if !live.session.finished(tag) {
            return self.advance(tag.session);
        }
        let error = refusal.message.as_str();
        warn!(session = format_args!("{:016x}", tag.session), error, "batch failed");
        live.session.abandon();
        self.settle(tag.session);
        self.send(tag.session, DaemonBody::Failed(refusal));
    }

    /// Gives back to the window what the session has done with.
    fn settle(&mut self, session_id: u64) {
        let Some(live) = self.sessions.get_mut(&session_id) else { return };
        if let Some(window) = window_of(&mut self.windows, &live.session) {
            live.session.take_returned().into_iter().for_each(|slot| window.release(slot));
        }
    }

    /// Does all the work that a session has.
    fn advance(&mut self, session_id: u64) {
        self.settle(session_id);
        loop {
            let Some(live) = self.sessions.get_mut(&session_id) else { return };
            let window = window_of(&mut self.windows, &live.session);
            match live.session.next_work(window) {
                None => return,
                Some(Work::Fill { job, n_samples }) => {
                    if self.draining.is_some() {
                        // The slot stays as if it were being filled: nothing new is begun.
                        return;
                    }
                    let is_own = job.tag.session == session_id;
                    let shared = live.session.window.as_ref().filter(|_| !is_own);
                    let slab = shared.map_or(&live.session.slab, |window| &window.slab);
                    #[allow(unsafe_code, reason = "the loan is handed to the pool whole")]
                    // SAFETY: the pool keeps `keep_alive` in what all chunks of the job share until
                    // the last of them is done, and touches the slices no later.
                    let output = unsafe { slab.lend(job.tag.slot, n_samples) };
                    self.pool.submit(job, output);
                    self.jobs_in_flight += 1;
                }
                Some(Work::Deliver(descriptor)) => self.deliver(session_id, descriptor),
                Some(Work::End(end)) => {
                    debug!(
                        session = format_args!("{session_id:016x}"),
                        epoch = end.epoch,
                        "epoch ends"
                    );
                    self.send(session_id, DaemonBody::EpochEnd(end));
                }
            }
        }
    }

    fn deliver(&mut self, session_id: u64, mut descriptor: BatchDescriptor) {
        let Some(live) = self.sessions.get_mut(&session_id) else { return };
        live.rate.add(u64::from(descriptor.n_samples));
        descriptor.inline = live.is_tcp;
        let payload = live.is_tcp.then(|| live.session.slab.copy_of(descriptor.slot));
        self.send_with(session_id, DaemonBody::Batch(descriptor), payload);
    }

    fn send(&mut self, session_id: u64, body: DaemonBody) {
        self.send_with(session_id, body, None);
    }

    fn send_with(&mut self, session_id: u64, body: DaemonBody, payload: Option<Vec<u8>>) {
        let Some(live) = self.sessions.get(&session_id) else { return };
        let Some(socket) = self.socket(live.is_tcp) else { return };
        let sent = send_frame(socket, &live.route, session_id, body, payload);
        let Err(error) = sent else { return };
        debug!(session = format_args!("{session_id:016x}"), %error, "cannot reach the client");
        // A local client that has gone is noticed by the HELLO thread; a TCP client only here.
        if live.is_tcp {
            self.remove(session_id, "unreachable");
        }
    }

    /// Reads frames of one socket; `true`: there may be more.
    fn take_frames(&mut self, is_tcp: bool) -> bool {
        for _ in 0..FRAMES_PER_TURN_MAX {
            let Some(socket) = self.socket(is_tcp) else { return false };
            let Ok(mut parts) = socket.recv_multipart(zmq::DONTWAIT) else { return false };
            match (parts.pop(), parts.pop(), parts.is_empty()) {
                (Some(body), Some(route), true) => self.on_frame(&route, &body, is_tcp),
                _ => self.count_bad("wrong number of parts"),
            }
        }
        true
    }

    fn count_bad(&mut self, why: &str) {
        self.n_bad_frames += 1;
        // Powers of two: a flood does not fill the log.
        if self.n_bad_frames.is_power_of_two() {
            warn!(why, total = self.n_bad_frames, "ignored a bad frame");
        }
    }

    fn on_frame(&mut self, route: &[u8], body: &[u8], is_tcp: bool) {
        let frame: ClientFrame = match wire::decode(body) {
            Ok(frame) => frame,
            Err(error) => {
                self.count_bad(&error.to_string());
                if is_tcp {
                    self.answer_tcp(route, HelloReply::Refused(refusal_of(error)));
                }
                return;
            }
        };
        if let ClientBody::Hello(hello) = frame.body {
            return if is_tcp {
                self.on_tcp_hello(route, hello);
            } else {
                self.count_bad("hello on the data socket");
            };
        }
        // The session may have been registered since the last look.
        if !self.sessions.contains_key(&frame.session) {
            self.take_events();
        }
        let known = self.sessions.get_mut(&frame.session);
        let Some(live) = known.filter(|live| live.route == route && live.is_tcp == is_tcp) else {
            // Normal for what a client said just before its hang-up was seen.
            return self.n_orphan_frames += 1;
        };
        if matches!(frame.body, ClientBody::Start(_) | ClientBody::Release(_)) {
            self.provider.demanded(live.session.peer.pid);
        }
        match frame.body {
            ClientBody::Start(start) => self.on_start(frame.session, &start),
            ClientBody::Release(leases) => {
                let stale = leases.into_iter().filter(|lease| !live.session.release(*lease));
                self.n_stale_releases += stale.count() as u64;
                self.advance(frame.session);
            }
            ClientBody::Bye => self.remove(frame.session, "said bye"),
            ClientBody::Hello(_) => {}
        }
    }

    fn on_start(&mut self, session_id: u64, start: &Start) {
        let Some(live) = self.sessions.get_mut(&session_id) else { return };
        let session = &mut live.session;
        let started = session.check_start(start).and_then(|()| {
            let name = session.run_name();
            let run = Run {
                dataset: &session.request.dataset,
                name: &name,
                is_group: !session.request.group.is_empty(),
            };
            let policy =
                self.provider.epoch_policy(&session.stream, &run, start.epoch, &start.policy)?;
            session.start(start, policy.clone())?;
            Ok(policy)
        });
        match started {
            Ok(policy) => {
                let begin = EpochBegin {
                    seek: start.seek,
                    epoch: start.epoch,
                    policy: policy.reference,
                    policy_id: policy.id,
                    policy_version: policy.version,
                };
                self.send(session_id, DaemonBody::EpochBegin(begin));
                self.advance(session_id);
            }
            Err(refusal) => self.send(session_id, DaemonBody::Failed(refusal)),
        }
    }

    fn on_tcp_hello(&mut self, route: &[u8], hello: ClientHello) {
        let reply = match self.open_tcp(hello, route) {
            Ok(reply) => reply,
            Err(refusal) => HelloReply::Refused(refusal),
        };
        self.answer_tcp(route, reply);
    }

    fn open_tcp(&mut self, hello: ClientHello, route: &[u8]) -> Result<HelloReply, Refusal> {
        let token = self.tcp.as_ref().map_or("", |tcp| tcp.token.as_str());
        if token.is_empty() || !equal_in_constant_time(hello.token.as_bytes(), token.as_bytes()) {
            return Err(Refusal::new(ErrorCode::Forbidden, "wrong token")
                .with_hint("pass the content of the daemon's token file"));
        }
        if self.sessions.len() >= SESSIONS_MAX {
            let message = format!("{SESSIONS_MAX} clients are connected already");
            return Err(Refusal::new(ErrorCode::Exhausted, message).with_hint("close some"));
        }
        check_request(&hello.request)?;
        let stream = self.provider.open(&hello.request, false)?;
        let peer = Peer { client: hello.client, pid: None, uid: None };
        let session = Session::open(hello.request, stream, peer)?;
        info!(
            session = format_args!("{:016x}", session.id),
            client = session.peer.client,
            dataset = session.request.dataset,
            split = session.request.split,
            "client subscribed over TCP"
        );
        let reply = HelloReply::Welcome(welcome(&session, ""));
        self.insert(session, route.to_vec(), true);
        Ok(reply)
    }

    fn answer_tcp(&self, route: &[u8], reply: HelloReply) {
        let Some(socket) = self.socket(true) else { return };
        let session = match &reply {
            HelloReply::Welcome(welcome) => welcome.session,
            HelloReply::Refused(_) => 0,
        };
        let body = DaemonBody::Hello(ServerHello { protocol: PROTOCOL_VERSION, reply });
        if let Err(error) = send_frame(socket, route, session, body, None) {
            debug!(%error, "a TCP client did not wait for its answer");
        }
    }

    fn say_goodbye(mut self) {
        let sessions: Vec<u64> = self.sessions.keys().copied().collect();
        for session_id in sessions {
            self.send(session_id, DaemonBody::Goodbye("the daemon is stopping".to_owned()));
        }
        debug!("stream server ends");
    }

    fn report(&mut self) -> ServerReport {
        let mut sessions: Vec<SessionReport> =
            self.sessions.values_mut().map(LiveSession::report).collect();
        sessions.sort_by_key(|report| report.session);
        ServerReport {
            sessions,
            n_bad_frames: self.n_bad_frames,
            n_orphan_frames: self.n_orphan_frames,
            n_stale_releases: self.n_stale_releases,
        }
    }
}

fn window_of<'a>(
    windows: &'a mut HashMap<u64, Window>,
    session: &Session,
) -> Option<&'a mut Window> {
    windows.get_mut(&session.window.as_ref()?.id)
}

fn send_frame(
    socket: &zmq::Socket,
    route: &[u8],
    session: u64,
    body: DaemonBody,
    payload: Option<Vec<u8>>,
) -> io::Result<()> {
    let frame = DaemonFrame { protocol: PROTOCOL_VERSION, session, body };
    let bytes = wire::encode(&frame).map_err(io::Error::other)?;
    let failed = |error: zmq::Error| io::Error::from_raw_os_error(error.to_raw());
    socket.send(route, zmq::DONTWAIT | zmq::SNDMORE).map_err(failed)?;
    let Some(payload) = payload else {
        return socket.send(bytes, zmq::DONTWAIT).map_err(failed);
    };
    socket.send(bytes, zmq::DONTWAIT | zmq::SNDMORE).map_err(failed)?;
    socket.send(payload, zmq::DONTWAIT).map_err(failed)
}
