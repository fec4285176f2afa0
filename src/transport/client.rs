//! The Rust client of a stream, used by `fastaa-ctl` and the tests. Local sockets only.
//!
//! *Justification of `unsafe`*: a batch's bytes are read in place from the memory that the daemon
//! shares. A lease makes it sound: the daemon does not write to a slot from its `Batch` message to
//! the release of the same generation, and [`ClientBatch`] releases when it is dropped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::hello::receive_with_fds;
use super::wire::{
    self, BatchDescriptor, ClientBody, ClientFrame, ClientHello, DaemonBody, DaemonFrame,
    EpochBegin, HelloReply, PROTOCOL_VERSION, Refusal, ServerHello, SlotLease, Start,
    StreamRequest, Welcome, WireDtype, WireError, WireLabels,
};
use crate::pipeline::recipe::Recipe;

/// How long a client waits for frames of a daemon that has hung up.
const LAST_WORDS_MS: i64 = 200;

/// Why a client has no batch.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon listens on {path}: {source}")]
    NoDaemon {
        /// The HELLO socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The daemon said no.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// The daemon has gone.
    #[error("the daemon has gone: {0}")]
    Gone(String),
    /// The daemon's bytes are no message.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The system refuses something.
    #[error("stream client: {0}")]
    System(#[from] io::Error),
}

/// A subscription to one stream.
pub struct StreamClient {
    socket: zmq::Socket,
    hello: OwnedFd,
    welcome: Welcome,
    memory: Arc<Memory>,
    seek: u32,
}

/// The slab, the group's window, and the leases that dropped batches gave back.
struct Memory {
    map: MmapRaw,
    /// Mapped for reading only.
    window: Option<MmapRaw>,
    released: Mutex<Vec<SlotLease>>,
}

/// What a stream yields.
pub enum ClientEvent {
    /// The epoch begins, with this policy.
    Begin(EpochBegin),
    /// A batch.
    Batch(ClientBatch),
    /// The epoch has ended.
    End,
}

/// A leased batch; dropping it gives the slot back.
pub struct ClientBatch {
    /// What it is.
    pub descriptor: BatchDescriptor,
    /// Samples that it has: those of the descriptor without the skipped ones.
    n_samples: usize,
    memory: Arc<Memory>,
    begin: usize,
    labels_offset: usize,
    indices_offset: usize,
    pixel_bytes: usize,
    label_bytes: usize,
}

impl StreamClient {
    /// Subscribes through the HELLO socket at `hello_path`.
    ///
    /// # Errors
    /// No daemon, a refusal, or a broken answer.
    pub fn connect(hello_path: &Path, request: StreamRequest) -> Result<Self, ClientError> {
        let no_daemon = |error: rustix::io::Errno| ClientError::NoDaemon {
            path: hello_path.to_owned(),
            source: error.into(),
        };
        let hello = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(io::Error::from)?;
        let address = SocketAddrUnix::new(hello_path).map_err(no_daemon)?;
        rustix::net::connect(&hello, &address).map_err(no_daemon)?;
        let message = wire::encode(&ClientHello {
            protocol: PROTOCOL_VERSION,
            client: concat!("rust ", env!("CARGO_PKG_VERSION")).to_owned(),
            token: String::new(),
            request,
        })?;
        rustix::net::send(&hello, &message, SendFlags::NOSIGNAL).map_err(io::Error::from)?;
        let (answer, fds) = receive_with_fds(hello.as_fd()).map_err(io::Error::from)?;
        if answer.is_empty() {
            return Err(ClientError::Gone("it hung up instead of answering".to_owned()));
        }
        let welcome = match wire::decode::<ServerHello>(&answer)?.reply {
            HelloReply::Welcome(welcome) => welcome,
            HelloReply::Refused(refusal) => return Err(ClientError::Refused(refusal)),
        };
        let n_expected = 1 + usize::from(welcome.n_window_slots > 0);
        if fds.len() != n_expected {
            let problem = format!("{} file descriptors instead of {n_expected}", fds.len());
            return Err(WireError::Malformed(format!("the welcome brought {problem}")).into());
        }
        let memory = Memory {
            map: MmapOptions::new()
                .len(checked_len(&fds[0], &welcome, welcome.n_slots)?)
                .map_raw(&fds[0])?,
            window: match fds.get(1) {
                None => None,
                Some(window) => Some(
                    MmapOptions::new()
                        .len(checked_len(window, &welcome, welcome.n_window_slots)?)
                        .map_raw_read_only(window)?,
                ),
            },
            released: Mutex::default(),
        };
        let socket = connect_dealer(&welcome)?;
        Ok(Self { socket, hello, welcome, memory: Arc::new(memory), seek: 0 })
    }

    /// Shapes, types and sizes of the stream.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Begins `epoch` at a global sample offset; `policy` is what a resumed epoch began with, or
    /// empty.
    ///
    /// # Errors
    /// The daemon cannot be reached.
    pub fn start(&mut self, epoch: u64, offset: u64, policy: &str) -> Result<(), ClientError> {
        self.seek += 1;
        let start = Start { seek: self.seek, epoch, offset, policy: policy.to_owned() };
        self.send(ClientBody::Start(start))
    }

    /// The next event of the epoch that was started last.
    ///
    /// # Errors
    /// The stream failed, or the daemon has gone.
    pub fn next_event(&mut self) -> Result<ClientEvent, ClientError> {
        loop {
            self.flush_releases()?;
            match self.receive()? {
                DaemonBody::Batch(descriptor) => {
                    let batch = self.batch(descriptor)?;
                    // Dropping a batch of an older start releases it.
                    if descriptor.seek == self.seek {
                        return Ok(ClientEvent::Batch(batch));
                    }
                }
                DaemonBody::EpochBegin(begin) if begin.seek == self.seek => {
                    return Ok(ClientEvent::Begin(begin));
                }
                DaemonBody::EpochEnd(end) if end.seek == self.seek => return Ok(ClientEvent::End),
                DaemonBody::EpochBegin(_) | DaemonBody::EpochEnd(_) => {}
                DaemonBody::Failed(refusal) => return Err(ClientError::Refused(refusal)),
                DaemonBody::Goodbye(reason) => return Err(ClientError::Gone(reason)),
                DaemonBody::Hello(_) => {
                    return Err(WireError::Malformed("a second hello".to_owned()).into());
                }
            }
        }
    }

    /// Sends the leases that dropped batches gave back.
    ///
    /// # Errors
    /// The daemon cannot be reached.
    pub fn flush_releases(&mut self) -> Result<(), ClientError> {
        let released = {
            let mut released = self.memory.released.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *released)
        };
        if released.is_empty() { Ok(()) } else { self.send(ClientBody::Release(released)) }
    }

    /// Releases a slot by name; a dropped batch does it by itself.
    ///
    /// # Errors
    /// The daemon cannot be reached.
    pub fn release(&mut self, lease: SlotLease) -> Result<(), ClientError> {
        self.send(ClientBody::Release(vec![lease]))
    }

    fn send(&self, body: ClientBody) -> Result<(), ClientError> {
        let frame = ClientFrame { protocol: PROTOCOL_VERSION, session: self.welcome.session, body };
        self.socket.send(wire::encode(&frame)?, 0).map_err(system)?;
        Ok(())
    }

    fn receive(&self) -> Result<DaemonBody, ClientError> {
        loop {
            match self.socket.recv_bytes(zmq::DONTWAIT) {
                Ok(bytes) => {
                    let frame: DaemonFrame = wire::decode(&bytes)?;
                    if frame.session == self.welcome.session {
                        return Ok(frame.body);
                    }
                }
                Err(zmq::Error::EAGAIN) => self.wait()?,
                Err(error) => return Err(system(error)),
            }
        }
    }

    fn wait(&self) -> Result<(), ClientError> {
        let mut items = [
            self.socket.as_poll_item(zmq::POLLIN),
            zmq::PollItem::from_fd(self.hello.as_raw_fd(), zmq::POLLIN),
        ];
        match zmq::poll(&mut items, -1) {
            Ok(_) | Err(zmq::Error::EINTR) => {}
            Err(error) => return Err(system(error)),
        }
        if items[0].is_readable() || !items[1].is_readable() {
            return Ok(());
        }
        // What the daemon said before its end may still be on its way through ZeroMQ's thread.
        match zmq::poll(&mut items[..1], LAST_WORDS_MS) {
            Ok(0) => Err(ClientError::Gone("its socket hung up".to_owned())),
            Ok(_) | Err(zmq::Error::EINTR) => Ok(()),
            Err(error) => Err(system(error)),
        }
    }

    fn batch(&self, descriptor: BatchDescriptor) -> Result<ClientBatch, ClientError> {
        let welcome = &self.welcome;
        let element_bytes = match welcome.dtype {
            WireDtype::U8 => 1,
            WireDtype::F16 | WireDtype::Bf16 => 2,
            WireDtype::F32 => 4,
        };
        let label_bytes = match welcome.labels {
            WireLabels::Class { .. } => 8,
            WireLabels::Vector { len } => len as usize * 4,
        };
        let slot_bytes = to_usize(welcome.slot_bytes);
        let mut batch = ClientBatch {
            descriptor,
            n_samples: 0,
            memory: Arc::clone(&self.memory),
            begin: match descriptor.window_slot {
                0 => descriptor.slot as usize * slot_bytes,
                slot => (slot - 1) as usize * slot_bytes,
            },
            labels_offset: to_usize(welcome.labels_offset),
            indices_offset: to_usize(welcome.indices_offset),
            pixel_bytes: [
                views(welcome),
                welcome.height,
                welcome.width,
                welcome.channels,
                element_bytes,
            ]
            .iter()
            .map(|&n| n as usize)
            .product(),
            label_bytes,
        };
        let n = descriptor.n_samples as usize;
        let map_len = batch.map().map_or(0, MmapRaw::len);
        let fits = batch.begin + slot_bytes <= map_len
            && n * batch.pixel_bytes <= batch.labels_offset
            && batch.labels_offset + n * label_bytes <= batch.indices_offset
            && batch.indices_offset + n * 8 <= slot_bytes;
        if !fits {
            return Err(
                WireError::Malformed(format!("a batch outside its slab: {descriptor:?}")).into()
            );
        }
        batch.n_samples = n;
        let n_skipped = batch.raw_indices().filter(|index| *index < 0).count();
        batch.n_samples = n - n_skipped;
        Ok(batch)
    }
}

/// Views of a sample, which the recipe tells.
fn views(welcome: &Welcome) -> u32 {
    let recipe: Option<Recipe> = serde_json::from_str(&welcome.recipe_json).ok();
    recipe.map_or(1, |recipe| recipe.views)
}

impl Drop for StreamClient {
    fn drop(&mut self) {
        // The daemon also notices that the HELLO socket hangs up.
        let _ = self.send(ClientBody::Bye);
    }
}

impl ClientBatch {
    /// All pixels, packed.
    pub fn pixels(&self) -> &[u8] {
        self.part(0, self.pixel_bytes)
    }

    /// All labels, packed, in native byte order.
    pub fn labels(&self) -> &[u8] {
        self.part(self.labels_offset, self.label_bytes)
    }

    /// Sample indices.
    pub fn indices(&self) -> Vec<u64> {
        self.raw_indices().filter_map(|index| u64::try_from(index).ok()).collect()
    }

    /// The batch's places, without those at its end that were skipped.
    fn raw_indices(&self) -> impl Iterator<Item = i64> + '_ {
        self.part(self.indices_offset, 8)
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i64::from_ne_bytes(*bytes))
    }

    /// Where its bytes are; `None` if the daemon says that they are in a window that is not there.
    fn map(&self) -> Option<&MmapRaw> {
        match self.descriptor.window_slot {
            0 => Some(&self.memory.map),
            _ => self.memory.window.as_ref(),
        }
    }

    #[allow(unsafe_code, reason = "see the module's justification")]
    fn part(&self, offset: usize, bytes_per_sample: usize) -> &[u8] {
        let n_bytes = self.n_samples * bytes_per_sample;
        let map = self.map().expect("checked when the batch came");
        // SAFETY: `StreamClient::batch` checked that all parts lie inside the map; the map lives as
        // long as `memory`; the daemon does not write to the slot while this lease lives, nobody
        // else can write to a window, and this process maps the slab nowhere else.
        unsafe { std::slice::from_raw_parts(map.as_ptr().add(self.begin + offset), n_bytes) }
    }
}

impl Drop for ClientBatch {
    fn drop(&mut self) {
        let lease =
            SlotLease { slot: self.descriptor.slot, generation: self.descriptor.generation };
        self.memory.released.lock().unwrap_or_else(PoisonError::into_inner).push(lease);
    }
}

/// The length of a memory of so many slots, if the file has it.
fn checked_len(fd: &OwnedFd, welcome: &Welcome, n_slots: u32) -> Result<usize, ClientError> {
    let n_bytes = welcome.slot_bytes.checked_mul(u64::from(n_slots));
    let real = rustix::fs::fstat(fd).map_err(io::Error::from)?.st_size;
    let n_bytes = n_bytes.filter(|&n| i64::try_from(n) == Ok(real)).ok_or_else(|| {
        WireError::Malformed(format!("a memory of {real} bytes, not {n_slots} slots"))
    })?;
    Ok(to_usize(n_bytes))
}

fn connect_dealer(welcome: &Welcome) -> Result<zmq::Socket, ClientError> {
    let socket = zmq::Context::new().socket(zmq::DEALER).map_err(system)?;
    socket.set_identity(&welcome.token).map_err(system)?;
    socket.set_linger(0).map_err(system)?;
    socket.set_rcvhwm(0).map_err(system)?;
    socket.connect(&welcome.endpoint).map_err(system)?;
    Ok(socket)
}

fn system(error: zmq::Error) -> ClientError {
    ClientError::System(io::Error::from_raw_os_error(error.to_raw()))
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
