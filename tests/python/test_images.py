"""Encoded images through the real daemon, against Pillow and torchvision.

The dataset is a folder of class folders with every kind of file that is read. Without a resize, a
`center` crop that is larger than an image shows all of it in a black frame: so whole images are
compared byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import numpy.typing as npt
import pytest
import torchvision.transforms.functional as F  # noqa: N812
from PIL import Image, ImageOps
from support import ImageDaemon
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

Pixels = npt.NDArray[np.uint8]

SIDE = 96
ORIENTATIONS = range(1, 9)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth shapes and some noise: what a photo's blocks look like to a decoder."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = []
    for _ in range(3):
        fx, fy, phase = rng.uniform(0.02, 0.25, 3) * (1, 1, 25)
        planes.append(127 + 90 * np.sin(fx * x + fy * y + phase) + rng.normal(0, 12, x.shape))
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def save_jpegs(folder: Path) -> None:
    """Samplings, sizes that are no multiple of a block, colours, scans, orientations."""
    sizes = [(96, 96), (1, 1), (17, 33), (64, 7), (95, 81), (8, 8), (50, 96)]
    for number, size in enumerate(sizes):
        for sampling in (0, 1, 2):
            image = picture(*size, seed=number)
            name = f"{size[0]}x{size[1]}-s{sampling}"
            image.save(folder / f"{name}.jpg", quality=92, subsampling=sampling)
            image.save(folder / f"{name}-p.JPG", quality=75, subsampling=sampling, progressive=True)
    rgb = picture(70, 45, seed=20)
    rgb.convert("L").save(folder / "gray.jpeg", quality=90)
    for sampling in (0, 1, 2):
        # Pillow thins out the fourth colour, too, for which libjpeg-turbo has no name.
        rgb.convert("CMYK").save(folder / f"cmyk-s{sampling}.jpg", subsampling=sampling)
        small = picture(17, 33, seed=21).convert("CMYK")
        small.save(folder / f"cmyk-s{sampling}-p.jpg", subsampling=sampling, progressive=True)
    rgb.save(folder / "adobe-rgb.jpg", quality=90, keep_rgb=True)
    rgb.save(folder / "restart.jpg", quality=90, restart_marker_blocks=2)
    for orientation in ORIENTATIONS:
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb.save(folder / f"turned{orientation}.jpg", quality=90, exif=exif)


def save_others(folder: Path) -> None:
    """PNG of every kind, WebP, BMP, PNM."""
    rgb = picture(61, 43, seed=30)
    alpha = rgb.convert("L").resize(rgb.size)
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    rgb.save(folder / "rgb.png")
    rgba.save(folder / "rgba.png")
    rgb.convert("L").save(folder / "l.png")
    la = rgb.convert("LA")
    la.putalpha(alpha)
    la.save(folder / "la.png")
    rgb.convert("1").save(folder / "bits1.png")
    rgb.quantize(200).save(folder / "palette.png")
    rgb.quantize(3).save(folder / "palette2.png", bits=2)
    rgb.quantize(16).save(folder / "transparent.png", transparency=3)
    deep = np.asarray(rgb.convert("L"), np.uint16) * 3
    Image.fromarray(deep).save(folder / "l16.png")
    rgb.save(folder / "lossy.webp", quality=80)
    rgb.save(folder / "lossless.webp", lossless=True)
    rgba.save(folder / "alpha.webp", quality=80)
    picture(33, 31, seed=31).save(folder / "odd.webp", quality=60)
    rgb.save(folder / "rgb.bmp")
    rgb.convert("L").save(folder / "l.bmp")
    rgb.save(folder / "rgb.ppm")
    rgb.convert("L").save(folder / "l.pgm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one of them with an inner folder."""
    root = tmp_path_factory.mktemp("images") / "train"
    for name in ("jpeg", "others", "others/inner"):
        (root / name).mkdir(parents=True)
    save_jpegs(root / "jpeg")
    save_others(root / "others")
    picture(40, 30, seed=40).save(root / "others" / "inner" / "a.png")
    (root / "others" / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[ImageDaemon]:
    """Serves the folder as `pictures`."""
    with ImageDaemon({"pictures": {"train": folder}}) as daemon:
        daemon.start()
        yield daemon


def rows(daemon: ImageDaemon, dataset: str = "pictures", **recipe: Any) -> list[tuple[Pixels, int]]:
    """All samples in order, as (height, width, channels) and label."""
    with fastaa.Loader(
        dataset,
        batch_size=16,
        shuffle=False,
        output="numpy",
        runtime_dir=daemon.runtime_dir,
        dtype="u8",
        layout="nhwc",
        **recipe,
    ) as loader:
        return [
            (image.copy(), int(label))
            for images, labels in loader
            for image, label in zip(images, labels, strict=True)
        ]


def framed(image: Image.Image, side: int = SIDE) -> Pixels:
    """As a `center` crop shows it."""
    return np.asarray(F.center_crop(image, [side, side])).reshape(side, side, -1)


FRAME = {"kind": "center", "size": SIDE}


@pytest.mark.parametrize("decode", ["full", "partial"])
def test_whole_images_are_those_of_image_folder(
    daemon: ImageDaemon, folder: Path, decode: str
) -> None:
    truth = ImageFolder(str(folder))
    got = rows(daemon, crop=FRAME, decode=decode)
    assert len(got) == len(truth)
    for (image, label), (path, expected) in zip(got, truth.samples, strict=True):
        assert label == expected, path
        difference = image.astype(int) - framed(Image.open(path).convert("RGB"))
        assert not difference.any(), f"{path}: off by up to {abs(difference).max()}"


def test_gray_is_that_of_pillow(daemon: ImageDaemon, folder: Path) -> None:
    got = rows(daemon, crop=FRAME, channels=1)
    for (image, _), (path, _) in zip(got, ImageFolder(str(folder)).samples, strict=True):
        difference = image.astype(int) - framed(Image.open(path).convert("L"))
        assert not difference.any(), f"{path}: off by up to {abs(difference).max()}"


def test_turned_images_are_those_of_exif_transpose(daemon: ImageDaemon, folder: Path) -> None:
    got = rows(daemon, crop=FRAME, exif="apply")
    n_turned = 0
    for (image, _), (path, _) in zip(got, ImageFolder(str(folder)).samples, strict=True):
        turned = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        n_turned += "turned" in path
        assert (image == framed(turned)).all(), path
    assert n_turned == len(ORIENTATIONS)


@pytest.mark.parametrize("side", [5, 16, 31])
def test_parts_equal_those_of_the_whole(daemon: ImageDaemon, side: int) -> None:
    """Without a resize, nothing is reduced, and a partial decode is exact."""
    for crop in ({"kind": "center", "size": side}, {"kind": "pad", "size": side, "pad": side}):
        full = rows(daemon, crop=crop, decode="full")
        partial = rows(daemon, crop=crop, decode="partial")
        for number, (a, b) in enumerate(zip(full, partial, strict=True)):
            assert (a[0] == b[0]).all(), (number, crop)


@pytest.mark.parametrize(("resize", "size", "bound"), [(48, 40, 1), (300, 290, 2)])
def test_resized_images_are_near_those_of_torchvision(
    daemon: ImageDaemon, folder: Path, resize: int, size: int, bound: int
) -> None:
    """`resize` and `center`, whole decode: the most that any byte is off by."""
    got = rows(daemon, crop={"kind": "center", "size": size, "resize": resize}, decode="full")
    worst, total, n_values = 0, 0, 0
    for (image, _), (path, _) in zip(got, ImageFolder(str(folder)).samples, strict=True):
        resized = F.resize(Image.open(path).convert("RGB"), [resize], InterpolationMode.BILINEAR)
        difference = abs(image.astype(int) - framed(resized, size))
        worst, total = max(worst, int(difference.max())), total + int(difference.sum())
        n_values += difference.size
    assert worst <= bound, f"off by up to {worst}, {total / n_values} in the mean"
