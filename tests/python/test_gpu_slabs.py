"""Slabs on a GPU: the real daemon and client, with a played driver (`tests/fake_cuda`).

The played GPU copies in the order of each stream, but late: after 300 µs for the daemon, after some
ms here. Who does not wait for an event sees what was there before. What stays for a real GPU:
PyTorch's view of foreign memory (`Cuda.flat`), its current stream, and when one process sees
another's writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastaa
import pytest
import torch
from fastaa import _cuda, _device
from support import CLIENT_SRC, Daemon, daemon_binary, wait_until
from test_device import PlayedGpu

BATCH = 64
N_SLOTS = 4
CLIENT_DELAY_US = 4000
OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801
SLAB_BYTES_MIN = 2 << 20


def library() -> Path:
    binary = daemon_binary()
    assert binary is not None
    return binary.parent / "examples" / "libfake_cuda.so"


class ForeignBytes:
    """A ctypes array at an address; it can be told what to keep alive."""

    def __new__(cls, root: _cuda.SlotRoot) -> Any:
        kind = type("Bytes", (ctypes.c_ubyte * root.n_bytes,), {})
        found: Any = kind.from_address(root.address)
        found.root = root
        return found


class SharingGpu(PlayedGpu):
    """The played driver's GPU, whose memory is the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = _cuda.Driver(0, str(library()))
        self.cuda = self.driver._library
        self.cuda.cuMemcpyDtoHAsync_v2.argtypes = (
            *(ctypes.c_void_p, ctypes.c_uint64),
            *(ctypes.c_size_t, ctypes.c_void_p),
        )
        made = ctypes.c_void_p()
        with self.driver._current():
            assert self.cuda.cuStreamCreate(ctypes.byref(made), 0) == 0
        self.handle = made.value or 0

    def flat(self, root: _cuda.SlotRoot) -> Any:
        return torch.frombuffer(ForeignBytes(root), dtype=torch.uint8)

    def stream(self) -> int:
        return self.handle

    def read_late(self, tensor: Any) -> Any:
        """What a kernel finds that runs when the program is long past it."""
        found = torch.full_like(tensor, 77)
        with self.driver._current():
            result = self.cuda.cuMemcpyDtoHAsync_v2(
                found.data_ptr(), tensor.data_ptr(), tensor.nbytes, self.handle
            )
        assert result == 0
        return found

    def wait(self) -> None:
        with self.driver._current():
            assert self.cuda.cuCtxSynchronize() == 0


class GpuHost:
    """A daemon with the played driver, and the folder that is the GPU's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "gpu"
        self.folder.mkdir()
        self.daemon = Daemon()

    def start(self, *, memory_mib: int = 64, augment_on: str = "cpu") -> None:
        with self.daemon.config.open("a") as config:
            config.write(f'\n[gpu]\nmemory_mib = {memory_mib}\naugment_on = "{augment_on}"\n')
        self.daemon.start()

    def says(self, words: str) -> bool:
        return words in self.daemon.log.read_text()

    def fails(self, function: str, error: int | None) -> None:
        path = self.folder / f"fail-{function}"
        if error is None:
            path.unlink()
        else:
            # The driver reads a whole number or none.
            written = path.with_suffix(".new")
            written.write_text(str(error))
            written.rename(path)

    @contextlib.contextmanager
    def holds(self, function: str) -> Iterator[None]:
        """The function does not return meanwhile."""
        path = self.folder / f"hold-{function}"
        path.touch()
        try:
            yield
        finally:
            path.unlink()

    def in_use(self, process: int) -> list[Path]:
        """Memory and events that a process has made on the GPU."""
        return list(self.folder.glob(f"memory-{process:08x}*"))

    def slabs(self) -> list[Path]:
        """Memory of slabs that the daemon has made."""
        assert self.daemon.process is not None
        found = self.in_use(self.daemon.process.pid)
        return [path for path in found if path.stat().st_size >= SLAB_BYTES_MIN]

    def is_empty(self) -> bool:
        assert self.daemon.process is not None
        return not self.in_use(self.daemon.process.pid)

    def loader(self, gpu: PlayedGpu, dataset: str = "toy", **options: Any) -> fastaa.Loader:
        with pytest.MonkeyPatch.context() as patch:
            real = _device.copier
            played = _device.Copier(gpu, "cuda:0")
            # Other threads may open loaders meanwhile.
            patch.setattr(
                _device, "copier", lambda device, *more: played if device else real(device, *more)
            )
            options = {"n_slots": N_SLOTS, "batch_size": BATCH, **options}
            loader: fastaa.Loader = self.daemon.loader(dataset, device="cuda:0", **options)
        return loader


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuHost]:
    """A host whose daemon is still to be started."""
    if daemon_binary() is None or not library().exists():
        pytest.skip("no daemon, or no played driver: cargo build --example fake_cuda")
    host = GpuHost(tmp_path)
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "libcuda.so.1").symlink_to(library())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver), prepend=":")
    monkeypatch.setenv("FAKE_CUDA", str(host.folder))
    with host.daemon:
        yield host
        # While the daemon is there: one that ends takes its memory with it.
        gc.collect()
        misused = host.folder / "misused"
        assert not misused.exists(), misused.read_text()


@pytest.fixture
def host(bare: GpuHost, monkeypatch: pytest.MonkeyPatch) -> GpuHost:
    bare.start()
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", str(CLIENT_DELAY_US))
    return bare


@pytest.fixture
def augmenting(bare: GpuHost, monkeypatch: pytest.MonkeyPatch) -> GpuHost:
    """A host whose daemon augments on the GPU."""
    bare.start(augment_on="gpu")
    if bare.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch")
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", str(CLIENT_DELAY_US))
    return bare


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        # This package's own; garbage of other tests may warn of its sockets meanwhile.
        warnings.simplefilter("error", RuntimeWarning)
        yield


def on_host(host: GpuHost, **options: Any) -> list[tuple[Any, Any]]:
    with host.daemon.loader(batch_size=BATCH, **options) as loader:
        return [(images.clone(), labels.clone()) for images, labels in loader]


def same(found: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "autoaugment-cifar10"},
        {"dtype": "bf16", "layout": "nhwc"},
        {"dtype": "u8", "views": 2},
        {"drop_last": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_the_gpu_reads_late_is_what_the_host_reads(
    host: GpuHost, options: dict[str, Any]
) -> None:
    expected = on_host(host, **options)
    gpu = SharingGpu()
    found = []
    with host.loader(gpu, **options) as loader:
        assert host.in_use(host.daemon.process.pid)  # type: ignore[union-attr]
        for batch in loader.batches():
            # The tensors are dropped at once: only the event keeps the slot from being filled anew.
            found.append((gpu.read_late(batch.images), gpu.read_late(batch.labels)))
            assert len(batch.indices) == len(batch.labels)
            del batch
        assert loader.epoch_digest == loader.expected_digest(0)
        assert not gpu.locked, "nobody copies here"
    gpu.wait()
    assert same(found, expected)
    del loader
    gc.collect()
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("toy", {"policy": "autoaugment-cifar10"}),
        ("toy", {"policy": "trivial-wide", "dtype": "bf16", "layout": "nhwc"}),
        ("toy", {"policy": "randaugment(2,9)", "dtype": "u8", "views": 2, "cutout": 8}),
        (
            "colour",
            {
                "policy": "autoaugment-cifar10",
                "crop": {"kind": "pad", "size": 32, "pad": 4},
                "hflip": True,
                "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
                "erase": {"p": 0.5},
                "normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
                "dtype": "f16",
                "seed": 11,
            },
        ),
    ],
    ids=["gray", "nhwc", "views", "colour"],
)
def test_what_is_augmented_on_the_gpu_is_what_the_processors_make(
    augmenting: GpuHost, dataset: str, options: dict[str, Any]
) -> None:
    with augmenting.daemon.loader(dataset, batch_size=BATCH, **options) as loader:
        expected = [(images.clone(), labels.clone()) for _ in range(2) for images, labels in loader]
    assert not augmenting.says("augments_on_gpu=true")
    gpu = SharingGpu()
    found = []
    with augmenting.loader(gpu, dataset, **options) as loader:
        for epoch in range(2):
            for images, labels in loader:
                found.append((gpu.read_late(images), gpu.read_late(labels)))
                del images, labels
            assert loader.epoch_digest == loader.expected_digest(epoch)
    assert augmenting.says("augments_on_gpu=true")
    gpu.wait()
    assert same(found, expected)
    del loader
    gc.collect()
    wait_until(augmenting.is_empty, "the daemon has freed the GPU's memory")


@pytest.mark.usefixtures("no_warning")
def test_what_cannot_be_augmented_on_the_gpu_is_made_by_the_processors(
    augmenting: GpuHost,
) -> None:
    options = {"mix": {"mixup": 0.2}}
    expected = on_host(augmenting, **options)
    with augmenting.loader(SharingGpu(), **options) as loader:
        found = [(images.clone(), labels.clone()) for images, labels in loader]
    assert same(found, expected)
    assert augmenting.says("is_on_gpu=true")
    assert not augmenting.says("augments_on_gpu=true")


@pytest.mark.usefixtures("no_warning")
def test_auto_measures_both_and_says_what_it_chose(bare: GpuHost) -> None:
    bare.start(augment_on="auto")
    if bare.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch")
    options = {"policy": "trivial-wide"}
    expected = on_host(bare, **options)
    with bare.loader(SharingGpu(), **options) as loader:
        found = [(images.clone(), labels.clone()) for images, labels in loader]
    assert same(found, expected)
    log = bare.daemon.log.read_text()
    told = re.search(
        r'augment_on = "auto": the processors make (\d+) images/s alone; with the GPU they load '
        r'(\d+) images/s and it finishes (\d+) chosen="(cpu|gpu)"',
        log,
    )
    assert told, log
    whole, loading, finishing = (int(told[number]) for number in (1, 2, 3))
    assert min(whole, loading, finishing) > 0
    chosen = "gpu" if min(loading, finishing) > whole else "cpu"
    assert told[4] == chosen
    assert bare.says(f"augments_on_gpu={str(chosen == 'gpu').lower()}")
    del loader
    gc.collect()
    wait_until(bare.is_empty, "what was measured with is freed, too")


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


@pytest.mark.usefixtures("no_warning")
def test_without_room_for_both_the_processors_augment(bare: GpuHost) -> None:
    # The slab takes 2 MiB of it, and what would be finished there 2 more.
    bare.start(memory_mib=3, augment_on="gpu")
    if bare.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch")
    options = {"policy": "trivial-wide"}
    expected = on_host(bare, **options)
    with bare.loader(SharingGpu(), **options) as loader:
        found = [(images.clone(), labels.clone()) for images, labels in loader]
    assert same(found, expected)
    assert bare.says("batches are augmented by the processors")
    assert bare.says("is_on_gpu=true augments_on_gpu=false")


@pytest.mark.usefixtures("no_warning")
def test_tensors_outlive_the_loader_and_keep_the_memory(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    with host.loader(gpu) as loader:
        images, labels = next(iter(loader))
        view = images[3, 0]
    del loader, images
    gc.collect()
    with host.loader(gpu) as other:
        assert sum(len(labels) for _, labels in other) == other.n_samples
    assert torch.equal(view, expected[0][0][3, 0])
    assert torch.equal(labels, expected[0][1])
    del other
    gc.collect()
    assert not host.is_empty()
    del view, labels
    gc.collect()
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")


def test_who_keeps_all_batches_gets_copies(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    with host.loader(gpu) as loader, pytest.warns(fastaa.AllSlotsHeldWarning):
        found = list(loader)
    assert same(found, expected)


def test_a_killed_consumer_leaves_no_memory_behind(host: GpuHost) -> None:
    code = """
import sys, fastaa, test_gpu_slabs as tests
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
        found = [(images.clone(), labels.clone()) for images, labels in [next(batches)] * 1]
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


@pytest.mark.usefixtures("no_warning")
def test_who_waits_for_a_slow_driver_waits_alone(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    with host.loader(gpu) as beside, ThreadPoolExecutor() as threads:
        batches = iter(beside)
        found = [tuple(tensor.clone() for tensor in next(batches))]
        with host.holds("cuMemHostRegister"):
            waiting = threads.submit(lambda: host.loader(gpu))
            wait_until(lambda: len(host.slabs()) == 2, "the driver is asked for memory")
            # Neither a client that comes now waits, nor one whose batches are on this GPU.
            assert same(on_host(host), expected)
            found.extend(tuple(tensor.clone() for tensor in batch) for batch in batches)
            assert same(found, expected)
            assert not waiting.done()
        with waiting.result() as loader:
            assert same([(a.clone(), b.clone()) for a, b in loader], expected)


def test_who_does_not_wait_for_a_slow_driver_leaves_nothing_behind(host: GpuHost) -> None:
    gpu = SharingGpu()
    with host.holds("cuMemHostRegister"):
        child = os.fork()
        if child == 0:
            host.loader(gpu)
            os._exit(1)
        wait_until(lambda: len(host.slabs()) == 1, "the driver is asked for memory")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")
    assert on_host(host)


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
def test_members_of_a_broadcast_group_share_memory_of_the_host(host: GpuHost) -> None:
    gpu = SharingGpu()
    with host.loader(gpu, group="sweep", mode="broadcast") as loader:
        assert sum(len(labels) for _, labels in loader) == loader.n_samples
        assert host.is_empty()


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
