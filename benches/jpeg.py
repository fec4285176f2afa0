"""JPEG folders through the whole pipeline into Python processes: rates, shared decoding, bad files.

Data: 1,500 JPEGs of 500x375, quality 92, cut from the photos of Debian's `mate-backgrounds` and
`lomiri-wallpapers-20.04` (`--photos` names other folders); kept in `--data`, as class folders.

  jpeg     random-resized crop 224, flip, autoaugment-imagenet (2 operations), normalised f32
  jpeg0    the same without the policy, uint8
  -full    with decode = "full"
  share    one consumer, and three with three policies, seeds alike: the daemon's CPU per consumer's
           images, and with `images.shared_mib = 0` for comparison
  cold     one epoch whose files are on disk alone, as a part of the rate when they are in memory
  corrupt  1 % truncated, 1 % empty, 1 % no image: rate of `substitute` and `skip`

`--peer PYTHON SCRIPT` runs another loader's script (`SCRIPT WORKLOAD PEER SECONDS`, which prints
"… N img/s …") in turn with ours: medians, ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
from host import Daemon, serve
from PIL import Image

N_IMAGES = 1500
N_CLASSES = 10
BATCH = 64
PHOTOS = (Path("/usr/share/backgrounds"),)
CROP = {"kind": "random-resized", "size": 224}
NORMALIZE = {"mean": [0.49] * 3, "std": [0.2] * 3}
BASE: dict[str, Any] = {"crop": CROP, "hflip": True, "normalize": NORMALIZE}
POLICIES = ("autoaugment-imagenet", "trivial-wide", "randaugment(2,9)")
WORKLOADS: dict[str, dict[str, Any]] = {
    "jpeg": {"policy": "autoaugment-imagenet"},
    "jpeg-u8": {"policy": "autoaugment-imagenet", "dtype": "u8"},
    "jpeg0": {"policy": "none", "dtype": "u8"},
    "jpeg0-f32": {"policy": "none"},
    "jpeg0-full": {"policy": "none", "dtype": "u8", "decode": "full"},
}


def has_data(folder: Path, photos: tuple[Path, ...]) -> bool:
    """Whether there are images, or photos to cut them from."""
    is_made = len(list(folder.glob("*/*.jpg"))) >= N_IMAGES
    return is_made or any(True for root in photos for _ in root.rglob("*.jp*g"))


def make_data(folder: Path, photos: tuple[Path, ...]) -> None:
    """Cuts the images out of photos, once."""
    if len(list(folder.glob("*/*.jpg"))) >= N_IMAGES:
        return
    paths = sorted(path for root in photos for path in root.rglob("*.jp*g"))
    if not paths:
        sys.exit("no photos; apt-get install mate-backgrounds lomiri-wallpapers-20.04, or --photos")
    sources = [Image.open(path).convert("RGB") for path in paths]
    rng = np.random.default_rng(1)
    for number in range(N_IMAGES):
        source = sources[rng.integers(len(sources))]
        width = int(source.width * rng.uniform(0.25, 1))
        height = min(int(width * 0.75), source.height)
        width = int(height / 0.75)
        x = rng.integers(0, source.width - width + 1)
        y = rng.integers(0, source.height - height + 1)
        path = folder / str(number % N_CLASSES) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        box = (x, y, x + width, y + height)
        source.resize((500, 375), box=box).save(path, quality=92)


@contextmanager
def daemon(data: Path, threads: int, more: str = "") -> Iterator[Daemon]:
    """A daemon that serves the folder as `photos`."""
    config = (
        f'[[dataset]]\nname = "photos"\ntrain = "{data}"\n[workers]\nthreads = {threads}\n'
        f"[search]\nenabled = false\n[telemetry]\nlog = 'error'\n{more}\n"
    )
    with serve(config) as started:
        yield started


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def consume(host: Daemon, seconds: float, barrier: threading.Barrier | None, **options: Any) -> int:
    """Reads for some time, after a first epoch's first batches; gives the number of images."""
    recipe = {**BASE, **options}
    n_images = 0
    with fastaa.Loader(
        "photos", batch_size=BATCH, runtime_dir=host.runtime_dir, drop_last=True, **recipe
    ) as loader:
        started = 0.0
        while True:
            for images, _labels in loader:
                if not started:
                    if barrier is not None:
                        barrier.wait()
                    started = time.perf_counter()
                    continue
                n_images += len(images)
                if time.perf_counter() - started > seconds:
                    return n_images


def rate(host: Daemon, seconds: float, **options: Any) -> tuple[float, float]:
    """Images per second of one consumer, and the daemon's CPU milliseconds per image."""
    began, cpu = time.perf_counter(), cpu_seconds(host.process.pid)
    n_images = consume(host, seconds, None, **options)
    elapsed = time.perf_counter() - began
    return n_images / elapsed, 1000 * (cpu_seconds(host.process.pid) - cpu) / n_images


def peer_rate(command: list[str], workload: str, peer: str, seconds: float) -> float:
    """What another loader's script prints."""
    done = subprocess.run(
        [*command, workload, peer, str(seconds)], capture_output=True, text=True, check=False
    )
    found = re.search(r"([\d.]+) img/s", done.stdout)
    if found is None:
        sys.exit(f"{peer} failed:\n{done.stdout}{done.stderr[-2000:]}")
    return float(found.group(1))


def cpu_of(host: Daemon, seconds: float, policies: tuple[str, ...]) -> float:
    """The daemon's CPU milliseconds per image that each of the consumers takes."""
    barrier = threading.Barrier(len(policies) + 1)
    counts = [0] * len(policies)

    def run(place: int) -> None:
        counts[place] = consume(host, seconds, barrier, policy=policies[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(policies))]
    for thread in threads:
        thread.start()
    barrier.wait()
    cpu = cpu_seconds(host.process.pid)
    for thread in threads:
        thread.join()
    used = 1000 * (cpu_seconds(host.process.pid) - cpu)
    print(f"   {len(policies)} consumer(s): {counts} images", file=sys.stderr)
    return used / statistics.mean(counts)


def sharing(data: Path, args: argparse.Namespace) -> dict[str, float]:
    """CPU of three consumers with three policies, as a multiple of one's mean."""
    figures = {}
    for name, more in (("shared", ""), ("apart", "[images]\nshared_mib = 0")):
        ratios = []
        with daemon(data, args.threads, more) as host:
            for _ in range(args.rounds):
                alone = [cpu_of(host, args.seconds, (policy,)) for policy in POLICIES]
                ratios.append(cpu_of(host, 2 * args.seconds, POLICIES) / statistics.mean(alone))
        figures[name] = statistics.median(ratios)
    return figures


def cold(data: Path, args: argparse.Namespace) -> dict[str, float]:
    """Rates of an epoch from the disk, and of the next, from memory."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with daemon(data, args.threads) as host:
            os.sync()
            for path in data.glob("*/*.jpg"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for rates in found.values():
                began, n_images = time.perf_counter(), 0
                with fastaa.Loader(
                    "photos",
                    batch_size=BATCH,
                    runtime_dir=host.runtime_dir,
                    policy="autoaugment-imagenet",
                    **BASE,
                ) as loader:
                    for images, _labels in loader:
                        n_images += len(images)
                rates.append(n_images / (time.perf_counter() - began))
    report = {name: statistics.median(rates) for name, rates in found.items()}
    return {**report, "cold / warm": report["cold"] / report["warm"]}


def corrupt(data: Path, args: argparse.Namespace) -> dict[str, float]:
    """Rates with 3 % bad files, as a part of the clean rate."""
    copy = Path(tempfile.mkdtemp(prefix="fastaa-corrupt-")) / "data"
    shutil.copytree(data, copy)
    for number, path in enumerate(sorted(copy.glob("*/*.jpg"))):
        whole = path.read_bytes()
        bad = {0: whole[: len(whole) // 2], 1: b"", 2: b"<html>no image</html>"}.get(number % 100)
        if bad is not None:
            path.write_bytes(bad)
    figures: dict[str, list[float]] = {"substitute": [], "skip": []}
    with daemon(data, args.threads) as clean, daemon(copy, args.threads) as broken:
        for _ in range(args.rounds):
            for name, ratios in figures.items():
                base, _ = rate(clean, args.seconds, policy="autoaugment-imagenet")
                got, _ = rate(broken, args.seconds, policy="autoaugment-imagenet", on_error=name)
                ratios.append(got / base)
    shutil.rmtree(copy.parent)
    return {name: statistics.median(ratios) for name, ratios in figures.items()}


def rates(data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Our workloads and the peer's, in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WORKLOADS}
    peers: list[float] = []
    for _ in range(args.rounds):
        with daemon(data, args.threads) as host:
            for name, options in WORKLOADS.items():
                found[name].append(rate(host, args.seconds, **options))
        if args.peer:
            peers.append(peer_rate(args.peer, "jpeg0", "ffcv", args.seconds))
    report: dict[str, Any] = {
        name: {
            "images_per_second": statistics.median(value for value, _ in pairs),
            "daemon_cpu_ms_per_image": statistics.median(cost for _, cost in pairs),
        }
        for name, pairs in found.items()
    }
    if peers:
        report["ffcv jpeg0"] = {"images_per_second": statistics.median(peers)}
        for name in ("jpeg", "jpeg-u8"):
            pairs = zip(found[name], peers, strict=True)
            report[f"{name} / ffcv jpeg0"] = statistics.median(
                own / peer for (own, _), peer in pairs
            )
    return report


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=["rates", "sharing", "cold", "corrupt"])
    parser.add_argument("--data", type=Path, default=Path("/tmp/fastaa-jpeg"))
    parser.add_argument("--photos", type=Path, nargs="*", default=PHOTOS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", nargs="*", default=[], metavar="WORD")
    args = parser.parse_args()
    make_data(args.data, tuple(args.photos))
    parts = {"rates": rates, "sharing": sharing, "cold": cold, "corrupt": corrupt}
    report = {name: parts[name](args.data, args) for name in args.what}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
