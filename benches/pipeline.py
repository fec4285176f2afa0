"""Throughput of the whole pipeline into a Python training process: `make bench`.

Workloads (batch 256, source 50,000 x 32x32x3 uint8, made from Fashion-MNIST by tinting):

  small    pad-4 crop, flip, autoaugment-cifar10 (2 operations), normalised f32, NCHW
  small0   the same without the policy
  small-u8 as small, but uint8 and not normalised

Each figure is the median over ROUNDS epochs after a warm-up epoch; the consumer touches no pixel.
The limits are measured in the same run: a memory copy of the same bytes.
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
from pathlib import Path

import fastaa
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RAW = Path("/usr/share/datasets/fashion-mnist")
N_IMAGES = 50_000
BATCH = 256
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CROP = {"kind": "pad", "size": 32, "pad": 4}
WORKLOADS: dict[str, dict[str, object]] = {
    "small": {"policy": "autoaugment-cifar10"},
    "small0": {"policy": "none"},
    "small-u8": {"policy": "autoaugment-cifar10", "dtype": "u8"},
}
READY_SECONDS_MAX = 60


def make_dataset(folder: Path) -> None:
    """Writes CIFAR-10's binary files: label, then the red, green and blue plane."""
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


def start_daemon(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """Starts the release daemon on the dataset and waits until it serves."""
    config = folder / "bench.toml"
    config.write_text(
        f'runtime_dir = "run"\nstate_dir = "state"\n[[dataset]]\nname = "bench"\npath = "."\n'
        f"[workers]\nthreads = {threads}\n[search]\nenabled = false\n[telemetry]\nlog = 'warn'\n"
    )
    binary = os.environ.get("FASTAA_LOADERD", str(ROOT / "target/release/fastaa-loaderd"))
    daemon = subprocess.Popen([binary, "--config", str(config)])
    end = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < end:
        try:
            fastaa.Loader("bench", runtime_dir=str(folder / "run"), policy="none").close()
        except fastaa.DaemonNotRunning:
            if daemon.poll() is not None:
                sys.exit("the daemon did not start")
            time.sleep(0.05)
        else:
            return daemon
    sys.exit("the daemon is not ready")


def process_status(pid: int, key: str) -> int:
    """A figure of /proc/PID/status, in kB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return 0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, daemon: int, rounds: int, recipe: dict[str, object]) -> dict[str, float]:
    """Epochs through a loader: median rate, and costs per 1000 images."""
    options = {"crop": CROP, "hflip": True, "normalize": {"mean": MEAN, "std": STD}, **recipe}
    rates, first_ms = [], 0.0
    began = time.perf_counter()
    with fastaa.Loader(
        "bench", batch_size=BATCH, runtime_dir=str(folder / "run"), **options
    ) as loader:
        cpu_before, own_before = cpu_seconds(daemon), time.process_time()
        for epoch in range(rounds + 1):
            start, n_images = time.perf_counter(), 0
            for images, _labels in loader:
                if not first_ms:
                    first_ms = 1000 * (time.perf_counter() - began)
                n_images += len(images)
            if epoch:
                rates.append(n_images / (time.perf_counter() - start))
            else:
                cpu_before, own_before = cpu_seconds(daemon), time.process_time()
        n_thousands = rounds * N_IMAGES / 1000
        return {
            "images_per_second": statistics.median(rates),
            "daemon_cpu_ms_per_1000": 1000 * (cpu_seconds(daemon) - cpu_before) / n_thousands,
            "client_cpu_ms_per_1000": 1000 * (time.process_time() - own_before) / n_thousands,
            "first_batch_ms": first_ms,
        }


def copy_limit() -> float:
    """Images per second of a plain copy of a float batch, one core."""
    source = np.ones((BATCH, 3, 32, 32), np.float32)
    target = np.empty_like(source)
    start, n_images = time.perf_counter(), 0
    while time.perf_counter() - start < 1:
        np.copyto(target, source)
        n_images += BATCH
    return n_images / (time.perf_counter() - start)


def main() -> None:
    """Prints a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="workers of the daemon; 0: default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="fastaa-bench-") as name:
        folder = Path(name)
        make_dataset(folder)
        daemon = start_daemon(folder, args.threads)
        try:
            results = {
                workload: measure(folder, daemon.pid, args.rounds, recipe)
                for workload, recipe in WORKLOADS.items()
            }
            memory = {
                "rss_mb": process_status(daemon.pid, "VmRSS") / 1024,
                "rss_anon_mb": process_status(daemon.pid, "RssAnon") / 1024,
                "rss_shmem_mb": process_status(daemon.pid, "RssShmem") / 1024,
                "rss_file_mb": process_status(daemon.pid, "RssFile") / 1024,
            }
        finally:
            daemon.terminate()
            daemon.wait()
    report = {
        "commit": commit,
        "cores": os.cpu_count(),
        "workloads": results,
        "daemon_memory": memory,
        "copy_limit_images_per_second": copy_limit(),
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"commit {commit}, {os.cpu_count()} cores, median of {args.rounds} epochs")
    print("workload       img/s   daemon CPU   client CPU   first batch")
    print("                       ms/1000 img  ms/1000 img  ms")
    for workload, result in results.items():
        print(
            f"{workload:9} {result['images_per_second']:10,.0f}   "
            f"{result['daemon_cpu_ms_per_1000']:11.2f}  {result['client_cpu_ms_per_1000']:11.2f}  "
            f"{result['first_batch_ms']:11.1f}"
        )
    print(f"limit: a copy of the f32 batch {report['copy_limit_images_per_second']:,.0f} img/s")
    print("daemon memory, MB: " + ", ".join(f"{k} {v:.0f}" for k, v in memory.items()))


if __name__ == "__main__":
    main()
