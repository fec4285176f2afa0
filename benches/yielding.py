"""How fast does the search yield, and what does it cost a training? `python benches/yielding.py`

latency     A GPU is played by tests/fake_nvml (cargo build --release --example fake_nvml), the
            rest is real. A client takes a batch while the search computes, --trials times; from
            just before the client asks until the kernel shows the search's process as stopped.
eviction    The played GPU's memory fills up, --evictions times; until the search's process has
            ended. Includes the wait for the next look at the GPU, 0.05 s.
throughput  A small CNN trains on the processors from a stream of a daemon that searches on idle
            processors. Windows of --seconds alternate: the search may run, or a user has paused it.
            Ratio of neighbouring windows' rates, with the 95 % interval of its mean by Student's t.
            Then the trainer pauses, and what the search computes meanwhile is told.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import torch
from host import READY_SECONDS_MAX, ROOT, Daemon, interval
from torch import nn

RAW = Path("/usr/share/datasets/fashion-mnist")
CONFIG = f"""
[[dataset]]
name = "fashion"
path = "{RAW}"
[stream.defaults]
crop = {{ kind = "pad", size = 28, pad = 4 }}
hflip = true
normalize = {{ mean = [0.286], std = [0.353] }}
[telemetry]
log = "error"
"""
GPU = {
    "uuid": "GPU-11111111-2222-3333-4444-555555555555",
    "name": "played",
    "memory_free": 70 << 30,
    "memory_total": 80 << 30,
    "tells_processes": True,
}


class SearchingDaemon(Daemon):
    """A daemon that searches, in a new folder."""

    def __init__(self, folder: Path, tables: str) -> None:
        """Starts it with these tables of its configuration."""
        folder.mkdir()
        super().__init__(folder, CONFIG + tables)

    def status(self) -> Any:
        """What the search does; `None` while the daemon starts."""
        return self.ctl("search", "status")

    def wait_for(self, what: str, state: str) -> Any:
        """The first status with this state."""
        end = time.monotonic() + READY_SECONDS_MAX
        while time.monotonic() < end:
            status = self.status()
            if status is not None and status["state"] == state:
                return status
            time.sleep(0.05)
        sys.exit(f"waited in vain for {what}: {self.status()}")

    def loader(self, batch_size: int) -> fastaa.Loader:
        """A consumer of it."""
        self.wait_until_ready()
        return fastaa.Loader("fashion", batch_size=batch_size, runtime_dir=str(self.runtime_dir))


def state_of(pid: int) -> str:
    """`T`: stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]


def play(driver: Path, **changes: object) -> None:
    """From now on the GPU does this."""
    partial = driver / "partial"
    partial.write_text(json.dumps({"devices": [GPU | changes]}))
    partial.rename(driver / "script.json")


def tell(what: str, values: list[float]) -> None:
    values.sort()
    p99 = values[math.ceil(0.99 * len(values)) - 1]
    print(
        f"{what}: median {statistics.median(values):.1f} ms, p99 {p99:.1f} ms, "
        f"longest {values[-1]:.1f} ms of {len(values)}",
        flush=True,
    )


def latency(folder: Path, trials: int, evictions: int) -> None:
    driver = folder / "driver"
    driver.mkdir()
    library = ROOT / "target/release/examples/libfake_nvml.so"
    shutil.copy(library, driver / "libnvidia-ml.so.1")
    play(driver)
    tables = f"""
[search]
enabled = true
reduced = 4000
[idle]
gpu = "0"
nvml_library = "{driver / "libnvidia-ml.so.1"}"
quiet_seconds = 0.2
sample_ms = 50
"""
    daemon = SearchingDaemon(folder / "latency", tables)
    seen, told, evicted = [], [], []
    try:
        with daemon.loader(64) as loader:
            batches = (batch for _ in range(10_000) for batch in loader)
            next(batches)
            for _ in range(trials):
                status = daemon.wait_for("a search that computes", "running")
                pid = status["pid"]
                assert isinstance(pid, int)
                while state_of(pid) == "T":
                    time.sleep(0.01)
                start = time.perf_counter()
                next(batches)
                while state_of(pid) != "T":
                    # Without the pause, this thread would keep the client's own from sending.
                    time.sleep(0.0002)
                seen.append(1000 * (time.perf_counter() - start))
                status = daemon.status()
                assert status is not None
                idle = status["idle"]
                assert isinstance(idle, dict)
                told.append(idle["yield_ms_last"])
        for _ in range(evictions):
            pid = daemon.wait_for("a search that computes", "running")["pid"]
            start = time.perf_counter()
            play(driver, memory_free=1 << 30)
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.0002)
            evicted.append(1000 * (time.perf_counter() - start))
            play(driver)
    finally:
        daemon.stop()
    tell("yield, seen by the client", seen)
    tell("yield, told by the daemon", told)
    tell("eviction", evicted)


def block(i: int, o: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(inplace=True))


def train(loader: fastaa.Loader) -> Iterator[int]:
    """Trains for ever; the sizes of its batches."""
    torch.manual_seed(0)
    net = nn.Sequential(
        block(1, 16, 2), block(16, 32, 1), block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.append(nn.Linear(64, 10))
    sgd = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    while True:
        for images, labels in loader:
            loss = nn.functional.cross_entropy(net(images), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            yield len(images)


def rate(training: Iterator[int], seconds: float) -> float:
    start, n_images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        n_images += next(training)
    return n_images / (time.perf_counter() - start)


def computed(daemon: SearchingDaemon) -> float:
    """CPU seconds of the search's process so far."""
    status = daemon.status()
    assert status is not None
    fields = Path(f"/proc/{status['pid']}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput(folder: Path, rounds: int, seconds: float, pause: float) -> None:
    daemon = SearchingDaemon(folder / "throughput", "[search]\nenabled = true\nreduced = 4000\n")
    rates: dict[str, list[float]] = {"resume": [], "pause": []}
    try:
        with daemon.loader(128) as loader:
            # The search has begun: it must yield, not merely not begin.
            daemon.wait_for("a search that computes", "running")
            training = train(loader)
            rate(training, 2 * seconds)
            before = computed(daemon)
            for number in range(rounds):
                # The order turns, so that a drift of the machine falls on both alike.
                for wish in ("resume", "pause") if number % 2 else ("pause", "resume"):
                    daemon.ctl("search", wish)
                    rates[wish].append(rate(training, seconds))
            daemon.ctl("search", "resume")
            beside = computed(daemon) - before
            time.sleep(pause)
            harvested = computed(daemon) - before - beside
    finally:
        daemon.stop()
    ratios = [on / off for on, off in zip(rates["resume"], rates["pause"], strict=True)]
    medians = {wish: statistics.median(values) for wish, values in rates.items()}
    print(f"training: {medians['resume']:,.0f} img/s, search paused: {medians['pause']:,.0f}")
    print(f"ratio: {interval(ratios)} of {rounds} pairs of {seconds:g} s")
    print(f"the search computed {beside:.1f} CPU s beside it, {harvested:.1f} in {pause:g} s alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--evictions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--pause", type=float, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastaa-bench-") as name:
        if args.trials:
            latency(Path(name), args.trials, args.evictions)
        if args.rounds:
            throughput(Path(name), args.rounds, args.seconds, args.pause)


if __name__ == "__main__":
    main()
