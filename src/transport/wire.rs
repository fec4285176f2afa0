//! The messages between daemon and training clients, and their bytes.
//!
//! *Encoding*: bincode 2, fixed-width integers, little-endian, with a size limit on both sides.
//! An enum is a `u32` tag and its fields; a `String` or `Vec` is a `u64` length and its content;
//! an `Option` is one byte 0 or 1 and then the value. Enums and structs are append-only: a field
//! that is added, removed or moved makes a new [`PROTOCOL_VERSION`]. The first field of every
//! message is the version, so that any two versions can refuse each other in words.
//! `tests/golden/wire.json` pins the bytes; the Rust and the Python tests both decode it.
//!
//! *Conversation of a local client*
//!
//! 1. It connects to the Unix `SOCK_SEQPACKET` socket `hello.sock` and sends one [`ClientHello`].
//! 2. The daemon answers one [`ServerHello`]: [`Welcome`] with the slab's file descriptor
//!    (`SCM_RIGHTS`) and, if [`Welcome::n_window_slots`] is not 0, the window's, or [`Refusal`] and
//!    closes. The socket stays open as the sign of life: when
//!    either side dies, the kernel hangs it up.
//! 3. The client makes a ZeroMQ DEALER with [`Welcome::token`] as its routing id, connects it to
//!    [`Welcome::endpoint`] and sends [`ClientBody::Start`]. All slots are free then, and each
//!    free slot is a credit.
//! 4. The daemon sends a [`DaemonBody::Batch`] per batch, in order, then
//!    [`DaemonBody::EpochEnd`]. A slot belongs to the client from its `Batch` to the
//!    [`ClientBody::Release`] that names the same generation.
//! 5. A new `Start` (any time) abandons the epoch under way; batches that still carry the older
//!    `seek` must be released unread.
//!
//! *Conversation over TCP* (loopback): the same, but `ClientHello` and `ServerHello` travel as
//! [`ClientBody::Hello`] and [`DaemonBody::Hello`] on the DEALER socket itself, the daemon keeps
//! the slab, and each `Batch` message is followed by a second frame with the slot's bytes
//! (`slot_bytes` long).
//!
//! *Windows*: the members of a broadcast group read a second memory, the window, which nobody but
//! the daemon can write: a member maps it privately, so that its own writes are its own, and maps a
//! slot anew for each batch in it. A batch there is leased and released by the slot of the member's
//! own slab that its descriptor names, whose bytes mean nothing meanwhile.
//!
//! *GPUs*: with [`Welcome::gpu`] a batch is announced when its slot's bytes are on the GPU, too;
//! the slab holds the same ones. Before the client releases such a slot it records the slot's event
//! behind its last use of it, and the daemon waits until that has passed. With the welcome comes,
//! last, the write end of a pipe, which the client closes when it has closed the GPU's memory.
//!
//! *Slot layout*: pixels from byte 0, then labels at `labels_offset`, then indices (`i64` sample
//! indices) at `indices_offset`; each part starts at a multiple of 64 bytes and is packed for
//! `n_samples` of the batch. Class labels are `i64`; vector labels are `f32` rows. Samples that
//! were skipped have their places at the end, with the index `-1 - sample`: count them out.

use bincode::{Decode, Encode};

use crate::limits;

/// Versions, newest first:
///
/// * 3: slabs on GPUs.
/// * 2: windows of broadcast groups, replay.
/// * 1: first.
pub const PROTOCOL_VERSION: u16 = 3;

/// First message on the HELLO socket.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ClientHello {
    /// [`PROTOCOL_VERSION`] of the client.
    pub protocol: u16,
    /// Who asks, for logs: for example `python 0.1.0`.
    pub client: String,
    /// The token of the token file (TCP only; empty on the Unix socket).
    pub token: String,
    /// What is asked for.
    pub request: StreamRequest,
}

/// Whether the members of a group share an epoch or each see all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum GroupMode {
    /// Rank r of w gets its share of each global batch.
    Shard,
    /// Every member gets every batch.
    Broadcast,
}

/// A subscription.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct StreamRequest {
    /// Name in the configuration.
    pub dataset: String,
    /// `train`, `test`, …
    pub split: String,
    /// Samples per rank and step.
    pub batch_size: u32,
    /// Keys the order and every random draw.
    pub seed: u64,
    /// This consumer's place, `0..world_size`.
    pub rank: u32,
    /// Ranks that share each global batch.
    pub world_size: u32,
    /// Drop the last, incomplete global batch of an epoch.
    pub drop_last: bool,
    /// Keyed permutation, or index order.
    pub shuffle: bool,
    /// The run whose epochs pin a policy together; empty: this connection alone.
    pub group: String,
    /// Meaning of the group.
    pub mode: GroupMode,
    /// Recipe keys that differ from `[stream.defaults]`, as a JSON object (`{}`: none). The
    /// policy is among them, under `policy`.
    pub recipe_json: String,
    /// Slots wanted; 0: the daemon chooses.
    pub n_slots: u32,
    /// Fill each slot once, and announce what lies in it from then on, whatever the step: to
    /// measure what a training could reach if batches cost nothing.
    pub replay: bool,
    /// The GPU on which the slab is to have an image, if any: its UUID as CUDA gives it.
    pub gpu: Option<[u8; 16]>,
}

/// Answer on the HELLO socket.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ServerHello {
    /// [`PROTOCOL_VERSION`] of the daemon.
    pub protocol: u16,
    /// Yes or no.
    pub reply: HelloReply,
}

/// Yes or no to a [`ClientHello`].
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum HelloReply {
    /// The stream is ready.
    Welcome(Welcome),
    /// It is not, and why.
    Refused(Refusal),
}

/// Element type of the pixels in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum WireDtype {
    /// 8-bit, 0–255, not normalised.
    U8,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single.
    F32,
}

/// Order of the pixels in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum WireLayout {
    /// `[batch, channels, height, width]`.
    Nchw,
    /// `[batch, height, width, channels]`.
    Nhwc,
}

/// Kind of the labels in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum WireLabels {
    /// One `i64` class per sample, `0..n_classes`.
    Class {
        /// Number of classes.
        n_classes: u32,
    },
    /// `len` `f32` per sample.
    Vector {
        /// Elements per sample.
        len: u32,
    },
}

/// The stream is ready; all a client needs to read it.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Welcome {
    /// Goes into every frame of this connection.
    pub session: u64,
    /// Routing id of the DEALER socket; secret to this client.
    pub token: [u8; 16],
    /// Where to connect the DEALER socket (`ipc://…`); empty over TCP.
    pub endpoint: String,
    /// Bytes from one slot to the next, a multiple of the page; the slab is `n_slots * slot_bytes`
    /// long.
    pub slot_bytes: u64,
    /// Slots in the slab.
    pub n_slots: u32,
    /// Where labels start within a slot.
    pub labels_offset: u64,
    /// Where sample indices start within a slot.
    pub indices_offset: u64,
    /// As requested. A slot has places for `min(batch_size, n_samples)` samples.
    pub batch_size: u32,
    /// Rows of every image.
    pub height: u32,
    /// Columns of every image.
    pub width: u32,
    /// Channels of every image.
    pub channels: u32,
    /// Element type.
    pub dtype: WireDtype,
    /// Element order.
    pub layout: WireLayout,
    /// Label kind.
    pub labels: WireLabels,
    /// Samples in the split.
    pub n_samples: u64,
    /// Identity of the split's content.
    pub fingerprint: String,
    /// The whole effective recipe, as JSON.
    pub recipe_json: String,
    /// Version of the daemon.
    pub daemon_version: String,
    /// Slots of the group's window; 0: there is none. They are as large as the slab's.
    pub n_window_slots: u32,
    /// The slab's image on the GPU that was asked for.
    pub gpu: Option<Box<GpuMemory>>,
    /// Why there is none, if one was asked for; else empty.
    pub gpu_refused: String,
}

/// Memory on a GPU, with as many slots as the slab. They hold pixels and labels; indices are in the
/// slab, and what else lies there means nothing where the two layouts differ.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct GpuMemory {
    /// For `cuIpcOpenMemHandle`.
    pub memory: [u8; 64],
    /// One per slot, for `cuIpcOpenEventHandle`.
    pub events: Vec<[u8; 64]>,
    /// Bytes from one slot to the next there.
    pub slot_bytes: u64,
    /// Where labels start within a slot there.
    pub labels_offset: u64,
}

/// Kinds of refusal and failure, for exception classes. Append-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ErrorCode {
    /// The two protocol versions differ.
    Protocol,
    /// The frame does not decode, or breaks the conversation.
    Malformed,
    /// The user may not.
    Forbidden,
    /// No such dataset, split or policy.
    NotFound,
    /// A value of the request is wrong.
    Invalid,
    /// A limit is reached (sessions, memory).
    Exhausted,
    /// A sample or file could not be read.
    Data,
    /// The daemon is stopping.
    Stopping,
    /// A fault of the daemon.
    Internal,
    /// The consumer's GPU has failed; without asking for it, the stream goes on.
    Gpu,
}

/// No, and why.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Refusal {
    /// Kind.
    pub code: ErrorCode,
    /// What is wrong, for people.
    pub message: String,
    /// What to do about it, or empty.
    pub hint: String,
}

/// Any frame from a client.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ClientFrame {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u16,
    /// [`Welcome::session`]; 0 in a TCP `Hello`.
    pub session: u64,
    /// Content.
    pub body: ClientBody,
}

/// What a client says after HELLO. Append-only.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum ClientBody {
    /// Deliver an epoch from a position on.
    Start(Start),
    /// These slots are free again.
    Release(Vec<SlotLease>),
    /// The client leaves.
    Bye,
    /// HELLO over TCP.
    Hello(ClientHello),
}

/// Deliver `epoch` from the global sample offset `offset` on.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Start {
    /// Counts the `Start`s of this session from 1; batches carry it back.
    pub seek: u32,
    /// Which epoch.
    pub epoch: u64,
    /// Samples of the epoch (all ranks together) that were already yielded.
    pub offset: u64,
    /// Reference of the policy that the resumed epoch began with ([`EpochBegin::policy`]), or
    /// empty.
    pub policy: String,
}

/// A slot in one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SlotLease {
    /// Index in the slab.
    pub slot: u32,
    /// Counts the slot's lives; a release with another one is ignored.
    pub generation: u32,
}

/// Any frame from the daemon.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct DaemonFrame {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u16,
    /// [`Welcome::session`].
    pub session: u64,
    /// Content.
    pub body: DaemonBody,
}

/// What the daemon says after HELLO. Append-only.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum DaemonBody {
    /// A batch is in a slot.
    Batch(BatchDescriptor),
    /// The epoch has no more batches for this rank.
    EpochEnd(EpochEnd),
    /// The stream cannot go on (a sample that must not fail did, …).
    Failed(Refusal),
    /// The daemon leaves; the text says why.
    Goodbye(String),
    /// HELLO over TCP.
    Hello(ServerHello),
    /// The epoch that `Start` asked for begins, with this policy.
    EpochBegin(EpochBegin),
}

/// The policy of an epoch is decided.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct EpochBegin {
    /// Of the `Start`.
    pub seek: u32,
    /// Which epoch.
    pub epoch: u64,
    /// Reference that names exactly this policy: `NAME@VERSION`, a built-in's name, or `id:` and
    /// the content hash of a policy file.
    pub policy: String,
    /// Content hash.
    pub policy_id: [u8; 16],
    /// Version in the store; 0 for a built-in or a file.
    pub policy_version: u64,
}

/// Where a batch is and what it is: 78 bytes, 92 with the frame around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct BatchDescriptor {
    /// Of the `Start` that it answers.
    pub seek: u32,
    /// Slot in the slab, by which the batch is leased.
    pub slot: u32,
    /// The slot's life.
    pub generation: u32,
    /// Samples in this rank's share; 0 only in an epoch's last step.
    pub n_samples: u32,
    /// Which epoch.
    pub epoch: u64,
    /// Step within the epoch since its beginning or since the offset resumed from.
    pub step: u64,
    /// Global samples of the epoch yielded once this batch is: the state to resume from.
    pub next_offset: u64,
    /// Content hash of the policy.
    pub policy_id: [u8; 16],
    /// Its version in the store; 0 for a built-in or a file.
    pub policy_version: u64,
    /// Samples of the whole global batch (all ranks), for the loss of the last step.
    pub n_global: u64,
    /// The slot's bytes follow as a second frame (TCP).
    pub inline: bool,
    /// The epoch's last batch.
    pub last: bool,
    /// 0: the bytes are in `slot`; else in the window's slot of this number less one.
    pub window_slot: u32,
}

/// End of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct EpochEnd {
    /// Of the `Start`.
    pub seek: u32,
    /// Which epoch.
    pub epoch: u64,
    /// Steps delivered for this `Start`.
    pub n_steps: u64,
}

/// Why bytes are no message.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Too long before or after encoding.
    #[error("message of {bytes} bytes is over the limit of {limit} bytes")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The maximum.
        limit: usize,
    },
    /// Another protocol version.
    #[error("protocol version {theirs}, but this side speaks version {PROTOCOL_VERSION}")]
    Version {
        /// The peer's.
        theirs: u16,
    },
    /// Not a message.
    #[error("malformed message: {0}")]
    Malformed(String),
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<{ limits::FRAME_BYTES_MAX }>()
}

/// Encodes a message.
///
/// # Errors
/// If it is over [`limits::FRAME_BYTES_MAX`].
pub fn encode(message: &impl Encode) -> Result<Vec<u8>, WireError> {
    let bytes = bincode::encode_to_vec(message, config())
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    if bytes.len() > limits::FRAME_BYTES_MAX {
        return Err(WireError::TooLong { bytes: bytes.len(), limit: limits::FRAME_BYTES_MAX });
    }
    Ok(bytes)
}

/// Decodes a message whose first field is the protocol version.
///
/// # Errors
/// Another version, too long, trailing bytes, or no message.
pub fn decode<M: Decode<()>>(bytes: &[u8]) -> Result<M, WireError> {
    if bytes.len() > limits::FRAME_BYTES_MAX {
        return Err(WireError::TooLong { bytes: bytes.len(), limit: limits::FRAME_BYTES_MAX });
    }
    let Some(version) = bytes.first_chunk::<2>() else {
        return Err(WireError::Malformed(format!("{} bytes hold no version", bytes.len())));
    };
    let theirs = u16::from_le_bytes(*version);
    if theirs != PROTOCOL_VERSION {
        return Err(WireError::Version { theirs });
    }
    let (message, used) = bincode::decode_from_slice::<M, _>(bytes, config())
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    if used != bytes.len() {
        return Err(WireError::Malformed(format!("{} trailing bytes", bytes.len() - used)));
    }
    Ok(message)
}
