"""Does a stream notice the search beside it? `python benches/search_beside.py`

One daemon streams Fashion-MNIST (batch 256, crop, flip, TrivialAugment-wide, normalised f32) as
fast as a process can take it, which keeps all cores busy, and searches. Windows of --seconds
alternate:

  paused    no search process
  running   the search goes on
  restart   its process is killed (SIGKILL) at the window's start, and the daemon starts it again

Ratios are of neighbouring windows, with the 95 % interval of their mean by Student's t. The limit
is 1: the search runs with SCHED_IDLE, on what the stream leaves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fastaa

ROOT = Path(__file__).resolve().parent.parent
RAW = Path("/usr/share/datasets/fashion-mnist")
BATCH = 256
KINDS = ("paused", "running", "restart")
CONFIG = f"""runtime_dir = "run"
state_dir = "state"
[[dataset]]
name = "fashion"
path = "{RAW}"
[stream.defaults]
crop = {{ kind = "pad", size = 28, pad = 4 }}
hflip = true
normalize = {{ mean = [0.286], std = [0.353] }}
[search]
enabled = true
reduced = 4000
[idle]
policy = "always"
[telemetry]
log = "error"
"""
READY_SECONDS_MAX = 60


class Daemon:
    """A daemon that streams and searches, and what its control socket says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "config.toml"
        path.write_text(CONFIG)
        binary = os.environ.get("FASTAA_LOADERD", str(ROOT / "target/release/fastaa-loaderd"))
        self.process = subprocess.Popen([binary, "--config", str(path)])

    def ctl(self, *arguments: str) -> dict[str, object]:
        binary = os.environ.get("FASTAA_CTL", str(ROOT / "target/release/fastaa-ctl"))
        command = [binary, "--runtime-dir", str(self.folder / "run"), "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        parsed: dict[str, object] = json.loads(done.stdout)
        return parsed

    def worker(self) -> int | None:
        """The process that searches, if there is one."""
        pid = self.ctl("search", "status")["pid"]
        assert pid is None or isinstance(pid, int)
        return pid

    def wait_for_worker(self) -> int:
        end = time.monotonic() + READY_SECONDS_MAX
        while time.monotonic() < end:
            try:
                pid = self.worker()
            except subprocess.CalledProcessError:
                pid = None
            if pid is not None:
                return pid
            time.sleep(0.1)
        sys.exit("there is no search process")


def batches(loader: fastaa.Loader) -> Iterator[int]:
    """The sizes of the stream's batches, epoch after epoch."""
    while True:
        for images, _labels in loader:
            yield len(images)


def rate(stream: Iterator[int], seconds: float) -> float:
    start, n_images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        n_images += next(stream)
    return n_images / (time.perf_counter() - start)


def window(daemon: Daemon, stream: Iterator[int], kind: str, seconds: float) -> float:
    """The stream's rate while the search is in a state."""
    if kind == "paused":
        daemon.ctl("search", "pause")
    else:
        daemon.ctl("search", "resume")
        pid = daemon.wait_for_worker()
        if kind == "restart":
            # Let it come to its work first: killed while it starts, it would be restarted later.
            rate(stream, seconds)
            os.kill(pid, signal.SIGKILL)
    result = rate(stream, seconds)
    if kind == "restart" and daemon.wait_for_worker() == pid:
        sys.exit("the search process was not restarted")
    return result


def interval(ratios: list[float]) -> str:
    # Two-sided 95 % points of Student's t; 2 is right for more.
    t95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    if len(ratios) < 2:
        return f"{ratios[0]:.3f}"
    half = t95.get(len(ratios) - 1, 2.2) * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return f"{statistics.mean(ratios):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="fastaa-bench-") as name:
        daemon = Daemon(Path(name))
        try:
            daemon.wait_for_worker()
            with fastaa.Loader(
                "fashion", batch_size=BATCH, policy="trivial-wide", runtime_dir=f"{name}/run"
            ) as loader:
                stream = batches(loader)
                rate(stream, 3)
                for number in range(args.rounds):
                    # The order turns, so that a drift of the machine falls on all kinds alike.
                    for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                        rates[kind].append(window(daemon, stream, kind, args.seconds))
            status = daemon.ctl("search", "status")
        finally:
            daemon.process.terminate()
            daemon.process.wait()
    print(f"{os.cpu_count()} cores, {args.rounds} windows of {args.seconds:g} s each")
    for kind, values in rates.items():
        print(f"{kind:8} {statistics.median(values):10,.0f} img/s (median)")
    for kind, base in (("running", "paused"), ("restart", "running"), ("restart", "paused")):
        ratios = [a / b for a, b in zip(rates[kind], rates[base], strict=True)]
        print(f"{kind} / {base}: {interval(ratios)}")
    print(f"restarts: {status['restarts']}, progress: {status['progress']}")


if __name__ == "__main__":
    main()
