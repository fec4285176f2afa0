"""Slabs on a GPU: the real daemon and client, with a played driver (`tests/fake_cuda`).

The played GPU copies in the order of each stream, but late: after 300 µs for the daemon, after some
ms here. Who does not wait for an event sees what was there before. What stays for a real GPU:
PyTorch's view of foreign memory (`Cuda.flat`), its current stream, and when one process sees
another's writes.
"""

from __future__ import annotations

import gc
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastaa
import pytest
import torch
from gpu_support import BATCH, GpuHost, SharingGpu, on_host, same
from support import wait_until


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "autoaugment-cifar10"},
        {"dtype": "bf16", "layout": "nhwc"},
        {"dtype": "u8", "views": 2},
        {"drop_last": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_the_gpu_reads_late_is_what_the_host_reads(
    host: GpuHost, options: dict[str, Any]
) -> None:
    expected = on_host(host, **options)
    gpu = SharingGpu()
    found = []
    with host.loader(gpu, **options) as loader:
        assert host.in_use(host.daemon.process.pid)  # type: ignore[union-attr]
        for batch in loader.batches():
            # The tensors are dropped at once: only the event keeps the slot from being filled anew.
            found.append((gpu.read_late(batch.images), gpu.read_late(batch.labels)))
            assert len(batch.indices) == len(batch.labels)
            del batch
        assert loader.epoch_digest == loader.expected_digest(0)
        assert not gpu.locked, "nobody copies here"
    gpu.wait()
    assert same(found, expected)
    del loader
    gc.collect()
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("toy", {"policy": "autoaugment-cifar10"}),
        ("toy", {"policy": "trivial-wide", "dtype": "bf16", "layout": "nhwc"}),
        ("toy", {"policy": "randaugment(2,9)", "dtype": "u8", "views": 2, "cutout": 8}),
        (
            "colour",
            {
                "policy": "autoaugment-cifar10",
                "crop": {"kind": "pad", "size": 32, "pad": 4},
                "hflip": True,
                "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
                "erase": {"p": 0.5},
                "normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
                "dtype": "f16",
                "seed": 11,
            },
        ),
    ],
    ids=["gray", "nhwc", "views", "colour"],
)
def test_what_is_augmented_on_the_gpu_is_what_the_processors_make(
    augmenting: GpuHost, dataset: str, options: dict[str, Any]
) -> None:
    with augmenting.daemon.loader(dataset, batch_size=BATCH, **options) as loader:
        expected = [(images.clone(), labels.clone()) for _ in range(2) for images, labels in loader]
    assert not augmenting.says("augments_on_gpu=true")
    gpu = SharingGpu()
    found = []
    with augmenting.loader(gpu, dataset, **options) as loader:
        for epoch in range(2):
            for images, labels in loader:
                found.append((gpu.read_late(images), gpu.read_late(labels)))
                del images, labels
            assert loader.epoch_digest == loader.expected_digest(epoch)
    assert augmenting.says("augments_on_gpu=true")
    gpu.wait()
    assert same(found, expected)
    del loader
    gc.collect()
    wait_until(augmenting.is_empty, "the daemon has freed the GPU's memory")


@pytest.mark.usefixtures("no_warning")
def test_what_cannot_be_augmented_on_the_gpu_is_made_by_the_processors(
    augmenting: GpuHost,
) -> None:
    options = {"mix": {"mixup": 0.2}}
    expected = on_host(augmenting, **options)
    with augmenting.loader(SharingGpu(), **options) as loader:
        found = [(images.clone(), labels.clone()) for images, labels in loader]
    assert same(found, expected)
    assert augmenting.says("is_on_gpu=true")
    assert not augmenting.says("augments_on_gpu=true")


@pytest.mark.usefixtures("no_warning")
def test_auto_measures_both_and_says_what_it_chose(bare: GpuHost) -> None:
    bare.start(augment_on="auto")
    if bare.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch")
    options = {"policy": "trivial-wide"}
    expected = on_host(bare, **options)
    with bare.loader(SharingGpu(), **options) as loader:
        found = [(images.clone(), labels.clone()) for images, labels in loader]
    assert same(found, expected)
    log = bare.daemon.log.read_text()
    told = re.search(
        r'augment_on = "auto": the processors make (\d+) images/s alone; with the GPU they load '
        r'(\d+) images/s and it finishes (\d+) chosen="(cpu|gpu)"',
        log,
    )
    assert told, log
    whole, loading, finishing = (int(told[number]) for number in (1, 2, 3))
    assert min(whole, loading, finishing) > 0
    chosen = "gpu" if min(loading, finishing) > whole else "cpu"
    assert told[4] == chosen
    assert bare.says(f"augments_on_gpu={str(chosen == 'gpu').lower()}")
    del loader
    gc.collect()
    wait_until(bare.is_empty, "what was measured with is freed, too")


@pytest.mark.usefixtures("no_warning")
def test_what_auto_has_measured_with_is_not_in_the_way(
    bare: GpuHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is tried takes 4 MiB, and what is chosen 2: together they would be too much.
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "30000")
    bare.start(memory_mib=4, augment_on="auto")
    if bare.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch")
    with bare.loader(SharingGpu(), policy="trivial-wide") as loader:
        assert sum(len(labels) for _, labels in loader) == loader.n_samples
    assert bare.says('chosen="cpu"')
    assert bare.says("is_on_gpu=true augments_on_gpu=false")


@pytest.mark.usefixtures("no_warning")
def test_without_room_for_both_the_processors_augment(bare: GpuHost) -> None:
    # The slab takes 2 MiB of it, and what would be finished there 2 more.
    bare.start(memory_mib=3, augment_on="gpu")
    if bare.says("without the feature torch"):
        pytest.skip("the daemon has no libtorch")
    options = {"policy": "trivial-wide"}
    expected = on_host(bare, **options)
    with bare.loader(SharingGpu(), **options) as loader:
        found = [(images.clone(), labels.clone()) for images, labels in loader]
    assert same(found, expected)
    assert bare.says("batches are augmented by the processors")
    assert bare.says("is_on_gpu=true augments_on_gpu=false")


@pytest.mark.usefixtures("no_warning")
def test_tensors_outlive_the_loader_and_keep_the_memory(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    with host.loader(gpu) as loader:
        images, labels = next(iter(loader))
        view = images[3, 0]
    del loader, images
    gc.collect()
    with host.loader(gpu) as other:
        assert sum(len(labels) for _, labels in other) == other.n_samples
    assert torch.equal(view, expected[0][0][3, 0])
    assert torch.equal(labels, expected[0][1])
    del other
    gc.collect()
    assert not host.is_empty()
    del view, labels
    gc.collect()
    wait_until(host.is_empty, "the daemon has freed the GPU's memory")


def test_who_keeps_all_batches_gets_copies(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    with host.loader(gpu) as loader, pytest.warns(fastaa.AllSlotsHeldWarning):
        found = list(loader)
    assert same(found, expected)


@pytest.mark.usefixtures("no_warning")
def test_who_waits_for_a_slow_driver_waits_alone(host: GpuHost) -> None:
    expected = on_host(host)
    gpu = SharingGpu()
    with host.loader(gpu) as beside, ThreadPoolExecutor() as threads:
        batches = iter(beside)
        found = [tuple(tensor.clone() for tensor in next(batches))]
        with host.holds("cuMemHostRegister"):
            waiting = threads.submit(lambda: host.loader(gpu))
            wait_until(lambda: len(host.slabs()) == 2, "the driver is asked for memory")
            # Neither a client that comes now waits, nor one whose batches are on this GPU.
            assert same(on_host(host), expected)
            found.extend(tuple(tensor.clone() for tensor in batch) for batch in batches)
            assert same(found, expected)
            assert not waiting.done()
        with waiting.result() as loader:
            assert same([(a.clone(), b.clone()) for a, b in loader], expected)


@pytest.mark.usefixtures("no_warning")
def test_members_of_a_broadcast_group_share_memory_of_the_host(host: GpuHost) -> None:
    gpu = SharingGpu()
    with host.loader(gpu, group="sweep", mode="broadcast") as loader:
        assert sum(len(labels) for _, labels in loader) == loader.n_samples
        assert host.is_empty()
