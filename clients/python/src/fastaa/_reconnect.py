"""Waiting for a daemon that is being restarted.

Owns the pauses and the one warning. Knows no connection: the loader tries, and asks here whether to
try again.
"""

from __future__ import annotations

import threading
import time
import warnings

from .errors import DaemonGone, DaemonNotRunning, DaemonRestartWarning, DaemonStopping, Error

PASSING = (DaemonGone, DaemonNotRunning, DaemonStopping)
"""What a restart of the daemon looks like from here."""

_PAUSE_SECONDS_MIN = 0.05
_PAUSE_SECONDS_MAX = 2.0
"""The pauses between attempts; each is twice the last."""


class Patience:
    """How long a loader waits for its daemon to come back."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._pause = _PAUSE_SECONDS_MIN
        self._stopped = threading.Event()

    def wait(self, error: Error) -> bool:
        """Waits a moment before the next attempt; `False` if there is to be none."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._seconds
            if self._seconds > 0:
                warnings.warn(
                    f"{error.message}; waiting up to {self._seconds:g} s for it to come back, and "
                    "then going on at the same sample (reconnect_seconds=0 raises at once)",
                    DaemonRestartWarning,
                    stacklevel=5,
                )
        left = self._deadline - now
        if left <= 0 or self._stopped.is_set():
            self._deadline = None
            return False
        self._stopped.wait(min(self._pause, left))
        self._pause = min(2 * self._pause, _PAUSE_SECONDS_MAX)
        return True

    def reset(self) -> None:
        """The daemon is there."""
        self._deadline = None
        self._pause = _PAUSE_SECONDS_MIN

    def stop(self) -> None:
        """Nobody waits any more. From any thread."""
        self._stopped.set()
