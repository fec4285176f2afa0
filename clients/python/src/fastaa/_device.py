"""Batches on a GPU.

Where CUDA shares memory between processes, the daemon puts them there: a batch is a view of the
daemon's memory on the GPU, and its slot goes back with an event behind the last use (`_cuda`).

Elsewhere they are copied from shared memory beside the training's own work. The slab is registered
with CUDA as page-locked memory, so the GPU reads it itself, on a stream of
its own, while the training computes. The stream that is current when a batch is yielded waits for
the copy; the program does not. (Batches that a broadcast group shares, and those that come over
TCP, lie in other memory: CUDA stages them, and the program waits for that.)

*Invariant*: an asynchronous copy returns before it has read, and PyTorch keeps no account of
memory that it did not lock itself. So the host tensors of a batch, and with them its slot's lease,
are held here until the event behind the copy has passed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ._arrays import Arrays
from ._cuda import CudaError, Driver, ImportedSlab, SlotRoot
from ._messages import GpuMemory
from ._slab import SlabMap
from ._values import shown
from .errors import (
    GpuCopyWarning,
    GpuFailedError,
    InvalidRequestError,
    PinningWarning,
    UnsupportedError,
    UsageError,
)

_KINDS = ("auto", "cpu", "cuda", "hpu", "meta", "mps", "mtia", "vulkan", "xla", "xpu")
"""What PyTorch calls devices, and `auto`."""


class Done(Protocol):
    """Tells when the work before it is over; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it is over."""

    def synchronize(self) -> None:
        """Waits until it is over."""


class Gpu(Protocol):
    """What is needed of a GPU."""

    @property
    def driver(self) -> Driver | None:
        """What opens the daemon's memory on it; `None` if nothing can."""

    def flat(self, root: SlotRoot) -> Any:
        """The bytes of a root as a tensor, which keeps it alive."""

    def stream(self) -> int:
        """The stream that is current now, as the driver knows it."""

    def lock(self, address: int, length: int) -> str:
        """Makes memory readable for the GPU; says why it cannot, or nothing."""

    def unlock(self, address: int) -> None:
        """Undoes `lock`."""

    def copy(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], Done]:
        """Begins to copy; the current stream's later work sees the copies finished."""


class Cuda:
    """A GPU of PyTorch's."""

    def __init__(self, torch: Any, device: Any) -> None:
        """`device` has an index."""
        self._torch, self._device = torch, device
        self._stream = torch.cuda.Stream(device)
        try:
            self._driver = Driver(device.index)
        except CudaError as error:
            raise UsageError(
                f"{device}: {error}", "see what `nvidia-smi` and torch.cuda.init() say of this GPU"
            ) from None

    @property
    def driver(self) -> Driver:
        """As in `Gpu`."""
        return self._driver

    def flat(self, root: SlotRoot) -> Any:
        """As in `Gpu`. Raises `CudaError` if PyTorch finds it elsewhere."""
        tensor = self._torch.as_tensor(root, device=self._device)
        if tensor.data_ptr() != root.address:
            raise CudaError(f"PyTorch copies the daemon's memory to {self._device}")
        return tensor

    def stream(self) -> int:
        """As in `Gpu`."""
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)

    def lock(self, address: int, length: int) -> str:
        """As in `Gpu`."""
        try:
            self._driver.lock(address, length)
        except CudaError as error:
            return str(error)
        return ""

    def unlock(self, address: int) -> None:
        """As in `Gpu`. What fails at the end of a process cannot be helped."""
        with contextlib.suppress(CudaError):
            self._driver.unlock(address)

    def copy(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], Done]:
        """As in `Gpu`."""
        cuda = self._torch.cuda
        with cuda.stream(self._stream):
            copies = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
            done: Done = self._stream.record_event()
        current = cuda.current_stream(self._device)
        current.wait_event(done)
        for copied in copies:
            # Its memory is of the other stream's; it must not be reused there while this one works.
            copied.record_stream(current)
        return copies, done


class _Copied(NamedTuple):
    """Host tensors that are still being read."""

    done: Done
    tensors: tuple[Any, ...]


class Copier:
    """Moves the batches of one loader to a GPU, or takes them where they are there already."""

    def __init__(self, gpu: Gpu, name: str = "the GPU") -> None:
        """Nothing is locked yet."""
        self._gpu = gpu
        self._name = name
        self._asks_daemon = gpu.driver is not None
        self._under_way: deque[_Copied] = deque()
        self._n_under_way_max = 0
        self._is_warned = False
        self._pid = os.getpid()

    @property
    def uuid(self) -> bytes | None:
        """Of the GPU on which the daemon is to put batches; `None`: it is not asked any more."""
        driver = self._gpu.driver
        return driver.uuid if driver is not None and self._asks_daemon else None

    def imported(self, memory: GpuMemory, pipe: int) -> ImportedSlab:
        """Opens a slab on the GPU, and makes sure that tensors of it are views. Takes over `pipe`.

        Raises `CudaError` if that does not work here.
        """
        driver = self._gpu.driver
        if driver is None:
            raise AssertionError("a GPU without a driver asks for nothing")
        slab = ImportedSlab(driver, memory, pipe)
        try:
            self._gpu.flat(slab.root(0))
        except Exception as error:
            # PyTorch's own refusals are RuntimeErrors of many kinds.
            raise CudaError(str(error)) from None
        return slab

    def copies_because(self, reason: str) -> None:
        """The daemon does not put batches on the GPU: says so once, and asks no more."""
        if self._asks_daemon:
            self._asks_daemon = False
            warnings.warn(
                f"batches are copied to {self._name} by this process: {reason}",
                GpuCopyWarning,
                stacklevel=5,
            )

    def stream(self) -> int:
        """The stream that is current now, as the driver knows it."""
        return self._gpu.stream()

    def flat(self, root: SlotRoot, *, copied: bool) -> Any:
        """The bytes of a slot on the GPU as a tensor that keeps it, or a copy of them."""
        try:
            tensor = self._gpu.flat(root)
        except CudaError as error:
            raise GpuFailedError(str(error)) from None
        return tensor.clone() if copied else tensor

    def attach(self, memory: tuple[SlabMap, int, int] | None, n_slots: int) -> None:
        """Reads from here on from a slab of `n_slots`: its map, address and length."""
        # Slots are left for the program and for what the daemon fills meanwhile.
        self._n_under_way_max = max(n_slots - 3, min(1, n_slots - 2), 0)
        if memory is None:
            return
        owner, address, length = memory
        gpu, pid = self._gpu, self._pid

        def unlock() -> None:
            # In a forked child CUDA does not work, and its copy of the map was never locked.
            if os.getpid() == pid:
                gpu.unlock(address)

        # First, so that nothing stays locked if this is interrupted.
        owner.before_unmap = unlock
        problem = gpu.lock(address, length)
        if not problem:
            return
        owner.before_unmap = None
        if not self._is_warned:
            self._is_warned = True
            is_memory = "memory" in problem
            cure = (
                "raise the limit of locked memory (ulimit -l, or LimitMEMLOCK), or pass a smaller "
                "n_slots="
                if is_memory
                else "see what `nvidia-smi` says of this GPU"
            )
            warnings.warn(
                f"the slab of {length >> 20} MiB cannot be page-locked ({problem}), so copies to "
                f"the GPU take longer and the program waits for them; {cure}",
                PinningWarning,
                stacklevel=6,
            )

    def move(self, arrays: Arrays) -> Arrays:
        """The batch on the GPU. `indices` stay on the host, as a copy of their own."""
        self.reap()
        (images, labels), done = self._gpu.copy((arrays.images, arrays.labels))
        self._under_way.append(_Copied(done, (arrays.images, arrays.labels)))
        while len(self._under_way) > self._n_under_way_max:
            self._wait_for_first()
        return arrays._replace(images=images, labels=labels, indices=arrays.indices.clone())

    def reap(self) -> None:
        """Gives up what the GPU has read."""
        while self._under_way:
            first = self._under_way.popleft()
            if not first.done.query():
                self._under_way.appendleft(first)
                return

    def drain(self) -> None:
        """Waits until the GPU has read everything. Any thread."""
        while self._under_way:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        # Taken out first: of two threads each waits for what it has taken.
        with contextlib.suppress(IndexError):
            first = self._under_way.popleft()
            try:
                first.done.synchronize()
            except BaseException:
                self._under_way.appendleft(first)
                raise

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        # What was yielded may still be under way: until then its slot must not be filled anew.
        if getpid() != self._pid:
            return
        while self._under_way:
            try:
                self.drain()
            except KeyboardInterrupt:
                # Python prints what a finaliser raises, and goes on; the GPU is still reading.
                continue
            except Exception:
                # Of a GPU that has failed, and reads no more.
                return


def copier(device: object, output: str) -> Copier | None:
    """What moves batches to `device`; `None` where they stay.

    Raises `InvalidRequestError` for what is no device, `UnsupportedError` for devices other than
    NVIDIA's GPUs, `UsageError` if PyTorch finds no such GPU.
    """
    kind, index = _kind_of(device)
    if kind == "cpu" or (kind == "auto" and output != "torch"):
        return None
    if kind not in ("auto", "cuda"):
        raise UnsupportedError(
            f"device={shown(device)}: batches can be put on NVIDIA's GPUs alone",
            "leave device out, and move batches with images.to(device)",
        )
    if output != "torch":
        raise InvalidRequestError(
            f"device={shown(device)} gives tensors of PyTorch, but output={shown(output)}",
            'use output="torch", or leave device out',
        )
    torch: Any = importlib.import_module("torch")
    # A build for AMD's GPUs calls them cuda, too.
    is_cuda = torch.version.cuda is not None and torch.cuda.is_available()
    if kind == "auto" and not is_cuda:
        return None
    n_gpus = torch.cuda.device_count() if is_cuda else 0
    if n_gpus == 0:
        raise UsageError(
            f"device={shown(device)}: PyTorch finds no GPU of NVIDIA's (no driver, one that is "
            "too old, or none in CUDA_VISIBLE_DEVICES)",
            'use device="auto" for a GPU where there is one, or leave device out',
        )
    index = torch.cuda.current_device() if index is None else index
    if index >= n_gpus:
        raise UsageError(
            f"device={shown(device)}: PyTorch finds {n_gpus} GPU(s), counted from 0",
            "use an index below that; CUDA_VISIBLE_DEVICES hides and renumbers GPUs",
        )
    gpu = torch.device("cuda", index)
    return Copier(Cuda(torch, gpu), str(gpu))


def _kind_of(device: object) -> tuple[str, int | None]:
    """What is meant, and which one of several. PyTorch itself takes `cuda:256` for `cuda:0`."""
    if device is None:
        return "cpu", None
    if isinstance(device, str):
        found = re.fullmatch(r"([a-z]+)(?::([0-9]{1,4}))?", device)
        kind, index = (found[1], found[2]) if found else (None, None)
    else:
        kind, index = getattr(device, "type", None), getattr(device, "index", None)
    if kind not in _KINDS or (kind == "auto" and index is not None):
        raise InvalidRequestError(
            f"device={shown(device)} is no device",
            'use "cuda:0" or another index, "auto" (a GPU if there is one), or "cpu"',
        )
    return str(kind), None if index is None else int(index)
