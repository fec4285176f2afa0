//! The thread of one GPU: it owns the context, the stream of copies, and every slab's memory there.
//!
//! *Slots*: the session says when a slot may be copied and when the consumer has released it; this
//! thread only says when the GPU is done. It never waits for whom it tells. The GPU it waits for
//! while a slab is opened or freed, and where libtorch does while a batch is finished: the GPU's
//! other consumers then wait for their copies as well.
//!
//! *Failure*: an error of CUDA usually stays with its process until the end. After one, or a panic
//! (a driver without one of the functions), copies fail with it in words, no slab is opened until
//! the thread has ended with its last slab, and the streams of the host go on.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, info, warn};

use crate::limits::GPU_COMMANDS_MAX;

use super::driver::{Context, Event, Locked, Memory, Stream};
use super::outbox::Outbox;
use super::{
    Exported, Finish, FinishPlace, FinishedLayout, GpuError, GpuNews, HostSlab, Importer, Uuid,
    Where, uuid_text,
};

/// How often the GPU is asked while something is under way: at first, and after a while in vain.
const GPU_LOOK_MIN: Duration = Duration::from_micros(100);
const GPU_LOOK_MAX: Duration = Duration::from_millis(2);
/// How often an importer is asked whether it has closed what a session has left behind.
const IMPORTER_LOOK: Duration = Duration::from_millis(50);
/// How long a GPU is kept without a slab: a context takes its time, and another loader may come.
const LINGER: Duration = Duration::from_secs(10);

/// Tells one asker how an upload ended.
pub(super) type Reply = Sender<Result<(), String>>;

/// What a GPU's thread is told.
pub(super) enum Command {
    Open {
        slab: u64,
        host: HostSlab,
        importer: Importer,
        reply: Sender<Result<Exported, GpuError>>,
    },
    Upload {
        slab: u64,
        slot: u32,
        finish: Option<Finish>,
        /// Who is told of the end, instead of the news.
        reply: Option<Reply>,
    },
    Reclaim {
        slab: u64,
        slot: u32,
    },
    Close {
        slab: u64,
    },
}

/// Begins a thread for the GPU `uuid`. It ends some time after its last slab.
pub(super) fn start(
    uuid: Uuid,
    memory_bytes: u64,
    news: Sender<GpuNews>,
    wake: Arc<dyn Fn() + Send + Sync>,
) -> Sender<Command> {
    let (sender, commands) = bounded(GPU_COMMANDS_MAX);
    let work = move || {
        let outbox = Outbox::new(news, wake);
        let begun = guarded(|| Lane::new(uuid, memory_bytes, outbox));
        match begun.and_then(std::convert::identity) {
            Ok(lane) => lane.live(&commands),
            Err(error) => refuse_first(&commands, &error),
        }
    };
    // Without a thread the receiver is gone, and `open` says that nobody answers.
    let _ = std::thread::Builder::new().name("gpu".into()).spawn(work);
    sender
}

/// Makes an error of a panic.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, GpuError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let problem = text.unwrap_or("a panic").to_owned();
        GpuError::Cuda { what: "the driver", problem }
    })
}

/// Tells whoever asked first why there is no context.
fn refuse_first(commands: &Receiver<Command>, error: &GpuError) {
    while let Ok(command) = commands.recv_timeout(IMPORTER_LOOK) {
        if let Command::Open { reply, .. } = command {
            // Fails only if the asker has given up.
            let _ = reply.send(Err(error.clone()));
        }
    }
}

/// A slab's memory on the GPU. Fields drop in this order: events, then memory, then the lock.
struct Held {
    /// Recorded by the importer, one per slot.
    used: Vec<Event>,
    /// Recorded here, one per slot.
    copied: Vec<Event>,
    memory: Memory,
    /// What batches are finished from, if that is done here, and whose memory it is.
    staging: Option<(Memory, Where)>,
    n_bytes: u64,
    _locked: Option<Locked>,
    host: HostSlab,
    importer: Importer,
    is_closed: bool,
}

/// A slot on its way.
struct Upload {
    pending: Pending,
    /// What is to be done when it is there.
    finish: Option<Finish>,
    reply: Option<Reply>,
}

/// A copy on its way, or a slot that the consumer's GPU work may still read.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Pending {
    slab: u64,
    slot: u32,
}

// The context is declared last, for it must be dropped last.
struct Lane {
    uuid: Uuid,
    memory_bytes: u64,
    outbox: Outbox,
    uploads: VecDeque<Upload>,
    reclaims: Vec<Pending>,
    /// How long the next look at the GPU waits, and whether the last one saw something.
    look: Duration,
    has_news: bool,
    broken: Option<GpuError>,
    /// Why no more batches are finished here.
    no_finish: Option<String>,
    held: HashMap<u64, Held>,
    stream: Stream,
    context: Context,
}

impl Lane {
    fn new(uuid: Uuid, memory_bytes: u64, outbox: Outbox) -> Result<Self, GpuError> {
        let context = Context::open(uuid)?;
        let stream = Stream::new(&context)?;
        info!(gpu = uuid_text(uuid), "uses a GPU for batches");
        Ok(Self {
            uuid,
            memory_bytes,
            outbox,
            uploads: VecDeque::new(),
            reclaims: Vec::new(),
            look: GPU_LOOK_MIN,
            has_news: false,
            broken: None,
            no_finish: None,
            held: HashMap::new(),
            stream,
            context,
        })
    }

    /// Until there was no slab for long, or the daemon ends.
    fn live(mut self, commands: &Receiver<Command>) {
        let is_over = loop {
            match guarded(|| self.run(commands)) {
                Ok(is_over) => break is_over,
                Err(error) if guarded(|| self.give_up(error.clone())).is_ok() => {}
                Err(_) => break false,
            }
        };
        if !is_over {
            // Consumers may have the memory open still: it goes with the process.
            std::mem::forget(self);
        }
    }

    /// `true`: there was no slab for long; `false`: the daemon is ending.
    fn run(&mut self, commands: &Receiver<Command>) -> bool {
        let mut last_used = Instant::now();
        loop {
            match self.next_command(commands) {
                Ok(command) => {
                    self.obey(command);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
            self.look_at_gpu();
            self.outbox.flush();
            self.free_closed();
            if !self.held.is_empty() || !self.outbox.is_empty() {
                last_used = Instant::now();
            } else if last_used.elapsed() > LINGER {
                info!(gpu = uuid_text(self.uuid), "leaves the GPU");
                return true;
            }
        }
    }

    /// After a panic in the driver's library: nothing under way is asked for any more.
    fn give_up(&mut self, error: GpuError) {
        for upload in std::mem::take(&mut self.uploads) {
            self.uploaded(upload, Some(error.to_string()));
        }
        for Pending { slab, slot } in std::mem::take(&mut self.reclaims) {
            self.outbox.push(GpuNews::Reclaimed { slab, slot });
        }
        self.breaks(error);
    }

    /// A command, if one is there; else waits as long as nothing else is to be looked at.
    fn next_command(&mut self, commands: &Receiver<Command>) -> Result<Command, RecvTimeoutError> {
        let is_busy =
            !self.uploads.is_empty() || !self.reclaims.is_empty() || !self.outbox.is_empty();
        // A trainer that computes for long, or stands still, is asked less and less often.
        self.look = if self.has_news { GPU_LOOK_MIN } else { (2 * self.look).min(GPU_LOOK_MAX) };
        self.has_news = false;
        commands.recv_timeout(if is_busy { self.look } else { IMPORTER_LOOK })
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Open { slab, host, importer, reply } => {
                let opened = self.open(slab, host, importer);
                if let Err(error) = &opened {
                    debug!(%error, "no slab on the GPU");
                }
                if reply.send(opened).is_err() {
                    // Nobody knows of it.
                    self.held.remove(&slab);
                }
            }
            Command::Upload { slab, slot, finish, reply } => {
                self.has_news = true;
                self.upload(Upload { pending: Pending { slab, slot }, finish, reply });
            }
            Command::Reclaim { slab, slot } => self.reclaims.push(Pending { slab, slot }),
            Command::Close { slab } => {
                if let Some(held) = self.held.get_mut(&slab) {
                    held.is_closed = true;
                }
            }
        }
        self.look_at_gpu();
    }

    fn open(
        &mut self,
        slab: u64,
        host: HostSlab,
        importer: Importer,
    ) -> Result<Exported, GpuError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        // What was given up just now makes room.
        self.free_closed();
        if let Some(reason) = self.no_finish.as_ref().filter(|_| host.finished.is_some()) {
            return Err(GpuError::NoFinish(reason.clone()));
        }
        let n_slots = host.n_slots as usize;
        let n_host_bytes = n_slots * host.slot_bytes;
        let n_finished_bytes = host.finished.map(|finished| n_slots * finished.slot_bytes);
        let n_memory_bytes = n_finished_bytes.unwrap_or(n_host_bytes);
        let n_staged_bytes = n_finished_bytes.map_or(0, |_| Memory::rounded(n_host_bytes));
        let n_bytes = (Memory::rounded(n_memory_bytes) + n_staged_bytes) as u64;
        self.check_share(n_bytes)?;
        let (memory, handle) = Memory::exported(&self.context, n_memory_bytes)?;
        let mut staging = None;
        if host.finished.is_some() {
            let staged = Memory::new(&self.context, n_host_bytes)?;
            let place = self.context.place_of(&staged)?;
            staging = Some((staged, place));
        }
        let (mut used, mut copied, mut events) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..n_slots {
            let (event, handle) = Event::exported(&self.context)?;
            used.push(event);
            events.push(handle);
            copied.push(Event::new(&self.context)?);
        }
        let keep_alive = Arc::clone(&host.keep_alive);
        #[allow(unsafe_code, reason = "the slab's owner is handed over")]
        // SAFETY: `keep_alive` is what keeps the slab mapped.
        let locked = unsafe { Locked::new(&self.context, host.address, n_host_bytes, keep_alive) };
        let locked = locked.inspect_err(|error| {
            warn!(%error, "a slab cannot be page-locked, so copies to the GPU take longer");
        });
        let held = Held {
            used,
            copied,
            memory,
            staging,
            n_bytes,
            _locked: locked.ok(),
            host,
            importer,
            is_closed: false,
        };
        self.held.insert(slab, held);
        Ok(Exported { memory: handle, events })
    }

    fn check_share(&self, n_bytes: u64) -> Result<(), GpuError> {
        let used_bytes: u64 = self.held.values().map(|held| held.n_bytes).sum();
        if used_bytes + n_bytes <= self.memory_bytes {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        let (cap_mib, used_mib) = (mib(self.memory_bytes), mib(used_bytes));
        Err(GpuError::Cap { cap_mib, used_mib, wanted_mib: mib(n_bytes) })
    }

    fn upload(&mut self, upload: Upload) {
        let Pending { slab, slot } = upload.pending;
        if !self.held.contains_key(&slab) {
            return;
        }
        // First, so that a panic loses nothing.
        self.uploads.push_back(upload);
        let begun = match (&self.broken, self.held.get(&slab)) {
            (Some(broken), _) => Err(broken.clone()),
            (None, Some(held)) => copy(held, slot as usize, &self.stream),
            (None, None) => Ok(()),
        };
        if let Err(error) = begun {
            self.breaks(error.clone());
            if let Some(upload) = self.uploads.pop_back() {
                self.uploaded(upload, Some(error.to_string()));
            }
        }
    }

    fn uploaded(&mut self, Upload { pending, reply, .. }: Upload, problem: Option<String>) {
        let Pending { slab, slot } = pending;
        match reply {
            None => self.outbox.push(GpuNews::Uploaded { slab, slot, problem }),
            Some(reply) => {
                // Fails only if the asker has given up.
                let _ = reply.send(problem.map_or(Ok(()), Err));
            }
        }
    }

    /// Queues what makes a batch of an uploaded slot.
    fn finish(&mut self, pending: Pending, finish: Finish) -> Result<(), String> {
        let Some(held) = self.held.get(&pending.slab) else { return Ok(()) };
        let slot = pending.slot as usize;
        let Some((finished, (staging, at))) = held.host.finished.zip(held.staging.as_ref()) else {
            return Err("the slab was not opened for it".to_owned());
        };
        let source = staging.address() + slot * held.host.slot_bytes;
        let target = held.memory.address() + slot * finished.slot_bytes;
        let place = FinishPlace { at: *at, source, target };
        guarded(|| finish(place)).map_err(|error| error.to_string())??;
        held.copied[slot].record_default(&self.context).map_err(|error| error.to_string())
    }

    fn breaks(&mut self, error: GpuError) {
        if self.broken.is_none() {
            warn!(gpu = uuid_text(self.uuid), %error, "no batches are put on this GPU any more");
            self.broken = Some(error);
            // What was queued before may still be reading.
            self.stream.wait();
        }
    }

    /// Tells of what has passed since the last look.
    fn look_at_gpu(&mut self) {
        // What is looked at stays in its queue until it is told, so that a panic loses nothing.
        while let Some(upload) = self.uploads.front() {
            let pending = upload.pending;
            let has_passed = self.has_passed(pending, |held| &held.copied);
            if has_passed == Ok(false) {
                break;
            }
            let finish = self.uploads.front_mut().and_then(|upload| upload.finish.take());
            let problem = match (has_passed, finish) {
                (Err(error), _) => Some(error.to_string()),
                (Ok(_), None) => None,
                (Ok(_), Some(finish)) => match self.finish(pending, finish) {
                    // Its event is recorded anew: it is the first one still.
                    Ok(()) => break,
                    Err(problem) => {
                        self.no_finish.get_or_insert_with(|| problem.clone());
                        Some(problem)
                    }
                },
            };
            self.has_news = true;
            if let Some(upload) = self.uploads.pop_front() {
                self.uploaded(upload, problem);
            }
        }
        let mut at = 0;
        while let Some(&pending) = self.reclaims.get(at) {
            // What cannot be asked any more is not read any more either.
            if let Ok(false) = self.has_passed(pending, |held| &held.used) {
                at += 1;
                continue;
            }
            let Pending { slab, slot } = self.reclaims.swap_remove(at);
            self.has_news = true;
            self.outbox.push(GpuNews::Reclaimed { slab, slot });
        }
    }

    fn has_passed(
        &mut self,
        pending: Pending,
        events: impl Fn(&Held) -> &Vec<Event>,
    ) -> Result<bool, GpuError> {
        let Some(held) = self.held.get(&pending.slab) else { return Ok(true) };
        let asked = events(held)[pending.slot as usize].has_passed();
        asked.inspect_err(|error| self.breaks(error.clone()))
    }

    /// Frees the slabs that neither side needs, nor any copy.
    fn free_closed(&mut self) {
        let uploads = &self.uploads;
        self.held.retain(|slab, held| {
            let is_read = uploads.iter().any(|upload| upload.pending.slab == *slab);
            is_read || !held.is_closed || !has_let_go(&held.importer)
        });
        // Its consumer is dead, or has closed it: there is nothing to wait for.
        let held = &self.held;
        self.reclaims.retain(|pending| held.contains_key(&pending.slab));
    }
}

fn copy(held: &Held, slot: usize, stream: &Stream) -> Result<(), GpuError> {
    let HostSlab { address, slot_bytes, .. } = held.host;
    let begin = slot * slot_bytes;
    let queue = |memory: &Memory, to: usize, from: usize, n_bytes: usize| {
        let source = std::ptr::with_exposed_provenance::<u8>(address + begin + from);
        #[allow(unsafe_code, reason = "the session promises that the slot is left alone")]
        // SAFETY: the bytes lie in the slot, and it in the slab, which `host.keep_alive` keeps
        // mapped as long as `held` lives, and `held` outlives its copies (`free_closed`). Nobody
        // writes to the slot before the news that it is copied: the session keeps it from its
        // workers (`GpuSlab::upload`).
        unsafe {
            memory.copy_from(to, source, n_bytes, stream)
        }
    };
    match (&held.staging, held.host.finished) {
        (Some((staging, _)), Some(finished)) => {
            let FinishedLayout { slot_bytes: n_finished, labels_from, labels_to, labels_bytes } =
                finished;
            queue(staging, begin, 0, slot_bytes)?;
            queue(&held.memory, slot * n_finished + labels_to, labels_from, labels_bytes)?;
        }
        _ => queue(&held.memory, begin, 0, slot_bytes)?,
    }
    held.copied[slot].record(stream)
}

/// Whether the importing process has closed the memory, or is dead.
fn has_let_go(importer: &Importer) -> bool {
    let fires = |fd: &OwnedFd, flags| {
        let mut fds = [PollFd::new(fd, flags)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|n_fired| n_fired > 0)
    };
    // A pipe without writers hangs up, which is told unasked.
    fires(&importer.closed, PollFlags::empty())
        || importer.process.as_ref().is_some_and(|process| fires(process, PollFlags::IN))
}
