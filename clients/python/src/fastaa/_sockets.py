"""What sockets need of the process beforehand: ZeroMQ's context, files, a host's address."""

from __future__ import annotations

import errno
import os
import socket
import urllib.parse

import zmq

from . import _hello
from .errors import DaemonNotRunning

_FILES_PER_CONNECTION = 20
"""More than a session opens: ZeroMQ's sockets and connection, HELLO, memories, events."""


class _Contexts:
    """ZeroMQ's context of this process, shared by all its connections.

    It is never ended, nor left to the garbage collector: ending it waits until all its sockets are
    closed, and a collector that finds a loader in a cycle may come to the context first. A forked
    child makes its own.
    """

    def __init__(self) -> None:
        self._by_pid: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}

    def current(self) -> zmq.Context[zmq.Socket[bytes]]:
        """That of this process."""
        pid = os.getpid()
        # Of two threads that come first together, one's context stays unused.
        return self._by_pid.get(pid) or self._by_pid.setdefault(pid, _new_context())


def _new_context() -> zmq.Context[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    # Each connection takes three; the default is a thousand.
    context.set(zmq.MAX_SOCKETS, context.get(zmq.SOCKET_LIMIT))
    return context


_contexts = _Contexts()


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """ZeroMQ's context of this process."""
    return _contexts.current()


def check_host(address: str) -> None:
    """Refuses a host that has no address at once: libzmq would go on asking for it."""
    place = urllib.parse.urlsplit(address)
    try:
        socket.getaddrinfo(place.hostname, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise DaemonNotRunning(
            f"the host of {address} is unknown: {error}", "check the address, and the name service"
        ) from None


def check_files() -> None:
    """Refuses to begin what would need more files than may be opened: libzmq ends the process that
    has none left for it."""
    opened = []
    try:
        for _ in range(_FILES_PER_CONNECTION):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise _hello.no_files_left() from None
    finally:
        for fd in opened:
            os.close(fd)
