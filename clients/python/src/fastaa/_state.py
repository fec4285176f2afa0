"""The position within a stream, and its form as a `state_dict`.

The position is a global sample offset, so any rank's state serves all ranks, whatever their
number and batch size; only the digest belongs to one rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _digest, _messages, _values
from ._values import shown
from .errors import StateError

STATE_VERSION = 1

EPOCHS_MAX = 1 << 40
"""Epochs of a run, by whose bits the daemon counts its random draws (`src/random.rs`)."""

_FRESH_MAX = 32  # Batches that are summed at once.
_POLICY_BYTES_MAX = 4096  # A path, at the longest.

_DAMAGE_HINT = "use an older one"


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
    fresh: tuple[npt.NDArray[np.int64], ...] = ()
    """Places of batches that are not yet in `digest`: many are summed at once, for speed."""

    def after(self, offset: int, places: npt.NDArray[np.int64]) -> Position:
        """The position behind a batch of these places, up to the global sample `offset`."""
        fresh = (*self.fresh, places.copy())
        position = self._replace(offset=offset, step=self.step + 1, fresh=fresh)
        return position.settled() if len(fresh) >= _FRESH_MAX else position

    def settled(self) -> Position:
        """The same, with everything in `digest`."""
        if not self.fresh:
            return self
        places = np.concatenate(self.fresh)
        # A skipped sample was visited, too.
        visited = np.where(places < 0, -1 - places, places)
        digest = _digest.add(self.digest, _digest.digest_of(visited))
        return self._replace(digest=digest, fresh=())


def _digest_owner(request: _messages.StreamRequest) -> list[int]:
    """Whose samples a digest sums up: a lone rank gets all, whatever the batch size."""
    if samples_per_step(request) == request.batch_size:
        return [0, 1, request.batch_size if request.drop_last else 0]
    return [request.rank, request.world_size, request.batch_size]


def state_of(
    position: Position, request: _messages.StreamRequest, welcome: _messages.Welcome
) -> dict[str, Any]:
    """The position as values that JSON knows."""
    position = position.settled()
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
    """The position in a state. Raises `StateError` if it is damaged or of another stream."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError("this is no state of a fastaa.Loader", "pass what state_dict() returned")
    version = state["version"]
    if _values.whole(version) != STATE_VERSION:
        raise StateError(
            f"the state has version {shown(version)}, this client knows {STATE_VERSION}",
            "use the client version that wrote it",
        )
    _check_stream(state, request, welcome)
    n_samples = welcome.n_samples
    epoch = _whole_in(state, "epoch", EPOCHS_MAX - 1)
    offset = _whole_in(state, "offset", n_samples)
    # Every step takes a sample at least, and a digest begins at or before the position.
    step = _whole_in(state, "step", offset)
    digest_since = _whole_in(state, "digest_since", offset)
    policy, digest = _policy_in(state), _digest_in(state)
    owner = _owner_in(state)
    if not _has_batches_left(offset, request, welcome):
        return Position(epoch=epoch + 1)
    if owner != _digest_owner(request):
        # Another rank's digest, or another partition: count from here on.
        digest, digest_since = 0, offset
    return Position(epoch, offset, step, policy, digest, digest_since)


def _check_stream(
    state: Mapping[str, Any], request: _messages.StreamRequest, welcome: _messages.Welcome
) -> None:
    expected = {
        "dataset": request.dataset,
        "split": request.split,
        "fingerprint": welcome.fingerprint,
        "seed": request.seed,
        "shuffle": request.shuffle,
        "drop_last": request.drop_last,
    }
    for key, value in expected.items():
        found = state.get(key)
        # The type counts: True is not 1.
        plain = _values.whole(found) if type(value) is int else found
        if type(plain) is not type(value) or plain != value:
            hint = f"make the loader with {key}={shown(found)}"
            if key == "fingerprint":
                hint = (
                    "the dataset's files were changed, copied or touched since; put them back as "
                    "they were, or start a new run ('fastaa-ctl dataset pack' makes files that are "
                    "known by their content)"
                )
            elif type(plain) is not type(value):
                hint = _DAMAGE_HINT
            raise StateError(
                f"the state belongs to {key}={shown(found)}, this loader has {shown(value)}", hint
            )


def _damaged(state: Mapping[str, Any], key: str, must_be: str) -> StateError:
    found = shown(state[key]) if key in state else "missing"
    return StateError(f"the state is damaged: {key} is {found}, not {must_be}", _DAMAGE_HINT)


def _whole_in(state: Mapping[str, Any], key: str, high: int) -> int:
    number = _values.whole(state.get(key))
    if number is None or not 0 <= number <= high:
        raise _damaged(state, key, f"a whole number from 0 to {high}")
    return number


def _policy_in(state: Mapping[str, Any]) -> str:
    """A reference: whatever the daemon called the policy; empty before it did."""
    policy = state.get("policy")
    try:
        if isinstance(policy, str) and len(policy.encode()) <= _POLICY_BYTES_MAX:
            return str.__str__(policy)
    except UnicodeEncodeError:
        pass
    raise _damaged(state, "policy", f"a text of at most {_POLICY_BYTES_MAX} bytes")


def _digest_in(state: Mapping[str, Any]) -> int:
    digest = state.get("digest")
    if not isinstance(digest, str) or re.fullmatch("[0-9a-fA-F]{16}", digest) is None:
        raise _damaged(state, "digest", "sixteen hexadecimal digits")
    return int(digest, 16)


def _owner_in(state: Mapping[str, Any]) -> list[int]:
    found = state.get("digest_of")
    numbers = [_values.whole(item) for item in found] if isinstance(found, list | tuple) else []
    owner = [number for number in numbers if number is not None]
    if len(numbers) != 3 or len(owner) != 3:
        raise _damaged(state, "digest_of", "a list of three whole numbers")
    return owner


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
