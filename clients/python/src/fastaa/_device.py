"""Batches on a GPU: copied from shared memory beside the training's own work.

The slab is registered with CUDA as page-locked memory, so the GPU reads it itself, on a stream of
its own, while the training computes. The stream that is current when a batch is yielded waits for
the copy; the program does not. (Batches that a broadcast group shares, and those that come over
TCP, lie in other memory: CUDA stages them, and the program waits for that.)

*Invariant*: an asynchronous copy returns before it has read, and PyTorch keeps no account of
memory that it did not lock itself. So the host tensors of a batch, and with them its slot's lease,
are held here until the event behind the copy has passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from ._arrays import Arrays
from ._slab import SlabMap
from ._values import shown
from .errors import InvalidRequestError, PinningWarning, UnsupportedError, UsageError

_KINDS = ("auto", "cpu", "cuda", "hpu", "meta", "mps", "mtia", "vulkan", "xla", "xpu")
"""What PyTorch calls devices, and `auto`."""
_REGISTER_PORTABLE = 1
"""`CU_MEMHOSTREGISTER_PORTABLE`: page-locked for every CUDA context of the process."""


class Done(Protocol):
    """Tells when the work before it is over; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it is over."""

    def synchronize(self) -> None:
        """Waits until it is over."""


class Gpu(Protocol):
    """What is needed of a GPU."""

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
        # The driver's functions, not the runtime's: a refusal by the runtime would stay behind as
        # its last error, and PyTorch would take it for that of its next kernel.
        self._driver = ctypes.CDLL("libcuda.so.1")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._driver.cuMemHostRegister_v2.argtypes = (pointer, size, ctypes.c_uint)
        self._driver.cuMemHostUnregister.argtypes = (pointer,)
        self._driver.cuCtxPushCurrent_v2.argtypes = (pointer,)
        # PyTorch's own context, the primary one of the device, which counts its users; it is never
        # released, and ends with the process. PyTorch counts devices as the driver does.
        self._context, handle = pointer(), ctypes.c_int()
        self._check(self._driver.cuDeviceGet(ctypes.byref(handle), device.index))
        self._check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle))

    def lock(self, address: int, length: int) -> str:
        """As in `Gpu`."""
        with self._current():
            result = self._driver.cuMemHostRegister_v2(address, length, _REGISTER_PORTABLE)
        return self._problem(result)

    def unlock(self, address: int) -> None:
        """As in `Gpu`. What fails at the end of a process cannot be helped."""
        with self._current():
            self._driver.cuMemHostUnregister(address)

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

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Makes the context current in this thread, which may never have used CUDA."""
        self._check(self._driver.cuCtxPushCurrent_v2(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _check(self, result: int) -> None:
        problem = self._problem(result)
        if problem:
            raise UsageError(
                f"{self._device}: {problem}",
                "see what `nvidia-smi` and torch.cuda.init() say of this GPU",
            )

    def _problem(self, result: int) -> str:
        if result == 0:
            return ""
        text = ctypes.c_char_p()
        if self._driver.cuGetErrorString(result, ctypes.byref(text)) != 0 or text.value is None:
            return f"CUDA error {result}"
        return text.value.decode(errors="replace")


class _Copied(NamedTuple):
    """Host tensors that are still being read."""

    done: Done
    tensors: tuple[Any, ...]


class Copier:
    """Moves the batches of one loader to a GPU."""

    def __init__(self, gpu: Gpu) -> None:
        """Nothing is locked yet."""
        self._gpu = gpu
        self._under_way: deque[_Copied] = deque()
        self._n_under_way_max = 0
        self._is_warned = False
        self._pid = os.getpid()

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
            warnings.warn(
                f"the slab of {length >> 20} MiB cannot be page-locked ({problem}), so copies to "
                "the GPU take longer and the program waits for them; raise the limit of locked "
                "memory (ulimit -l, or LimitMEMLOCK), or pass a smaller n_slots=",
                PinningWarning,
                stacklevel=6,
            )

    def move(self, arrays: Arrays) -> Arrays:
        """The batch on the GPU. `indices` stay on the host, as a copy of their own."""
        self.reap()
        (images, labels), done = self._gpu.copy((arrays.images, arrays.labels))
        self._under_way.append(_Copied(done, (arrays.images, arrays.labels)))
        while len(self._under_way) > self._n_under_way_max:
            self._under_way[0].done.synchronize()
            self._under_way.popleft()
        return arrays._replace(images=images, labels=labels, indices=arrays.indices.clone())

    def reap(self) -> None:
        """Gives up what the GPU has read."""
        while self._under_way and self._under_way[0].done.query():
            self._under_way.popleft()

    def __del__(self) -> None:
        # What was yielded may still be under way: until then its slot must not be filled anew.
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(Exception):
            while self._under_way:
                self._under_way[0].done.synchronize()
                self._under_way.popleft()


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
    return Copier(Cuda(torch, torch.device("cuda", index)))


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
