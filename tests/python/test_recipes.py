"""Parts of recipes: colour jitter, erasing, mixtures, views; random-resized crops in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fastaa
import numpy as np
import numpy.typing as npt
import pytest
import torchvision.transforms.functional as F  # noqa: N812
from PIL import Image
from support import ImageDaemon
from test_images import picture

N_SAMPLES, N_CLASSES, SIDE = 64, 4, 32
CROP = {"kind": "center", "size": SIDE}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageDaemon]:
    root = tmp_path_factory.mktemp("recipes")
    for number in range(N_SAMPLES):
        path = root / f"class{number * N_CLASSES // N_SAMPLES}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        picture(SIDE, SIDE, seed=number).save(path)
    large = tmp_path_factory.mktemp("large")
    (large / "class").mkdir()
    for number in range(24):
        picture(320 + number, 240 - number, seed=number).save(
            large / "class" / f"{number:03}.jpg", quality=92
        )
    with ImageDaemon({"small": {"train": root}, "large": {"train": large}}) as daemon:
        daemon.start()
        yield daemon


def epoch(daemon: ImageDaemon, dataset: str = "small", **options: Any) -> list[npt.NDArray[Any]]:
    """Images, labels and indices of an epoch, in index order unless told otherwise."""
    base: dict[str, Any] = {
        "batch_size": 16,
        "dtype": "u8",
        "layout": "nhwc",
        "output": "numpy",
        "shuffle": False,
        "crop": CROP,
    }
    base.update(options)
    with fastaa.Loader(dataset, runtime_dir=daemon.runtime_dir, **base) as loader:
        parts = [
            (batch.images.copy(), batch.labels.copy(), batch.indices.copy())
            for batch in loader.batches()
        ]
        assert loader.epoch_digest == loader.expected_digest(0)
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def test_every_hue_is_one_of_torchvisions(daemon: ImageDaemon) -> None:
    plain, _, _ = epoch(daemon)
    turned, _, _ = epoch(daemon, jitter={"hue": 0.5})
    shifts = set()
    for before, after in zip(plain, turned, strict=True):
        hue, saturation, value = Image.fromarray(before).convert("HSV").split()
        matches = []
        for shift in range(256):
            moved = Image.fromarray(np.asarray(hue) + np.uint8(shift))
            merged = Image.merge("HSV", (moved, saturation, value)).convert("RGB")
            if (np.asarray(merged) == after).all():
                matches.append(shift)
        assert matches, "no turn of the hue gives this image"
        shifts.update(matches)
    assert len(shifts) > N_SAMPLES / 2, "the turns are drawn anew for each sample"


def test_jitter_stays_within_its_factors(daemon: ImageDaemon) -> None:
    plain, _, _ = epoch(daemon)
    bright, _, _ = epoch(daemon, jitter={"brightness": 0.5})
    factors = []
    for before, after in zip(plain, bright, strict=True):
        image = Image.fromarray(before)
        factor = after.astype(float).sum() / before.astype(float).sum()
        assert 0.4 < factor < 1.55
        factors.append(factor)
        near = [np.asarray(F.adjust_brightness(image, factor + d)) for d in (-0.03, 0.03)]
        assert (after >= near[0] - 1.0).all()
        # Clipped pixels pull the estimate down.
        assert (after <= np.asarray(F.adjust_brightness(image, factor + 0.2)) + 1.0).all()
    assert np.std(factors) > 0.15
    again, _, _ = epoch(daemon, jitter={"brightness": 0.5}, batch_size=5)
    assert (again == bright).all(), "whatever the batch size"


def test_erasing_fills_one_box_with_the_mean(daemon: ImageDaemon) -> None:
    mean = [0.2, 0.4, 0.6]
    plain, _, _ = epoch(daemon)
    options = {"normalize": {"mean": mean, "std": [1, 1, 1]}}
    erased, _, _ = epoch(daemon, erase={"p": 0.5, "scale": [0.1, 0.3]}, **options)
    n_erased = 0
    for before, after in zip(plain, erased, strict=True):
        changed = (before != after).any(-1)
        if not changed.any():
            continue
        n_erased += 1
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == np.round(np.array(mean) * 255).astype(np.uint8)).all()
        assert 0.08 < box.shape[0] * box.shape[1] / SIDE**2 < 0.33
    assert N_SAMPLES / 4 < n_erased < N_SAMPLES * 3 / 4


@pytest.mark.parametrize("dtype", ["f32", "u8"])
def test_mixup_mixes_pairs_and_their_labels(daemon: ImageDaemon, dtype: str) -> None:
    images, labels, indices = epoch(daemon, dtype=dtype)
    mixed, soft, order = epoch(daemon, dtype=dtype, mix={"mixup": 1.0})
    assert (order == indices).all()
    assert soft.shape == (N_SAMPLES, N_CLASSES)
    assert soft.dtype == np.float32
    hard = np.eye(N_CLASSES, dtype=np.float32)[labels]
    weights = []
    for first in range(0, N_SAMPLES, 2):
        a, b = images[first].astype(float), images[first + 1].astype(float)
        difference = a - b
        weight = ((mixed[first] - b) * difference).sum() / (difference**2).sum()
        weights.append(weight)
        tolerance = 1e-5 if dtype == "f32" else 0.51 + 0.01 * abs(difference).max() / 2.55
        for place, (one, other) in ((first, (a, b)), (first + 1, (b, a))):
            expected = weight * one + (1 - weight) * other
            assert abs(mixed[place] - expected).max() <= tolerance
        if dtype == "f32":
            expected_label = weight * hard[first] + (1 - weight) * hard[first + 1]
            assert np.allclose(soft[first], expected_label, atol=1e-5)
    assert np.allclose(soft.sum(1), 1)
    assert min(weights) < 0.25
    assert max(weights) > 0.75
    assert len(set(np.round(weights, 4))) > len(weights) / 2


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_cutmix_exchanges_a_box(daemon: ImageDaemon, layout: str) -> None:
    images, labels, _ = epoch(daemon)
    mixed, soft, _ = epoch(daemon, layout=layout, mix={"cutmix": 1.0, "p": 0.7})
    if layout == "nchw":
        mixed = mixed.transpose(0, 2, 3, 1)
    hard = np.eye(N_CLASSES, dtype=np.float32)[labels]
    n_mixed = 0
    for first in range(0, N_SAMPLES, 2):
        own, other = images[first], images[first + 1]
        is_own, is_other = (mixed[first] == own).all(-1), (mixed[first] == other).all(-1)
        assert (is_own | is_other).all(), "every pixel is of one of the two"
        assert (mixed[first + 1][is_other] == own[is_other]).all()
        weight = float(is_own.mean())
        n_mixed += weight < 1
        expected = weight * hard[first] + (1 - weight) * hard[first + 1]
        assert np.allclose(soft[first], expected, atol=0.02)
    assert 8 < n_mixed < 31


def test_views_differ_and_the_first_is_the_sample(daemon: ImageDaemon) -> None:
    recipe = {"crop": {"kind": "random-resized", "size": 24}, "hflip": True, "jitter": {"hue": 0.2}}
    one, labels, _ = epoch(daemon, **recipe)
    three, same_labels, _ = epoch(daemon, views=3, **recipe)
    assert three.shape == (N_SAMPLES, 3, 24, 24, 3)
    assert (labels == same_labels).all()
    assert (three[:, 0] == one).all()
    for a, b in ((0, 1), (1, 2), (0, 2)):
        n_same = (three[:, a] == three[:, b]).all((1, 2, 3)).sum()
        assert n_same == 0


def test_parts_are_near_the_whole(daemon: ImageDaemon) -> None:
    """`decode = "full"` is the reference: equal where nothing is reduced, close where it is."""
    for size, is_reduced in ((224, False), (48, True)):
        crop = {"kind": "random-resized", "size": size, "scale": [0.3, 1.0]}
        partial, _, _ = epoch(daemon, "large", crop=crop)
        full, _, _ = epoch(daemon, "large", crop=crop, decode="full")
        difference = abs(partial.astype(int) - full.astype(int))
        if is_reduced:
            assert difference.mean() < 4
            assert difference.any()
        else:
            assert not difference.any()


def test_views_of_large_images_are_those_of_single_ones(daemon: ImageDaemon) -> None:
    """The views share a decode, and it changes no byte."""
    for size in (24, 64, 160):
        recipe = {"crop": {"kind": "random-resized", "size": size}}
        one, _, _ = epoch(daemon, "large", **recipe)
        four, _, _ = epoch(daemon, "large", views=4, **recipe)
        assert (four[:, 0] == one).all()


def test_wrong_parts_are_refused_with_their_key(daemon: ImageDaemon) -> None:
    for options, words in (
        ({"jitter": {"hue": 1}}, "'jitter': hue must be 0 to 0.5"),
        ({"erase": {"p": 2}}, "'erase': p must be 0 to 1"),
        ({"mix": {"p": 1}}, "give mixup, cutmix or both"),
        ({"views": 65}, "'views': must be 1 to 64"),
        ({"crop": {"kind": "center", "size": 4, "resize": 60000}}, "crop.size = 4 to 16384"),
        ({"crop": {"kind": "none"}}, "'none' needs images of one size"),
        ({"on_error": "ignore"}, "unknown variant `ignore`"),
    ):
        with pytest.raises(fastaa.InvalidRequestError, match=words):
            epoch(daemon, **options)
