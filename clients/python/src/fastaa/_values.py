"""Values that came from outside: what they are, and how an error message shows them."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

_SHOWN_CHARS_MAX = 80


def whole(value: Any) -> int | None:
    """`value` as a plain int if it is a whole number (numpy's too), else `None`; so for bools."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return int(operator.index(value))
    except TypeError:
        return None


def shown(value: Any) -> str:
    """The value in an error message: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # Its own, or that of an int with thousands of digits.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"
