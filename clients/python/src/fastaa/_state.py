"""The position within a stream, and its form as a `state_dict`.

The position is a global sample offset, so any rank's state serves all ranks, whatever their
number and batch size; only the digest belongs to one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _messages
from .errors import StateError

STATE_VERSION = 1

_POLICY_BYTES_MAX = 4096
"""Longest reference of a policy in a state."""


class Position(NamedTuple):
    """Where in which epoch a loader is."""

    epoch: int = 0
    offset: int = 0
    """Samples of the epoch, all ranks together, that were yielded."""
    step: int = 0
    """Steps of the epoch that were yielded."""
    policy: str = ""
    """Reference of the epoch's policy; empty until the daemon has told it."""
    digest: int = 0
    """Digest of the samples that this rank received of the epoch, from `digest_since` on."""
    digest_since: int = 0
    is_complete: bool = False
    """The last batch was yielded; the epoch has nothing left."""


def _digest_owner(request: _messages.StreamRequest) -> list[int]:
    """Whose samples a digest sums up: a lone rank gets all, whatever the batch size."""
    if samples_per_step(request) == request.batch_size:
        return [0, 1, request.batch_size if request.drop_last else 0]
    return [request.rank, request.world_size, request.batch_size]


def state_of(
    position: Position, request: _messages.StreamRequest, welcome: _messages.Welcome
) -> dict[str, Any]:
    """The position as values that JSON knows."""
    if position.is_complete:
        # A finished epoch would come back as an empty one.
        position = Position(epoch=position.epoch + 1)
    return {
        "version": STATE_VERSION,
        "dataset": request.dataset,
        "split": request.split,
        "fingerprint": welcome.fingerprint,
        "seed": request.seed,
        "shuffle": request.shuffle,
        "drop_last": request.drop_last,
        "epoch": position.epoch,
        "offset": position.offset,
        "step": position.step,
        "policy": position.policy,
        "digest": f"{position.digest:016x}",
        "digest_since": position.digest_since,
        "digest_of": _digest_owner(request),
    }


def position_of(
    state: Mapping[str, Any], request: _messages.StreamRequest, welcome: _messages.Welcome
) -> Position:
    """The position in a state. Raises `StateError` if it belongs to another stream."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError("this is no state of a fastaa.Loader", "pass what state_dict() returned")
    if state["version"] != STATE_VERSION:
        raise StateError(
            f"the state has version {state['version']!r}, this client knows {STATE_VERSION}",
            "use the client version that wrote it",
        )
    expected = {
        "dataset": request.dataset,
        "split": request.split,
        "fingerprint": welcome.fingerprint,
        "seed": request.seed,
        "shuffle": request.shuffle,
        "drop_last": request.drop_last,
    }
    hints = {
        "fingerprint": "the dataset was changed or replaced since; a new run must start anew",
    }
    for key, value in expected.items():
        if state.get(key) != value:
            raise StateError(
                f"the state belongs to {key}={state.get(key)!r}, this loader has {value!r}",
                hints.get(key, f"make the loader with {key}={state.get(key)!r}"),
            )
    try:
        numbers = [_whole(state[key]) for key in ("epoch", "offset", "step", "digest_since")]
        digest = int(state["digest"], 16)
        policy, owner = state["policy"], list(state["digest_of"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"the state is damaged: {error!r}", "use an older one") from None
    if not isinstance(policy, str) or len(policy.encode()) > _POLICY_BYTES_MAX:
        raise StateError("the state is damaged: its policy is no reference", "use an older one")
    epoch, offset, step, digest_since = numbers
    is_possible = epoch < 1 << 40 and step < 1 << 63 and offset <= welcome.n_samples
    if min(numbers) < 0 or not is_possible or digest_since > offset or digest >> 64:
        raise StateError(
            f"the state is damaged: epoch {epoch}, offset {offset} of {welcome.n_samples} samples",
            "use an older one",
        )
    if not _has_batches_left(offset, request, welcome):
        return Position(epoch=epoch + 1)
    if owner != _digest_owner(request):
        # Another rank's digest, or another partition: count from here on.
        digest, digest_since = 0, offset
    return Position(epoch, offset, step, policy, digest, digest_since)


def _whole(value: Any) -> int:
    """A number of a state; JSON has no other whole numbers than ints."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _has_batches_left(
    offset: int, request: _messages.StreamRequest, welcome: _messages.Welcome
) -> bool:
    """Whether a resumed epoch still has a step; with other batch sizes it may have none."""
    n_left = welcome.n_samples - offset
    if not request.drop_last or offset == 0:
        return n_left > 0
    return n_left >= samples_per_step(request)


def samples_per_step(request: _messages.StreamRequest) -> int:
    """Samples of one step, all ranks together."""
    if request.mode == _messages.GroupMode.Broadcast:
        return request.batch_size
    return request.batch_size * request.world_size
