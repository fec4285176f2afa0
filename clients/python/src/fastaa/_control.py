"""Questions to the daemon's control socket: one JSON line there, one JSON line back."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, NamedTuple

from . import _hello
from .errors import (
    DaemonGone,
    Error,
    ExhaustedError,
    ForbiddenError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
)

_CLASS_BY_CODE: dict[str, type[Error]] = {
    "not-found": NotFoundError,
    "invalid": InvalidRequestError,
    "forbidden": ForbiddenError,
    "exhausted": ExhaustedError,
}

_REPLY_BYTES_MAX = 16 * 1024 * 1024


class DigestQuestion(NamedTuple):
    """Which samples: those that `rank` should get of `epoch` from `start_offset` on."""

    dataset: str
    split: str
    seed: int
    epoch: int
    batch_size: int
    world_size: int
    rank: int
    drop_last: bool
    shuffle: bool
    start_offset: int


def expected_digest(runtime_dir: Path, question: DigestQuestion) -> str:
    """The digest that the daemon computes for these samples, as sixteen hexadecimal digits."""
    answer = ask(runtime_dir, {"request": "expected-digest", **question._asdict()})
    digest = answer.get("digest")
    if not isinstance(digest, str):
        raise ProtocolError(f"the daemon answers a question for a digest with {answer!r}")
    return digest


def ask(runtime_dir: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The daemon's answer to one request (`src/control/messages.rs`). Raises what it refuses."""
    path = runtime_dir / _hello.CONTROL_SOCKET
    with _hello.connect_socket(path, socket.SOCK_STREAM) as connection:
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = _line(connection)
        except OSError as error:
            raise DaemonGone(
                f"the daemon at {path} did not answer: {error}", "see its log, and try again"
            ) from None
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if isinstance(reply, dict):
        if isinstance(answer := reply.get("ok"), dict):
            return answer
        if isinstance(failure := reply.get("error"), dict):
            kind = _CLASS_BY_CODE.get(str(failure.get("code")), InternalError)
            raise kind(str(failure.get("message", failure)), str(failure.get("hint", "")))
    raise ProtocolError(
        f"the daemon at {path} answered {line[:100]!r}",
        "install the client and the daemon from the same release",
    )


def _line(connection: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        part = connection.recv(65_536)
        if not part:
            break
        received += part
        if len(received) > _REPLY_BYTES_MAX:
            raise ProtocolError(f"an answer of over {_REPLY_BYTES_MAX} bytes")
    return bytes(received)
