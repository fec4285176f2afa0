"""Train a small CNN on Fashion-MNIST from fastaa-loaderd; plain PyTorch, CPU.

    fastaa-loaderd --config config/demo.toml &
    python clients/examples/train_fashion_mnist.py

Three epochs take under a minute on two cores and reach over 88 % test accuracy. At the end a
picture shows original samples above what the loader made of them in four epochs.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import torch
from torch import nn
from torch.nn import functional

DATASET = "fashion-mnist"
TEST_RECIPE: dict[str, Any] = {"crop": {"kind": "none"}, "hflip": False, "policy": "none"}
PICTURE_COLUMNS, PICTURE_EPOCHS, PICTURE_SCALE, PICTURE_GAP = 12, 4, 2, 2


def small_cnn(n_channels: int, n_classes: int) -> nn.Sequential:
    """Three convolutions, 28 k parameters, 2.1 million multiply-adds per 28x28 image."""

    def block(n_in: int, n_out: int) -> list[nn.Module]:
        return [
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *block(n_channels, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, n_classes),
    )


class Progress:
    """A line that follows the epoch on a terminal, and one line per epoch elsewhere."""

    def __init__(self, epoch: int, n_steps: int) -> None:
        self._epoch, self._n_steps = epoch, n_steps
        self._is_terminal = sys.stderr.isatty()
        self._began, self._shown_at, self._n_images, self._loss = time.monotonic(), 0.0, 0, 0.0

    def step(self, step: int, loss: torch.Tensor, n_images: int) -> None:
        """Counts a step; looks at the loss only when it shows it."""
        self._n_images += n_images
        now = time.monotonic()
        is_last = step + 1 == self._n_steps
        if not (is_last or (self._is_terminal and now - self._shown_at > 0.2)):
            return
        self._shown_at, self._loss = now, loss.item()
        rate = self._n_images / max(now - self._began, 1e-9)
        text = (
            f"epoch {self._epoch}: step {step + 1}/{self._n_steps}, "
            f"loss {self._loss:.3f}, {rate:,.0f} images/s"
        )
        start = "\r\x1b[K" if self._is_terminal else ""
        print(start + text, end="\n" if is_last else "", file=sys.stderr, flush=True)


def train(model: nn.Module, loader: fastaa.Loader, n_epochs: int) -> tuple[fastaa.Batch, float]:
    """Trains with a one-cycle schedule; returns the last batch and the images per second."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=n_epochs * len(loader), pct_start=0.25
    )
    model.train()
    began, n_images = time.monotonic(), 0
    batch = None
    for _ in range(n_epochs):
        progress = Progress(loader.epoch, len(loader))
        for batch in loader.batches():
            images = batch.images.contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(model(images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            n_images += len(batch.labels)
            progress.step(batch.step, loss.detach(), len(batch.labels))
    assert batch is not None, "an epoch has at least one batch"
    return batch, n_images / (time.monotonic() - began)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: fastaa.Loader) -> float:
    """Percent of the loader's samples that the model classifies right."""
    model.eval()
    n_right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return 100 * n_right / loader.n_samples


def write_png(path: Path, pixels: torch.Tensor) -> None:
    """Writes uint8 `[height, width, 1 or 3]` as a PNG, which needs no library."""
    height, width, n_channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    colour_type = 0 if n_channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def picture_rows(arguments: dict[str, Any], policy: str) -> Iterator[torch.Tensor]:
    """Rows of samples, uint8 `[n, height, width, channels]`: originals, then four epochs' worth."""
    common = {**arguments, "batch_size": PICTURE_COLUMNS, "shuffle": False}
    pixels = {"dtype": "u8", "layout": "nhwc"}
    with fastaa.Loader(DATASET, **{**common, **TEST_RECIPE, **pixels}) as originals:
        yield next(originals.batches()).images.clone()
    with fastaa.Loader(DATASET, policy=policy, **common, **pixels) as augmented:
        for epoch in range(PICTURE_EPOCHS):
            augmented.set_epoch(epoch)
            yield next(augmented.batches()).images.clone()


def write_picture(path: Path, arguments: dict[str, Any], policy: str) -> None:
    """A grid: a column per sample, the original above its augmentations."""
    rows = []
    for row in picture_rows(arguments, policy):
        scaled = row.repeat_interleave(PICTURE_SCALE, 1).repeat_interleave(PICTURE_SCALE, 2)
        framed = functional.pad(scaled, (0, 0, 0, PICTURE_GAP, 0, PICTURE_GAP), value=255)
        rows.append(torch.cat(list(framed), dim=1))
    write_png(path, torch.cat(rows, dim=0))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--runtime-dir", help="the daemon's, if it is not the default one")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--policy", help="default: the daemon's default")
    parser.add_argument(
        "--picture", type=Path, default=Path("out/augmented.png"), help="default: %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    return arguments


def main() -> None:
    """Trains, evaluates, draws, and says how it went."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    # The daemon wants a core, too; with more threads than cores, everything waits for everything.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    common = {"runtime_dir": arguments.runtime_dir, "seed": arguments.seed}
    with fastaa.Loader(
        DATASET,
        split="train",
        batch_size=arguments.batch_size,
        policy=arguments.policy,
        **common,
    ) as loader:
        assert loader.n_classes is not None, f"{DATASET} has classes"
        model = small_cnn(loader.image_shape[0], loader.n_classes)
        # Half as fast again on a CPU.
        model = model.to(memory_format=torch.channels_last)
        last, images_per_second = train(model, loader, arguments.epochs)
        is_complete = loader.epoch_digest == loader.expected_digest(last.epoch)
    with fastaa.Loader(
        DATASET, split="test", batch_size=1000, shuffle=False, **TEST_RECIPE, **common
    ) as test:
        test_accuracy = accuracy(model, test)
    write_picture(arguments.picture, common, last.policy)
    print(f"test accuracy: {test_accuracy:.2f} % after {arguments.epochs} epochs")
    print(f"throughput: {images_per_second:,.0f} images/s (training, on this machine's CPU)")
    print(f"policy: {last.policy} (version {last.policy_version}, id {last.policy_id})")
    print(f"every sample of the last epoch came exactly once: {'yes' if is_complete else 'NO'}")
    print(f"picture: {arguments.picture} (originals above {PICTURE_EPOCHS} epochs' augmentations)")


if __name__ == "__main__":
    try:
        main()
    except fastaa.Error as error:
        sys.exit(f"error: {error}")
