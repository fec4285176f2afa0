"""What a stream is: what must not change while a loader goes on with it."""

from __future__ import annotations

import json

from . import _messages


def changes(before: _messages.Welcome, after: _messages.Welcome) -> str:
    """What differs between two streams, for people."""
    old, new = json.loads(before.recipe_json), json.loads(after.recipe_json)
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    found = [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in keys]
    for name in ("fingerprint", "n_samples", "labels"):
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            found.append(f"{name} was {was!r} and is {now!r}")
    return ", ".join(found) or "its images have another shape or type"


def identity(welcome: _messages.Welcome) -> tuple[object, ...]:
    """What a stream must have in common with its continuation."""
    return (
        *(welcome.fingerprint, welcome.n_samples, welcome.recipe_json, welcome.labels),
        *(welcome.height, welcome.width, welcome.channels, welcome.dtype, welcome.layout),
    )
