"""The messages between the daemon and its clients, as values.

The contract is `src/transport/wire.rs`, which also describes the conversation; classes and fields
have its names, in its order. `_wire` knows their bytes.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, TypeAlias


class GroupMode(enum.IntEnum):
    """Whether the members of a group share an epoch or each see all of it."""

    Shard = 0
    Broadcast = 1


class WireDtype(enum.IntEnum):
    """Element type of the pixels in a slot."""

    U8 = 0
    F16 = 1
    Bf16 = 2
    F32 = 3


class WireLayout(enum.IntEnum):
    """Order of the pixels in a slot."""

    Nchw = 0
    Nhwc = 1


class ErrorCode(enum.IntEnum):
    """Kinds of refusal and failure. Append-only."""

    Protocol = 0
    Malformed = 1
    Forbidden = 2
    NotFound = 3
    Invalid = 4
    Exhausted = 5
    Data = 6
    Stopping = 7
    Internal = 8
    Gpu = 9


class StreamRequest(NamedTuple):
    """A subscription."""

    dataset: str
    split: str
    batch_size: int
    seed: int
    rank: int
    world_size: int
    drop_last: bool
    shuffle: bool
    group: str
    mode: GroupMode
    recipe_json: str
    n_slots: int
    replay: bool
    gpu: bytes | None


class ClientHello(NamedTuple):
    """First message of a client."""

    protocol: int
    client: str
    token: str
    request: StreamRequest


class ClassLabels(NamedTuple):
    """One `i64` class per sample, `0..n_classes`."""

    n_classes: int


class VectorLabels(NamedTuple):
    """`len` `f32` per sample."""

    len: int


class GpuMemory(NamedTuple):
    """Memory on a GPU, with as many slots as the slab, and an event per slot: CUDA's handles.

    Pixels and labels are there, indices in the slab; its pixels and labels mean nothing.
    """

    memory: bytes
    events: tuple[bytes, ...]
    slot_bytes: int
    labels_offset: int


class Welcome(NamedTuple):
    """The stream is ready; all a client needs to read it."""

    session: int
    token: bytes
    endpoint: str
    slot_bytes: int
    n_slots: int
    labels_offset: int
    indices_offset: int
    batch_size: int
    height: int
    width: int
    channels: int
    dtype: WireDtype
    layout: WireLayout
    labels: ClassLabels | VectorLabels
    n_samples: int
    fingerprint: str
    recipe_json: str
    daemon_version: str
    n_window_slots: int
    gpu: GpuMemory | None
    gpu_refused: str


class Refusal(NamedTuple):
    """No, and why."""

    code: ErrorCode
    message: str
    hint: str


class ServerHello(NamedTuple):
    """The daemon's answer to a `ClientHello`."""

    protocol: int
    reply: Welcome | Refusal


class Start(NamedTuple):
    """Deliver `epoch` from the global sample offset `offset` on."""

    seek: int
    epoch: int
    offset: int
    policy: str


class SlotLease(NamedTuple):
    """A slot in one of its lives."""

    slot: int
    generation: int


class Release(NamedTuple):
    """These slots are free again."""

    leases: tuple[SlotLease, ...]


class Bye(NamedTuple):
    """The client leaves."""


class EpochBegin(NamedTuple):
    """The policy of an epoch is decided."""

    seek: int
    epoch: int
    policy: str
    policy_id: bytes
    policy_version: int


class BatchDescriptor(NamedTuple):
    """Where a batch is and what it is."""

    seek: int
    slot: int
    generation: int
    n_samples: int
    epoch: int
    step: int
    next_offset: int
    policy_id: bytes
    policy_version: int
    n_global: int
    inline: bool
    last: bool
    window_slot: int
    """0: the bytes are in `slot`; else in this slot, less one, of the window."""


class EpochEnd(NamedTuple):
    """The epoch has no more batches for this rank."""

    seek: int
    epoch: int
    n_steps: int


class Failed(NamedTuple):
    """The stream cannot go on."""

    refusal: Refusal


class Goodbye(NamedTuple):
    """The daemon leaves."""

    reason: str


ClientBody: TypeAlias = Start | Release | Bye | ClientHello
DaemonBody: TypeAlias = BatchDescriptor | EpochEnd | Failed | Goodbye | ServerHello | EpochBegin


class ClientFrame(NamedTuple):
    """Any frame from a client."""

    protocol: int
    session: int
    body: ClientBody


class DaemonFrame(NamedTuple):
    """Any frame from the daemon."""

    protocol: int
    session: int
    body: DaemonBody


Message: TypeAlias = ClientHello | ServerHello | ClientFrame | DaemonFrame
