"""Many consumers: what one that stops costs the others, and what a resume costs.

    python benches/consumers.py [stopped] [resume]

stopped  Four consumers read as fast as they can, for themselves and then as a broadcast group. One
         is stopped (SIGSTOP) for --seconds. Told: the daemon's resident memory before and after,
         and the others' rates while it is stopped, over those before.
resume   A dataset of 1,281,167 samples (ImageNet's number). Told: the time to the first batch after
         a seek to a random place, over the time to the first batch of an epoch, alternating; and
         from the start of the daemon's process to the first batch in the client.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import fastaa
import numpy as np
from host import Daemon, interval

CONSUMER = """
import sys, time, fastaa
group = {"group": "bench", "mode": "broadcast"} if sys.argv[2] == "broadcast" else {}
loader = fastaa.Loader("fashion", batch_size=256, runtime_dir=sys.argv[1], output="numpy",
                       policy="trivial-wide", seed=int(sys.argv[3]), **group)
n, since = 0, time.monotonic()
while True:
    for images, labels in loader:
        n += len(labels)
        now = time.monotonic()
        if now - since >= 1:
            print(n / (now - since), flush=True)
            n, since = 0, now
"""
FASHION = """
[[dataset]]
name = "fashion"
path = "/usr/share/datasets/fashion-mnist"
[stream.defaults]
crop = { kind = "pad", size = 28, pad = 4 }
hflip = true
[search]
enabled = false
[telemetry]
log = "error"
"""
N_SAMPLES, SIDE = 1_281_167, 16


def rates(process: subprocess.Popen[str], n_seconds: int) -> list[float]:
    """What the consumer prints in so many seconds."""
    assert process.stdout is not None
    return [float(process.stdout.readline()) for _ in range(n_seconds)]


def stopped(folder: Path, n_seconds: int) -> None:
    """See the module."""
    for mode in ("independent", "broadcast"):
        place = folder / mode
        place.mkdir()
        with Daemon(place, FASHION) as daemon:
            daemon.wait_until_ready()
            consumers = []
            for number in range(4):
                seed = 0 if mode == "broadcast" else number
                command = [sys.executable, "-c", CONSUMER, str(daemon.runtime_dir), mode, str(seed)]
                consumers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            try:
                for consumer in consumers:
                    rates(consumer, 4)
                others = consumers[1:]
                before = [statistics.mean(rates(other, 10)) for other in others]
                memory_before = daemon.resident_kib()
                consumers[0].send_signal(signal.SIGSTOP)
                for other in others:
                    # Lines that were printed meanwhile.
                    rates(other, 10)
                during = [statistics.mean(rates(other, n_seconds)) for other in others]
                memory_after = daemon.resident_kib()
            finally:
                for consumer in consumers:
                    consumer.kill()
                    consumer.wait()
            ratios = [after / ahead for after, ahead in zip(during, before, strict=True)]
            text = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{mode}: the others' rates over those before: {text}")
            print(f"{mode}: resident KiB {memory_before} before, {memory_after} after")


def write_large(folder: Path) -> str:
    """A dataset as large in number as ImageNet's; gives the path of its images."""
    rng = np.random.default_rng(0)
    images = folder / "train-images-idx3-ubyte"
    with images.open("wb") as file:
        file.write(bytes([0, 0, 8, 3]))
        file.write(b"".join(value.to_bytes(4, "big") for value in (N_SAMPLES, SIDE, SIDE)))
        for start in range(0, N_SAMPLES, 1 << 16):
            n = min(1 << 16, N_SAMPLES - start)
            file.write(rng.integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8).tobytes())
    labels = rng.integers(0, 10, N_SAMPLES, dtype=np.uint8)
    header = bytes([0, 0, 8, 1]) + N_SAMPLES.to_bytes(4, "big")
    (folder / "train-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return str(images)


def resume(folder: Path, n_trials: int) -> None:
    """See the module."""
    place = folder / "large"
    place.mkdir()
    config = f"""
[[dataset]]
name = "large"
train = "{write_large(place)}"
[stream.defaults]
policy = "trivial-wide"
[search]
enabled = false
[telemetry]
log = "error"
"""
    began = time.monotonic()
    with Daemon(place, config) as daemon:
        while True:
            try:
                loader = fastaa.Loader("large", runtime_dir=daemon.runtime_dir, output="numpy")
                break
            except (fastaa.DaemonNotRunning, fastaa.DaemonGone):
                time.sleep(0.002)
        next(loader.batches())
        cold = time.monotonic() - began
        print(f"cold start, {N_SAMPLES:,} samples: {cold:.3f} s to the first batch")
        state = loader.state_dict()
        rng = random.Random(1)
        times: dict[str, list[float]] = {"start": [], "seek": []}
        for trial, kind in itertools.product(range(1, n_trials + 1), times):
            # Nothing of the last one is under way any more.
            time.sleep(0.05)
            began = time.monotonic()
            if kind == "start":
                loader.set_epoch(trial)
            else:
                loader.load_state_dict(
                    {
                        **state,
                        "epoch": trial,
                        "offset": rng.randrange(1000, N_SAMPLES - 1000),
                        "step": 1,
                        "digest_since": 0,
                    }
                )
            next(loader.batches())
            times[kind].append(time.monotonic() - began)
        medians = {kind: 1e3 * statistics.median(found) for kind, found in times.items()}
        ratios = [seek / start for seek, start in zip(times["seek"], times["start"], strict=True)]
        print(
            f"first batch of an epoch {medians['start']:.2f} ms, after a seek "
            f"{medians['seek']:.2f} ms (medians of {n_trials})"
        )
        print(
            f"after a seek / of an epoch: {interval(ratios)} (mean of pairs, 95 %), medians' "
            f"ratio {medians['seek'] / medians['start']:.2f}"
        )


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["stopped", "resume"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--trials", type=int, default=100)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", fastaa.AllSlotsHeldWarning)
    with tempfile.TemporaryDirectory(prefix="fa", dir="/tmp") as folder:
        if "stopped" in arguments.parts:
            stopped(Path(folder), arguments.seconds)
        if "resume" in arguments.parts:
            resume(Path(folder), arguments.trials)


if __name__ == "__main__":
    main()
