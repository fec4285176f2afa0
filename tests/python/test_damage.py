"""JPEG files with damage in the midst of their data, against Pillow: who refuses which, and what is
seen of those that are read all the same."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from support import ImageDaemon, ctl_binary
from test_images import FRAME, framed, picture

N_FILES = 240


def damaged(number: int) -> bytes:
    """A whole file, then some bytes of its data replaced; every eighth stays whole."""
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    image = picture(90, 70, seed=number)
    image.save(file, "JPEG", quality=90, progressive=number % 2 == 0, subsampling=number % 3)
    content = bytearray(file.getvalue())
    start = content.index(b"\xff\xda") + 16
    if number % 8 == 7:
        return bytes(content)
    n_bytes = int(rng.choice([1, 2, 8, 64, 512]))
    at = int(rng.integers(start, len(content) - n_bytes - 2))
    content[at : at + n_bytes] = rng.bytes(n_bytes)
    if number % 5 == 0:
        # A marker that does not belong there: start of image, of frame, a table, a restart.
        content[at : at + 2] = bytes([0xFF, rng.choice([0xD8, 0xC3, 0xC4, 0xDB, 0xD3, 0xDA])])
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damage")
    (root / "all").mkdir()
    for number in range(N_FILES):
        (root / "all" / f"{number:03}.jpg").write_bytes(damaged(number))
    return root


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[ImageDaemon]:
    with ImageDaemon({"damage": {"train": folder}}) as daemon:
        daemon.start()
        yield daemon


def by_pillow(path: Path) -> npt.NDArray[np.uint8] | None:
    """What Pillow reads; `None` if it refuses."""
    try:
        with Image.open(path) as image:
            return framed(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


def seen(daemon: ImageDaemon, **options: Any) -> dict[int, npt.NDArray[np.uint8]]:
    """The images that come, by sample."""
    recipe = {"crop": FRAME, "dtype": "u8", "layout": "nhwc", "on_error": "skip", **options}
    with fastaa.Loader(
        "damage", output="numpy", runtime_dir=daemon.runtime_dir, **recipe
    ) as loader:
        found = {}
        for batch in loader.batches():
            for index, image in zip(batch.indices, batch.images, strict=True):
                found[int(index)] = image.copy()
        return found


def test_damaged_files_are_read_or_refused_as_by_pillow(daemon: ImageDaemon, folder: Path) -> None:
    paths = sorted((folder / "all").iterdir())
    expected = {number: by_pillow(path) for number, path in enumerate(paths)}
    n_refused = sum(image is None for image in expected.values())
    assert 20 < n_refused < N_FILES - 60, "the damage is of both kinds"
    found = seen(daemon, batch_size=16, decode="full")
    for number, image in expected.items():
        assert (image is None) == (number not in found), paths[number]
        if image is not None:
            assert (found[number] == image).all(), paths[number]


def test_what_is_seen_does_not_depend_on_what_came_before(daemon: ImageDaemon) -> None:
    crop = {"kind": "random-resized", "size": 40, "scale": [0.2, 1.0]}
    runs = [seen(daemon, batch_size=size, crop=crop, shuffle=False) for size in (1, 7, 64)]
    for run in runs[1:]:
        assert run.keys() == runs[0].keys()
        for index, image in run.items():
            assert (image == runs[0][index]).all(), index


def test_verify_counts_them(folder: Path) -> None:
    ctl = ctl_binary()
    if ctl is None:
        pytest.skip("no fastaa-ctl: build it first")
    n_refused = sum(by_pillow(path) is None for path in (folder / "all").iterdir())
    command = [str(ctl), "dataset", "verify", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{n_refused} " in done.stdout + done.stderr, done.stdout + done.stderr
