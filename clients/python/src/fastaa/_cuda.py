"""CUDA's driver API by ctypes: the few calls that are needed beside PyTorch's.

The driver's functions, not the runtime's: a refusal by the runtime would stay behind as its last
error, and PyTorch would take it for that of its next kernel. All of them work in the device's
primary context, which is PyTorch's, too: it is made current around each call, because the calling
thread may never have used CUDA, and garbage collection runs in any.

*Source* of each call's contract: NVIDIA, CUDA Driver API, chapters 6.6 (primary contexts), 6.13
(memory, interprocess communication), 6.19 (events).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ._messages import GpuMemory

_LIBRARY = "libcuda.so.1"
_REGISTER_PORTABLE = 1
"""`CU_MEMHOSTREGISTER_PORTABLE`: page-locked for every CUDA context of the process."""
_IPC_LAZY_PEER_ACCESS = 1
"""`CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the only flag that there is, and obligatory."""


class CudaError(Exception):
    """A call was refused; the text says which, and why."""


class _Handle(ctypes.Structure):
    """`CUipcMemHandle` and `CUipcEventHandle`; both are passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


_POINTER, _SIZE, _UINT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDeviceGet": (_POINTER, ctypes.c_int),
    "cuDeviceGetUuid_v2": (_POINTER, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_POINTER, ctypes.c_int),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemHostRegister_v2": (_POINTER, _SIZE, _UINT),
    "cuMemHostUnregister": (_POINTER,),
    "cuIpcOpenMemHandle_v2": (_POINTER, _Handle, _UINT),
    "cuIpcCloseMemHandle": (ctypes.c_uint64,),
    "cuIpcOpenEventHandle": (_POINTER, _Handle),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuCtxSynchronize": (),
    "cuEventSynchronize": (_POINTER,),
    "cuEventDestroy_v2": (_POINTER,),
    "cuGetErrorString": (ctypes.c_int, _POINTER),
}


class Driver:
    """One device of the driver. Its context is never released: it ends with the process."""

    def __init__(self, ordinal: int, library: str = _LIBRARY) -> None:
        """PyTorch counts devices as the driver does. Raises `CudaError`."""
        try:
            self._library = ctypes.CDLL(library)
            for name, arguments in _ARGUMENTS.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise CudaError(f"{library}: {error}") from None
        self._context, device = ctypes.c_void_p(), ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        uuid = ctypes.create_string_buffer(16)
        self._call("cuDeviceGetUuid_v2", uuid, device)
        self.uuid = uuid.raw
        """That of a MIG instance, if it is one."""

    def lock(self, address: int, length: int) -> None:
        """Page-locks memory of the host. Raises `CudaError`."""
        with self._current():
            self._call("cuMemHostRegister_v2", address, length, _REGISTER_PORTABLE)

    def unlock(self, address: int) -> None:
        """Undoes `lock`. Raises `CudaError`."""
        with self._current():
            self._call("cuMemHostUnregister", address)

    def open_memory(self, handle: bytes) -> int:
        """The address of memory that another process exports. Raises `CudaError`."""
        address = ctypes.c_uint64()
        with self._current():
            self._call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle),
                _IPC_LAZY_PEER_ACCESS,
            )
        return address.value

    def close_memory(self, address: int, marks: Sequence[int] | None) -> None:
        """Closes it when its last uses are over: when the events `marks` behind them have passed,
        or without them when all work of this process is done.

        Raises `CudaError`, and then the memory is still open.
        """
        with self._current():
            if marks is None:
                self._call("cuCtxSynchronize")
            for event in marks or ():
                self._call("cuEventSynchronize", event)
            self._call("cuIpcCloseMemHandle", address)

    def open_events(self, handles: Sequence[bytes]) -> list[int]:
        """Events that another process exports. Raises `CudaError`, and has none open then."""
        events: list[int] = []
        try:
            with self._current():
                for handle in handles:
                    event = ctypes.c_void_p()
                    copied = _Handle.from_buffer_copy(handle)
                    self._call("cuIpcOpenEventHandle", ctypes.byref(event), copied)
                    events.append(event.value or 0)
        except BaseException:
            self.close_events(events)
            raise
        return events

    def close_events(self, events: Sequence[int]) -> None:
        """Closes them. What is refused cannot be helped."""
        with self._current():
            for event in events:
                self._library.cuEventDestroy_v2(event)

    def record(self, event: int, stream: int) -> None:
        """Puts an event behind all work that a stream has been given. Raises `CudaError`."""
        with self._current():
            self._call("cuEventRecord", event, stream)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            raise CudaError(f"{name}: {self._words(result)}")

    def _words(self, result: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(result, ctypes.byref(text)) != 0 or text.value is None:
            return f"CUDA error {result}"
        return f"{text.value.decode(errors='replace')} (CUDA error {result})"


def _is_read(pipe: int) -> bool:
    """Whether the process at the pipe's other end lives."""
    poller = select.poll()
    poller.register(pipe, 0)
    return not poller.poll(0)


class ImportedSlab:
    """A slab on the GPU that the daemon owns, opened in this process.

    Each root keeps it open. When the last one and the connection are gone, it is closed, and then
    a byte in the pipe tells the daemon that it may free the memory.
    """

    def __init__(self, driver: Driver, memory: GpuMemory, pipe: int) -> None:
        """Takes over the file descriptor `pipe`, also if it raises `CudaError`."""
        self._pipe = pipe
        _imported.add(self)
        self._driver = driver
        self._events: list[int] = []
        self._address = 0
        self._is_marked = True
        self._slot_bytes = memory.slot_bytes
        self._address = driver.open_memory(memory.memory)
        self._events = driver.open_events(memory.events)

    def root(self, slot: int) -> SlotRoot:
        """What tensors of a slot are made of, and keep alive."""
        return SlotRoot(self, slot, self._address + slot * self._slot_bytes, self._slot_bytes)

    def record(self, slot: int, stream: int) -> bool:
        """Marks the end of what `stream` does with a slot. In any thread; `False` if CUDA refuses
        it, as while a stream is captured: then the slot must be kept, and it be tried again."""
        # The events of a daemon that is dead are dead, too.
        if _is_read(self._pipe):
            try:
                self._driver.record(self._events[slot], stream)
            except CudaError:
                pass
            else:
                return True
        self._is_marked = False
        return False

    def leave(self) -> None:
        """In a forked child: CUDA does not work, and the memory is the parent's alone."""
        self._address = 0
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def __del__(
        self,
        is_read: Callable[[int], bool] = _is_read,
        write: Callable[[int, bytes], int] = os.write,
        close: Callable[[int], None] = os.close,
    ) -> None:
        if self._address:
            try:
                has_marks = self._is_marked and is_read(self._pipe)
                marks = self._events if has_marks else None
                self._driver.close_memory(self._address, marks)
                self._driver.close_events(self._events)
            except Exception:
                # It stays open, so the daemon must not free it: the pipe stays, too.
                return
        if self._pipe >= 0:
            # Not only a hang-up: when a process dies, the pipe hangs up before its GPU work ends.
            with contextlib.suppress(OSError):
                write(self._pipe, b"\0")
            close(self._pipe)


_imported: weakref.WeakSet[ImportedSlab] = weakref.WeakSet()


def _leave_all() -> None:
    for slab in list(_imported):
        slab.leave()


os.register_at_fork(after_in_child=_leave_all)


class SlotRoot:
    """A slot's bytes on the GPU, as the array interface of CUDA programs describes them."""

    def __init__(self, slab: ImportedSlab, slot: int, address: int, n_bytes: int) -> None:
        self.slab, self.slot = slab, slot
        self.address, self.n_bytes = address, n_bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Bytes in order; there is nothing to wait for: a batch is announced when it is there."""
        return {
            "shape": (self.n_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "stream": None,
        }
