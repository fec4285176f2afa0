"""HELLO: how a client finds a daemon and asks it for a stream.

On one host it connects the Unix `SOCK_SEQPACKET` socket `hello.sock` in the runtime directory,
sends one `ClientHello`, and receives one `ServerHello` with the slab's file descriptor. The socket
stays open as the sign of life: when either side dies, the kernel hangs it up.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path
from typing import NamedTuple

from . import _messages, _wire
from ._values import shown
from .errors import (
    DaemonGone,
    DaemonNotRunning,
    Error,
    ExhaustedError,
    ForbiddenError,
    InvalidRequestError,
    ProtocolError,
    error_from_refusal,
)

HELLO_SOCKET = "hello.sock"
CONTROL_SOCKET = "control.sock"

ANSWER_SECONDS_MAX = 60.0
"""How long a daemon may take to prepare a stream (mapping a large folder takes its time)."""

_RETRY_SECONDS_MIN = 0.005
_RETRY_SECONDS_MAX = 0.2
"""The pauses between attempts to connect a daemon whose queue is full; each is twice the last."""

_PATH_BYTES_MAX = 107


def runtime_dir_of(runtime_dir: str | os.PathLike[str] | None) -> Path:
    """Where the daemon's sockets are; one rule for daemon, `fastaa-ctl` and this package.

    The argument, else `$FASTAA_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/fastaa`, else `/run/fastaa`
    for root, else `/tmp/fastaa-UID`.
    """
    if runtime_dir is not None:
        try:
            return Path(runtime_dir)
        except TypeError:
            raise InvalidRequestError(
                f"runtime_dir={shown(runtime_dir)} is no path", "pass a str or a pathlib.Path"
            ) from None
    if named := os.environ.get("FASTAA_RUNTIME_DIR"):
        return Path(named)
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(xdg) / "fastaa"
    if os.geteuid() == 0:
        return Path("/run/fastaa")
    return _own_tmp_dir()


def _own_tmp_dir() -> Path:
    """`/tmp/fastaa-UID`, if it is ours: anyone can make a folder of that name in /tmp."""
    path = Path(f"/tmp/fastaa-{os.geteuid()}")
    try:
        found = path.lstat()
    except FileNotFoundError:
        return path
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise ForbiddenError(
            f"{path} belongs to another user, who could pose as your daemon",
            "set runtime_dir in the daemon's configuration, and FASTAA_RUNTIME_DIR here",
        )
    return path


def connect_socket(path: Path, kind: socket.SocketKind) -> socket.socket:
    """A connected Unix socket, or an error that says how to get a daemon."""
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise InvalidRequestError(
            f"{path}: a socket's path has at most {_PATH_BYTES_MAX} bytes",
            "use a shorter runtime_dir",
        )
    try:
        connection = socket.socket(socket.AF_UNIX, kind)
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise no_files_left() from None
        raise ExhaustedError(f"this process can open no socket: {error}") from None
    try:
        connection.settimeout(ANSWER_SECONDS_MAX)
        _connect_patiently(connection, path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        raise DaemonNotRunning(
            f"no fastaa-loaderd listens at {path}",
            "start it with: fastaa-loaderd --config FILE (its runtime_dir must be "
            f"{path.parent}; else pass runtime_dir= or set FASTAA_RUNTIME_DIR)",
        ) from None
    except PermissionError:
        connection.close()
        raise ForbiddenError(
            f"this user may not open {path}",
            "join the daemon's group, or start a daemon of your own",
        ) from None
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError | BlockingIOError):
            raise DaemonNotRunning(
                f"the daemon at {path} accepts no connection",
                "it may be stopped or overloaded; see its log",
            ) from None
        if isinstance(error, OSError | ValueError):
            # ValueError: a NUL in the path.
            raise DaemonNotRunning(
                f"{shown(str(path))} cannot be connected: {error}",
                "runtime_dir must be the folder of a running daemon",
            ) from None
        raise
    return connection


def _connect_patiently(connection: socket.socket, path: Path) -> None:
    """Connects; while the daemon's queue of connections is full, waits as for an answer.

    With a timeout set, Python connects without blocking, and Linux then refuses at once (EAGAIN)
    what does not fit into the queue; there is nothing to poll for.
    """
    deadline = time.monotonic() + ANSWER_SECONDS_MAX
    pause = _RETRY_SECONDS_MIN
    while True:
        try:
            connection.connect(str(path))
            return
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            _pause(min(pause, left))
            pause = min(2 * pause, _RETRY_SECONDS_MAX)


def _pause(seconds: float) -> None:
    time.sleep(seconds)


class LocalStream(NamedTuple):
    """An answered HELLO; the caller owns the socket and the file descriptors."""

    welcome: _messages.Welcome
    socket: socket.socket
    slab_fd: int
    window_fd: int | None
    gpu_fd: int | None
    """The pipe that says when this process has closed the slab on the GPU."""


def hello_local(runtime_dir: Path, hello: _messages.ClientHello) -> LocalStream:
    """Asks the daemon of `runtime_dir` for a stream. Raises the refusal, if it is one."""
    path = runtime_dir / HELLO_SOCKET
    message = encode_hello(hello)
    connection = connect_socket(path, socket.SOCK_SEQPACKET)
    try:
        # A daemon that refuses us at the door has hung up by now; its answer is there all the same.
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(message)
        try:
            answer, fds = _receive_with_fds(connection, path)
        except ConnectionResetError:
            # It did not read what we said, which comes before what it said: its answer is next.
            answer, fds = _receive_with_fds(connection, path)
        try:
            welcome = welcome_of(answer)
            has_window, has_gpu = welcome.n_window_slots > 0, welcome.gpu is not None
            n_expected = 1 + has_window + has_gpu
            if len(fds) != n_expected:
                raise ProtocolError(
                    f"the daemon at {path} sent {len(fds)} files instead of {n_expected}"
                )
            if welcome.gpu is not None and len(welcome.gpu.events) != welcome.n_slots:
                raise ProtocolError(
                    f"the daemon at {path} sent {len(welcome.gpu.events)} events for "
                    f"{welcome.n_slots} slots"
                )
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        window_fd, gpu_fd = fds[1] if has_window else None, fds[-1] if has_gpu else None
        return LocalStream(welcome, connection, fds[0], window_fd, gpu_fd)
    except TimeoutError:
        connection.close()
        raise DaemonGone(
            f"the daemon at {path} did not answer within {ANSWER_SECONDS_MAX:.0f} s",
            "it may be stopped or overloaded; see its log",
        ) from None
    except (BrokenPipeError, ConnectionResetError):
        connection.close()
        raise _hung_up(path) from None
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError) and not isinstance(error, Error):
            raise DaemonGone(f"no answer from the daemon at {path}: {error}") from None
        raise


def _hung_up(path: Path) -> Error:
    return DaemonGone(
        f"the daemon at {path} hung up without an answer",
        "its log says why; if it has just died, start it again",
    )


def _receive_with_fds(connection: socket.socket, path: Path) -> tuple[bytes, list[int]]:
    """One message and the file descriptors that came with it, which the caller must close."""
    fd_bytes = array.array("i").itemsize
    # Room for a few more than belong, so that too many are noticed rather than dropped.
    answer, control, flags, _ = connection.recvmsg(
        _wire.HELLO_BYTES_MAX, socket.CMSG_SPACE(4 * fd_bytes), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fd_bytes])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not answer:
        for fd in fds:
            os.close(fd)
        if not answer:
            raise _hung_up(path)
        if flags & socket.MSG_CTRUNC:
            raise no_files_left()
        raise ProtocolError(f"the answer of the daemon at {path} is too long")
    return answer, fds.tolist()


def no_files_left() -> ExhaustedError:
    """What a process without file descriptors is told."""
    return ExhaustedError(
        "this process can open no more files, and a stream needs some",
        "close loaders that are not used, or raise the limit (ulimit -n)",
    )


def encode_hello(hello: _messages.ClientHello) -> bytes:
    """The bytes of a HELLO; a request that does not fit is the caller's mistake."""
    try:
        return _wire.encode(hello)
    except _wire.WireError as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from None


def welcome_of(answer: bytes | _messages.ServerHello) -> _messages.Welcome:
    """The welcome in an answer. Raises what it is otherwise."""
    if isinstance(answer, bytes):
        try:
            answer = _wire.decode(_messages.ServerHello, answer)
        except _wire.WireError as error:
            raise protocol_error(error) from None
    if isinstance(answer.reply, _messages.Refusal):
        raise error_from_refusal(answer.reply)
    return answer.reply


def protocol_error(error: _wire.WireError) -> ProtocolError:
    """What a message that cannot be read becomes."""
    return ProtocolError(
        f"the daemon speaks another language: {error}",
        "install the client and the daemon from the same release",
    )
