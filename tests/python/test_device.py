"""Batches on a GPU: the real loader and daemon, with a GPU that is played where there is none."""

from __future__ import annotations

import gc
import os
import warnings
from typing import Any

import fastaa
import pytest
import torch
from fastaa import _device
from gpu_support import PlayedCopy, PlayedGpu
from support import Daemon, wait_until

BATCH = 64
N_SLOTS = 6


def loader_on(daemon: Daemon, gpu: PlayedGpu, **options: Any) -> fastaa.Loader:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device, "copier", lambda *_: _device.Copier(gpu))
        options = {"n_slots": N_SLOTS, **options}
        return daemon.loader(batch_size=BATCH, device="cuda:0", **options)


def epoch_of(loader: fastaa.Loader) -> list[tuple[Any, Any]]:
    return [(images.clone(), labels.clone()) for images, labels in loader]


@pytest.mark.parametrize("mode", ["shard", "broadcast"])
def test_what_the_gpu_reads_late_is_what_the_host_reads(shared_daemon: Daemon, mode: str) -> None:
    options = {"policy": "autoaugment-cifar10", "mode": mode}
    with shared_daemon.loader(batch_size=BATCH, **options) as loader:
        expected = epoch_of(loader)
    gpu = PlayedGpu()
    found = []
    with loader_on(shared_daemon, gpu, **options) as loader:
        for batch in loader.batches():
            # The host's tensors are dropped at once: only the loader keeps the slot.
            found.append((batch.images, batch.labels))
            assert batch.indices.device.type == "cpu"
        digest = loader.epoch_digest
        assert digest == loader.expected_digest(0)
        # It held as many slots as it may, and no more.
        assert gpu.n_most == N_SLOTS - 2
        assert len(gpu.locked) == 1
        assert all(length >= N_SLOTS * BATCH for length in gpu.locked.values())
    assert not gpu.under_way, "who closes the loader waits for the copies"
    del loader
    gc.collect()
    # The thread that gives leases back may hold the connection a moment longer.
    wait_until(lambda: gpu.n_unlocked == 1, "the slab is unlocked")
    assert not gpu.locked
    assert len(found) == len(expected)
    for (images, labels), (host_images, host_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, host_images)
        assert torch.equal(labels, host_labels)


def test_who_drops_a_loader_waits_for_its_copies(shared_daemon: Daemon) -> None:
    gpu = PlayedGpu()
    loader = loader_on(shared_daemon, gpu)
    first = next(iter(loader))
    n_interrupts = iter(range(2))

    def interrupted(copied: PlayedCopy, synchronize: Any = PlayedCopy.synchronize) -> None:
        if next(n_interrupts, None) is not None:
            raise KeyboardInterrupt
        synchronize(copied)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlayedCopy, "synchronize", interrupted)
        copier = loader._copier
        loader._copier = None
        del copier
        gc.collect()
    assert next(n_interrupts, None) is None, "a Ctrl-C, and another one"
    assert not gpu.under_way
    with shared_daemon.loader(batch_size=BATCH) as other:
        assert torch.equal(first[0], next(iter(other))[0])


def test_slots_come_back_as_soon_as_the_gpu_has_read_them(shared_daemon: Daemon) -> None:
    gpu = PlayedGpu()
    with loader_on(shared_daemon, gpu) as loader:
        kept = []
        for images, _labels in loader:
            kept.append(images)
            gpu.under_way.popleft().finish()
        # All batches are kept on the GPU, which takes no slot.
        assert len(kept) == len(loader) > N_SLOTS
        assert gpu.n_most == 1


@pytest.mark.parametrize("n_slots", [2, 3, 4, 5])
def test_few_slots_are_enough(shared_daemon: Daemon, n_slots: int) -> None:
    gpu = PlayedGpu()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with loader_on(shared_daemon, gpu, n_slots=n_slots) as loader:
            assert sum(len(labels) for _, labels in loader) == loader.n_samples


def test_a_forked_child_leaves_the_gpu_alone(shared_daemon: Daemon) -> None:
    gpu = PlayedGpu()
    loader = loader_on(shared_daemon, gpu)
    next(iter(loader))
    child = os.fork()
    if child == 0:
        gpu.unlock = gpu.copy = lambda *_: os._exit(1)  # type: ignore[method-assign,assignment]
        PlayedCopy.synchronize = lambda _: os._exit(2)  # type: ignore[method-assign,assignment]
        del loader
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loader.close()
    del loader
    gc.collect()
    # The thread that gives leases back may hold the connection a moment longer.
    wait_until(lambda: gpu.n_unlocked == 1, "the slab is unlocked")


def test_memory_that_cannot_be_locked_is_told_once(daemon: Daemon) -> None:
    gpu = PlayedGpu("out of memory")
    with pytest.warns(fastaa.PinningWarning, match=r"\(out of memory\).*ulimit -l") as told:
        loader = loader_on(daemon, gpu)
    assert told[0].filename == __file__ or "support" in told[0].filename
    with loader:
        assert sum(len(labels) for _, labels in loader) == loader.n_samples
    assert gpu.n_unlocked == 0


def test_a_daemon_that_comes_back_brings_another_slab(daemon: Daemon) -> None:
    gpu = PlayedGpu()
    with loader_on(daemon, gpu) as loader:
        batches = loader.batches()
        found = [next(batches).labels for _ in range(5)]
        daemon.kill()
        daemon.start()
        with pytest.warns(fastaa.DaemonRestartWarning):
            found.extend(batch.labels for batch in batches)
        del batches
        while gpu.under_way:
            gpu.under_way.popleft().finish()
        assert gpu.n_unlocked + len(gpu.locked) == 2
    with daemon.loader(batch_size=BATCH) as loader:
        expected = torch.cat([labels.clone() for _, labels in loader])
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_or_stays_on_the_host(shared_daemon: Daemon) -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda", 3)):
        with pytest.raises(fastaa.UsageError, match=r"finds no GPU.*\n.*auto"):
            shared_daemon.loader(device=device)
    for here in ("auto", "cpu", "cpu:0", torch.device("cpu", 0), None):
        with shared_daemon.loader(batch_size=BATCH, device=here) as loader:
            images, _ = next(iter(loader))
            assert images.device.type == "cpu"


@pytest.mark.parametrize(
    "device", ["gpu", "CUDA:0", "cuda:-1", "cuda:", "cuda:99999", "auto:0", "", 0, object(), [1]]
)
@pytest.mark.parametrize("output", ["torch", "numpy"])
def test_what_is_no_device_is_refused(device: object, output: str) -> None:
    with pytest.raises(fastaa.InvalidRequestError, match=r'is no device\n.*"cuda:0"'):
        _device.copier(device, output)


@pytest.mark.parametrize("device", ["mps", "meta", "xpu:1", torch.device("meta")])
def test_other_devices_are_refused(device: object) -> None:
    with pytest.raises(fastaa.UnsupportedError, match=r"NVIDIA's GPUs alone\n.*images.to"):
        _device.copier(device, "torch")


def test_indices_beyond_the_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda:2", "cuda:256", torch.device("cuda", 3)):
        with pytest.raises(fastaa.UsageError, match=r"finds 2 GPU\(s\), counted from 0"):
            _device.copier(device, "torch")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _device.copier("auto", "torch") is None, "a GPU of another make"
    with pytest.raises(fastaa.UsageError, match="no GPU of NVIDIA's"):
        _device.copier("cuda", "torch")
