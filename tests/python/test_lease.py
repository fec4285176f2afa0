"""Slots, leases and arrays, against a memfd as the daemon makes it; no daemon needed."""

from __future__ import annotations

import fcntl
import gc
import os
import select
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastaa import ProtocolError, _messages
from fastaa._arrays import ArrayMaker
from fastaa._lease import Releases
from fastaa._messages import SlotLease
from fastaa._slab import Slab, check_slot_layout

N_SLOTS, BATCH_SIZE = 3, 4
LEASE = SlotLease(1, 7)

WELCOME = _messages.Welcome(
    session=1,
    token=bytes(16),
    endpoint="",
    slot_bytes=4096,
    n_slots=N_SLOTS,
    labels_offset=2048,
    indices_offset=3072,
    batch_size=BATCH_SIZE,
    height=3,
    width=5,
    channels=2,
    dtype=_messages.WireDtype.F32,
    layout=_messages.WireLayout.Nchw,
    labels=_messages.ClassLabels(10),
    n_samples=100,
    fingerprint="f",
    recipe_json="{}",
    daemon_version="0",
    n_window_slots=0,
    gpu=None,
    gpu_refused="",
)


@pytest.fixture
def slab_fd() -> Iterator[int]:
    fd = os.memfd_create("slab", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, N_SLOTS * WELCOME.slot_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    yield fd
    os.close(fd)


def fill(fd: int, slot: int, welcome: _messages.Welcome = WELCOME) -> None:
    """Writes a slot as the daemon would: pixels 0, 1, 2…, labels 3, indices 1000…"""
    start = slot * welcome.slot_bytes
    pixels = np.arange(BATCH_SIZE * 30, dtype=np.float32)
    os.pwrite(fd, pixels.tobytes(), start)
    os.pwrite(fd, np.full(BATCH_SIZE, 3, np.int64).tobytes(), start + welcome.labels_offset)
    indices = np.arange(1000, 1000 + BATCH_SIZE, dtype=np.int64)
    os.pwrite(fd, indices.tobytes(), start + welcome.indices_offset)


def is_ready(releases: Releases) -> bool:
    return bool(select.select([releases.fd], [], [], 0)[0])


def test_views_share_the_slots_memory(slab_fd: int) -> None:
    slab = Slab(slab_fd, WELCOME)
    fill(slab_fd, 1)
    for output in ("torch", "numpy"):
        images, labels, indices, _ = ArrayMaker(WELCOME, output).arrays(slab.root(1), BATCH_SIZE)
        assert tuple(images.shape) == (BATCH_SIZE, 2, 3, 5)
        assert images.reshape(-1).tolist() == list(range(BATCH_SIZE * 30))
        assert labels.tolist() == [3] * BATCH_SIZE
        assert indices.tolist() == [1000, 1001, 1002, 1003]
        images[0, 0, 0, 0] = 42
        written = os.pread(slab_fd, 4, WELCOME.slot_bytes)
        assert np.frombuffer(written, np.float32)[0] == 42
        images[0, 0, 0, 0] = 0


def test_layout_dtype_and_vector_labels() -> None:
    welcome = WELCOME._replace(
        layout=_messages.WireLayout.Nhwc,
        dtype=_messages.WireDtype.F16,
        labels=_messages.VectorLabels(3),
    )
    root = bytearray(welcome.slot_bytes)
    images, labels, _, _ = ArrayMaker(welcome, "torch").arrays(root, 2)
    assert (tuple(images.shape), images.dtype) == ((2, 3, 5, 2), torch.float16)
    assert (tuple(labels.shape), labels.dtype) == ((2, 3), torch.float32)
    images, labels, indices, _ = ArrayMaker(welcome, "numpy").arrays(root, 0)
    assert (images.shape, images.dtype) == ((0, 3, 5, 2), np.float16)
    assert (labels.shape, labels.dtype) == ((0, 3), np.float32)
    assert (indices.shape, indices.dtype) == ((0,), np.int64)


@pytest.mark.parametrize("output", ["torch", "numpy"])
@pytest.mark.parametrize("keep", ["images", "labels", "indices", "places"])
def test_any_slice_of_any_part_keeps_the_lease(slab_fd: int, output: str, keep: str) -> None:
    slab, releases = Slab(slab_fd, WELCOME), Releases()
    root = slab.root(1)
    releases.watch(root, LEASE)
    arrays = ArrayMaker(WELCOME, output).arrays(root, BATCH_SIZE)
    kept = getattr(arrays, keep)[1:2]
    del root, arrays
    gc.collect()
    assert releases.n_alive == 1
    assert not is_ready(releases)
    del kept
    gc.collect()
    assert releases.n_alive == 0
    assert is_ready(releases)
    assert releases.drain() == (LEASE,)
    assert not is_ready(releases)


def test_memory_outlives_the_slab_object(slab_fd: int) -> None:
    slab = Slab(slab_fd, WELCOME)
    fill(slab_fd, 2)
    images = ArrayMaker(WELCOME, "torch").arrays(slab.root(2), BATCH_SIZE).images
    del slab
    gc.collect()
    assert images.sum().item() == sum(range(BATCH_SIZE * 30))


def test_a_copy_is_private(slab_fd: int) -> None:
    slab = Slab(slab_fd, WELCOME)
    fill(slab_fd, 0)
    copy = slab.copy(0)
    os.pwrite(slab_fd, bytes(WELCOME.slot_bytes), 0)
    images = ArrayMaker(WELCOME, "torch").arrays(copy, BATCH_SIZE).images
    assert images.reshape(-1).tolist() == list(range(BATCH_SIZE * 30))
    images += 1


def test_a_lease_given_back_in_another_thread_or_by_the_collector(slab_fd: int) -> None:
    slab, releases = Slab(slab_fd, WELCOME), Releases()

    def lend(slot: int) -> list[Any]:
        root = slab.root(slot)
        releases.watch(root, SlotLease(slot, 1))
        return [ArrayMaker(WELCOME, "torch").arrays(root, BATCH_SIZE).images]

    holder = lend(0)
    thread = threading.Thread(target=holder.clear)
    thread.start()
    releases.wait()
    thread.join()
    assert releases.drain() == (SlotLease(0, 1),)

    cycle = lend(2)
    cycle.append(cycle)
    del cycle
    assert releases.n_alive == 1
    gc.collect()
    assert releases.drain() == (SlotLease(2, 1),)


def test_a_forked_child_gives_nothing_back(slab_fd: int) -> None:
    slab, releases = Slab(slab_fd, WELCOME), Releases()
    root = slab.root(1)
    releases.watch(root, LEASE)
    child = os.fork()
    if child == 0:
        del root
        gc.collect()
        os._exit(0 if not is_ready(releases) and releases.drain() == () else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert releases.n_alive == 1
    assert not is_ready(releases)
    del root
    assert releases.drain() == (LEASE,)


def test_leases_that_could_not_be_sent_come_again_in_order() -> None:
    releases = Releases()
    first, second, third = (SlotLease(slot, 1) for slot in range(3))
    releases.give_back(first)
    releases.give_back(second)
    drained = releases.drain()
    releases.give_back(third)
    releases.put_back(drained)
    assert is_ready(releases)
    assert releases.drain() == (first, second, third)


def test_closing_wakes_who_waits_and_later_deaths_are_silent(slab_fd: int) -> None:
    slab, releases = Slab(slab_fd, WELCOME), Releases()
    root = slab.root(1)
    releases.watch(root, LEASE)
    waiter = threading.Thread(target=releases.wait)
    waiter.start()
    releases.close()
    waiter.join(10)
    assert not waiter.is_alive()
    releases.drain()
    assert is_ready(releases), "a drain that is under way must not hide the close"
    fd = releases.fd
    del releases
    gc.collect()
    # The finaliser still owns the eventfd, so its number is nobody else's yet.
    os.fstat(fd)
    del root
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_refuses_a_slab_that_is_too_short_or_can_shrink(slab_fd: int) -> None:
    with pytest.raises(ProtocolError, match="bytes, but"):
        Slab(slab_fd, WELCOME._replace(n_slots=N_SLOTS + 1))
    unsealed = os.memfd_create("slab", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, N_SLOTS * WELCOME.slot_bytes)
    with pytest.raises(ProtocolError, match="sealed"):
        Slab(unsealed, WELCOME)
    os.close(unsealed)


@pytest.mark.parametrize(
    "change",
    [
        {"labels_offset": 100},
        {"indices_offset": 2050},
        {"slot_bytes": 3073},
        {"batch_size": 1 << 20},
        {"labels": _messages.VectorLabels(1 << 16)},
        {"n_slots": 0},
    ],
)
def test_refuses_slots_whose_parts_overlap(change: dict[str, Any]) -> None:
    check_slot_layout(WELCOME)
    with pytest.raises(ProtocolError):
        check_slot_layout(WELCOME._replace(**change))
