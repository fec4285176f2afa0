"""Whose memory a batch is, and for how long: against the real daemon."""

from __future__ import annotations

import gc
import os
import queue
import threading
import warnings
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import pytest
from support import TOY, TOY_TRAIN, Daemon, flat, indices_of, python, wait_until

BATCH = 64
TRUTH = TOY["train"]


def n_open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def as_f32(split: Any, indices: Any) -> Any:
    """What an f32 stream without augmentation and normalisation holds, `[n, c, h, w]`."""
    return (split.images[indices].astype(np.float32) / np.float32(255)).transpose(0, 3, 1, 2)


def test_a_slice_keeps_its_batch(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, dtype="u8")
    iterator = loader.batches()
    batch = next(iterator)
    index = int(batch.indices[3])
    kept = batch.images[3:4]
    del batch
    for _ in range(2):
        for _ in loader:
            pass
    assert np.array_equal(kept[0, 0].numpy(), TRUTH.images[index, :, :, 0])


def test_batches_are_views_of_the_slab(shared_daemon: Daemon) -> None:
    """No more places than slots, and none is a copy, as long as batches are dropped."""
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = {images.data_ptr() for _ in range(3) for images, _ in loader}
    assert len(places) <= 4
    first = min(places)
    slot_bytes = loader._welcome.slot_bytes
    assert all((place - first) % slot_bytes == 0 for place in places)


def test_keeping_all_batches_copies_them_with_one_warning(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, dtype="u8", n_slots=3)
    with pytest.warns(fastaa.AllSlotsHeldWarning) as caught:
        batches = list(loader.batches())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(batches) == 16
    for batch in batches:
        expected = TRUTH.images[batch.indices.numpy()].transpose(0, 3, 1, 2)
        assert np.array_equal(batch.images.numpy(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = list(loader)
    assert len(more) == 16


def test_writing_to_a_batch_harms_nobody(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=3)
    for epoch in range(2):
        for batch in loader.batches():
            indices = batch.indices.numpy().copy()
            assert np.array_equal(batch.images.numpy(), as_f32(TRUTH, indices)), epoch
            assert batch.labels.tolist() == TRUTH.labels[indices].tolist()
            batch.images.fill_(float("nan"))
            batch.labels.fill_(-1)
            batch.indices.fill_(-1)
        assert loader.epoch_digest == loader.expected_digest(epoch)


def test_batches_may_die_in_another_thread(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=4)
    handed: queue.Queue[Any] = queue.Queue(maxsize=1)

    def drop() -> None:
        while handed.get() is not None:
            gc.collect()

    # A daemon thread: if the test fails, nobody tells it to end.
    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    total = 0
    for _ in range(3):
        for batch in loader.batches():
            total += len(batch.indices)
            cycle = [batch]
            cycle.append(cycle)  # type: ignore[arg-type]
            handed.put(cycle)
            del batch, cycle
    handed.put(None)
    thread.join(30)
    assert not thread.is_alive()
    assert total == 3 * TOY_TRAIN


def test_leases_go_back_while_the_consumer_computes(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=3)
    releases = loader._connection._releases
    batch = next(loader.batches())
    assert releases.n_alive == 1
    del batch
    assert releases.n_alive == 0
    wait_until(lambda: not releases._waiting, "the background thread gave the lease back")


def test_batches_outlive_the_loader(shared_daemon: Daemon) -> None:
    with shared_daemon.loader(batch_size=BATCH, dtype="u8") as loader:
        batch = next(loader.batches())
    loader.close()
    with pytest.raises(fastaa.UsageError, match="closed"):
        iter(loader)
    del loader
    gc.collect()
    # Another session may get memory of its own now, but never this.
    other = shared_daemon.loader(batch_size=BATCH, dtype="u8", seed=9)
    for _ in other:
        pass
    expected = TRUTH.images[batch.indices.numpy()].transpose(0, 3, 1, 2)
    assert np.array_equal(batch.images.numpy(), expected)


def test_a_dropped_loader_ends_its_session(shared_daemon: Daemon) -> None:
    before = threading.active_count()
    fds = n_open_fds()
    for _ in range(20):
        loader = shared_daemon.loader(batch_size=BATCH)
        next(iter(loader))
        del loader
    gc.collect()
    wait_until(lambda: threading.active_count() <= before, "the lease threads ended")
    wait_until(lambda: n_open_fds() <= fds, "all descriptors are closed")


def test_the_interpreter_exits_with_everything_alive(shared_daemon: Daemon) -> None:
    code = """
import sys, fastaa
loader = fastaa.Loader("toy", batch_size=64, runtime_dir=sys.argv[1], output=sys.argv[2])
iterator = loader.batches()
kept = [next(iterator), next(iterator).images[:1]]
sys.modules["kept forever"] = kept
print("done")
"""
    for output in ("torch", "numpy"):
        process = python(code, shared_daemon.runtime_dir, output)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "done\n", "")


def test_a_forked_child_cannot_use_the_loader_nor_harm_it(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH)
    iterator = loader.batches()
    seen = [next(iterator).indices.tolist()]
    batch = next(iterator)
    with warnings.catch_warnings():
        # Python and torch warn that threads exist; that is what is tested.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                next(iterator)
            except fastaa.UsageError as error:
                status = 0 if "fork" in str(error) else 2
            del batch
            gc.collect()
            loader.close()
            del loader, iterator
            gc.collect()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    seen.append(batch.indices.tolist())
    seen += indices_of(iterator)
    assert sorted(flat(seen)) == list(range(TOY_TRAIN))
