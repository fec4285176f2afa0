"""Consumers of one dataset with different recipes, policies and seeds share decoded and cropped
images, and it changes no byte."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import numpy.typing as npt
import pytest
from fastaa import _control
from support import CLIENT_SRC, ROOT, ImageDaemon
from test_images import picture

N_SAMPLES = 96
RECIPES: list[dict[str, Any]] = [
    {"policy": "trivial-wide", "crop": {"kind": "random-resized", "size": 40}},
    # The same crops as the first, so that what was loaded is shared: cut and resized already.
    {"policy": "none", "crop": {"kind": "random-resized", "size": 40}, "dtype": "f32"},
    {"policy": "randaugment(2,9)", "crop": {"kind": "random-resized", "size": 40}, "views": 2},
    {"policy": "autoaugment-cifar10", "crop": {"kind": "random-resized", "size": 64}},
    {"policy": "none", "crop": {"kind": "center", "size": 48, "resize": 56}, "seed": 7},
    {"policy": "none", "crop": {"kind": "pad", "size": 32, "pad": 4}, "dtype": "f32"},
    # Small enough that the decoder reduces: never from a shared image.
    {"policy": "none", "crop": {"kind": "random-resized", "size": 12, "scale": [0.5, 1.0]}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    for number in range(N_SAMPLES):
        path = root / f"class{number % 4}" / f"{number:03}.{('jpg', 'png', 'webp')[number % 3]}"
        path.parent.mkdir(exist_ok=True)
        picture(120 + number % 17, 90 + number % 11, seed=number).save(path, quality=90)
    return root


@pytest.fixture(params=["", "[images]\nshared_mib = 1\n"], ids=["roomy", "tight"])
def daemon(folder: Path, request: pytest.FixtureRequest) -> Iterator[ImageDaemon]:
    """With room for all images, and for some thirty of them."""
    with ImageDaemon({"shared": {"train": folder}}, request.param) as daemon:
        daemon.start()
        yield daemon


def epochs(daemon: ImageDaemon, recipe: dict[str, Any]) -> list[npt.NDArray[Any]]:
    """Two epochs of a consumer."""
    options = {"batch_size": 8, "dtype": "u8", "output": "numpy", **recipe}
    with fastaa.Loader("shared", runtime_dir=daemon.runtime_dir, **options) as loader:
        return [np.concatenate([images.copy() for images, _ in loader]) for _ in range(2)]


def counters(daemon: ImageDaemon) -> dict[str, int]:
    counts: dict[str, int] = _control.ask(daemon.runtime_dir, {"request": "status"})["counters"]
    return counts


def test_sharing_changes_no_byte(daemon: ImageDaemon) -> None:
    alone = [epochs(daemon, recipe) for recipe in RECIPES]
    before = counters(daemon)
    assert before["images_decoded_for_several"] == 0
    together: list[list[npt.NDArray[Any]]] = [[] for _ in RECIPES]
    for _ in range(3):

        def run(place: int) -> None:
            together[place] = epochs(daemon, RECIPES[place])

        threads = [threading.Thread(target=run, args=(place,)) for place in range(len(RECIPES))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for place, (one, other) in enumerate(zip(alone, together, strict=True)):
            for epoch, (a, b) in enumerate(zip(one, other, strict=True)):
                assert (a == b).all(), (place, epoch)
    after = counters(daemon)
    assert after["images_decoded_for_several"] > 0
    assert after["images_taken_decoded"] > 0


def test_a_sweep_of_three_policies_shares_the_decode(folder: Path) -> None:
    """The example, on image files: three trainers with a stream and a policy each."""
    defaults = 'crop = { kind = "random-resized", size = 32 }'
    with ImageDaemon({"shared": {"train": folder, "test": folder}}) as daemon:
        config = daemon.config.read_text().replace(
            'policy = "none"', f'policy = "none"\n{defaults}'
        )
        daemon.config.write_text(config)
        daemon.start()
        script = ROOT / "clients" / "examples" / "sweep.py"
        options = ["--dataset", "shared", "--epochs", "3", "--batch-size", "16"]
        done = subprocess.run(
            [sys.executable, script, "policies", *options, "--runtime-dir", daemon.runtime_dir],
            capture_output=True,
            text=True,
            check=False,
            env=dict(os.environ, PYTHONPATH=str(CLIENT_SRC)),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("test accuracy after 3 epochs:")
        counts = counters(daemon)
    assert counts["images_decoded_for_several"] > 0
    assert counts["images_taken_decoded"] > 0
