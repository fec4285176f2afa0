"""What a loader yields."""

from __future__ import annotations

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """One step's samples for this rank."""

    images: Any
    """`[n, channels, height, width]` or `[n, height, width, channels]`, as the recipe says."""
    labels: Any
    """int64 `[n]`, or float32 `[n, len]`."""
    indices: Any
    """int64 `[n]`: which samples of the split these are."""
    epoch: int
    step: int
    """Steps of this epoch that were yielded before; goes on after a resume."""
    policy_id: str
    """Content hash of the policy that augmented the batch, hexadecimal."""
    policy_version: int
    """The policy's version in the daemon's store; 0 for a built-in or a file."""
    policy: str
    """Reference that names exactly this policy: `NAME@VERSION`, a built-in's name, or `id:` and
    the content hash of a policy file."""
    n_global: int
    """Samples of all ranks in this step: divide a summed loss of the last step by it. Skipped ones
    are counted."""
    n_skipped: int = 0
    """Samples of this rank that were left out, because they cannot be read (`on_error="skip"`)."""
