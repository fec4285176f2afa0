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
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fastaa
from host import READY_SECONDS_MAX, Daemon, interval

RAW = Path("/usr/share/datasets/fashion-mnist")
BATCH = 256
KINDS = ("paused", "running", "restart")
CONFIG = f"""
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


def wait_for_worker(daemon: Daemon) -> int:
    """The process that searches, once there is one."""
    end = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < end:
        status = daemon.ctl("search", "status")
        if status is not None and status["pid"] is not None:
            pid: int = status["pid"]
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
        pid = wait_for_worker(daemon)
        if kind == "restart":
            # Let it come to its work first: killed while it starts, it would be restarted later.
            rate(stream, seconds)
            os.kill(pid, signal.SIGKILL)
    result = rate(stream, seconds)
    if kind == "restart" and wait_for_worker(daemon) == pid:
        sys.exit("the search process was not restarted")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with (
        tempfile.TemporaryDirectory(prefix="fastaa-bench-") as name,
        Daemon(Path(name), CONFIG) as daemon,
    ):
        wait_for_worker(daemon)
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
    print(f"{os.cpu_count()} cores, {args.rounds} windows of {args.seconds:g} s each")
    for kind, values in rates.items():
        print(f"{kind:8} {statistics.median(values):10,.0f} img/s (median)")
    for kind, base in (("running", "paused"), ("restart", "running"), ("restart", "paused")):
        ratios = [a / b for a, b in zip(rates[kind], rates[base], strict=True)]
        print(f"{kind} / {base}: {interval(ratios)}")
    print(f"restarts: {status['restarts']}, progress: {status['progress']}")


if __name__ == "__main__":
    main()
