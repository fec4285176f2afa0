//! The thread of one slab on a GPU: it owns the memory there, the stream of its copies, and their
//! events.
//!
//! *Slots*: the session says when a slot may be copied and when the consumer has released it; this
//! thread only says when the GPU is done. It never waits for whom it tells. Where it waits for the
//! GPU, as while the slab is made, or where libtorch does while a batch is finished, this slab's
//! consumer alone waits for it.
//!
//! *Failure*: an error of CUDA usually stays with its process until the end. After one, or a panic
//! (a driver without one of the functions), copies fail with it in words, no slab is opened on this
//! GPU until the last one there has gone, and the streams of the host go on.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvError, Sender, bounded, never};
use tracing::{debug, info, warn};

use super::card::{Card, Share};
use super::driver::{Context, Event, Locked, Memory, Stream};
use super::openings::Opening;
use super::outbox::Outbox;
use super::{
    Exported, Finish, FinishPlace, FinishedLayout, GpuError, GpuNews, HostSlab, Importer, Where,
    uuid_text,
};

/// How often the GPU is asked while something is under way: at first, and after a while in vain.
const GPU_LOOK_MIN: Duration = Duration::from_micros(100);
const GPU_LOOK_MAX: Duration = Duration::from_millis(2);
/// How long a GPU is kept without a slab: a context takes its time, and another loader may come.
const LINGER: Duration = Duration::from_secs(10);
/// How often it is asked meanwhile whether one has come.
const LINGER_LOOK: Duration = Duration::from_millis(50);

/// Tells one asker how an upload ended.
pub(super) type Reply = Sender<Result<(), String>>;
/// What comes of opening a slab.
type Answer = Result<Exported, GpuError>;

/// What a slab's thread is told. No more commands: the session has ended.
pub(super) enum Command {
    Upload {
        slot: u32,
        finish: Option<Finish>,
        /// Who is told of the end, instead of the news.
        reply: Option<Reply>,
    },
    Reclaim {
        slot: u32,
    },
}

/// Begins the thread of a new slab, and gives what it takes commands from and what it answers.
pub(super) fn start(
    card: Arc<Card>,
    opening: Opening,
    host: HostSlab,
    importer: Importer,
    outbox: Outbox,
) -> (Sender<Command>, Receiver<Answer>) {
    // A slot is copied, or taken back, or both in turn.
    let (sender, mut commands) = bounded(2 * host.n_slots as usize + 2);
    let (reply, answer) = bounded(1);
    let work = move || {
        let opened = guarded(|| Lane::open(&card, host, importer, outbox));
        drop(opening);
        match opened.and_then(std::convert::identity) {
            Ok((mut lane, exported)) => {
                // If nobody waits any more, nobody knows of it.
                let is_known = reply.send(Ok(exported)).is_ok();
                if !is_known || lane.live(&mut commands) {
                    lane.leave(&card);
                } else {
                    // The importer may have the memory open still: it goes with the process.
                    std::mem::forget(lane);
                }
            }
            Err(error) => {
                debug!(%error, "no slab on the GPU");
                // Fails only if the asker has given up.
                let _ = reply.send(Err(error));
            }
        }
    };
    // Without a thread the reply's sender is gone, and `open` says that nobody answers.
    let _ = std::thread::Builder::new().name("gpu-slab".into()).spawn(work);
    (sender, answer)
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

/// A slab's memory on the GPU. Fields drop in this order: events, then memory, then the lock.
struct Held {
    /// Recorded by the importer, one per slot.
    used: Vec<Event>,
    /// Recorded here, one per slot.
    copied: Vec<Event>,
    memory: Memory,
    /// What batches are finished from, if that is done here, and whose memory it is.
    staging: Option<(Memory, Where)>,
    _locked: Option<Locked>,
    stream: Stream,
    host: HostSlab,
    importer: Importer,
    share: Share,
}

/// A slot on its way to the GPU.
struct Upload {
    slot: u32,
    /// What has gone wrong already: told when the slot is not read any more.
    problem: Option<String>,
    reply: Option<Reply>,
}

// The context is declared last, for it must be dropped last.
struct Lane {
    outbox: Outbox,
    /// In the order of their events.
    uploads: VecDeque<Upload>,
    /// Slots that the consumer's GPU work may still read.
    reclaims: Vec<u32>,
    /// How long the next look at the GPU waits, and whether the last one saw something.
    look: Duration,
    has_news: bool,
    broken: Option<GpuError>,
    /// The session has not ended.
    is_open: bool,
    held: Held,
    context: Context,
}

impl Lane {
    fn open(
        card: &Arc<Card>,
        host: HostSlab,
        importer: Importer,
        outbox: Outbox,
    ) -> Result<(Self, Exported), GpuError> {
        let n_slots = host.n_slots as usize;
        let n_host_bytes = n_slots * host.slot_bytes;
        let n_finished_bytes = host.finished.map(|finished| n_slots * finished.slot_bytes);
        let n_memory_bytes = n_finished_bytes.unwrap_or(n_host_bytes);
        let n_staged_bytes = n_finished_bytes.map_or(0, |_| Memory::rounded(n_host_bytes));
        let n_bytes = (Memory::rounded(n_memory_bytes) + n_staged_bytes) as u64;

        let context = Context::open(card.uuid)?;
        let share = card.share(n_bytes, host.finished.is_some())?;
        let (memory, handle) = Memory::exported(&context, n_memory_bytes)?;
        let mut staging = None;
        if host.finished.is_some() {
            let staged = Memory::new(&context, n_host_bytes)?;
            let place = context.place_of(&staged)?;
            staging = Some((staged, place));
        }
        let (mut used, mut copied, mut events) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..n_slots {
            let (event, handle) = Event::exported(&context)?;
            used.push(event);
            events.push(handle);
            copied.push(Event::new(&context)?);
        }
        let stream = Stream::new(&context)?;
        let keep_alive = Arc::clone(&host.keep_alive);
        #[allow(unsafe_code, reason = "the slab's owner is handed over")]
        // SAFETY: `keep_alive` is what keeps the slab mapped.
        let locked = unsafe { Locked::new(&context, host.address, n_host_bytes, keep_alive) };
        let locked = locked.inspect_err(|error| {
            warn!(%error, "a slab cannot be page-locked, so copies to the GPU take longer");
        });
        let held = Held {
            used,
            copied,
            memory,
            staging,
            _locked: locked.ok(),
            stream,
            host,
            importer,
            share,
        };
        let lane = Self {
            outbox,
            uploads: VecDeque::new(),
            reclaims: Vec::new(),
            look: GPU_LOOK_MIN,
            has_news: false,
            broken: None,
            is_open: true,
            held,
            context,
        };
        Ok((lane, Exported { memory: handle, events }))
    }

    /// Until the session has ended and nothing of it is under way; `false`: the driver's library
    /// cannot even be told that it has failed.
    fn live(&mut self, commands: &mut Receiver<Command>) -> bool {
        loop {
            match guarded(|| self.run(commands)) {
                Ok(()) => return true,
                Err(error) if guarded(|| self.give_up(error.clone())).is_ok() => {}
                Err(_) => return false,
            }
        }
    }

    fn run(&mut self, commands: &mut Receiver<Command>) {
        while self.is_open || !self.uploads.is_empty() {
            match self.next_command(commands) {
                Ok(Some(command)) => self.obey(command),
                Ok(None) => {}
                Err(RecvError) => {
                    self.is_open = false;
                    *commands = never();
                    // Whose consumer would use its slots again?
                    self.reclaims.clear();
                }
            }
            self.look_at_gpu();
            self.outbox.flush();
        }
    }

    /// After a panic in the driver's library: nothing under way is asked for any more.
    fn give_up(&mut self, error: GpuError) {
        for upload in std::mem::take(&mut self.uploads) {
            self.uploaded(upload, Some(error.to_string()));
        }
        for slot in std::mem::take(&mut self.reclaims) {
            self.outbox.push(GpuNews::Reclaimed { slab: self.outbox.slab, slot });
        }
        self.breaks(error);
    }

    /// A command, or `None` when it is time to look at the GPU.
    fn next_command(&mut self, commands: &Receiver<Command>) -> Result<Option<Command>, RecvError> {
        if self.uploads.is_empty() && self.reclaims.is_empty() && self.outbox.is_empty() {
            return commands.recv().map(Some);
        }
        // A trainer that computes for long, or stands still, is asked less and less often.
        self.look = if self.has_news { GPU_LOOK_MIN } else { (2 * self.look).min(GPU_LOOK_MAX) };
        self.has_news = false;
        match commands.recv_timeout(self.look) {
            Ok(command) => Ok(Some(command)),
            Err(error) if error.is_timeout() => Ok(None),
            Err(_) => Err(RecvError),
        }
    }

    fn obey(&mut self, command: Command) {
        self.has_news = true;
        match command {
            Command::Upload { slot, finish, reply } => {
                // First, so that a panic loses nothing.
                self.uploads.push_back(Upload { slot, problem: None, reply });
                let begun = self.upload(slot as usize, finish);
                if let Err(error) = begun
                    && let Some(upload) = self.uploads.pop_back()
                {
                    self.breaks(error.clone());
                    self.uploaded(upload, Some(error.to_string()));
                }
            }
            Command::Reclaim { slot } => self.reclaims.push(slot),
        }
    }

    /// Queues a slot's copy, what finishes its batch, and its event.
    fn upload(&mut self, slot: usize, finish: Option<Finish>) -> Result<(), GpuError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        copy(&self.held, slot)?;
        let copied = &self.held.copied[slot];
        copied.record(&self.held.stream)?;
        if let Some(finish) = finish {
            copied.holds_default(&self.context)?;
            if let Err(problem) = self.finish(slot, finish) {
                self.held.share.no_finish(&problem);
                if let Some(upload) = self.uploads.back_mut() {
                    upload.problem = Some(problem);
                }
            }
            // Behind what was queued of a batch that failed, too.
            self.held.copied[slot].record_default(&self.context)?;
        }
        Ok(())
    }

    /// Queues what makes a batch of an uploaded slot.
    fn finish(&self, slot: usize, finish: Finish) -> Result<(), String> {
        let held = &self.held;
        let Some((finished, (staging, at))) = held.host.finished.zip(held.staging.as_ref()) else {
            return Err("the slab was not opened for it".to_owned());
        };
        let source = staging.address() + slot * held.host.slot_bytes;
        let target = held.memory.address() + slot * finished.slot_bytes;
        let place = FinishPlace { at: *at, source, target };
        guarded(|| finish(place)).map_err(|error| error.to_string())?
    }

    fn uploaded(&mut self, upload: Upload, problem: Option<String>) {
        let Upload { slot, problem: own, reply } = upload;
        let problem = own.or(problem);
        match reply {
            None => self.outbox.push(GpuNews::Uploaded { slab: self.outbox.slab, slot, problem }),
            Some(reply) => {
                // Fails only if the asker has given up.
                let _ = reply.send(problem.map_or(Ok(()), Err));
            }
        }
    }

    fn breaks(&mut self, error: GpuError) {
        if self.broken.is_none() {
            self.held.share.breaks(&error);
            self.broken = Some(error);
            // What was queued before may still be reading. Behind a panic there is nothing to wait.
            let held = &self.held;
            let _ = guarded(|| held.stream.wait());
            if held.staging.is_some() {
                let _ = guarded(|| Stream::wait_for_default(&self.context));
            }
        }
    }

    /// Tells of what has passed since the last look.
    fn look_at_gpu(&mut self) {
        // What is looked at stays in its queue until it is told, so that a panic loses nothing.
        while let Some(upload) = self.uploads.front() {
            let problem = match self.has_passed(upload.slot, |held| &held.copied) {
                Ok(true) => None,
                Ok(false) => break,
                Err(error) => Some(error.to_string()),
            };
            self.has_news = true;
            if let Some(upload) = self.uploads.pop_front() {
                self.uploaded(upload, problem);
            }
        }
        let mut at = 0;
        while let Some(&slot) = self.reclaims.get(at) {
            // What cannot be asked any more is not read any more either.
            if let Ok(false) = self.has_passed(slot, |held| &held.used) {
                at += 1;
                continue;
            }
            self.reclaims.swap_remove(at);
            self.has_news = true;
            self.outbox.push(GpuNews::Reclaimed { slab: self.outbox.slab, slot });
        }
    }

    fn has_passed(
        &mut self,
        slot: u32,
        events: impl Fn(&Held) -> &Vec<Event>,
    ) -> Result<bool, GpuError> {
        let asked = events(&self.held)[slot as usize].has_passed();
        asked.inspect_err(|error| self.breaks(error.clone()))
    }

    /// Frees the slab when its importer has closed it, and leaves the GPU some time later.
    fn leave(self, card: &Card) {
        let Self { held, context, .. } = self;
        held.importer.wait();
        if guarded(|| drop(held)).is_err() {
            // The context must not go before what is left of it.
            std::mem::forget(context);
            return;
        }
        // The last one stays, for the next one. Nobody speaks to it.
        let (began, nobody) = (Instant::now(), never::<()>());
        while card.is_empty() && began.elapsed() < LINGER {
            let _ = nobody.recv_timeout(LINGER_LOOK);
        }
        if card.is_empty() {
            info!(gpu = uuid_text(card.uuid), "leaves the GPU");
        }
    }
}

fn copy(held: &Held, slot: usize) -> Result<(), GpuError> {
    let HostSlab { address, slot_bytes, .. } = held.host;
    let begin = slot * slot_bytes;
    let queue = |memory: &Memory, to: usize, from: usize, n_bytes: usize| {
        let source = std::ptr::with_exposed_provenance::<u8>(address + begin + from);
        #[allow(unsafe_code, reason = "the session promises that the slot is left alone")]
        // SAFETY: the bytes lie in the slot, and it in the slab, which `host.keep_alive` keeps
        // mapped as long as `held` lives, and `held` outlives its copies (`Lane::run`). Nobody
        // writes to the slot before the news that it is copied: the session keeps it from its
        // workers (`GpuSlab::upload`).
        unsafe {
            memory.copy_from(to, source, n_bytes, &held.stream)
        }
    };
    match (&held.staging, held.host.finished) {
        (Some((staging, _)), Some(finished)) => {
            let FinishedLayout { slot_bytes: n_finished, labels_from, labels_to, labels_bytes } =
                finished;
            queue(staging, begin, 0, slot_bytes)?;
            queue(&held.memory, slot * n_finished + labels_to, labels_from, labels_bytes)
        }
        _ => queue(&held.memory, begin, 0, slot_bytes),
    }
}
