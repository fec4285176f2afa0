"""Leases: which slots this process holds, and how they find their way back.

A slot is leased from the moment its batch is yielded until the last tensor, array, view or slice
of it is gone. The finaliser that notices this sits on the slot's root buffer, and runs wherever
the last reference dies: in any thread, and within garbage collection. So it takes no lock and
touches no socket; it appends to a deque and writes an eventfd. Whoever holds the connection's
lock drains the deque and tells the daemon.

*Invariant*: the eventfd is closed only when no finaliser can write to it any more, because each
holds the `Releases` that owns it; its number can therefore never be someone else's file.
"""

from __future__ import annotations

import contextlib
import os
import select
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from ._messages import SlotLease


class _Event:
    """A wake-up that can be waited for together with sockets.

    `clear` lowers the flag last and `set` raises it first: who finds it raised has nothing to do,
    because whoever clears looks for leases after that.
    """

    def __init__(self) -> None:
        self._is_set = False
        if hasattr(os, "eventfd"):
            self.read_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._write_fd = self.read_fd
        else:
            self.read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def set(self) -> None:
        if self._is_set:
            return
        self._is_set = True
        # Full is set already. Eight bytes is what an eventfd takes; a pipe takes them as well.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"\x01\0\0\0\0\0\0\0")

    def clear(self) -> None:
        if not self._is_set:
            return
        with contextlib.suppress(BlockingIOError):
            while os.read(self.read_fd, 4096) and self._write_fd != self.read_fd:
                pass
        self._is_set = False

    def __del__(self) -> None:
        for fd in {getattr(self, "read_fd", -1), getattr(self, "_write_fd", -1)} - {-1}:
            os.close(fd)


class Releases:
    """The leases of one connection: those alive, and those that wait to be given back."""

    def __init__(self) -> None:
        self._event = _Event()
        self._waiting: deque[SlotLease] = deque()
        self._blocked: deque[tuple[SlotLease, Callable[[], bool]]] = deque()
        self._alive: set[SlotLease] = set()
        self._pid = os.getpid()
        self.closed = False

    @property
    def fd(self) -> int:
        """Readable while leases wait to be given back."""
        return self._event.read_fd

    @property
    def n_alive(self) -> int:
        """Slots that this process still reads."""
        return len(self._alive)

    @property
    def n_waiting(self) -> int:
        """Slots that wait to be given back."""
        return len(self._waiting)

    def watch(self, root: Any, lease: SlotLease, before: Callable[[], bool] | None = None) -> None:
        """Gives `lease` back when `root` is dead and `before` says that it may be, which is asked
        again whenever leases are drained."""
        self._alive.add(lease)
        finalizer = weakref.finalize(root, self.give_back, lease, before)
        # At exit the kernel hangs up for us; running thousands of finalisers then helps nobody.
        finalizer.atexit = False

    def give_back(self, lease: SlotLease, before: Callable[[], bool] | None = None) -> None:
        """Marks `lease` as free. Called in any thread, within garbage collection too."""
        if os.getpid() != self._pid:
            return  # A forked child: the lease is the parent's.
        may_be = before is None or before()
        if not self.closed:
            if before is not None and not may_be:
                self._blocked.append((lease, before))
                return
            self._waiting.append(lease)
            self._event.set()
        self._alive.discard(lease)

    def drain(self) -> tuple[SlotLease, ...]:
        """The leases to give back now. The caller holds the connection's lock."""
        # Cleared first: a lease that comes in between is found now and wakes once for nothing.
        self._event.clear()
        if self.closed:
            # `close` may have come just before: nobody who waits may miss it.
            self._event.set()
        for _ in range(len(self._blocked)):
            self.give_back(*self._blocked.popleft())
        leases = []
        while self._waiting:
            leases.append(self._waiting.popleft())
        return tuple(leases)

    def put_back(self, leases: tuple[SlotLease, ...]) -> None:
        """Undoes `drain`, because the leases could not be sent."""
        self._waiting.extendleft(reversed(leases))
        self._event.set()

    def wait(self) -> None:
        """Blocks until leases wait to be given back, or `close`."""
        poll = select.poll()
        poll.register(self._event.read_fd, select.POLLIN)
        poll.poll()

    def close(self) -> None:
        """Nobody will drain any more; wakes whoever waits."""
        self.closed = True
        self._event.set()
