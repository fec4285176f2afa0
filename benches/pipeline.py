"""Throughput of the whole pipeline into a Python training process: `make bench`.

  small        50,000 x 32x32x3 uint8: pad-4 crop, flip, autoaugment-cifar10 (2 operations),
               normalised f32, batch 256
  small0       the same without the policy
  small-u8     as small, uint8 and not normalised
  jpeg         1,500 JPEGs of 500x375: random-resized 224, flip, autoaugment-imagenet, f32, batch 64
  jpeg0        the same without the policy
  ready        a pixel a batch, numpy, 16 slots: the transport alone, batches per second
  broadcast-N  N members of a broadcast group who compute 4 ms on each batch: images of all a second

Each figure is the median over the rounds; the consumer touches no pixel. The limits are measured in
the same run: a memory copy of the same bytes, and libjpeg-turbo's full decode of the same files on
as many threads (`cargo build --release --example decode_all`). `--peers COMMAND` runs another
script in turn with ours (`COMMAND WORKLOAD PEER SECONDS`, which prints "... N img/s ..."); ratios
are medians of pairs. JPEGs are made as `jpeg.py` says, and left out without photos.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastaa
import jpeg
import numpy as np
from host import ROOT, Daemon, serve

RAW = Path("/usr/share/datasets/fashion-mnist")
N_IMAGES = 50_000
BATCH = 256
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SMALL: dict[str, Any] = {
    "crop": {"kind": "pad", "size": 32, "pad": 4},
    "hflip": True,
    "normalize": {"mean": MEAN, "std": STD},
}
READY: dict[str, Any] = {
    "crop": {"kind": "center", "size": 1},
    "policy": "none",
    "dtype": "u8",
    "batch_size": 1,
    "output": "numpy",
    "n_slots": 16,
}
BROADCAST: dict[str, Any] = {"policy": "none", "dtype": "u8", "batch_size": 256}
WORKLOADS: dict[str, dict[str, Any]] = {
    "small": {**SMALL, "policy": "autoaugment-cifar10"},
    "small0": {**SMALL, "policy": "none"},
    "small-u8": {**SMALL, "policy": "autoaugment-cifar10", "dtype": "u8"},
}
JPEG: dict[str, dict[str, Any]] = {
    "jpeg": {**jpeg.BASE, "policy": "autoaugment-imagenet"},
    "jpeg0": {**jpeg.BASE, "policy": "none"},
}
# What is compared: our workload, the peer's and its name.
PEERS = (
    ("small", "small", "torchvision"),
    ("small", "small", "dali"),
    ("small", "small0", "ffcv"),
    ("small-u8", "small0", "ffcv"),
    ("jpeg", "jpeg", "torchvision"),
    ("jpeg", "jpeg0", "ffcv"),
)


def make_dataset(folder: Path) -> None:
    """Writes CIFAR-10's binary files from tinted Fashion-MNIST: label, then the three planes."""
    with gzip.open(RAW / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:N_IMAGES]
    with gzip.open(RAW / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:N_IMAGES]
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    gain = np.random.default_rng(0).uniform(0.4, 1, (N_IMAGES, 3, 1, 1)).astype(np.float32)
    planes = (images[:, None] * gain).astype(np.uint8).reshape(N_IMAGES, -1)
    records = np.concatenate([labels[:, None], planes], axis=1)
    for part, chunk in enumerate(np.array_split(records, 5), 1):
        (folder / f"data_batch_{part}.bin").write_bytes(chunk.tobytes())
    (folder / "test_batch.bin").write_bytes(records[:1000].tobytes())


@contextmanager
def daemon(small: Path, photos: Path | None, threads: int) -> Iterator[Daemon]:
    """The release daemon on both datasets."""
    config = (
        f'[[dataset]]\nname = "bench"\npath = "{small}"\n[workers]\nthreads = {threads}\n'
        "[search]\nenabled = false\n[telemetry]\nlog = 'error'\n"
    )
    if photos is not None:
        config += f'[[dataset]]\nname = "photos"\ntrain = "{photos}"\n'
    with serve(config) as started:
        yield started


def process_status(pid: int, key: str) -> int:
    """A figure of /proc/PID/status, in kB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return 0


def measure(host: Daemon, dataset: str, seconds: float, recipe: dict[str, Any]) -> dict[str, float]:
    """Whole epochs through a loader, for some seconds: rate, and costs per 1000 images."""
    options = {"batch_size": BATCH, **recipe}
    began, first_ms = time.perf_counter(), 0.0
    with fastaa.Loader(dataset, runtime_dir=host.runtime_dir, **options) as loader:
        for images, _labels in loader:
            first_ms = first_ms or 1000 * (time.perf_counter() - began)
            n_images = len(images)
        pid = host.process.pid
        cpu, own, n_images, n_batches = jpeg.cpu_seconds(pid), time.process_time(), 0, 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for images, _labels in loader:
                n_images += len(images)
                n_batches += 1
        elapsed = time.perf_counter() - start
        return {
            "images_per_second": n_images / elapsed,
            "batches_per_second": n_batches / elapsed,
            "daemon_cpu_ms_per_1000": 1e6 * (jpeg.cpu_seconds(pid) - cpu) / n_images,
            "client_cpu_ms_per_1000": 1e6 * (time.process_time() - own) / n_images,
            "first_batch_ms": first_ms,
        }


def broadcast(host: Daemon, seconds: float, n_members: int) -> dict[str, float]:
    """Members of a group in processes of their own: images per second of all together."""
    script = (
        "import json, sys, time, fastaa\n"
        "options = json.loads(sys.argv[1])\n"
        "seconds = options.pop('seconds')\n"
        "with fastaa.Loader('bench', **options) as loader:\n"
        "    for images, _ in loader: pass\n"
        "    n, start = 0, time.perf_counter()\n"
        "    while time.perf_counter() - start < seconds:\n"
        "        for images, _ in loader:\n"
        "            n += len(images)\n"
        "            time.sleep(0.004)\n"
        "    print(n / (time.perf_counter() - start))\n"
    )
    group = {"group": f"of-{n_members}", "mode": "broadcast", "world_size": n_members}
    members = []
    for rank in range(n_members):
        options = {**BROADCAST, **group, "rank": rank, "seconds": seconds}
        options["runtime_dir"] = str(host.runtime_dir)
        command = [sys.executable, "-c", script, json.dumps(options)]
        members.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    return {"images_per_second": sum(float(member.communicate()[0]) for member in members)}


def copy_limit() -> float:
    """Images per second of a plain copy of a float batch, one core."""
    source = np.ones((BATCH, 3, 32, 32), np.float32)
    target = np.empty_like(source)
    start, n_images = time.perf_counter(), 0
    while time.perf_counter() - start < 1:
        np.copyto(target, source)
        n_images += BATCH
    return n_images / (time.perf_counter() - start)


def decode_limit(photos: Path, threads: int) -> float:
    """Images per second that libjpeg-turbo decodes whole."""
    program = ROOT / "target/release/examples/decode_all"
    if not program.exists():
        sys.exit("cargo build --release --example decode_all")
    command = [str(program), str(photos), str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(report: dict[str, Any], n_cores: int) -> None:
    """Prints the figures for people."""
    print("workload           img/s  per core  CPU-s per 1000 img  first batch")
    print("                                     daemon    client           ms")
    for name, row in report["workloads"].items():
        cost = [row.get(f"{who}_cpu_ms_per_1000", 0) / 1000 for who in ("daemon", "client")]
        rate, first = row["images_per_second"], row.get("first_batch_ms", 0)
        print(
            f"{name:13} {rate:10,.0f}{rate / n_cores:10,.0f}{cost[0]:11.4f}{cost[1]:10.4f}"
            f"{first:13.1f}"
        )
    for name, rate in report["limits"].items():
        print(f"limit: {name} {rate:,.0f} img/s")
    for name, ratio in report["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    memory = ", ".join(f"{key} {value}" for key, value in report["memory"].items())
    print(f"daemon memory, MB: {memory}")


def run(args: argparse.Namespace, small: Path, photos: Path | None) -> dict[str, Any]:
    """All rounds: our workloads, the limits and the peers, in turn."""
    found: dict[str, list[dict[str, float]]] = {}
    limits: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}

    def wanted(name: str) -> bool:
        return not args.only or name in args.only

    def note(name: str, take: Callable[[], dict[str, float]]) -> None:
        if wanted(name):
            found.setdefault(name, []).append(take())

    with daemon(small, photos, args.threads) as host:
        for _ in range(args.rounds):
            for name, recipe in WORKLOADS.items():
                note(name, lambda recipe=recipe: measure(host, "bench", args.seconds, recipe))
            note("ready", lambda: measure(host, "bench", args.seconds, READY))
            for n_members in (1, 2, 3, 4):
                name = f"broadcast-{n_members}"
                note(name, lambda n=n_members: broadcast(host, args.seconds, n))
            limits.setdefault("a copy of small's batches, one core", []).append(copy_limit())
            if photos is not None:
                for name, recipe in JPEG.items():
                    recipe = {**recipe, "batch_size": jpeg.BATCH}
                    note(name, lambda recipe=recipe: measure(host, "photos", args.seconds, recipe))
                rate = decode_limit(photos, args.threads or os.cpu_count() or 1)
                limits.setdefault("libjpeg-turbo, full decode", []).append(rate)
                if "jpeg" in found:
                    own = found["jpeg"][-1]["images_per_second"]
                    ratios.setdefault("jpeg / full decode", []).append(own / rate)
            for own_name, workload, peer in PEERS if args.peers else ():
                if own_name in found:
                    rate = jpeg.peer_rate(args.peers, workload, peer, args.seconds)
                    ratio = found[own_name][-1]["images_per_second"] / rate
                    ratios.setdefault(f"{own_name} / {peer} {workload}", []).append(ratio)
                    limits.setdefault(f"peer: {peer} {workload}", []).append(rate)
        keys = ("VmRSS", "RssAnon", "RssShmem", "RssFile")
        memory = {key: process_status(host.process.pid, key) // 1024 for key in keys}
    return {
        "workloads": {
            name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for name, rows in found.items()
        },
        "limits": {name: statistics.median(rates) for name, rates in limits.items()},
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "memory": memory,
    }


def main() -> None:
    """Prints a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="workers")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORKLOAD")
    parser.add_argument("--photos", type=Path, nargs="*", default=list(jpeg.PHOTOS))
    parser.add_argument("--data", type=Path, default=Path("/tmp/fastaa-jpeg"))
    parser.add_argument("--peers", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    photos = args.data if jpeg.has_data(args.data, tuple(args.photos)) else None
    if photos is None:
        print("no photos: the jpeg workloads are left out (see jpeg.py)", file=sys.stderr)
    else:
        jpeg.make_data(args.data, tuple(args.photos))
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder)
        make_dataset(small)
        report = {"commit": commit, "rounds": args.rounds, **run(args, small, photos)}
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"commit {commit}, {os.cpu_count()} cores, medians of {args.rounds} rounds")
    table(report, os.cpu_count() or 1)


if __name__ == "__main__":
    main()
