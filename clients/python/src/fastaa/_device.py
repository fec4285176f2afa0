"""Batches on a GPU: copied from shared memory beside the training's own work.

The slab is registered with CUDA as page-locked memory, so the GPU reads it itself, on a stream of
its own, while the training computes. The stream that is current when a batch is yielded waits for
the copy; the program does not.

*Invariant*: an asynchronous copy returns before it has read, and PyTorch keeps no account of
memory that it did not lock itself. So the host tensors of a batch, and with them its slot's lease,
are held here until the event behind the copy has passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import warnings
import weakref
from collections import deque
from typing import Any, NamedTuple, Protocol

from ._arrays import Arrays
from ._values import shown
from .errors import InvalidRequestError, PinningWarning, UnsupportedError, UsageError

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
        self._driver.cuMemHostRegister_v2.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_uint,
        )
        self._driver.cuMemHostUnregister.argtypes = (ctypes.c_void_p,)

    def lock(self, address: int, length: int) -> str:
        """As in `Gpu`."""
        with self._torch.cuda.device(self._device):
            return self._problem(
                self._driver.cuMemHostRegister_v2(address, length, _REGISTER_PORTABLE)
            )

    def unlock(self, address: int) -> None:
        """As in `Gpu`. What fails at the end of a process cannot be helped."""
        with self._torch.cuda.device(self._device):
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
        self._n_under_way_max = 1
        self._is_warned = False

    def attach(self, memory: tuple[Any, int, int] | None, n_slots: int) -> None:
        """Reads from here on from a slab of `n_slots`: its map, address and length."""
        # Two slots for the program and for what the daemon fills meanwhile.
        self._n_under_way_max = max(1, n_slots - 3)
        if memory is None:
            return
        owner, address, length = memory
        problem = self._gpu.lock(address, length)
        if not problem:
            # Before the map goes; at exit all of it goes at once.
            weakref.finalize(owner, self._gpu.unlock, address).atexit = False
        elif not self._is_warned:
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
        with contextlib.suppress(Exception):
            while self._under_way:
                self._under_way[0].done.synchronize()
                self._under_way.popleft()


def copier(device: object, output: str) -> Copier | None:
    """What moves batches to `device`; `None` where they stay.

    Raises `InvalidRequestError` for what is no device, `UnsupportedError` for devices other than
    NVIDIA's GPUs, `UsageError` if PyTorch finds no such GPU.
    """
    if device is None or str(device) == "cpu":
        return None
    if output != "torch":
        raise InvalidRequestError(
            f"device={shown(str(device))} gives tensors of PyTorch, but output={shown(output)}",
            'use output="torch", or leave device out',
        )
    torch: Any = importlib.import_module("torch")
    if str(device) == "auto":
        if not torch.cuda.is_available():
            return None
        device = "cuda"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise InvalidRequestError(
            f"device={shown(str(device))} is no device",
            'use "cuda:0" or another index, "auto" (a GPU if there is one), or "cpu"',
        ) from None
    if wanted.type != "cuda" or torch.version.cuda is None:
        raise UnsupportedError(
            f"device={shown(str(device))}: batches can be put on NVIDIA's GPUs alone",
            "leave device out, and move batches with images.to(device)",
        )
    return Copier(Cuda(torch, _gpu_of(torch, wanted)))


def _gpu_of(torch: Any, wanted: Any) -> Any:
    """The device with its index; `cuda` is the current one, as everywhere in PyTorch."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus == 0:
        raise UsageError(
            f"device={shown(str(wanted))}: PyTorch finds no GPU (no driver, one that is too old, "
            "or none in CUDA_VISIBLE_DEVICES)",
            'use device="auto" for a GPU where there is one, or leave device out',
        )
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= n_gpus:
        raise UsageError(
            f"device={shown(str(wanted))}: PyTorch finds {n_gpus} GPU(s), counted from 0",
            "use an index below that; CUDA_VISIBLE_DEVICES hides and renumbers GPUs",
        )
    return torch.device("cuda", index)
