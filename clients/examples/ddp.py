"""Train on several ranks from fastaa-loaderd: PyTorch's DistributedDataParallel, gloo, CPU.

    fastaa-loaderd --config config/demo.toml &
    torchrun --standalone --nproc-per-node 2 clients/examples/ddp.py --checkpoint out/ddp.pt
    torchrun --standalone --nproc-per-node 1 clients/examples/ddp.py --resume out/ddp.pt --epochs 5

Each epoch ends with a checkpoint, and any number of ranks can resume it. If ranks x batch size
stays the same, so does the training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import fastaa
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


def small_cnn(n_channels: int, n_classes: int) -> nn.Sequential:
    """Three convolutions, for images of any size."""

    def block(n_in: int, n_out: int) -> list[nn.Module]:
        # Not BatchNorm: it normalises by the rank's own share, so the model would depend on the
        # number of ranks; and a share of the last step may be a single sample, or none.
        return [
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.GroupNorm(4, n_out),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *block(n_channels, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, n_classes),
    )


def train_epoch(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, loader: fastaa.Loader
) -> float:
    """Runs one epoch; returns the mean loss over the samples of all ranks."""
    total = torch.zeros(())
    for batch in loader.batches():
        loss = functional.cross_entropy(model(batch.images), batch.labels, reduction="sum")
        optimizer.zero_grad()
        # Not the mean over the rank's share: in the last step shares differ by a sample and may be
        # empty, and the mean of nothing is NaN, on all ranks then. The sum of nothing is 0, and its
        # backward pass takes part in DDP's all-reduce, which divides by the world size.
        (loss * dist.get_world_size() / batch.n_global).backward()
        optimizer.step()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / loader.n_samples


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint; one that is there stays whole if this fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(arguments: argparse.Namespace, loader: fastaa.Loader) -> None:
    """Trains, saves, and says how it went."""
    assert loader.n_classes is not None, "the labels are classes"
    model = DistributedDataParallel(small_cnn(loader.image_shape[0], loader.n_classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    if arguments.resume is not None:
        state = torch.load(arguments.resume, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        if loader.epoch >= arguments.epochs:
            sys.exit(f"error: {arguments.resume} has {loader.epoch} epochs; raise --epochs")
    is_first = dist.get_rank() == 0
    n_wrong = torch.zeros((), dtype=torch.int64)
    for epoch in range(loader.epoch, arguments.epochs):
        loss = train_epoch(model, optimizer, loader)
        n_wrong += loader.epoch_digest != loader.expected_digest(epoch)
        if is_first:
            print(f"epoch {epoch}: loss {loss:.4f}", flush=True)
            state = {
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "loader": loader.state_dict(),  # Any rank's serves all.
            }
            save(arguments.checkpoint, state)
    dist.all_reduce(n_wrong)
    if is_first:
        print(f"ranks: {dist.get_world_size()}, checkpoint: {arguments.checkpoint}")
        print(f"every sample came exactly once: {'no' if n_wrong else 'yes'}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runtime-dir", help="the daemon's, if it is not the default one")
    parser.add_argument("--dataset", default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="in all; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="per rank; default: %(default)s")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("out/ddp.pt"), help="default: %(default)s"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to go on from")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    if arguments.resume is not None and not arguments.resume.is_file():
        parser.error(f"--resume: there is no file {arguments.resume}")
    return arguments


def main() -> None:
    """Joins the other ranks and trains."""
    arguments = parse_arguments()
    if not dist.is_torchelastic_launched():
        sys.exit("error: start this by torchrun, as its first lines say")
    torch.manual_seed(0)
    # Rank, world size and group come from torchrun's environment.
    with fastaa.Loader(
        arguments.dataset, batch_size=arguments.batch_size, runtime_dir=arguments.runtime_dir
    ) as loader:
        dist.init_process_group("gloo")
        train(arguments, loader)
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except fastaa.Error as error:
        sys.exit(f"error: {error}")
