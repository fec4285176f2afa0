"""Fixtures: the client of this checkout, and the real daemon on a folder of its own."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "clients" / "python" / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import Daemon, daemon_binary  # noqa: E402  (needs the path above)

if TYPE_CHECKING:
    from gpu_support import GpuHost


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


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuHost]:
    """A host with a played GPU (`gpu_support`) whose daemon is still to be started."""
    from gpu_support import GpuHost, library

    if daemon_binary() is None or not library().exists():
        pytest.skip("no daemon, or no played driver: cargo build --example fake_cuda")
    host = GpuHost(tmp_path)
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "libcuda.so.1").symlink_to(library())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver), prepend=":")
    monkeypatch.setenv("FAKE_CUDA", str(host.folder))
    with host.daemon:
        yield host
        # While the daemon is there: one that ends takes its memory with it.
        gc.collect()
        misused = host.folder / "misused"
        assert not misused.exists(), misused.read_text()


@pytest.fixture
def host(bare: GpuHost, monkeypatch: pytest.MonkeyPatch) -> GpuHost:
    """The same, started."""
    from gpu_support import CLIENT_DELAY_US

    bare.start()
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", str(CLIENT_DELAY_US))
    return bare


@pytest.fixture
def augmenting(bare: GpuHost, monkeypatch: pytest.MonkeyPatch) -> GpuHost:
    """A host whose daemon augments on the GPU."""
    from gpu_support import CLIENT_DELAY_US

    bare.start(augment_on="gpu")
    if bare.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch")
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", str(CLIENT_DELAY_US))
    return bare


@pytest.fixture
def no_warning() -> Iterator[None]:
    """This package warns of nothing."""
    with warnings.catch_warnings():
        # This package's own; garbage of other tests may warn of its sockets meanwhile.
        warnings.simplefilter("error", RuntimeWarning)
        yield
