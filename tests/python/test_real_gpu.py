"""Batches on a real GPU. Skipped where there is none; `make test-gpu` says so.

What a played driver cannot show: that PyTorch takes the daemon's memory for its own, in the order
of its streams, that CUDA shares it between these two processes, and that nothing is left of it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import pytest
import torch
from support import CLIENT_SRC, Daemon, daemon_binary, wait_until

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)

BATCH, N_SLOTS = 64, 4
SLEEP_CYCLES = 20_000_000
"""Some ten milliseconds of a kernel that does nothing else."""
MEMORY_SLACK = 64 << 20
"""What other processes of the GPU may take or give back meanwhile."""


class GpuDaemon(Daemon):
    """The daemon of the other tests, with a share of the GPU."""

    def __init__(self, memory_mib: int = 256, augment_on: str = "cpu") -> None:
        super().__init__()
        with self.config.open("a") as config:
            config.write(f'\n[gpu]\nmemory_mib = {memory_mib}\naugment_on = "{augment_on}"\n')


@pytest.fixture
def daemon() -> Iterator[GpuDaemon]:
    if daemon_binary() is None:
        pytest.skip("no daemon: build target/release/fastaa-loaderd, or set FASTAA_LOADERD")
    with GpuDaemon() as daemon:
        daemon.start()
        yield daemon


def on_host(daemon: Daemon, **options: Any) -> list[tuple[Any, Any]]:
    with daemon.loader(batch_size=BATCH, **options) as loader:
        return [(images.clone(), labels.clone()) for images, labels in loader]


def check(found: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> None:
    for (images, labels), (host_images, host_labels) in zip(found, expected, strict=True):
        assert images.is_cuda
        assert labels.is_cuda
        assert torch.equal(images.cpu(), host_images)
        assert torch.equal(labels.cpu(), host_labels)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "autoaugment-cifar10"},
        {"dtype": "bf16", "layout": "nhwc"},
        {"dtype": "f16"},
        {"dtype": "u8", "views": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_ipc_is_bit_equal_to_the_host(daemon: GpuDaemon, options: dict[str, Any]) -> None:
    """Each batch is read by a kernel that runs long after its tensors are gone."""
    expected = on_host(daemon, **options)
    found = []
    with daemon.loader(batch_size=BATCH, device="cuda:0", n_slots=N_SLOTS, **options) as loader:
        for images, labels in loader:
            torch.cuda._sleep(SLEEP_CYCLES)
            found.append((images.clone(), labels.clone()))
        assert loader.epoch_digest == loader.expected_digest(0)
    check(found, expected)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_stream_that_is_current_is_waited_for(daemon: GpuDaemon) -> None:
    expected = on_host(daemon)
    found = []
    with daemon.loader(batch_size=BATCH, device="cuda:0", n_slots=N_SLOTS) as loader:
        with torch.cuda.stream(torch.cuda.Stream()):
            for images, labels in loader:
                torch.cuda._sleep(SLEEP_CYCLES)
                found.append((images.clone(), labels.clone()))
        torch.cuda.synchronize()
    check(found, expected)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_tensors_outlive_their_loader(daemon: GpuDaemon) -> None:
    expected = on_host(daemon)
    loader = daemon.loader(batch_size=BATCH, device="cuda:0")
    images, labels = next(iter(loader))
    loader.close()
    del loader
    gc.collect()
    with daemon.loader(batch_size=BATCH, device="cuda:0") as other:
        assert sum(len(labels) for _, labels in other) == other.n_samples
    check([(images, labels)], expected[:1])


def test_forced_fallback_is_bit_equal() -> None:
    with GpuDaemon(memory_mib=0) as daemon:
        daemon.start()
        expected = on_host(daemon, policy="autoaugment-cifar10")
        with pytest.warns(fastaa.GpuCopyWarning, match=r"gpu.memory_mib is 0"):
            loader = daemon.loader(batch_size=BATCH, device="cuda:0", policy="autoaugment-cifar10")
        with loader:
            check(list(loader), expected)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("augment_on", ["gpu", "auto"])
@pytest.mark.parametrize("policy", ["autoaugment-cifar10", "trivial-wide"])
def test_what_is_augmented_there_is_what_the_processors_make(augment_on: str, policy: str) -> None:
    options = {"policy": policy, "crop": {"kind": "pad", "size": 32, "pad": 4}, "hflip": True}
    with GpuDaemon(augment_on=augment_on) as daemon:
        daemon.start()
        with daemon.loader("colour", batch_size=BATCH, **options) as loader:
            expected = [(images.clone(), labels.clone()) for images, labels in loader]
        with daemon.loader("colour", batch_size=BATCH, device="cuda:0", **options) as loader:
            check([(images.clone(), labels.clone()) for images, labels in loader], expected)
        log = daemon.log.read_text()
        assert ("augments_on_gpu=true" if augment_on == "gpu" else "chosen=") in log


CONSUMER = """
import json, sys, fastaa, torch, warnings
warnings.simplefilter("error")
options = json.loads(sys.argv[1])
loader = fastaa.Loader("toy", device="cuda:0", **options)
total = sum(int(images.sum(dtype=torch.int64)) for images, _ in loader)
held = next(iter(loader))
print(total, loader.epoch_digest == loader.expected_digest(0), flush=True)
sys.stdin.read()
"""


def consumer(daemon: Daemon, **environment: str) -> subprocess.Popen[str]:
    options = {"runtime_dir": str(daemon.runtime_dir), "batch_size": BATCH, "dtype": "u8"}
    return subprocess.Popen(
        [sys.executable, "-c", CONSUMER, json.dumps(options)],
        env=dict(os.environ, PYTHONPATH=str(CLIENT_SRC), **environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_expandable_segments_in_the_consumer(daemon: GpuDaemon) -> None:
    total = sum(int(images.sum(dtype=torch.int64)) for images, _ in on_host(daemon, dtype="u8"))
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    process = consumer(daemon, **setting)
    assert told(process) == [str(total), "True"]
    process.communicate()


@pytest.mark.parametrize("who", ["consumer", "daemon"])
def test_a_kill_leaves_no_memory_behind(daemon: GpuDaemon, who: str) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(0)[0]
    process = consumer(daemon)
    assert told(process)[1:] == ["True"]
    assert torch.cuda.mem_get_info(0)[0] < before
    if who == "daemon":
        daemon.kill()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The daemon leaves the GPU some seconds after its last consumer, context and all.
    wait_until(
        lambda: torch.cuda.mem_get_info(0)[0] > before - MEMORY_SLACK, "the GPU's memory is free"
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_are_told_apart_by_uuid(daemon: GpuDaemon) -> None:
    for hidden in ("0", "1", "1,0"):
        process = consumer(daemon, CUDA_VISIBLE_DEVICES=hidden)
        assert told(process)[1:] == ["True"]
        process.communicate()
    log = Path(daemon.log).read_text()
    assert log.count("is_on_gpu=true") == 3
