"""Every kind of image dataset, against the library that people read it with.

Labels must be equal, and so must the decoded pixels, byte for byte: a `center` crop that is larger
than every image shows the whole of it in a black frame.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pytest
import webdataset
from PIL import Image
from support import ImageDaemon
from test_images import SIDE, framed, picture, rows
from torchvision.datasets import ImageFolder

Pixels = npt.NDArray[np.uint8]

N_SAMPLES = 30
N_CLASSES = 3
FRAME = {"kind": "center", "size": SIDE}


def encoded(number: int) -> tuple[str, bytes]:
    """An image file of one of three kinds, and its extension."""
    extension, options = [
        ("jpg", {"quality": 90}),
        ("png", {}),
        ("webp", {"quality": 80}),
    ][number % 3]
    buffer = io.BytesIO()
    image = picture(30 + number, 64 - number, seed=number)
    image.save(buffer, {"jpg": "jpeg"}.get(extension, extension), **options)
    return extension, buffer.getvalue()


def check(got: list[tuple[Pixels, int]], truth: list[tuple[Image.Image, int]]) -> None:
    """Compares what the daemon gives with what another library does."""
    assert len(got) == len(truth)
    for number, ((image, label), (expected, expected_label)) in enumerate(
        zip(got, truth, strict=True)
    ):
        assert label == expected_label, number
        assert (image == framed(expected.convert("RGB"))).all(), number


def served(name: str, **splits: Path) -> list[tuple[Pixels, int]]:
    """All samples of the training split."""
    with ImageDaemon({name: splits}) as daemon:
        daemon.start()
        return rows(daemon, name, crop=FRAME)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset(tmp_path: Path, kind: int) -> None:
    """Two shards; classes as text and as JSON; long names in the forms that tar has for them."""
    deep = "d" * 90 + "/" + "e" * 60 if kind != tarfile.USTAR_FORMAT else "d" * 90 + "/ee"
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard:03}.tar", "w", format=kind) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for number in range(shard * 15, shard * 15 + 15):
                extension, content = encoded(number)
                key = f"{deep}/sample{number}" if number % 5 == 0 else f"folder/sample{number}"
                add(tar, f"{key}.{extension}", content)
                add(tar, f"{key}.txt", b"a caption")
                if number % 2:
                    add(tar, f"{key}.cls", str(number % N_CLASSES).encode())
                else:
                    add(tar, f"{key}.json", json.dumps({"label": number % N_CLASSES}).encode())
    got = served("shards", path=tmp_path)
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    truth = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pil"):
        image = next(sample[name] for name in ("jpg", "png", "webp") if name in sample)
        label = sample["cls"] if "cls" in sample else sample["json"]["label"]
        truth.append((image, int(label)))
    assert len(truth) == N_SAMPLES
    check(got, truth)


def hf_dataset() -> datasets.Dataset:
    """Images, a class, and columns of other types around them."""
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "boxes": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4)),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "hen"]),
            "weight": datasets.Value("float64"),
        }
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    picture(60, 40, seed=99).save(turned, "jpeg", exif=exif)
    images = [turned.getvalue()] + [encoded(number)[1] for number in range(1, N_SAMPLES)]
    return datasets.Dataset.from_dict(
        {
            "caption": [f"caption {n}" if n % 4 else None for n in range(N_SAMPLES)],
            "boxes": [[[1.0, 2.0, 3.0, 4.0]] * (n % 3) for n in range(N_SAMPLES)],
            "image": [{"bytes": image, "path": None} for image in images],
            "label": [n % N_CLASSES for n in range(N_SAMPLES)],
            "weight": [0.5] * N_SAMPLES,
        },
        features=features,
    )


def of_hf(dataset: Any) -> list[tuple[Image.Image, int]]:
    """Its samples as `datasets` gives them: turned by EXIF."""
    return [(row["image"], row["label"]) for row in dataset]


def test_huggingface_saved_to_disk(tmp_path: Path) -> None:
    dataset = hf_dataset()
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    check(served("hf", train=tmp_path / "one"), of_hf(dataset))
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select(range(7))})
    both.save_to_disk(tmp_path / "both")
    check(served("hf", path=tmp_path / "both"), of_hf(dataset))
    inner = served("hf", train=tmp_path / "both" / "train", test=tmp_path / "both" / "test")
    check(inner, of_hf(dataset))


def test_huggingface_cache(tmp_path: Path) -> None:
    """What `load_dataset` leaves in its cache, here of a folder of images."""
    for number in range(N_SAMPLES):
        extension, content = encoded(number)
        folder = tmp_path / "source" / "train" / f"class{number % N_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.{extension}").write_bytes(content)
    source = hf_dataset()
    source.to_parquet(str(tmp_path / "data.parquet"))
    cache = tmp_path / "cache"
    files = {"train": str(tmp_path / "data.parquet")}
    dataset = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache))["train"]
    folder = Path(dataset.cache_files[0]["filename"]).parent
    check(served("hf", path=folder), of_hf(dataset))


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for split, n_samples in (("train", N_SAMPLES), ("val", 6)):
        for number in range(n_samples):
            extension, content = encoded(number)
            folder = tmp_path / split / f"class{number % N_CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03}.{extension}").write_bytes(content)
    truth = ImageFolder(str(tmp_path / "train"))
    images = [(Image.open(path).convert("RGB"), label) for path, label in truth.samples]
    check(served("folder", path=tmp_path), images)
