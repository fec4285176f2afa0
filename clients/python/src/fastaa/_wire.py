"""The messages between the daemon and its clients, and their bytes.

The contract is `src/transport/wire.rs`; `tests/golden/wire.json` pins the bytes for both sides.

Encoding: fixed-width little-endian integers; an enum is a `u32` tag and its fields; a string or
list is a `u64` length and its content; a byte array of fixed length is its content alone. The
first field of every message is the protocol version, and it is checked before anything else.

Not here: sockets. This module turns bytes into values and back, and trusts neither.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ._messages import (
    BatchDescriptor,
    Bye,
    ClassLabels,
    ClientFrame,
    ClientHello,
    DaemonFrame,
    EpochBegin,
    EpochEnd,
    ErrorCode,
    Failed,
    Goodbye,
    GpuMemory,
    GroupMode,
    Message,
    Refusal,
    Release,
    ServerHello,
    SlotLease,
    Start,
    StreamRequest,
    VectorLabels,
    Welcome,
    WireDtype,
    WireLayout,
)

PROTOCOL_VERSION = 3
"""Version of the messages below; both sides refuse any other one in words."""

HELLO_BYTES_MAX = 64 * 1024
"""Largest message on the HELLO socket, in bytes (`limits.rs`)."""

FRAME_BYTES_MAX = 64 * 1024
"""Largest frame on the data socket, in bytes, without inline payload (`limits.rs`)."""


class WireError(ValueError):
    """The bytes are no message; or the value fits into none."""


class WireVersionError(WireError):
    """The bytes are a message of another protocol version, `theirs`."""

    def __init__(self, theirs: int) -> None:
        super().__init__(
            f"protocol version {theirs}, but this side speaks version {PROTOCOL_VERSION}"
        )
        self.theirs = theirs


MessageT = TypeVar("MessageT", ClientHello, ServerHello, ClientFrame, DaemonFrame)


# --- codecs -----------------------------------------------------------------------------------
#
# A codec is a pair of functions. They are composed once, at import, from the field lists below,
# which stand in the order of the Rust declarations: that order is the format.


class _Reader:
    """A position in untrusted bytes."""

    __slots__ = ("data", "position")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, n_bytes: int) -> bytes:
        end = self.position + n_bytes
        if end > len(self.data):
            raise WireError(
                f"malformed message: {n_bytes} bytes wanted at byte {self.position} of "
                f"{len(self.data)}"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken


class _Codec(NamedTuple):
    write: Callable[[bytearray, Any], None]
    read: Callable[[_Reader], Any]


def _integer(letter: str) -> _Codec:
    packer = struct.Struct("<" + letter)

    def write(out: bytearray, value: Any) -> None:
        try:
            out += packer.pack(value)
        except struct.error as error:
            raise WireError(f"{value!r} does not fit into {packer.size} bytes: {error}") from None

    def read(reader: _Reader) -> int:
        value: int = packer.unpack(reader.take(packer.size))[0]
        return value

    return _Codec(write, read)


_U16 = _integer("H")
_U32 = _integer("I")
_U64 = _integer("Q")
_BYTE = _integer("B")


def _write_bool(out: bytearray, value: Any) -> None:
    _BYTE.write(out, 1 if value else 0)


def _read_bool(reader: _Reader) -> bool:
    value = _BYTE.read(reader)
    if value > 1:
        raise WireError(f"malformed message: {value} is no bool")
    return bool(value)


_BOOL = _Codec(_write_bool, _read_bool)


def _write_str(out: bytearray, value: Any) -> None:
    try:
        encoded = value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise WireError(f"a text that is no UTF-8: {error}") from None
    _U64.write(out, len(encoded))
    out += encoded


def _read_str(reader: _Reader) -> str:
    encoded = reader.take(_U64.read(reader))
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"malformed message: {error}") from None


_STR = _Codec(_write_str, _read_str)


def _byte_array(n_bytes: int) -> _Codec:
    def write(out: bytearray, value: Any) -> None:
        if len(value) != n_bytes:
            raise WireError(f"{len(value)} bytes where {n_bytes} belong")
        out += value

    return _Codec(write, lambda reader: reader.take(n_bytes))


_ID = _byte_array(16)
_IPC_HANDLE = _byte_array(64)


def _option(item: _Codec) -> _Codec:
    def write(out: bytearray, value: Any) -> None:
        _write_bool(out, value is not None)
        if value is not None:
            item.write(out, value)

    return _Codec(write, lambda reader: item.read(reader) if _read_bool(reader) else None)


def _list(item: _Codec) -> _Codec:
    def write(out: bytearray, value: Any) -> None:
        _U64.write(out, len(value))
        for element in value:
            item.write(out, element)

    def read(reader: _Reader) -> tuple[Any, ...]:
        n_items = _U64.read(reader)
        # An item is at least a byte, so that no claimed length costs more than the frame is long.
        if n_items > len(reader.data) - reader.position:
            raise WireError(f"malformed message: a list of {n_items} items does not fit")
        return tuple(item.read(reader) for _ in range(n_items))

    return _Codec(write, read)


def _fields(kind: Any, *codecs: _Codec) -> _Codec:
    """A `NamedTuple` whose fields are encoded one after the other."""
    if len(codecs) != len(kind._fields):
        raise AssertionError(f"{kind.__name__} has {len(kind._fields)} fields")

    def write(out: bytearray, value: Any) -> None:
        for codec, field in zip(codecs, value, strict=True):
            codec.write(out, field)

    return _Codec(write, lambda reader: kind._make([codec.read(reader) for codec in codecs]))


def _plain_enum(kind: type[enum.IntEnum]) -> _Codec:
    """An enum without fields: its tag."""

    def read(reader: _Reader) -> enum.IntEnum:
        tag = _U32.read(reader)
        try:
            return kind(tag)
        except ValueError:
            raise WireError(f"malformed message: {kind.__name__} has no variant {tag}") from None

    return _Codec(_U32.write, read)


def _union(name: str, *variants: tuple[Any, _Codec]) -> _Codec:
    """An enum with fields: the tag, then the variant, which has a class of its own here."""
    tags = {kind: tag for tag, (kind, _) in enumerate(variants)}

    def write(out: bytearray, value: Any) -> None:
        tag = tags.get(type(value))
        if tag is None:
            raise WireError(f"{type(value).__name__} is no variant of {name}")
        _U32.write(out, tag)
        variants[tag][1].write(out, value)

    def read(reader: _Reader) -> Any:
        tag = _U32.read(reader)
        if tag >= len(variants):
            raise WireError(f"malformed message: {name} has no variant {tag}")
        return variants[tag][1].read(reader)

    return _Codec(write, read)


_STREAM_REQUEST = _fields(
    StreamRequest,
    *(_STR, _STR, _U32, _U64, _U32, _U32, _BOOL, _BOOL, _STR),
    *(_plain_enum(GroupMode), _STR, _U32, _BOOL, _option(_ID)),
)
_CLIENT_HELLO = _fields(ClientHello, _U16, _STR, _STR, _STREAM_REQUEST)
_LABELS = _union(
    "WireLabels",
    (ClassLabels, _fields(ClassLabels, _U32)),
    (VectorLabels, _fields(VectorLabels, _U32)),
)
_GPU_MEMORY = _fields(GpuMemory, _IPC_HANDLE, _list(_IPC_HANDLE), _U64, _U64)
_WELCOME = _fields(
    Welcome,
    *(_U64, _ID, _STR, _U64, _U32, _U64, _U64, _U32, _U32, _U32, _U32),
    *(_plain_enum(WireDtype), _plain_enum(WireLayout), _LABELS, _U64, _STR, _STR, _STR),
    *(_U32, _option(_GPU_MEMORY), _STR),
)
_REFUSAL = _fields(Refusal, _plain_enum(ErrorCode), _STR, _STR)
_HELLO_REPLY = _union("HelloReply", (Welcome, _WELCOME), (Refusal, _REFUSAL))
_SERVER_HELLO = _fields(ServerHello, _U16, _HELLO_REPLY)
_LEASES = _list(_fields(SlotLease, _U32, _U32))
_CLIENT_BODY = _union(
    "ClientBody",
    (Start, _fields(Start, _U32, _U64, _U64, _STR)),
    (Release, _fields(Release, _LEASES)),
    (Bye, _fields(Bye)),
    (ClientHello, _CLIENT_HELLO),
)
_BATCH = _fields(
    BatchDescriptor,
    *(_U32, _U32, _U32, _U32, _U64, _U64, _U64, _ID, _U64, _U64, _BOOL, _BOOL, _U32),
)
_DAEMON_BODY = _union(
    "DaemonBody",
    (BatchDescriptor, _BATCH),
    (EpochEnd, _fields(EpochEnd, _U32, _U64, _U64)),
    (Failed, _fields(Failed, _REFUSAL)),
    (Goodbye, _fields(Goodbye, _STR)),
    (ServerHello, _SERVER_HELLO),
    (EpochBegin, _fields(EpochBegin, _U32, _U64, _STR, _ID, _U64)),
)
_MESSAGES: dict[type[Message], _Codec] = {
    ClientHello: _CLIENT_HELLO,
    ServerHello: _SERVER_HELLO,
    ClientFrame: _fields(ClientFrame, _U16, _U64, _CLIENT_BODY),
    DaemonFrame: _fields(DaemonFrame, _U16, _U64, _DAEMON_BODY),
}


def encode(message: Message) -> bytes:
    """The bytes of a message.

    Raises `WireError` if a value does not fit its field or the message is over the limit.
    """
    out = bytearray()
    _MESSAGES[type(message)].write(out, message)
    if len(out) > FRAME_BYTES_MAX:
        raise WireError(f"message of {len(out)} bytes is over the limit of {FRAME_BYTES_MAX} bytes")
    return bytes(out)


def decode(kind: type[MessageT], data: bytes) -> MessageT:
    """The message of class `kind` in `data`.

    Raises `WireVersionError` on another protocol version and `WireError` on anything else that
    is not exactly one message.
    """
    if len(data) > FRAME_BYTES_MAX:
        raise WireError(
            f"message of {len(data)} bytes is over the limit of {FRAME_BYTES_MAX} bytes"
        )
    if len(data) < 2:
        raise WireError(f"malformed message: {len(data)} bytes hold no version")
    version = int.from_bytes(data[:2], "little")
    if version != PROTOCOL_VERSION:
        raise WireVersionError(version)
    reader = _Reader(data)
    message: MessageT = _MESSAGES[kind].read(reader)
    if reader.position != len(data):
        raise WireError(f"malformed message: {len(data) - reader.position} trailing bytes")
    return message


# --- the hot path -----------------------------------------------------------------------------
#
# A training loop decodes one batch and encodes one release per step; both are one precompiled
# `Struct`. The tests compare them with the codecs above.

_BATCH_FRAME = struct.Struct("<HQI IIII QQQ 16s QQ BB I")
_BATCH_TAG = 0
_RELEASE_FRAME = struct.Struct("<HQI Q II")
_RELEASE_TAG = 1


def decode_daemon_frame(data: bytes) -> DaemonFrame:
    """As `decode(DaemonFrame, data)`, fast where it is a batch."""
    if len(data) == _BATCH_FRAME.size:
        version, session, tag, *fields = _BATCH_FRAME.unpack(data)
        if version == PROTOCOL_VERSION and tag == _BATCH_TAG and max(fields[-3:-1]) <= 1:
            fields[-3:-1] = bool(fields[-3]), bool(fields[-2])
            return DaemonFrame(version, session, BatchDescriptor._make(fields))
    return decode(DaemonFrame, data)


def encode_release(session: int, leases: tuple[SlotLease, ...]) -> bytes:
    """As `encode` of a `Release` frame, fast where it is a single lease."""
    if len(leases) == 1:
        slot, generation = leases[0]
        return _RELEASE_FRAME.pack(PROTOCOL_VERSION, session, _RELEASE_TAG, 1, slot, generation)
    return encode(ClientFrame(PROTOCOL_VERSION, session, Release(leases)))
