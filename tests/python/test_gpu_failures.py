"""Slabs on a played GPU (`test_gpu_slabs`) where something refuses, fails, dies, or forks."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastaa
import pytest
import torch
from fastaa import _cuda
from gpu_support import BATCH, NOT_SUPPORTED, OUT_OF_MEMORY, GpuHost, SharingGpu, on_host, same
from support import CLIENT_SRC, wait_until

OPENINGS_MAX = 16
"""`GPU_OPENINGS_MAX` in `src/limits.rs`."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_libtorch_fails_this_process_copies_and_later_ones_do_not(
    augmenting: GpuHost,
) -> None:
    """Here because it finds no GPU; it is the way of any of its errors, such as full memory."""
    (augmenting.folder / "device-memory").touch()
    options = {"policy": "trivial-wide"}
    expected = on_host(augmenting, **options)
    gpu = SharingGpu()
    with augmenting.loader(gpu, **options) as loader:
        with pytest.warns(fastaa.GpuCopyWarning, match="batches on the GPU: libtorch"):
            found = list(loader)
        assert loader.epoch_digest == loader.expected_digest(0)
        while gpu.under_way:
            gpu.under_way.popleft().finish()
        assert same(found, expected)
    with augmenting.loader(SharingGpu(), **options) as loader:
        assert same([(a.clone(), b.clone()) for a, b in loader], expected)
    assert augmenting.says("cannot be augmented on this GPU: libtorch")
    assert augmenting.says("is_on_gpu=true augments_on_gpu=false")


def test_a_killed_consumer_leaves_no_memory_behind(host: GpuHost) -> None:
    code = """
import sys, fastaa, gpu_support as tests
from pathlib import Path
host = tests.GpuHost.__new__(tests.GpuHost)
class Daemon:
    def loader(self, dataset, **options):
        return fastaa.Loader(dataset, runtime_dir=sys.argv[1], **options)
host.daemon = Daemon()
gpu = tests.SharingGpu()
loader = host.loader(gpu)
kept = [gpu.read_late(images) for images, _ in loader]
held = next(iter(loader))
print("holds", flush=True)
sys.stdin.read()
"""
    paths = os.pathsep.join([str(CLIENT_SRC), str(Path(__file__).parent)])
    consumer = subprocess.Popen(
        [sys.executable, "-c", code, str(host.daemon.runtime_dir)],
        env=dict(os.environ, PYTHONPATH=paths),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert consumer.stdout is not None
    assert consumer.stdout.readline() == b"holds\n"
    assert not host.is_empty()
    consumer.kill()
    consumer.communicate()
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")
    assert on_host(host)


@pytest.mark.parametrize(("before", "after"), [("cpu", "cpu"), ("gpu", "cpu"), ("cpu", "gpu")])
def test_a_daemon_that_comes_back_brings_another_slab(
    bare: GpuHost, before: str, after: str
) -> None:
    """And, where augmentation has moved, another layout."""
    host = bare
    host.start(augment_on=before)
    expected = on_host(host)
    gpu = SharingGpu()
    with host.loader(gpu) as loader:
        batches = iter(loader)
        found = [tuple(tensor.clone() for tensor in next(batches))]
        held = next(batches)
        found.append((held[0].clone(), held[1].clone()))
        host.daemon.kill()
        config = host.daemon.config.read_text()
        host.daemon.config.write_text(config.replace(f'"{before}"', f'"{after}"'))
        host.daemon.start()
        with pytest.warns(fastaa.DaemonRestartWarning):
            found.extend((gpu.read_late(images), labels.clone()) for images, labels in batches)
        gpu.wait()
        assert torch.equal(held[0], expected[1][0]), "what is held stays"
        assert loader.epoch_digest == loader.expected_digest(0)
    assert same(found, expected)


def test_what_a_dead_daemon_has_left_is_closed_without_its_events(host: GpuHost) -> None:
    gpu = SharingGpu()
    with host.loader(gpu) as loader:
        batches = iter(loader)
        images, labels = next(batches)
        del images, labels
        host.daemon.kill()
        host.daemon.start()
        with pytest.warns(fastaa.DaemonRestartWarning):
            assert sum(len(batch[1]) for batch in batches) == loader.n_samples - BATCH


def test_a_loader_that_has_not_seen_the_daemons_death_closes_without_its_events(
    host: GpuHost,
) -> None:
    loader = host.loader(SharingGpu())
    next(iter(loader))
    host.daemon.kill()
    loader.close()


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("cuInit", 100, r"CUDA: cuInit: a played error"),
        (
            "cuDevicePrimaryCtxRetain",
            OUT_OF_MEMORY,
            r"CUDA: cuDevicePrimaryCtxRetain: out of memory",
        ),
        ("cuMemAlloc", OUT_OF_MEMORY, r"CUDA: cuMemAlloc: out of memory"),
        ("cuEventCreate", NOT_SUPPORTED, r"CUDA: cuEventCreate: operation not supported"),
        ("cuIpcGetMemHandle", NOT_SUPPORTED, r"CUDA: cuIpcGetMemHandle: operation not supported"),
        ("cuIpcOpenMemHandle", NOT_SUPPORTED, r"cuIpcOpenMemHandle_v2: operation not supported"),
    ],
)
def test_where_nothing_can_be_shared_this_process_copies(
    host: GpuHost, function: str, error: int, words: str
) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    host.fails(function, error)
    with pytest.warns(fastaa.GpuCopyWarning, match=f"copied to cuda:0 by this process: {words}"):
        loader = host.loader(gpu)
    with loader:
        found = list(loader)
        assert len(gpu.locked) == 1, "the copies come out of locked memory"
        while gpu.under_way:
            gpu.under_way.popleft().finish()
        assert same(found, expected)
    wait_until(host.is_empty, "nothing half-made is left on the GPU")


@pytest.mark.usefixtures("no_warning")
def test_a_slab_that_cannot_be_locked_is_copied_from_all_the_same(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    host.fails("cuMemHostRegister", OUT_OF_MEMORY)
    with host.loader(gpu) as loader:
        found = [(gpu.read_late(images), gpu.read_late(labels)) for images, labels in loader]
    gpu.wait()
    assert same(found, expected)
    assert "cannot be page-locked" in host.daemon.log.read_text()


@pytest.mark.parametrize(
    ("memory_mib", "words"),
    [(0, r"gpu.memory_mib is 0"), (1, r"may take 1 MiB of the GPU.*0 of them.*needs 2")],
)
def test_the_daemons_share_of_a_gpu_is_kept(bare: GpuHost, memory_mib: int, words: str) -> None:
    bare.start(memory_mib=memory_mib)
    with pytest.warns(fastaa.GpuCopyWarning, match=words):
        loader = bare.loader(SharingGpu())
    with loader:
        assert sum(len(labels) for _, labels in loader) == loader.n_samples


def test_a_daemon_without_a_driver_serves_and_says_so(
    bare: GpuHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SharingGpu()
    monkeypatch.delenv("LD_LIBRARY_PATH")
    bare.start()
    with pytest.warns(fastaa.GpuCopyWarning, match="this host has no NVIDIA driver"):
        loader = bare.loader(gpu)
    with loader:
        assert sum(len(labels) for _, labels in loader) == loader.n_samples


@pytest.mark.parametrize(
    "function", ["cuDevicePrimaryCtxRetain", "cuMemAlloc", "cuIpcGetMemHandle", "cuMemHostRegister"]
)
def test_who_dies_while_a_slab_is_opened_leaves_nothing_behind(
    host: GpuHost, function: str
) -> None:
    """Nor does it live on in a forked child, which has its socket."""
    read_end, write_end = os.pipe()
    gpu = SharingGpu()
    with host.holds(function):
        client = os.fork()
        if client == 0:
            threading.Thread(target=host.loader, args=(gpu,)).start()
            wait_until(lambda: host.has_thread("open"), "the daemon opens a slab")
            if os.fork() == 0:
                os.close(write_end)
                os.read(read_end, 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(client, 0)
    wait_until(lambda: not host.has_thread("open"), "the slab was opened in vain")
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")
    wait_until(lambda: not host.daemon.streams(), "the session has ended")
    os.close(write_end)
    os.close(read_end)
    assert on_host(host)


def test_a_driver_that_does_not_return_takes_little_with_it(host: GpuHost) -> None:
    gpu = SharingGpu()
    with host.holds("cuMemAlloc"):
        clients = []
        for _ in range(OPENINGS_MAX + 8):
            clients.append(os.fork())
            if clients[-1] == 0:
                host.loader(gpu)
                os._exit(0)
        wait_until(lambda: host.threads().count("open") == len(clients), "all are opened")
        assert host.threads().count("gpu-slab") == OPENINGS_MAX
        for client in clients:
            os.kill(client, signal.SIGKILL)
            os.waitpid(client, 0)
        assert on_host(host)
    wait_until(lambda: not host.has_thread("open"), "all were opened in vain")
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")


def test_a_daemon_that_stops_tells_those_whose_slab_is_being_opened(host: GpuHost) -> None:
    with host.holds("cuMemAlloc"), ThreadPoolExecutor() as threads:
        waiting = threads.submit(host.loader, SharingGpu())
        wait_until(lambda: host.has_thread("open"), "the daemon opens a slab")
        host.daemon.signal(signal.SIGTERM)
        with pytest.raises(fastaa.DaemonStopping, match="the daemon is stopping"):
            waiting.result()
        assert host.daemon.wait() == 0


def test_another_gpu_is_not_taken_for_it(host: GpuHost) -> None:
    gpu = SharingGpu()
    gpu.driver.uuid = bytes(range(16))
    with pytest.warns(
        fastaa.GpuCopyWarning, match="no GPU with the UUID GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    ):
        host.loader(gpu).close()


@pytest.mark.parametrize(
    ("augment_on", "function"),
    [
        *(("cpu", function) for function in ("cuMemcpyHtoDAsync", "cuEventRecord", "cuEventQuery")),
        *(("gpu", function) for function in ("cuMemcpyHtoDAsync", "cuEventQuery")),
        ("gpu", "cuStreamWaitEvent"),
    ],
)
def test_a_gpu_that_fails_stops_no_other_stream(
    bare: GpuHost, augment_on: str, function: str
) -> None:
    host = bare
    host.start(augment_on=augment_on)
    if function == "cuStreamWaitEvent" and host.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch, and does not call it")
    expected = on_host(host)
    gpu = SharingGpu()
    loader = host.loader(gpu)
    beside = host.daemon.loader(batch_size=BATCH)
    n_beside = len(next(iter(beside))[1])
    found = [(images.clone(), labels.clone()) for images, labels in itertools.islice(loader, 2)]
    host.fails(function, OUT_OF_MEMORY)
    with pytest.warns(fastaa.GpuCopyWarning, match=f"put batches on the GPU: CUDA: {function}"):
        found.extend(loader)
    while gpu.under_way:
        gpu.under_way.popleft().finish()
    assert same(found, expected)
    assert loader.epoch_digest == loader.expected_digest(0)
    loader.close()
    n_beside += sum(len(labels) for _, labels in beside)
    assert n_beside == beside.n_samples
    assert beside.epoch_digest == beside.expected_digest(0)
    beside.close()


@pytest.mark.usefixtures("no_warning")
def test_a_slot_whose_end_of_use_cannot_be_marked_is_kept(host: GpuHost) -> None:
    """As while PyTorch captures a graph: CUDA then refuses to record events."""
    expected = on_host(host)
    gpu = SharingGpu()
    found = []
    with host.loader(gpu) as loader:
        for number, (images, labels) in enumerate(loader):
            found.append((gpu.read_late(images), gpu.read_late(labels)))
            if number % 3 == 0:
                host.fails("cuEventRecord", NOT_SUPPORTED)
            del images, labels
            if number % 3 == 0:
                host.fails("cuEventRecord", None)
    gpu.wait()
    assert same(found, expected)


@pytest.mark.usefixtures("no_warning")
def test_memory_that_cannot_be_closed_is_not_freed(host: GpuHost) -> None:
    gpu = SharingGpu()
    loader = host.loader(gpu)
    next(iter(loader))
    host.fails("cuIpcCloseMemHandle", NOT_SUPPORTED)
    loader.close()
    del loader
    gc.collect()
    with pytest.raises(AssertionError, match="in vain"):
        wait_until(host.is_empty, "it is freed all the same", seconds=1)


@pytest.mark.usefixtures("no_warning")
def test_a_forked_child_keeps_no_memory(host: GpuHost) -> None:
    gpu = SharingGpu()
    loader = host.loader(gpu)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        sys.unraisablehook = lambda _: os._exit(1)
        # It forks again, when there is nothing to leave any more.
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        os.read(read_end, 1)
        os._exit(status)
    loader.close()
    del loader
    gc.collect()
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")
    os.close(write_end)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(read_end)


@pytest.mark.usefixtures("no_warning")
def test_a_forked_child_leaves_the_gpu_alone(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    loader = host.loader(gpu)
    batches = iter(loader)
    held = next(batches)
    child = os.fork()
    if child == 0:
        _cuda.Driver._call = lambda *_: os._exit(1)  # type: ignore[method-assign,assignment]
        del loader, batches, held
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = [(gpu.read_late(images), gpu.read_late(labels)) for images, labels in [held]]
    found.extend((gpu.read_late(images), gpu.read_late(labels)) for images, labels in batches)
    gpu.wait()
    assert same(found, expected)
    loader.close()
