"""What the tests need around the client: synthetic datasets and the real daemon.

Datasets, made of a fixed seed:

* `toy`: IDX files, 28x28 grey, 1,000 training and 210 test images, ten classes;
* `fashion-mnist`: the same files, for the example that trains on that name;
* `colour`: CIFAR-10 binary files, 32x32 RGB, 300 training and 50 test images.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[2]
CLIENT_SRC = ROOT / "clients" / "python" / "src"

TOY_TRAIN, TOY_TEST = 1000, 210
COLOUR_TRAIN, COLOUR_TEST = 300, 50
WAIT_SECONDS_MAX = 30.0


def daemon_binary() -> Path | None:
    """`$FASTAA_LOADERD`, else the release build, if there is one."""
    named = os.environ.get("FASTAA_LOADERD")
    path = Path(named) if named else ROOT / "target" / "release" / "fastaa-loaderd"
    return path if path.exists() else None


def ctl_binary() -> Path | None:
    """`$FASTAA_CTL`, else the release build, if there is one."""
    named = os.environ.get("FASTAA_CTL")
    path = Path(named) if named else ROOT / "target" / "release" / "fastaa-ctl"
    return path if path.exists() else None


class Split:
    """The truth about a split: images `[n, height, width, channels]` uint8, labels int64."""

    def __init__(self, n_samples: int, side: int, channels: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (n_samples, side, side, channels)
        self.images: npt.NDArray[np.uint8] = rng.integers(0, 256, shape, dtype=np.uint8)
        self.labels: npt.NDArray[np.int64] = rng.integers(0, 10, n_samples).astype(np.int64)
        # Every class occurs, so that the daemon finds ten of them.
        self.labels[:10] = np.arange(10)


TOY = {"train": Split(TOY_TRAIN, 28, 1, 1), "test": Split(TOY_TEST, 28, 1, 2)}
COLOUR = {"train": Split(COLOUR_TRAIN, 32, 3, 3), "test": Split(COLOUR_TEST, 32, 3, 4)}


def write_idx(directory: Path) -> None:
    """The `toy` dataset under the names that MNIST's files have."""
    directory.mkdir()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        truth = TOY[split]
        sides = b"".join(side.to_bytes(4, "big") for side in truth.images.shape[:3])
        images = b"\x00\x00\x08\x03" + sides + truth.images.tobytes()
        (directory / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        count = len(truth.labels).to_bytes(4, "big")
        labels = b"\x00\x00\x08\x01" + count + truth.labels.astype(np.uint8).tobytes()
        (directory / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


def write_cifar(directory: Path) -> None:
    """The `colour` dataset as CIFAR-10's binary version has it, the training set in one batch."""
    directory.mkdir()
    for split, name in (("train", "data_batch_1.bin"), ("test", "test_batch.bin")):
        truth = COLOUR[split]
        planar = truth.images.transpose(0, 3, 1, 2).reshape(len(truth.labels), -1)
        labels = truth.labels.astype(np.uint8)[:, None]
        (directory / name).write_bytes(np.concatenate([labels, planar], axis=1).tobytes())


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class BareDaemon:
    """A daemon on a temporary folder (a short one: a socket's path is at most 80 bytes), whose
    configuration is still to be written."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fastaa-", dir="/tmp"))
        self.runtime_dir = self.directory / "run"
        self.log = self.directory / "daemon.log"
        self.config = self.directory / "config.toml"
        self.process: subprocess.Popen[bytes] | None = None
        self.is_ended_by_test = False

    def start(self) -> None:
        """Starts it and returns when it accepts a connection."""
        binary = daemon_binary()
        assert binary is not None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [binary, "--config", self.config],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=dict(os.environ, RUST_BACKTRACE="1"),
            )
        self.is_ended_by_test = False
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not self._accepts():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the daemon does not start:\n{self.log.read_text()}")
            # There is no event to wait for before the socket exists.
            time.sleep(0.01)

    def _accepts(self) -> bool:
        kinds = (("hello.sock", socket.SOCK_SEQPACKET), ("control.sock", socket.SOCK_STREAM))
        for name, kind in kinds:
            with socket.socket(socket.AF_UNIX, kind) as probe:
                try:
                    probe.connect(str(self.runtime_dir / name))
                except OSError:
                    return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        assert self.process is not None
        self.is_ended_by_test |= number in (signal.SIGTERM, signal.SIGKILL)
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status."""
        assert self.process is not None
        return self.process.wait(WAIT_SECONDS_MAX)

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.signal(signal.SIGKILL)
        self.wait()

    def loader(self, dataset: str = "toy", **arguments: Any) -> Any:
        """A loader of this daemon."""
        import fastaa

        return fastaa.Loader(dataset, runtime_dir=self.runtime_dir, **arguments)

    def streams(self) -> list[dict[str, Any]]:
        """Its sessions, as `fastaa-ctl stream list --json` tells them."""
        from fastaa import _control

        found: list[dict[str, Any]] = _control.ask(self.runtime_dir, {"request": "stream-list"})[
            "streams"
        ]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.kill()
        log = self.log.read_text() if self.log.exists() else ""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.process is not None and not self.is_ended_by_test:
            raise AssertionError(f"the daemon ended by itself:\n{log}")


class ImageDaemon(BareDaemon):
    """Serves datasets by name and split; the recipe is up to the subscription."""

    def __init__(self, datasets: dict[str, dict[str, Path]], more: str = "") -> None:
        super().__init__()
        lines = [f'runtime_dir = "{self.runtime_dir}"', f'state_dir = "{self.directory}/state"']
        for name, splits in datasets.items():
            paths = [f'{split} = "{path}"' for split, path in splits.items()]
            lines += ["[[dataset]]", f'name = "{name}"', *paths]
        lines += ["[stream.defaults]", 'policy = "none"', "[search]", "enabled = false", more]
        self.config.write_text("\n".join(lines))


class Daemon(BareDaemon):
    """Serves `toy`, `fashion-mnist` and `colour`, over TCP, too."""

    def __init__(self) -> None:
        super().__init__()
        self.token_file = self.directory / "token"
        self.port = free_port()
        write_idx(self.directory / "toy")
        write_cifar(self.directory / "colour")
        self.token_file.write_text("the-token-of-the-tests\n")
        self.token_file.chmod(0o600)
        self.config.write_text(
            f"""
runtime_dir = "{self.runtime_dir}"
state_dir = "{self.directory / "state"}"

[[dataset]]
name = "toy"
train = "{self.directory / "toy" / "train-images-idx3-ubyte"}"
test = "{self.directory / "toy" / "t10k-images-idx3-ubyte"}"

[[dataset]]
name = "fashion-mnist"
path = "{self.directory / "toy"}"

[[dataset]]
name = "colour"
train = "{self.directory / "colour" / "data_batch_1.bin"}"
test = "{self.directory / "colour" / "test_batch.bin"}"

[stream.defaults]
crop = {{ kind = "none" }}
hflip = false
policy = "none"
cutout = 0
dtype = "f32"
layout = "nchw"

[workers]
threads = 2

[search]
enabled = false

[transport]
tcp = "127.0.0.1:{self.port}"
token_file = "{self.token_file}"
"""
        )

    @property
    def address(self) -> str:
        """Where it listens on TCP."""
        return f"tcp://127.0.0.1:{self.port}"


def indices_of(batches: Any) -> list[list[int]]:
    """The sample indices of each batch."""
    return [batch.indices.tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    """All of them, one after the other."""
    return [index for part in lists for index in part]


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of its own that runs `code` with this checkout's client."""
    environment = dict(os.environ, PYTHONPATH=str(CLIENT_SRC))
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *map(str, arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Any, what: str, seconds: float = WAIT_SECONDS_MAX) -> None:
    """Waits for what another process or thread does; there is no event to wait for instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)
