"""GPUs that are played: one that PyTorch would copy to, and the driver of `tests/fake_cuda`."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import pytest
import torch
from fastaa import _cuda, _device
from support import Daemon, daemon_binary

BATCH = 64
N_SLOTS = 4
CLIENT_DELAY_US = 4000
OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801
SLAB_BYTES_MIN = 2 << 20


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


class PlayedGpu(_device.Gpu):
    """Copies as late as a GPU may: when the event behind the copy passes."""

    driver: Any = None

    def __init__(self, problem: str = "") -> None:
        self.problem = problem
        self.locked: dict[int, int] = {}
        self.n_unlocked = 0
        self.under_way: deque[PlayedCopy] = deque()
        self.n_most = 0

    def lock(self, address: int, length: int) -> str:
        if not self.problem:
            self.locked[address] = length
        return self.problem

    def unlock(self, address: int) -> None:
        assert is_mapped(address), "nobody else may get the address before"
        del self.locked[address]
        self.n_unlocked += 1

    def copy(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], PlayedCopy]:
        made = PlayedCopy(self, tensors)
        self.under_way.append(made)
        self.n_most = max(self.n_most, len(self.under_way))
        return made.copies, made


class PlayedCopy:
    """An event, and the copy before it. In order, as on a stream.

    It knows addresses alone, as a GPU does: it keeps no tensor alive.
    """

    def __init__(self, gpu: PlayedGpu, tensors: tuple[Any, ...]) -> None:
        self.gpu = gpu
        self.sources = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
        self.copies = tuple(torch.full_like(tensor, 77) for tensor in tensors)
        self.is_over = False

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        while not self.is_over:
            self.gpu.under_way.popleft().finish()

    def finish(self) -> None:
        for copied, (address, n_bytes) in zip(self.copies, self.sources, strict=True):
            ctypes.memmove(copied.data_ptr(), address, n_bytes)
        self.is_over = True


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

    def threads(self) -> list[str]:
        """The names of the daemon's threads."""
        assert self.daemon.process is not None
        names = []
        for task in Path(f"/proc/{self.daemon.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                names.append((task / "comm").read_text().strip())
        return names

    def has_thread(self, name: str) -> bool:
        return name in self.threads()

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


def on_host(host: GpuHost, **options: Any) -> list[tuple[Any, Any]]:
    with host.daemon.loader(batch_size=BATCH, **options) as loader:
        return [(images.clone(), labels.clone()) for images, labels in loader]


def same(found: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
