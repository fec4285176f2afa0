"""Throughput into CUDA tensors: `make bench-gpu`. Prints what it leaves out, and why.

  small   50,000 x 32x32x3 uint8: pad-4 crop, flip, autoaugment-cifar10, normalised f32, batch 256
  jpeg    1,500 JPEGs of 500x375: random-resized 224, flip, autoaugment-imagenet, f32, batch 64

Of each, in turn, round after round: ours (memory shared by CUDA IPC), ours with the client copying
(`gpu.memory_mib = 0`), a plain DataLoader with torchvision's transforms and `pin_memory`,
torchvision v2 (one operation for the whole batch), Kornia and DALI on the GPU, as far as they are
installed. The limit, in the same run: a copy of the same batches out of page-locked memory.
`training`: ResNet-18 on `jpeg` in bf16, its rate with our batches over that with one batch that is
already there.

Figures are medians of the rounds; ratios are medians of pairs. Every batch is read by a kernel.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastaa
import jpeg
import numpy as np
from host import ROOT, serve

import pipeline

SMALL = {**pipeline.SMALL, "policy": "autoaugment-cifar10", "batch_size": pipeline.BATCH}
JPEG = {**jpeg.BASE, "policy": "autoaugment-imagenet", "batch_size": jpeg.BATCH}
Batches = Iterator[Any]


def rate(batches: Batches, seconds: float, step: Callable[[Any], Any]) -> float:
    """Images per second, from the second batch on, until the GPU is done with them."""
    import torch

    step(next(batches))
    torch.cuda.synchronize()
    n_images, start = 0, time.perf_counter()
    for images in batches:
        step(images)
        n_images += len(images)
        if time.perf_counter() - start > seconds:
            break
    torch.cuda.synchronize()
    return n_images / (time.perf_counter() - start)


def ours(runtime_dir: Path, dataset: str, recipe: dict[str, Any]) -> Batches:
    """Epoch after epoch of a loader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastaa.GpuCopyWarning)
        loader = fastaa.Loader(dataset, runtime_dir=runtime_dir, device="cuda:0", **recipe)
    with loader:
        while True:
            for images, _labels in loader:
                yield images


def raw_small(folder: Path) -> Any:
    """The images of `small` as a tensor `[n, 3, 32, 32]`."""
    import torch

    parts = [np.fromfile(path, np.uint8) for path in sorted(folder.glob("data_batch_*.bin"))]
    records = np.concatenate(parts).reshape(-1, 1 + 3 * 32 * 32)
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())


def plain_loader(workload: str, small: Path, photos: Path | None) -> Batches:
    """What most scripts have: DataLoader, torchvision on PIL images, pin_memory."""
    import torch
    import torchvision.transforms.v2 as transforms
    from PIL import Image

    if workload == "small":
        arrays = raw_small(small).permute(0, 2, 3, 1).numpy()
        crop, policy = transforms.RandomCrop(32, 4), transforms.AutoAugmentPolicy.CIFAR10
        batch_size, n_images = pipeline.BATCH, len(arrays)
    else:
        files = sorted(Path(str(photos)).rglob("*.jpg"))
        crop, policy = transforms.RandomResizedCrop(224), transforms.AutoAugmentPolicy.IMAGENET
        batch_size, n_images = jpeg.BATCH, len(files)
    transform = transforms.Compose(
        [
            *(crop, transforms.RandomHorizontalFlip(), transforms.AutoAugment(policy)),
            *(transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True)),
            transforms.Normalize(pipeline.MEAN, pipeline.STD),
        ]
    )

    class Images(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return n_images

        def __getitem__(self, index: int) -> Any:
            if workload == "small":
                return transform(Image.fromarray(arrays[index]))
            return transform(Image.open(files[index]).convert("RGB"))

    loader: Any = torch.utils.data.DataLoader(
        Images(),
        batch_size,
        shuffle=True,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
        pin_memory=True,
        drop_last=True,
    )
    while True:
        for images in loader:
            yield images.to("cuda:0", non_blocking=True)


def on_gpu(kind: str, small: Path) -> Batches:
    """torchvision v2 or Kornia on batches that are uploaded as bytes; `small` alone."""
    import torch

    source, device = raw_small(small).pin_memory(), torch.device("cuda", 0)
    augment: Any
    if kind == "kornia":
        import kornia.augmentation as kornia
        from kornia.augmentation.auto import AutoAugment

        crop = (kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip())
        scale = kornia.Normalize(torch.tensor(pipeline.MEAN), torch.tensor(pipeline.STD))
        augment = torch.nn.Sequential(*crop, AutoAugment("cifar10"), scale)
    else:
        import torchvision.transforms.v2 as transforms

        policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
        augment = transforms.Compose(
            [
                *(transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), policy),
                transforms.ToDtype(torch.float32, scale=True),
                transforms.Normalize(pipeline.MEAN, pipeline.STD),
            ]
        )
    while True:
        order = torch.randperm(len(source))
        for chosen in order.split(pipeline.BATCH):
            images = source[chosen].pin_memory().to(device, non_blocking=True)
            yield augment(images.float() / 255 if kind == "kornia" else images)


def dali(photos: Path) -> Batches:
    """DALI's mixed decoder and AutoAugment, all on the GPU; `jpeg` alone."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import auto_augment
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(  # type: ignore[misc]
        batch_size=jpeg.BATCH,
        num_threads=os.cpu_count() or 1,
        device_id=0,
        enable_conditionals=True,
    )
    def graph() -> Any:
        files, _ = fn.readers.file(file_root=str(photos), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(files, device="mixed", output_type=types.RGB)
        images = fn.resize(images, size=(224, 224))
        images = auto_augment.auto_augment_image_net(images, shape=(224, 224))
        return fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[255 * mean for mean in pipeline.MEAN],
            std=[255 * std for std in pipeline.STD],
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    built = graph()
    built.build()
    iterator = DALIGenericIterator([built], ["images"], reader_name="reader", auto_reset=True)
    while True:
        for found in iterator:
            yield found[0]["images"]


def copies(shape: tuple[int, ...]) -> Batches:
    """The limit: one page-locked batch, copied again and again."""
    import torch

    source = torch.ones(shape).pin_memory()
    while True:
        yield source.to("cuda:0", non_blocking=True)


def training() -> Callable[[Any], Any]:
    """A step of ResNet-18 in bf16 with channels last."""
    import torch
    import torchvision

    model = torchvision.models.resnet18().cuda().to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step(images: Any) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(images.to(memory_format=torch.channels_last))
            loss = output.float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def has(*modules: str) -> str:
    """Which of them is missing, or nothing."""
    missing = [name for name in modules if importlib.util.find_spec(name.split(".")[0]) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


def touch(images: Any) -> Any:
    """A kernel that reads everything."""
    return images.sum()


def contenders(
    runtime_dirs: dict[str, Path], small: Path, photos: Path | None
) -> tuple[dict[str, Callable[[], Batches]], dict[str, str]]:
    """What is measured, by `workload: who`, and what is not, with its reason."""
    found: dict[str, Callable[[], Batches]] = {}
    left_out: dict[str, str] = {}

    def offer(name: str, problem: str, make: Callable[[], Batches]) -> None:
        if problem:
            left_out[name] = problem
        else:
            found[name] = make

    for workload, dataset, shape in (
        ("small", "bench", (pipeline.BATCH, 3, 32, 32)),
        ("jpeg", "photos", (jpeg.BATCH, 3, 224, 224)),
    ):
        no_photos = "no photos (see jpeg.py)" if workload == "jpeg" and photos is None else ""
        for who, runtime_dir in runtime_dirs.items():

            def own(runtime_dir: Path = runtime_dir, dataset: str = dataset) -> Batches:
                return ours(runtime_dir, dataset, SMALL if dataset == "bench" else JPEG)

            offer(f"{workload}: {who}", no_photos, own)
        offer(
            f"{workload}: DataLoader, pin_memory",
            no_photos or has("torchvision", "PIL"),
            lambda workload=workload: plain_loader(workload, small, photos),  # type: ignore[misc]
        )
        offer(
            f"{workload}: limit, a copy",
            no_photos,
            lambda shape=shape: copies(shape),  # type: ignore[misc]
        )
    offer("small: torchvision v2", has("torchvision"), lambda: on_gpu("torchvision", small))
    offer("small: Kornia", has("kornia"), lambda: on_gpu("kornia", small))
    no_dali = "no photos (see jpeg.py)" if photos is None else has("nvidia.dali")
    try:
        no_dali = no_dali or ("" if importlib.util.find_spec("nvidia.dali") else "not installed")
    except ModuleNotFoundError:
        no_dali = "nvidia.dali not installed"
    offer("jpeg: DALI GPU", no_dali, lambda: dali(Path(str(photos))))
    return found, left_out


def run(args: argparse.Namespace, small: Path, photos: Path | None) -> dict[str, Any]:
    """All rounds, all in turn."""
    config = (
        f'[[dataset]]\nname = "bench"\npath = "{small}"\n'
        "[search]\nenabled = false\n[telemetry]\nlog = 'error'\n"
    )
    if photos is not None:
        config += f'[[dataset]]\nname = "photos"\ntrain = "{photos}"\n'
    rates: dict[str, list[float]] = {}
    with serve(config) as shared, serve(config + "[gpu]\nmemory_mib = 0\n") as copied:
        dirs = {"fastaa": shared.runtime_dir, "fastaa, client copies": copied.runtime_dir}
        found, left_out = contenders(dirs, small, photos)
        for _ in range(args.rounds):
            for name, make in found.items():
                rates.setdefault(name, []).append(rate(make(), args.seconds, touch))
            if photos is None or has("torchvision"):
                left_out["training"] = has("torchvision") or "no photos (see jpeg.py)"
                continue
            step = training()
            one = next(copies((jpeg.BATCH, 3, 224, 224)))
            for name, batches in (
                ("training: batches already there", itertools.repeat(one)),
                ("training: fastaa", ours(shared.runtime_dir, "photos", JPEG)),
            ):
                rates.setdefault(name, []).append(rate(batches, args.seconds, step))
    ratios = {}
    for name, values in rates.items():
        workload = name.split(":")[0]
        own = rates.get(f"{workload}: fastaa", [])
        if own and values is not own:
            pairs = zip(own, values, strict=True)
            ratios[f"{workload}: fastaa / {name.split(': ')[1]}"] = statistics.median(
                mine / theirs for mine, theirs in pairs
            )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"images_per_second": medians, "ratios": ratios, "left_out": left_out}


def main() -> None:
    """Prints a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--photos", type=Path, nargs="*", default=list(jpeg.PHOTOS))
    parser.add_argument("--data", type=Path, default=Path("/tmp/fastaa-jpeg"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("skipped: everything: no GPU (torch.cuda.is_available() is False)")
        return
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    photos = args.data if jpeg.has_data(args.data, tuple(args.photos)) else None
    if photos is not None:
        jpeg.make_data(args.data, tuple(args.photos))
    with tempfile.TemporaryDirectory() as folder:
        pipeline.make_dataset(Path(folder))
        report = {
            "commit": commit,
            "gpu": torch.cuda.get_device_name(0),
            "cores": os.cpu_count(),
            **run(args, Path(folder), photos),
        }
    if args.json:
        json.dump(report, sys.stdout, indent=2)
        return
    print(f"commit {commit}, {report['gpu']}, {os.cpu_count()} cores, {args.rounds} rounds")
    for name, value in report["images_per_second"].items():
        print(f"{name:40} {value:12,.0f} img/s")
    for name, value in report["ratios"].items():
        print(f"{name:60} {value:6.2f}")
    for name, reason in report["left_out"].items():
        print(f"skipped: {name}: {reason}")


if __name__ == "__main__":
    main()
