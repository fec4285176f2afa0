"""What a caller asks for, checked and completed: requests, recipes, and where the daemon is."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import _control, _hello, _messages, _wire
from ._arrays import check_output
from ._connection import Connection
from ._version import __version__
from .errors import InvalidRequestError, UnsupportedError

_U32_MAX = (1 << 32) - 1
_U64_MAX = (1 << 64) - 1
_BATCH_SIZE_MAX = 1 << 20  # limits.rs
_WORLD_SIZE_MAX = 1 << 16  # limits.rs

_SHOWN_CHARS_MAX = 80

_MODES = {"shard": _messages.GroupMode.Shard, "broadcast": _messages.GroupMode.Broadcast}


def shown(value: Any) -> str:
    """The value in an error message: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # Its own, or that of an int with thousands of digits.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int within bounds (numpy's integers are welcome, bools and floats are not)."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise InvalidRequestError(
            f"{name}={value!r} is no whole number from {low} to {high}", f"pass a valid {name}"
        )
    return number


def stream_request(
    *,
    dataset: Any,
    split: Any,
    batch_size: Any,
    seed: Any,
    rank: Any,
    world_size: Any,
    group: Any,
    mode: Any,
    drop_last: Any,
    shuffle: Any,
    recipe: str,
    n_slots: Any,
) -> _messages.StreamRequest:
    """A checked request; what is `None` comes from torchrun's environment, if it runs us."""
    if mode not in _MODES:
        raise InvalidRequestError(f"mode={mode!r} is unknown", 'use mode="shard" or "broadcast"')
    for name, value in (("dataset", dataset), ("split", split), ("group", group or "")):
        if not isinstance(value, str):
            raise InvalidRequestError(f"{name}={value!r} is no str", f"pass the {name}'s name")
    rank, world_size = _rank_and_world_size(rank, world_size, is_shard=mode == "shard")
    return _messages.StreamRequest(
        dataset=dataset,
        split=split,
        batch_size=integer("batch_size", batch_size, 1, _BATCH_SIZE_MAX),
        seed=integer("seed", seed, 0, _U64_MAX),
        rank=rank,
        world_size=world_size,
        drop_last=bool(drop_last),
        shuffle=bool(shuffle),
        group=_torchrun_group() if group is None else group,
        mode=_MODES[mode],
        recipe_json=recipe,
        n_slots=integer("n_slots", n_slots, 0, _U32_MAX),
    )


def _rank_and_world_size(rank: Any, world_size: Any, *, is_shard: bool) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise InvalidRequestError(
            f"rank={rank!r} and world_size={world_size!r} belong together",
            "pass both, or neither: then torchrun's RANK and WORLD_SIZE count, else 0 and 1",
        )
    if rank is None:
        # Members of a broadcast group share nothing, so torchrun's ranks mean nothing there.
        rank, world_size = "0", "1"
        if is_shard and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        try:
            rank, world_size = int(rank), int(world_size)
        except ValueError:
            raise InvalidRequestError(
                f"RANK={rank!r} and WORLD_SIZE={world_size!r} in the environment are no numbers",
                "unset them, or pass rank= and world_size=",
            ) from None
    world_size = integer("world_size", world_size, 1, _WORLD_SIZE_MAX)
    return integer("rank", rank, 0, world_size - 1), world_size


def _torchrun_group() -> str:
    """The run that torchrun's ranks belong to, or empty.

    Without `--rdzv-id`, torchrun calls every run "none". Two jobs of a host would share policies
    then; their launchers, whose children the ranks are, tell them apart.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run_id != "none":
        return run_id
    launcher = os.getppid()
    try:
        # The command's name, in parentheses, may contain anything; the start time is field 22.
        stat = Path(f"/proc/{launcher}/stat").read_text(errors="replace")
        started = stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = "0"
    return f"torchrun-{launcher}-{started}"


def recipe(policy: str | os.PathLike[str] | None, overrides: Mapping[str, Any]) -> str:
    """The recipe keys that differ from the daemon's defaults, as a JSON object."""
    keys = dict(overrides)
    if policy is not None:
        keys["policy"] = _policy_reference(policy)
    try:
        return json.dumps(keys, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"the recipe overrides cannot be sent: {error}",
            "use numbers, strings, lists and dicts, as in the daemon's [stream.defaults]",
        ) from None


def _policy_reference(policy: Any) -> str:
    """The policy as the daemon finds it: paths absolute, names as they are."""
    if not isinstance(policy, str | os.PathLike):
        raise InvalidRequestError(
            f"policy={shown(policy)} is no policy",
            "pass a name, NAME@VERSION, a policy file's path, or None for the daemon's default",
        )
    reference = policy.strip() if isinstance(policy, str) else os.fsdecode(policy)
    # The rule for strings is that of the daemon (`looks_like_path` in src/policy/builtin.rs).
    looks_like_path = "/" in reference or Path(reference).suffix.lower() == ".json"
    if isinstance(policy, str) and not looks_like_path:
        return reference
    try:
        # The daemon has another working directory.
        return os.path.abspath(reference)  # noqa: PTH100 (a symlink stays what the user named)
    except OSError as error:
        raise InvalidRequestError(
            f"policy={shown(policy)} is relative, and the working directory is gone: {error}",
            "pass an absolute path",
        ) from None


def check_device(device: object) -> None:
    """Refuses what this version cannot do yet."""
    if device is not None and str(device) != "cpu":
        raise UnsupportedError(
            f"device={str(device)!r}: batches in GPU memory come in a later version",
            "leave device out, and move batches with images.to(device, non_blocking=True)",
        )


class Target(NamedTuple):
    """Which daemon: that of a runtime directory, or one at a TCP address."""

    runtime_dir: Path
    address: str | None
    token: str

    def connect(self, request: _messages.StreamRequest) -> Connection:
        """A new session."""
        hello = _messages.ClientHello(
            _wire.PROTOCOL_VERSION, f"python {__version__}", self.token, request
        )
        if self.address is not None:
            return Connection.tcp(self.address, hello)
        return Connection.local(self.runtime_dir, hello)

    def expected_digest(self, request: _messages.StreamRequest, epoch: int, since: int) -> str:
        """The daemon's answer to which digest a rank's samples of `epoch` have."""
        if self.address is not None:
            raise UnsupportedError(
                "the daemon's control socket is not served over TCP",
                "ask on the daemon's host, by a loader with runtime_dir=",
            )
        is_shard = request.mode == _messages.GroupMode.Shard
        question = _control.DigestQuestion(
            dataset=request.dataset,
            split=request.split,
            seed=request.seed,
            epoch=epoch,
            start_offset=since,
            batch_size=request.batch_size,
            rank=request.rank if is_shard else 0,
            world_size=request.world_size if is_shard else 1,
            drop_last=request.drop_last,
            shuffle=request.shuffle,
        )
        return _control.expected_digest(self.runtime_dir, question)


def target(
    runtime_dir: str | os.PathLike[str] | None,
    address: str | None,
    token: str | os.PathLike[str] | None,
    output: str,
    dtype: object,
) -> Target:
    """A checked target; `output` and `dtype` are checked here as well, before any daemon is."""
    check_output(output, dtype)
    if address is None:
        if token is not None:
            raise InvalidRequestError("token= is for TCP only", "drop it, or pass address= as well")
        return Target(_hello.runtime_dir_of(runtime_dir), None, "")
    if not address.startswith("tcp://"):
        raise InvalidRequestError(
            f"address={address!r} is no tcp:// address",
            'use address="tcp://127.0.0.1:PORT", or runtime_dir= for the daemon of this host',
        )
    directory = Path() if runtime_dir is None else Path(runtime_dir)
    return Target(directory, address, _token_of(token))


def _token_of(token: str | os.PathLike[str] | None) -> str:
    """The token itself: given, or the content of the file that is named."""
    if token is None:
        raise InvalidRequestError(
            "TCP needs a token",
            "pass token=: the daemon's token, or the path of its token_file",
        )
    try:
        is_file = isinstance(token, os.PathLike) or Path(token).is_file()
        return Path(token).read_text().strip() if is_file else str(token)
    except OSError as error:
        raise InvalidRequestError(
            f"the token file cannot be read: {error}", "pass the path of the daemon's token_file"
        ) from None
