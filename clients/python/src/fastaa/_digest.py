"""The digest of visited samples: which samples a rank received, whatever their order.

The digest of a set of sample indices is the sum, modulo 2^64, of `splitmix64(index + 1)`; the
daemon computes the same for the indices that it should have sent. A sample that is lost or comes
twice changes it.

Source: the output of G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, as S. Vigna's `splitmix64.c` writes it: the first number after the state
was set to the argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIX_1 = np.uint64(0xBF58_476D_1CE4_E5B9)
_MIX_2 = np.uint64(0x94D0_49BB_1331_11EB)
_CHUNK = 1 << 16


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 of each value; arithmetic wraps at 64 bits."""
    z = values + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def digest_of(indices: npt.NDArray[Any]) -> int:
    """The digest of these sample indices."""
    keys = indices.astype(np.uint64) + np.uint64(1)
    return int(splitmix64(keys).sum(dtype=np.uint64))


def digest_of_first(n_samples: int) -> int:
    """The digest of the indices `0..n_samples`, without holding them all."""
    total = 0
    for start in range(0, n_samples, _CHUNK):
        chunk = np.arange(start, min(start + _CHUNK, n_samples), dtype=np.uint64)
        total += digest_of(chunk)
    return total & _MASK


def add(digest: int, other: int) -> int:
    """The digest of two disjoint sets together."""
    return (digest + other) & _MASK


def to_text(digest: int) -> str:
    """Sixteen hexadecimal digits."""
    return f"{digest:016x}"
