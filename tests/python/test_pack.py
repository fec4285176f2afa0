"""`fastaa-ctl dataset pack` of image files: as they are, smaller, as pixels; divided in two."""

from __future__ import annotations

import io
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support import ImageDaemon, ctl_binary
from test_images import SIDE, framed, picture, rows

N_SAMPLES, N_CLASSES = 40, 4
FRAME = {"kind": "center", "size": SIDE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for number in range(N_SAMPLES):
        path = root / f"class{number % N_CLASSES}" / f"{number:03}.{('jpg', 'png')[number % 2]}"
        path.parent.mkdir(exist_ok=True)
        picture(40 + number, 90 - number, seed=number).save(path)
    return root


def ctl(*arguments: object, code: int = 0) -> str:
    """Runs the client; gives what it prints."""
    command = [str(ctl_binary()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def table(path: Path) -> Any:
    """A packed file, as pyarrow reads it."""
    return pa.ipc.open_file(path).read_all()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"), key=lambda path: (path.parent.name, path.name))


def test_files_are_packed_as_they_are(folder: Path, tmp_path: Path) -> None:
    ctl("dataset", "pack", folder, tmp_path / "packed")
    packed = table(tmp_path / "packed/train.arrow")
    assert packed["image"].to_pylist() == [path.read_bytes() for path in files(folder)]
    assert (
        packed.schema.metadata[b"fastaa.class_names"]
        == json.dumps([f"class{n}" for n in range(N_CLASSES)], separators=(",", ":")).encode()
    )
    assert "all checksums right" in ctl("dataset", "verify", tmp_path / "packed")
    datasets = {"one": {"train": folder}, "other": {"path": tmp_path / "packed"}}
    with ImageDaemon(datasets) as daemon:
        daemon.start()
        one, other = (rows(daemon, name, crop=FRAME) for name in ("one", "other"))
    for (a, a_label), (b, b_label) in zip(one, other, strict=True):
        assert a_label == b_label
        assert (a == b).all()


def test_a_fraction_divides_every_class_by_the_seed(folder: Path, tmp_path: Path) -> None:
    parts = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dest = tmp_path / name
        ctl("dataset", "pack", folder, dest, "--split", "0.7", "--seed", seed)
        parts[name] = [table(dest / f"{split}.arrow") for split in ("train", "val")]
    train, val = parts["a"]
    assert Counter(train["label"].to_pylist()) == dict.fromkeys(range(N_CLASSES), 7)
    assert Counter(val["label"].to_pylist()) == dict.fromkeys(range(N_CLASSES), 3)
    both = train["image"].to_pylist() + val["image"].to_pylist()
    assert sorted(both) == sorted(path.read_bytes() for path in files(folder))
    assert parts["b"][0].equals(train)
    assert not parts["c"][0].equals(train)


def test_images_shrink_to_the_longest_side(folder: Path, tmp_path: Path) -> None:
    ctl("dataset", "pack", folder, tmp_path / "small", "--max-side", 48, "--quality", 95)
    for image, path in zip(
        table(tmp_path / "small/train.arrow")["image"], files(folder), strict=True
    ):
        got, source = Image.open(io.BytesIO(image.as_py())), Image.open(path).convert("RGB")
        assert got.format == "JPEG"
        assert max(got.size) == min(48, max(source.size))
        expected = np.asarray(source.resize(got.size, Image.Resampling.BILINEAR), int)
        assert abs(np.asarray(got.convert("RGB"), int) - expected).mean() < 6, path
    ctl("dataset", "pack", folder, tmp_path / "kept", "--max-side", 1000)
    kept = table(tmp_path / "kept/train.arrow")["image"].to_pylist()
    assert kept == [path.read_bytes() for path in files(folder)], "what is small enough is kept"


def test_pixels_need_one_size(folder: Path, tmp_path: Path) -> None:
    text = ctl("dataset", "pack", folder, tmp_path / "raw", "--raw", code=1)
    assert "has shape [" in text
    assert "crop or resize the images to one shape" in text
    assert not (tmp_path / "raw").exists()
    same = tmp_path / "same"
    for number in range(6):
        (same / "class").mkdir(parents=True, exist_ok=True)
        picture(24, 20, seed=number).save(same / "class" / f"{number}.jpg")
    ctl("dataset", "pack", same, tmp_path / "raw", "--raw")
    got = table(tmp_path / "raw/train.arrow")["image"].to_pylist()
    for pixels, path in zip(got, files(same), strict=True):
        assert pixels == np.asarray(Image.open(path)).tobytes()


def test_bad_arguments_and_images_are_named(folder: Path, tmp_path: Path) -> None:
    text = ctl("dataset", "pack", folder, tmp_path / "x", "--split", "1.5", code=2)
    assert "a fraction is above 0 and below 1" in text
    broken = tmp_path / "broken"
    (broken / "class").mkdir(parents=True)
    (broken / "class" / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    assert "1 damaged split(s)" in ctl("dataset", "verify", broken, code=1)
    (tmp_path / "whole" / "class").mkdir(parents=True)
    picture(9, 9, seed=1).save(tmp_path / "whole" / "class" / "a.png")
    assert "image files right" in ctl("dataset", "verify", tmp_path / "whole")
    text = ctl("dataset", "pack", broken, tmp_path / "y", "--quality", "80", code=1)
    assert "class/a.jpg: damaged or cut off" in text
    assert "move the file out of the dataset" in text


def test_whole_images_of_a_packed_file(folder: Path, tmp_path: Path) -> None:
    """The frame shows that packed images decode as Pillow decodes the files."""
    ctl("dataset", "pack", folder, tmp_path / "packed")
    with ImageDaemon({"packed": {"path": tmp_path / "packed"}}) as daemon:
        daemon.start()
        got = rows(daemon, "packed", crop=FRAME)
    for (image, label), path in zip(got, files(folder), strict=True):
        assert label == int(path.parent.name.removeprefix("class"))
        assert (image == framed(Image.open(path).convert("RGB"))).all()
