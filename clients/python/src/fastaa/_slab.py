"""The slab: the memory that the daemon fills and this process reads, cut into slots.

A slot's content: pixels from byte 0, then labels, then sample indices (`_messages.Welcome` says
where). The slab is mapped shared and writable, so that an in-place operation on a batch is
harmless: the daemon rewrites a slot whole before it lends it again.

The members of a broadcast group read a window together, which only the daemon can write. Each
batch of it gets a private map of its own: an in-place operation changes this process's copy of the
pages, which is gone with the batch.

*Invariant*: nothing here unmaps the slab. Every root keeps the map alive, and the map goes when
the last root and the connection are gone; a tensor never outlives its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
from collections.abc import Callable
from typing import Any

from . import _messages
from .errors import ProtocolError

_ITEM_BYTES = {
    _messages.WireDtype.U8: 1,
    _messages.WireDtype.F16: 2,
    _messages.WireDtype.Bf16: 2,
    _messages.WireDtype.F32: 4,
}


def views(welcome: _messages.Welcome) -> int:
    """Views of every sample, as the recipe says."""
    found = json.loads(welcome.recipe_json or "{}").get("views", 1)
    return found if isinstance(found, int) else 1


def pixel_bytes(welcome: _messages.Welcome, n_samples: int) -> int:
    """Bytes of the pixels of `n_samples` samples."""
    n_values = n_samples * welcome.channels * welcome.height * welcome.width * views(welcome)
    return n_values * _ITEM_BYTES[welcome.dtype]


def label_bytes(welcome: _messages.Welcome, n_samples: int) -> int:
    """Bytes of the labels of `n_samples` samples."""
    if isinstance(welcome.labels, _messages.VectorLabels):
        return n_samples * welcome.labels.len * 4
    return n_samples * 8


def samples_per_batch_max(welcome: _messages.Welcome) -> int:
    """What a slot has room for: the split may be smaller than a batch."""
    return min(welcome.batch_size, welcome.n_samples)


def check_slot_layout(welcome: _messages.Welcome) -> None:
    """Refuses a slot whose parts overlap or do not fit, before anything is read by it."""
    n_samples = samples_per_batch_max(welcome)
    pixels, labels = pixel_bytes(welcome, n_samples), label_bytes(welcome, n_samples)
    indices = ("indices", welcome.indices_offset, n_samples * 8, welcome.slot_bytes)
    if welcome.gpu is None:
        parts = (
            ("pixels", 0, pixels, welcome.labels_offset),
            ("labels", welcome.labels_offset, labels, welcome.indices_offset),
            indices,
        )
    else:
        parts = (
            ("pixels", 0, pixels, welcome.gpu.labels_offset),
            ("labels", welcome.gpu.labels_offset, labels, welcome.gpu.slot_bytes),
            indices,
        )
    for name, start, length, end in parts:
        if start + length > end:
            raise ProtocolError(
                f"the daemon announces slots whose {name} ({length} bytes at byte {start}) run "
                f"over byte {end}",
                "install the client and the daemon from the same release",
            )
    if welcome.n_slots < 1:
        raise ProtocolError("the daemon announces a slab without slots")


def _check_memory(fd: int, length: int) -> None:
    found = os.fstat(fd).st_size
    if found < length:
        raise ProtocolError(f"the slab has {found} bytes, but {length} were announced")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        # A slab that can shrink under the map would end the training by SIGBUS.
        raise ProtocolError("the slab that the daemon sent is not sealed against shrinking")


class SlabMap(mmap.mmap):
    """A map that can be taken leave of.

    `weakref.finalize` would come too late: the memory is unmapped before weak references are told.
    """

    before_unmap: Callable[[], None] | None = None
    """Called once, in whatever thread drops the last view, while the memory is still there."""

    def __del__(self) -> None:
        if self.before_unmap is not None:
            with contextlib.suppress(Exception):
                self.before_unmap()


class Slab:
    """A mapped slab."""

    def __init__(self, fd: int, welcome: _messages.Welcome) -> None:
        """Maps the slab behind `fd`; the caller keeps and closes `fd`."""
        length = welcome.n_slots * welcome.slot_bytes
        _check_memory(fd, length)
        self._map = SlabMap(
            fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self._slot_bytes = welcome.slot_bytes
        self._slot_type: Any = ctypes.c_ubyte * welcome.slot_bytes

    def memory(self) -> tuple[SlabMap, int, int]:
        """The map, its address and its length in bytes."""
        address = ctypes.addressof(self._slot_type.from_buffer(self._map))
        return self._map, address, len(self._map)

    def root(self, slot: int) -> Any:
        """A buffer that is the slot: views of it keep it alive, and it keeps the map alive."""
        return self._slot_type.from_buffer(self._map, slot * self._slot_bytes)

    def copy(self, slot: int) -> Any:
        """A private copy of the slot, of the same kind as `root`."""
        return self._slot_type.from_buffer_copy(self._map, slot * self._slot_bytes)


class Window:
    """The memory that a broadcast group reads together."""

    def __init__(self, fd: int, welcome: _messages.Welcome) -> None:
        """Keeps a file descriptor of its own for `fd`, which the caller closes."""
        _check_memory(fd, welcome.n_window_slots * welcome.slot_bytes)
        if welcome.slot_bytes % mmap.ALLOCATIONGRANULARITY:
            raise ProtocolError(
                f"the daemon announces slots of {welcome.slot_bytes} bytes, which is no multiple "
                f"of this host's page, {mmap.ALLOCATIONGRANULARITY}",
                "install the client and the daemon from the same release",
            )
        self._slot_bytes = welcome.slot_bytes
        self._slot_type: Any = ctypes.c_ubyte * welcome.slot_bytes
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)

    def root(self, slot: int) -> Any:
        """A buffer that is a private map of the slot, and keeps it until the last view is gone."""
        slot_map = mmap.mmap(
            self._fd,
            self._slot_bytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=slot * self._slot_bytes,
        )
        return self._slot_type.from_buffer(slot_map)

    def copy(self, slot: int) -> Any:
        """A private copy of the slot, of the same kind as `root`."""
        return self._slot_type.from_buffer_copy(self.root(slot))

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)
