"""A connection: one session with the daemon, from HELLO to Bye.

Owns the sockets, the slab and the leases of one session. Knows seeks and slots, and nothing of
epochs' meaning, tensors or state, which are the loader's.

*Threads*: the consumer calls `start`, `receive` and `lend`; a small daemon thread gives leases back
while the consumer computes. The lock owns the DEALER socket. `receive` waits with the lock held
and watches the leases' eventfd itself, so nobody waits for the thread, nor it for a batch.

*Forks*: a child shares the sockets' file descriptions with its parent; it must not use them, and
does not: every entry compares the process id first.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import zmq
from zmq.utils.monitor import recv_monitor_message

from . import _hello, _messages, _sockets, _wire
from ._cuda import CudaError, ImportedSlab, SlotRoot
from ._device import Copier
from ._lease import Releases
from ._slab import Slab, SlabMap, Window, check_slot_layout, samples_per_batch_max
from .errors import (
    DaemonGone,
    DaemonNotRunning,
    DaemonStopping,
    Error,
    ProtocolError,
    UsageError,
    error_from_refusal,
)

_SLOTS_PER_RELEASE = 2
_COALESCE_SECONDS = 0.002
"""How long the thread waits for more leases to give back in the same message."""

_GRACE_MS = 200
"""How long a message that the daemon sent before it died may still be under way in libzmq."""

_LAST_WORDS_SECONDS_MAX = 10.0
"""How long a daemon that hung up may take to finish what it fills, and say goodbye."""

_BYE_MS = 100
"""How long `close` waits for a Bye to leave this process."""

_RECONNECT_MS = 3_600_000
"""Longer than any connection lives after its end."""

_HEARTBEAT_MS = 1_000
_HEARTBEAT_TIMEOUT_MS = 10_000

_RESUME_HINT = (
    "start the daemon again (with the same state_dir) and iterate again: the loader goes on at "
    "the same epoch and sample; after a restart of the training, load_state_dict does the same"
)


class Delivery(NamedTuple):
    """A batch that arrived; over TCP with its bytes."""

    descriptor: _messages.BatchDescriptor
    payload: Any


Event: TypeAlias = Delivery | _messages.EpochBegin | _messages.EpochEnd
"""What `Connection.receive` returns."""


class Loan(NamedTuple):
    """The memory of a batch. `copied` if its slot could not be lent, because all are held.

    With `gpu` the batch lies there, and that root keeps the slot: the tensors of a loan that is
    `copied` must be copies. `root`, of the same bytes, is then to be read at once.
    """

    root: Any
    copied: bool
    gpu: SlotRoot | None = None


class Local(NamedTuple):
    """What a connection within a host has: the HELLO socket and the memories."""

    hello: socket.socket
    slab: Slab
    window: Window | None
    gpu: ImportedSlab | None


class Connection:
    """One session."""

    def __init__(
        self,
        welcome: _messages.Welcome,
        dealer: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
        local: Local | None,
        place: str,
    ) -> None:
        """Takes over the sockets. `local` is `None` over TCP."""
        self.welcome = welcome
        self.torn = False
        """A message was taken from the socket and not yet dealt with: set while it is, and left
        set by an exception (Ctrl-C) in between. Such a session cannot be gone on with."""
        self._dealer = dealer
        self._monitor = monitor
        self._hello = local.hello if local else None
        self._slab = local.slab if local else None
        self._window = local.window if local else None
        self._gpu = local.gpu if local else None
        self._place = place
        self._seek = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._last_words_until: float | None = None
        self._releases = Releases()
        # A message for a part of the slots, not for each: the daemon still has the others to fill.
        self._give_back_from = max(1, welcome.n_slots // _SLOTS_PER_RELEASE)
        self._poller = zmq.Poller()
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        if self._hello is not None:
            self._poller.register(self._hello, zmq.POLLIN)
        self._poller.register(self._releases.fd, zmq.POLLIN)
        threading.Thread(
            target=_give_back_in_background,
            args=(weakref.ref(self), self._releases),
            name="fastaa-leases",
            daemon=True,
        ).start()

    @classmethod
    def local(
        cls, runtime_dir: Path, hello: _messages.ClientHello, copier: Copier | None = None
    ) -> Connection:
        """A session with the daemon of this host.

        Raises `CudaError` if it cannot have the slab on the GPU that the HELLO asks for.
        """
        _sockets.check_files()
        stream = _hello.hello_local(runtime_dir, hello)
        dealer: zmq.Socket[bytes] | None = None
        try:
            try:
                check_slot_layout(stream.welcome)
                slab = Slab(stream.slab_fd, stream.welcome)
                window = None
                if stream.window_fd is not None:
                    window = Window(stream.window_fd, stream.welcome)
                gpu = None
                if stream.gpu_fd is not None:
                    gpu = _imported(stream.welcome, stream.gpu_fd, copier)
            finally:
                for fd in (stream.slab_fd, stream.window_fd, stream.gpu_fd):
                    if fd is not None:
                        os.close(fd)
            if hello.request.gpu is not None and gpu is None and window is None:
                raise CudaError(stream.welcome.gpu_refused or "the daemon does not say why")
            stream.socket.setblocking(False)
            dealer = _sockets.context().socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.ROUTING_ID, stream.welcome.token)
            monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            dealer.connect(stream.welcome.endpoint)
        except BaseException as error:
            stream.socket.close()
            _discard(dealer)
            if _is_foreign(error):
                raise _cannot_connect(str(runtime_dir), error) from None
            raise
        local = Local(stream.socket, slab, window, gpu)
        return cls(stream.welcome, dealer, monitor, local, str(runtime_dir))

    @classmethod
    def tcp(cls, address: str, hello: _messages.ClientHello) -> Connection:
        """A session with a daemon at a loopback `tcp://` address; batches come inline."""
        request = _messages.ClientFrame(_wire.PROTOCOL_VERSION, 0, hello)
        _hello.encode_hello(hello)
        _sockets.check_files()
        _sockets.check_host(address)
        dealer: zmq.Socket[bytes] | None = None
        try:
            dealer = _sockets.context().socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            # A socket that reconnects would tell a restarted daemon what was meant for the dead
            # one; and on TCP only the heartbeat tells that a peer vanished without a word. (-1, to
            # never reconnect, would also throw away what came before the end.)
            dealer.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
            dealer.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
            dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
            dealer.setsockopt(zmq.HEARTBEAT_TTL, _HEARTBEAT_TIMEOUT_MS)
            monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
            dealer.connect(address)
            dealer.send(_wire.encode(request))
            welcome = _tcp_welcome(dealer, monitor, address)
            check_slot_layout(welcome)
        except BaseException as error:
            _discard(dealer)
            if _is_foreign(error):
                raise _cannot_connect(address, error) from None
            raise
        return cls(welcome, dealer, monitor, None, address)

    # --- the consumer's side ------------------------------------------------------------------

    def start(self, epoch: int, offset: int, policy: str) -> None:
        """Asks for `epoch` from the global sample `offset` on; what is under way is abandoned."""
        self._check_process()
        with self._lock:
            self._check_open()
            self._seek += 1
            try:
                self._send(_messages.Start(self._seek, epoch, offset, policy))
            except zmq.Again:
                raise self._gone("takes no messages any more") from None

    def receive(self) -> Event:
        """The next message of the epoch that was started last; waits for it as long as it takes.

        Raises `DaemonGone`, `DaemonStopping`, `ProtocolError`, or what the daemon says went wrong.
        Leaves `torn` set; the caller clears it when the message has taken effect.
        """
        self._check_process()
        with self._lock:
            self._check_open()
            if self._releases.n_waiting >= self._give_back_from:
                self._give_back()
            while True:
                self.torn = True
                try:
                    frames = self._dealer.recv_multipart(zmq.NOBLOCK, copy=self._slab is not None)
                except zmq.Again:
                    self.torn = False
                    self._give_back()
                    self._wait()
                    continue
                message = self._message_of(frames)
                if message is not None:
                    return message

    @property
    def memory(self) -> tuple[SlabMap, int, int] | None:
        """The slab's map, address and length, where it is what batches are read from."""
        return None if self._slab is None or self._gpu is not None else self._slab.memory()

    def lend(self, delivery: Delivery, stream: int = 0) -> Loan:
        """The memory of a batch that `receive` returned. `stream`: what works on it on the GPU.

        Its slot goes back to the daemon when the root is dead. If this process holds all other
        slots, the root is a private copy and the slot goes back now: lending the last one would
        make the daemon wait for this process while this process waits for the daemon.
        """
        descriptor = delivery.descriptor
        lease = _messages.SlotLease(descriptor.slot, descriptor.generation)
        if self._slab is None:
            # The bytes are ours; the slot was only the permission to send them.
            self._releases.give_back(lease)
            return Loan(delivery.payload, copied=False)
        if descriptor.n_samples == 0:
            self._releases.give_back(lease)
            return Loan(b"", copied=False)
        memory: Slab | Window = self._slab
        slot = descriptor.slot
        if descriptor.window_slot and self._window is not None:
            memory, slot = self._window, descriptor.window_slot - 1
        is_last = self._releases.n_alive >= self.welcome.n_slots - 1
        if self._gpu is not None:
            gpu_root = self._gpu.root(slot)
            end_of_use = functools.partial(self._gpu.record, slot, stream)
            self._releases.watch(gpu_root, lease, end_of_use)
            return Loan(self._slab.root(slot), is_last, gpu_root)
        if is_last:
            root = memory.copy(slot)
            self._releases.give_back(lease)
            return Loan(root, copied=True)
        root = memory.root(slot)
        self._releases.watch(root, lease)
        return Loan(root, copied=False)

    def give_back(self) -> None:
        """Tells the daemon which slots are free again. Any thread."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._closed:
                self._give_back()

    def close(self, *, alive: bool = True) -> None:
        """Ends the session. Batches that are still held stay valid. Idempotent.

        `alive=False`: the daemon is known to be dead, so there is nobody to take leave of.
        """
        if os.getpid() != self._pid:
            return
        self._releases.close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if alive:
                with contextlib.suppress(zmq.ZMQError):
                    self._send(_messages.Bye())
            if self._hello is not None:
                # A forked child keeps the socket open; the hang-up must not wait for it.
                with contextlib.suppress(OSError):
                    self._hello.shutdown(socket.SHUT_RDWR)
                self._hello.close()
            self._dealer.disable_monitor()
            self._monitor.close(linger=0)
            self._dealer.close(linger=_BYE_MS if alive else 0)

    def __del__(self) -> None:
        if hasattr(self, "_poller"):
            with contextlib.suppress(Exception):
                self.close()

    # --- inside -------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                "this loader belongs to the process that made it, not to its forked child",
                "make a fastaa.Loader of its own in the child, after the fork",
            )

    def _check_open(self) -> None:
        """To be called with the lock held: another thread may close at any time."""
        if self._closed:
            raise UsageError("the loader was closed by another thread")

    def _send(self, body: _messages.ClientBody) -> None:
        """Sends a frame; raises `zmq.Again` rather than wait."""
        frame = _messages.ClientFrame(_wire.PROTOCOL_VERSION, self.welcome.session, body)
        self._dealer.send(_wire.encode(frame), zmq.NOBLOCK)

    def _give_back(self) -> None:
        leases = self._releases.drain()
        if leases:
            try:
                self._dealer.send(_wire.encode_release(self.welcome.session, leases), zmq.NOBLOCK)
            except zmq.Again:
                self._releases.put_back(leases)

    def _wait(self) -> None:
        """Until there may be a message. Gives leases back; raises if the daemon is dead."""
        patience_ms = None
        if self._last_words_until is not None:
            patience_ms = max(0, int(1000 * (self._last_words_until - time.monotonic())))
        events = dict(self._poller.poll(patience_ms))
        if self._releases.closed:
            raise UsageError("the loader was closed while it waited for a batch")
        if self._releases.fd in events:
            self._give_back()
        if self._dealer in events:
            return
        if self._monitor in events:
            recv_monitor_message(self._monitor)
            if not self._dealer.poll(_GRACE_MS):
                raise self._gone("is gone")
        elif self._hello is not None and self._hello.fileno() in events:
            # A daemon that stops in good order may hang up before it says goodbye.
            self._poller.unregister(self._hello)
            self._last_words_until = time.monotonic() + _LAST_WORDS_SECONDS_MAX
        elif not events:
            raise self._gone("hung up")

    def _gone(self, how: str) -> Error:
        return DaemonGone(f"the fastaa-loaderd at {self._place} {how}", _RESUME_HINT)

    def _message_of(self, frames: list[Any]) -> Event | None:
        """The message, if it belongs to the epoch started last."""
        first = frames[0]
        data = first if isinstance(first, bytes) else first.bytes
        try:
            frame = _wire.decode_daemon_frame(data)
        except _wire.WireError as error:
            raise _hello.protocol_error(error) from None
        if frame.session != self.welcome.session:
            raise ProtocolError(f"a message for session {frame.session:#x} came to another one")
        body = frame.body
        if isinstance(body, _messages.Failed):
            raise error_from_refusal(body.refusal)
        if isinstance(body, _messages.Goodbye):
            raise DaemonStopping(
                f"the fastaa-loaderd at {self._place} stops: {body.reason or 'no reason given'}",
                _RESUME_HINT,
            )
        if isinstance(body, _messages.ServerHello):
            raise ProtocolError("the daemon says hello twice")
        if isinstance(body, _messages.BatchDescriptor):
            self._check_batch(body, frames)
            if body.seek != self._seek:
                self._releases.give_back(_messages.SlotLease(body.slot, body.generation))
                self._give_back()
                return None
            return Delivery(body, _aligned(frames[1].buffer) if body.inline else None)
        return body if body.seek == self._seek else None

    def _check_batch(self, batch: _messages.BatchDescriptor, frames: list[Any]) -> None:
        """Refuses a descriptor that would make us read outside of a slot."""
        welcome, n_samples_max = self.welcome, samples_per_batch_max(self.welcome)
        if batch.slot >= welcome.n_slots or batch.n_samples > n_samples_max:
            raise ProtocolError(
                f"the daemon announces {batch.n_samples} samples in slot {batch.slot}; the slab "
                f"has {welcome.n_slots} slots of {n_samples_max}"
            )
        if batch.window_slot > welcome.n_window_slots:
            raise ProtocolError(
                f"the daemon announces a batch in slot {batch.window_slot} of a window of "
                f"{welcome.n_window_slots}"
            )
        if len(frames) != 1 + batch.inline or (batch.inline and self._slab is not None):
            raise ProtocolError(f"a batch came in {len(frames)} frames")
        if self._slab is None and batch.n_samples > 0:
            found = len(frames[1].buffer) if batch.inline else 0
            if found < welcome.indices_offset + 8 * batch.n_samples:
                raise ProtocolError(f"a batch came with only {found} bytes")


def _imported(welcome: _messages.Welcome, pipe: int, copier: Copier | None) -> ImportedSlab:
    """The slab on the GPU. The caller keeps and closes `pipe`."""
    if copier is None or welcome.gpu is None:
        raise ProtocolError("the daemon sent memory of a GPU unasked")
    own_pipe = fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 0)
    return copier.imported(welcome.gpu, own_pipe)


def _discard(dealer: zmq.Socket[bytes] | None) -> None:
    """Closes a socket that no connection has taken over."""
    if dealer is not None:
        dealer.disable_monitor()
        dealer.close(linger=0)


def _is_foreign(error: BaseException) -> bool:
    """An error of the operating system or of libzmq, which is none of this package's."""
    return isinstance(error, zmq.ZMQError | OSError) and not isinstance(error, Error)


def _cannot_connect(place: str, error: BaseException) -> Error:
    return DaemonNotRunning(
        f"the fastaa-loaderd at {place} cannot be connected: {error}",
        "check the address, and the limits of this process (ulimit -n, free memory)",
    )


def _aligned(payload: memoryview) -> memoryview:
    """The payload, copied if it does not start where an i64 may (libzmq promises nothing)."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(payload))
    return payload if address % 8 == 0 else memoryview(bytearray(payload))


def _tcp_welcome(
    dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes], address: str
) -> _messages.Welcome:
    """Waits for the answer to a HELLO over TCP."""
    poller = zmq.Poller()
    poller.register(dealer, zmq.POLLIN)
    poller.register(monitor, zmq.POLLIN)
    events = dict(poller.poll(int(_hello.ANSWER_SECONDS_MAX * 1000)))
    # A daemon that refuses may hang up at once, so its answer goes before the hang-up.
    if dealer not in events and not dealer.poll(_GRACE_MS):
        raise DaemonNotRunning(
            f"no fastaa-loaderd answers at {address}",
            "start it with `tcp` and `token_file` under [transport] in its configuration",
        )
    try:
        frame = _wire.decode(_messages.DaemonFrame, dealer.recv())
    except _wire.WireError as error:
        raise _hello.protocol_error(error) from None
    if not isinstance(frame.body, _messages.ServerHello):
        raise ProtocolError(f"the daemon at {address} answers HELLO with something else")
    return _hello.welcome_of(frame.body)


def _give_back_in_background(connection_ref: weakref.ref[Connection], releases: Releases) -> None:
    """Gives leases back while the consumer computes. Ends with the connection."""
    while True:
        releases.wait()
        if releases.closed:
            return
        # More tensors usually die together with the first; one message then serves all.
        time.sleep(_COALESCE_SECONDS)
        connection = connection_ref()
        if connection is None:
            return
        connection.give_back()
        del connection
