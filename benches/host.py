"""What the benchmarks of the whole pipeline have in common: a daemon, and honest intervals."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS_MAX = 120


def binary(name: str, variable: str) -> str:
    """The program that a variable names, else the release build's."""
    return os.environ.get(variable, str(ROOT / "target/release" / name))


class Daemon:
    """A daemon in a folder of its own, which must be near the root: a socket's path is short."""

    def __init__(self, folder: Path, config: str) -> None:
        """Starts it; `config` is without `runtime_dir` and `state_dir`."""
        self.folder = folder
        self.runtime_dir = folder / "run"
        path = folder / "config.toml"
        path.write_text(f'runtime_dir = "run"\nstate_dir = "state"\n{config}')
        command = [binary("fastaa-loaderd", "FASTAA_LOADERD"), "--config", str(path)]
        self.process = subprocess.Popen(command)

    def ctl(self, *arguments: str) -> Any:
        """What `fastaa-ctl --json` says; `None` if it fails."""
        program = binary("fastaa-ctl", "FASTAA_CTL")
        command = [program, "--runtime-dir", str(self.runtime_dir), "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if done.returncode else json.loads(done.stdout)

    def wait_until_ready(self) -> None:
        """Returns when it answers."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while self.ctl("status") is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the daemon does not start")
            time.sleep(0.01)

    def resident_kib(self) -> int:
        """Its resident memory, what it shares with clients included."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def serve(config: str) -> Iterator[Daemon]:
    """A daemon that is ready, in a folder that goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="fastaa-bench-"))
    try:
        with Daemon(folder, config) as started:
            started.wait_until_ready()
            yield started
    finally:
        shutil.rmtree(folder)


def interval(values: list[float]) -> str:
    """Mean and 95 % interval by Student's t, as text."""
    n = len(values)
    if n < 2:
        return f"{values[0]:.3f}"
    half = student_t(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def student_t(freedom: int) -> float:
    """The 97.5 % quantile. Source: Abramowitz and Stegun, 26.7.5 (within 0.4 % from 4 on)."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
