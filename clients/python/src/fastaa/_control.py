"""Questions to the daemon's control socket: one JSON line there, one JSON line back."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, NamedTuple

from . import _hello
from .errors import DaemonGone, Error, InternalError, ProtocolError

_REPLY_BYTES_MAX = 16 * 1024 * 1024


class DigestQuestion(NamedTuple):
    """Which samples: those that `rank` should get of `epoch` from the sample `offset` on."""

    dataset: str
    split: str
    seed: int
    epoch: int
    offset: int
    batch_size: int
    rank: int
    world_size: int
    drop_last: bool
    shuffle: bool


def expected_digest(runtime_dir: Path, question: DigestQuestion) -> str:
    """The digest that the daemon computes for these samples, as sixteen hexadecimal digits."""
    answer = ask(runtime_dir, {"ExpectedDigest": question._asdict()})
    digest = answer.get("digest") if isinstance(answer, dict) else answer
    if not isinstance(digest, str):
        raise ProtocolError(f"the daemon answers ExpectedDigest with {answer!r}")
    return digest


def ask(runtime_dir: Path, request: dict[str, Any]) -> Any:
    """The content of the daemon's answer to one request. Raises what it refuses."""
    path = runtime_dir / _hello.CONTROL_SOCKET
    with _hello.connect_socket(path, socket.SOCK_STREAM) as connection:
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = _line(connection)
        except OSError as error:
            raise DaemonGone(f"the daemon at {path} did not answer: {error}") from None
    try:
        reply = json.loads(line)
    except ValueError:
        raise ProtocolError(f"the daemon at {path} answered {line[:100]!r}") from None
    if not isinstance(reply, dict) or len(reply) != 1:
        raise ProtocolError(f"the daemon at {path} answered {line[:100]!r}")
    ((kind, content),) = reply.items()
    if kind == "Error":
        raise _refused(content)
    return content


def _refused(content: Any) -> Error:
    if isinstance(content, dict):
        return InternalError(str(content.get("message", content)), str(content.get("hint") or ""))
    return InternalError(str(content))


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
