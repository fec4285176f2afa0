//! Memory of batches on the GPUs of their consumers.
//!
//! A *slab on a GPU* is the image of a slab in shared memory: as many slots, of the same layout.
//! It has a thread of its own, which owns everything of it in CUDA; it copies filled slots to the
//! GPU, tells when a copy is over, and when a consumer's own work on a slot is. What the slabs of
//! one GPU have in common is their share of its memory (`card`).
//!
//! *Order between the processes*: no stream of one process ever waits for the other process, so
//! that neither's death can hang the other's GPU work. Towards the consumer a batch is announced
//! when its copy is over. Back from it, the consumer records an interprocess event behind its last
//! use of a slot, and the thread asks that event until it has passed: the slot is free then.
//!
//! *Life of the memory*: it is freed when the session has ended **and** the importing process has
//! closed it or died (CUDA leaves undefined what an earlier `cuMemFree` does to the importer). The
//! first is `GpuSlab`'s drop, the second a byte in a pipe that the importer holds, or the end of
//! its process. Some time after the last slab the context goes, too: no memory of the GPU is taken
//! then.
//!
//! Never touches pixels, and never decides what is computed. Uses CUDA's driver API alone, loaded
//! at run time: without an NVIDIA driver all this is a refusal in words.

mod card;
mod driver;
mod importer;
mod lane;
mod openings;
mod outbox;

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::limits::GPU_NEWS_MAX;

use card::Card;
pub use importer::{Importer, ImporterEnd};
use openings::Openings;
use outbox::Outbox;

/// How long a GPU may take to answer: its driver may have to wake it first.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(20);

/// A GPU's UUID, as CUDA gives it: that of a MIG instance, if it is one.
pub type Uuid = [u8; 16];
/// What CUDA exports memory and events as.
pub type IpcHandle = [u8; 64];

/// The slab that is to have an image on a GPU.
pub struct HostSlab {
    /// Of its first byte.
    pub address: usize,
    /// From one slot to the next.
    pub slot_bytes: usize,
    /// Number of slots.
    pub n_slots: u32,
    /// Keeps the memory mapped.
    pub keep_alive: Arc<dyn Any + Send + Sync>,
    /// What the slots become on the GPU, if they do not stay what they are.
    pub finished: Option<FinishedLayout>,
}

/// Slots whose batches are finished on the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FinishedLayout {
    /// From one of them to the next.
    pub slot_bytes: usize,
    /// Where labels start in a slot of the host.
    pub labels_from: usize,
    /// Where they start in a finished one.
    pub labels_to: usize,
    /// Their length.
    pub labels_bytes: usize,
}

/// Whose memory a GPU's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// That of the GPU with this number.
    Gpu(usize),
    /// The host's: the GPU is played.
    Host,
}

/// Where a batch is to be finished: its bytes as they are in the slab, and what they are to become.
/// Nobody else touches either before the end of the work that is queued.
#[derive(Clone, Copy, Debug)]
pub struct FinishPlace {
    /// What the addresses belong to.
    pub at: Where,
    /// Address of the slot as it was uploaded.
    pub source: usize,
    /// Address of the finished slot.
    pub target: usize,
}

/// Queues, on the default stream, the work that finishes a batch.
pub type Finish = Box<dyn FnOnce(FinishPlace) -> Result<(), String> + Send>;

/// What an importer opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// All slots.
    pub memory: IpcHandle,
    /// One event per slot, which the importer records behind its use.
    pub events: Vec<IpcHandle>,
}

/// What a slab's thread tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuNews {
    /// A slot's copy is over, well or not.
    Uploaded {
        /// Of which slab.
        slab: u64,
        /// Which slot.
        slot: u32,
        /// Why it failed.
        problem: Option<String>,
    },
    /// The consumer's work on a slot is over.
    Reclaimed {
        /// Of which slab.
        slab: u64,
        /// Which slot.
        slot: u32,
    },
}

/// Why there is no slab on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// No library of NVIDIA's driver.
    #[error("this host has no NVIDIA driver (libcuda.so.1 cannot be loaded)")]
    NoDriver,
    /// The configuration says so.
    #[error("gpu.memory_mib is 0 in the daemon's configuration")]
    Off,
    /// None with this UUID.
    #[error("the daemon sees no GPU with the UUID {0} (CUDA_VISIBLE_DEVICES may hide it)")]
    NoSuchGpu(String),
    /// The configured share is taken.
    #[error(
        "batches may take {cap_mib} MiB of the GPU (gpu.memory_mib in the configuration), and \
         {used_mib} of them are taken; this slab needs {wanted_mib}: raise it, pass a smaller \
         n_slots=, or drop tensors of loaders that are closed"
    )]
    Cap {
        /// The share.
        cap_mib: u64,
        /// What is taken of it.
        used_mib: u64,
        /// What was asked for.
        wanted_mib: u64,
    },
    /// CUDA says no.
    #[error("CUDA: {what}: {problem}")]
    Cuda {
        /// Which call.
        what: &'static str,
        /// Its error.
        problem: String,
    },
    /// Batches could not be finished there before.
    #[error("batches cannot be augmented on this GPU: {0}")]
    NoFinish(String),
    /// The thread has not answered.
    #[error("the GPU's driver does not answer")]
    Silent,
}

/// A slab on a GPU. Dropping it ends the session's part in it.
pub struct GpuSlab {
    commands: Sender<lane::Command>,
    exported: Exported,
}

impl GpuSlab {
    /// What the importer opens.
    pub fn exported(&self) -> &Exported {
        &self.exported
    }

    /// Begins to copy a slot, which must not change until the news of it. `finish` makes the batch
    /// of it there, if the slab was opened for that.
    pub fn upload(&self, slot: u32, finish: Option<Finish>) {
        self.tell(lane::Command::Upload { slot, finish, reply: None });
    }

    /// The same before any news are waited for: how long it takes until the batch is there.
    ///
    /// # Errors
    /// In words.
    pub fn time(&self, slot: u32, finish: Finish) -> Result<Duration, String> {
        let (reply, answer) = bounded(1);
        let began = Instant::now();
        let (finish, reply) = (Some(finish), Some(reply));
        self.tell(lane::Command::Upload { slot, finish, reply });
        let silent = |_| GpuError::Silent.to_string();
        answer.recv_timeout(ANSWER_WAIT_MAX).map_err(silent)??;
        Ok(began.elapsed())
    }

    /// Asks for the news that the consumer's work on a slot is over.
    pub fn reclaim(&self, slot: u32) {
        self.tell(lane::Command::Reclaim { slot });
    }

    fn tell(&self, command: lane::Command) {
        // There is room for all that can be under way, and the thread lives as long as `self`.
        let _ = self.commands.send(command);
    }
}

impl std::fmt::Debug for GpuSlab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuSlab").finish_non_exhaustive()
    }
}

/// All GPUs of the host.
pub struct Gpus {
    memory_bytes: u64,
    news: Sender<GpuNews>,
    wake: Arc<dyn Fn() + Send + Sync>,
    openings: Arc<Openings>,
    cards: Mutex<HashMap<Uuid, Arc<Card>>>,
}

impl Gpus {
    /// `memory_bytes`: most memory of all slabs on one GPU. `wake` is called after each piece of
    /// news, which the receiver has.
    pub fn new(
        memory_bytes: u64,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> (Self, Receiver<GpuNews>) {
        let (news, receiver) = bounded(GPU_NEWS_MAX);
        let (openings, cards) = (Arc::default(), Mutex::default());
        (Self { memory_bytes, news, wake: Arc::new(wake), openings, cards }, receiver)
    }

    /// Makes a slab on the GPU `uuid`, and waits for it. `id` names it in the news.
    ///
    /// # Errors
    /// No driver, no such GPU, no memory, or no export of it (MIG, some containers).
    pub fn open(
        &self,
        uuid: Uuid,
        id: u64,
        host: HostSlab,
        importer: Importer,
    ) -> Result<GpuSlab, GpuError> {
        if self.memory_bytes == 0 {
            return Err(GpuError::Off);
        }
        let opening = Openings::begin(&self.openings, ANSWER_WAIT_MAX).ok_or(GpuError::Silent)?;
        let outbox = Outbox::new(id, self.news.clone(), Arc::clone(&self.wake));
        let (commands, answer) = lane::start(self.card(uuid), opening, host, importer, outbox);
        let exported = answer.recv_timeout(ANSWER_WAIT_MAX).map_err(|_| GpuError::Silent)??;
        Ok(GpuSlab { commands, exported })
    }

    fn card(&self, uuid: Uuid) -> Arc<Card> {
        let mut cards = self.cards.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody uses are nothing but a name, which any client can make up.
        cards.retain(|_, card| Arc::strong_count(card) > 1);
        Arc::clone(
            cards.entry(uuid).or_insert_with(|| Arc::new(Card::new(uuid, self.memory_bytes))),
        )
    }
}

/// A UUID as `nvidia-smi -L` prints it.
fn uuid_text(uuid: Uuid) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
