"""Fixtures: the client of this checkout, and the real daemon on a folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "clients" / "python" / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import Daemon, daemon_binary  # noqa: E402  (needs the path above)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A running daemon with the datasets of `support.py`; stopped at the end."""
    if daemon_binary() is None:
        pytest.skip("no daemon: build target/release/fastaa-loaderd, or set FASTAA_LOADERD")
    with Daemon() as daemon:
        daemon.start()
        yield daemon


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """As `daemon`, one for all tests of a module that do it no harm."""
    if daemon_binary() is None:
        pytest.skip("no daemon: build target/release/fastaa-loaderd, or set FASTAA_LOADERD")
    with Daemon() as daemon:
        daemon.start()
        yield daemon
