"""Compare policies, or learning rates: several trainers at once on one fastaa-loaderd.

    fastaa-loaderd --config config/demo.toml &
    python clients/examples/sweep.py policies
    python clients/examples/sweep.py learning-rates

With `policies` each trainer has a stream of its own: the same samples in the same order, augmented
by another policy; image files are decoded once for all of them. With `learning-rates` all trainers
want the same batches, so they join one broadcast group: the daemon makes each batch once, and all
read it from the same memory. Nobody waits for anybody; a trainer that falls too far behind gets the
same batches made anew.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import fastaa
import torch
from torch import nn
from torch.nn import functional

POLICIES = ("none", "trivial-wide", "randaugment(2,9)")
LEARNING_RATES = (0.01, 0.03, 0.1)


class Trial(NamedTuple):
    """What one trainer does differently."""

    name: str
    learning_rate: float
    stream: dict[str, Any]
    """Arguments of its training stream."""


def trials_of(subject: str) -> list[Trial]:
    """The trainers of a sweep."""
    if subject == "policies":
        return [Trial(policy, 0.03, {"policy": policy}) for policy in POLICIES]
    stream = {
        "mode": "broadcast",
        # A group's name stands for one run: another sweep needs another name.
        "group": f"sweep-{uuid.uuid4().hex}",
        "policy": "trivial-wide",
    }
    return [Trial(f"learning rate {rate}", rate, stream) for rate in LEARNING_RATES]


def small_cnn(n_channels: int, n_classes: int) -> nn.Sequential:
    """Two convolutions, for images of any size."""
    return nn.Sequential(
        nn.Conv2d(n_channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, n_classes),
    )


@torch.inference_mode()
def accuracy(model: nn.Module, loader: fastaa.Loader) -> float:
    """Percent of the loader's samples that the model classifies right."""
    model.eval()
    n_right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return 100 * n_right / loader.n_samples


def run(trial: Trial, arguments: argparse.Namespace, n_trials: int) -> float:
    """Trains in this process; returns the test accuracy."""
    torch.manual_seed(0)
    # The trainers share the processors.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // n_trials))
    common = {"runtime_dir": arguments.runtime_dir, "seed": 0}
    with fastaa.Loader(
        arguments.dataset, batch_size=arguments.batch_size, **trial.stream, **common
    ) as loader:
        assert loader.n_classes is not None, "the labels are classes"
        n_channels, side, _ = loader.image_shape
        model = small_cnn(n_channels, loader.n_classes)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=trial.learning_rate, momentum=0.9, nesterov=True
        )
        for _ in range(arguments.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
    with fastaa.Loader(
        arguments.dataset,
        split="test",
        batch_size=1000,
        shuffle=False,
        crop={"kind": "center", "size": side},
        hflip=False,
        policy="none",
        **common,
    ) as test:
        return accuracy(model, test)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("subject", choices=("policies", "learning-rates"))
    parser.add_argument("--runtime-dir", help="the daemon's, if it is not the default one")
    parser.add_argument("--dataset", default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    return arguments


def main() -> None:
    """Runs all trainers at once and prints their results."""
    arguments = parse_arguments()
    trials = trials_of(arguments.subject)
    # Not fork: neither torch's threads nor a loader survive it.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(trials), mp_context=spawn) as trainers:
        train = partial(run, arguments=arguments, n_trials=len(trials))
        accuracies = list(trainers.map(train, trials))
    print(f"test accuracy after {arguments.epochs} epochs:")
    for trial, percent in zip(trials, accuracies, strict=True):
        print(f"{trial.name:20} {percent:6.2f} %")


if __name__ == "__main__":
    try:
        main()
    except fastaa.Error as error:
        sys.exit(f"error: {error}")
