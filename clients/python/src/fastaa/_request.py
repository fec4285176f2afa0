"""What a caller asks for, checked and completed: requests, recipes, and where the daemon is."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import _control, _hello, _messages, _state, _values, _wire
from ._arrays import check_output
from ._connection import Connection
from ._cuda import CudaError
from ._device import Copier
from ._values import shown
from ._version import __version__
from .errors import InvalidRequestError, UnsupportedError

_U32_MAX = (1 << 32) - 1
_U64_MAX = (1 << 64) - 1
_BATCH_SIZE_MAX = 1 << 20  # limits.rs
_WORLD_SIZE_MAX = 1 << 16  # limits.rs

_PORT_MAX = 65_535

_ADDRESS = re.compile(r"tcp://(?:[\w.-]+|\[[\w.:%-]+\]):(?P<port>\d{1,5})", re.ASCII)

_MODES = {"shard": _messages.GroupMode.Shard, "broadcast": _messages.GroupMode.Broadcast}


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int within bounds (numpy's integers are welcome, bools and floats are not)."""
    number = _values.whole(value)
    if number is None or not low <= number <= high:
        raise InvalidRequestError(
            f"{name}={shown(value)} is no whole number from {low} to {high}", f"pass a valid {name}"
        )
    return number


def metric(name: str, value: Any) -> float:
    """`value` as a finite float; what holds one number (numpy, torch) is welcome."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, str | bool):
        raise InvalidRequestError(
            f"{name}={shown(value)} is no finite number", f"pass a number as {name}"
        )
    return number


def seconds(name: str, value: Any) -> float:
    """`value` as a duration: a finite number that is not negative."""
    number = metric(name, value)
    if number < 0:
        raise InvalidRequestError(f"{name}={shown(value)} is negative", f"pass {name}=0 or more")
    return number


def _flag(name: str, value: Any) -> bool:
    """`value` as a bool; `"false"` is none, and would count as true."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InvalidRequestError(f"{name}={shown(value)} is no bool", f"pass {name}=True or False")


def _name(name: str, value: Any) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    raise InvalidRequestError(f"{name}={shown(value)} is no str", f"pass the {name}'s name")


def _is_replay() -> bool:
    """Whether the environment asks for batches that cost nothing (`stream headspace` does)."""
    value = os.environ.get("FASTAA_REPLAY", "")
    if value not in ("", "0", "1"):
        raise InvalidRequestError(
            f"FASTAA_REPLAY={shown(value)} is neither 0 nor 1",
            "unset it; 'fastaa-ctl stream headspace' sets it for its measurement",
        )
    return value == "1"


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
    if not isinstance(mode, str) or mode not in _MODES:
        raise InvalidRequestError(
            f"mode={shown(mode)} is unknown", 'use mode="shard" or "broadcast"'
        )
    rank, world_size = _rank_and_world_size(rank, world_size, is_shard=mode == "shard")
    return _messages.StreamRequest(
        dataset=_name("dataset", dataset),
        split=_name("split", split),
        batch_size=integer("batch_size", batch_size, 1, _BATCH_SIZE_MAX),
        seed=integer("seed", seed, 0, _U64_MAX),
        rank=rank,
        world_size=world_size,
        drop_last=_flag("drop_last", drop_last),
        shuffle=_flag("shuffle", shuffle),
        group=_torchrun_group() if group is None else _name("group", group),
        mode=_MODES[mode],
        replay=_is_replay(),
        recipe_json=recipe,
        n_slots=integer("n_slots", n_slots, 0, _U32_MAX),
        gpu=None,
    )


def _rank_and_world_size(rank: Any, world_size: Any, *, is_shard: bool) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise InvalidRequestError(
            f"rank={shown(rank)} and world_size={shown(world_size)} belong together",
            "pass both, or neither: then torchrun's RANK and WORLD_SIZE count, else 0 and 1",
        )
    names = ("rank", "world_size")
    if rank is None:
        # Each member of a broadcast group gets everything: torchrun's ranks mean nothing there.
        rank, world_size = "0", "1"
        if is_shard and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
            rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
            names = ("RANK in the environment", "WORLD_SIZE in the environment")
        if rank is None or world_size is None:
            # Ranks that all take themselves for rank 0 would train on the same samples.
            alone, missing = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
            raise InvalidRequestError(
                f"the environment has {alone}={shown(os.environ[alone])} but no {missing}; they "
                "belong together",
                "set both, as torchrun does, or unset both, or pass rank= and world_size=",
            )
        try:
            rank, world_size = int(rank), int(world_size)
        except ValueError:
            raise InvalidRequestError(
                f"RANK={shown(rank)} and WORLD_SIZE={shown(world_size)} in the environment are no "
                "numbers",
                "unset them, or pass rank= and world_size=",
            ) from None
    world_size = integer(names[1], world_size, 1, _WORLD_SIZE_MAX)
    return integer(names[0], rank, 0, world_size - 1), world_size


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


def recipe(
    policy: str | os.PathLike[str] | None, overrides: Mapping[str, Any], total_epochs: Any = None
) -> str:
    """The recipe keys that differ from the daemon's defaults, as a JSON object."""
    keys = dict(overrides)
    if total_epochs is not None:
        keys["total_epochs"] = integer("total_epochs", total_epochs, 0, _state.EPOCHS_MAX)
    if policy is not None:
        keys["policy"] = _policy_reference(policy)
    try:
        return json.dumps(keys, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
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


class Target(NamedTuple):
    """Which daemon: that of a runtime directory, or one at a TCP address."""

    runtime_dir: Path
    address: str | None
    token: str

    def connect(self, request: _messages.StreamRequest, copier: Copier | None = None) -> Connection:
        """A new session; its batches are on the copier's GPU, if that can be."""

        def hello(gpu: bytes | None) -> _messages.ClientHello:
            asked = request._replace(gpu=gpu)
            return _messages.ClientHello(
                _wire.PROTOCOL_VERSION, f"python {__version__}", self.token, asked
            )

        if self.address is not None:
            return Connection.tcp(self.address, hello(None))
        gpu = None if copier is None else copier.uuid
        if copier is not None and gpu is not None:
            try:
                return Connection.local(self.runtime_dir, hello(gpu), copier)
            except CudaError as error:
                copier.copies_because(str(error))
        return Connection.local(self.runtime_dir, hello(None), copier)

    def expected_digest(self, request: _messages.StreamRequest, epoch: int, since: int) -> str:
        """The daemon's answer to which digest a rank's samples of `epoch` have."""
        self._check_local()
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

    def report(self, dataset: str, run: str, epoch: int, policy: str, value: float) -> None:
        """Tells the daemon a run's metric after an epoch."""
        self._check_local()
        _control.ask(
            self.runtime_dir,
            {
                "request": "report-metric",
                "dataset": dataset,
                "run": run,
                "epoch": epoch,
                "policy": policy,
                "value": value,
            },
        )

    def _check_local(self) -> None:
        if self.address is not None:
            raise UnsupportedError(
                "the daemon's control socket is not served over TCP",
                "ask on the daemon's host, by a loader with runtime_dir=",
            )


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
    found = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if found is None or not 1 <= int(found["port"]) <= _PORT_MAX:
        raise InvalidRequestError(
            f"address={shown(address)} is no tcp:// address",
            'use address="tcp://127.0.0.1:PORT", or runtime_dir= for the daemon of this host',
        )
    return Target(Path(), found[0], _token_of(token))


def _token_of(token: str | os.PathLike[str] | None) -> str:
    """The token itself: given, or the content of the file that is named."""
    if token is None:
        raise InvalidRequestError(
            "TCP needs a token",
            "pass token=: the daemon's token, or the path of its token_file",
        )
    if not isinstance(token, str | os.PathLike):
        # What it is not told: it may be a secret.
        raise InvalidRequestError(
            f"token= is a {type(token).__name__}", "pass the token as a str, or its file's path"
        )
    try:
        # A token has no slash: what has one is meant as a path, also if there is no such file.
        is_file = isinstance(token, os.PathLike) or "/" in token or Path(token).is_file()
        return Path(token).read_text().strip() if is_file else str(token)
    except (OSError, TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"the token file cannot be read: {error}", "pass the path of the daemon's token_file"
        ) from None
