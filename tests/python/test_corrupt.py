"""Samples that cannot be read: substituted, skipped, or an error that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import pytest
from fastaa import _control
from support import ImageDaemon
from test_images import picture

N_SAMPLES = 120
KINDS = ("truncated", "empty", "text")
CROP = {"kind": "random-resized", "size": 16}


BAD = {number for number in range(N_SAMPLES) if number % 20 in (4, 17)}


def broken(kind: str, whole: bytes) -> bytes:
    """What is left of an image file."""
    return {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>"}[kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth JPEG and every tenth PNG is broken, each in one of three ways."""
    root = tmp_path_factory.mktemp("corrupt")
    for number in range(N_SAMPLES):
        path = (
            root / f"class{number * 2 // N_SAMPLES}" / f"{number:03}.{('jpg', 'png')[number % 2]}"
        )
        path.parent.mkdir(exist_ok=True)
        picture(60, 40, seed=number).save(path)
        if number in BAD:
            path.write_bytes(broken(KINDS[number // 20 % 3], path.read_bytes()))
    return root


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[ImageDaemon]:
    with ImageDaemon({"corrupt": {"train": folder}}) as daemon:
        daemon.start()
        yield daemon


def loader(daemon: ImageDaemon, **arguments: Any) -> fastaa.Loader:
    options: dict[str, Any] = {"batch_size": 16, "output": "numpy", "dtype": "u8", "crop": CROP}
    options.update(arguments)
    return fastaa.Loader("corrupt", runtime_dir=daemon.runtime_dir, **options)


def epoch(loader: fastaa.Loader) -> tuple[Any, Any, Any, int]:
    """Pixels, labels and indices of an epoch, and how many samples were skipped."""
    parts = [
        (batch.images.copy(), batch.labels.copy(), batch.indices.copy(), batch.n_skipped)
        for batch in loader.batches()
    ]
    images, labels, indices, n_skipped = zip(*parts, strict=True)
    return *(np.concatenate(part) for part in (images, labels, indices)), sum(n_skipped)


def test_substitutes_take_the_places_of_bad_samples(daemon: ImageDaemon) -> None:
    with loader(daemon, on_error="substitute") as stream:
        images, labels, indices, n_skipped = epoch(stream)
        assert stream.epoch_digest == stream.expected_digest(0)
    assert sorted(indices) == list(range(N_SAMPLES))
    assert n_skipped == 0
    with loader(daemon, on_error="substitute", batch_size=5) as other:
        again, _, order, _ = epoch(other)
    assert (order == indices).all()
    assert (again == images).all(), "the same at every visit"
    good = np.array([index not in BAD for index in indices])
    own = (indices * 2 // N_SAMPLES).astype(np.int64)
    assert (labels[good] == own[good]).all()
    # Of the substitutes, about half come from the other class: labels go with the pixels.
    assert 0 < (labels[~good] != own[~good]).sum() < len(BAD)
    assert all(image.std() > 1 for image in images[~good])


def test_skipped_samples_leave_smaller_batches(daemon: ImageDaemon) -> None:
    with loader(daemon, on_error="substitute") as whole:
        all_images, all_labels, all_indices, _ = epoch(whole)
    with loader(daemon, on_error="skip") as stream:
        images, labels, indices, n_skipped = epoch(stream)
        assert stream.epoch_digest == stream.expected_digest(0)
    assert n_skipped == len(BAD)
    assert set(indices) == set(range(N_SAMPLES)) - BAD
    good = np.array([index not in BAD for index in all_indices])
    assert (indices == all_indices[good]).all()
    assert (labels == all_labels[good]).all()
    assert (images == all_images[good]).all()


def test_a_batch_may_be_empty_and_two_ranks_make_equal_steps(daemon: ImageDaemon) -> None:
    with loader(daemon, on_error="skip", batch_size=1, shuffle=False) as stream:
        sizes = [len(batch.images) for batch in stream.batches()]
        assert stream.epoch_digest == stream.expected_digest(0)
    assert sizes == [int(index not in BAD) for index in range(N_SAMPLES)]
    steps = []
    for rank in range(2):
        with loader(daemon, on_error="skip", rank=rank, world_size=2) as stream:
            steps.append(len(list(stream.batches())))
            assert stream.epoch_digest == stream.expected_digest(0)
    assert steps == [4, 4]


def test_fail_names_the_file_and_the_cure(daemon: ImageDaemon, folder: Path) -> None:
    for options in ({}, {"on_error": "fail"}):
        with (
            loader(daemon, shuffle=False, **options) as stream,
            pytest.raises(fastaa.DataError) as error,
        ):
            list(stream)
        text = str(error.value)
        assert str(folder / "class0" / "004.jpg") in text, text
        assert 'set on_error = "substitute" or "skip"' in text, text


def test_bad_samples_are_counted_and_listed_once(daemon: ImageDaemon) -> None:
    for _ in range(2):
        with loader(daemon, on_error="skip") as stream:
            list(stream)
    lines = (daemon.directory / "state/quarantine/corrupt/train.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert {entry["sample"] for entry in listed} == BAD
    assert len(listed) == len(BAD)
    reasons = " ".join(entry["reason"] for entry in listed)
    for words in ("damaged or cut off", "it is empty", "its first bytes are 3c 68 74 6d 6c"):
        assert words in reasons
    status = _control.ask(daemon.runtime_dir, {"request": "status"})
    assert status["counters"]["samples_bad"] == len(BAD)
    assert status["counters"]["samples_skipped"] >= 2 * len(BAD)
    assert daemon.log.read_text().count(" sample=") == len(BAD)


def test_no_trace_of_a_damaged_jpeg_is_in_the_next_one(tmp_path: Path) -> None:
    """Cuts in headers and data, wrong sizes, missing tables: each between good files."""
    picture(60, 40, seed=3).save(tmp_path / "good.jpg", quality=90)
    picture(60, 40, seed=4).save(tmp_path / "other.jpg", quality=10)
    good, other = ((tmp_path / name).read_bytes() for name in ("good.jpg", "other.jpg"))
    frame = good.index(b"\xff\xc0")
    tables = good.index(b"\xff\xdb")
    length = int.from_bytes(good[tables + 2 : tables + 4], "big")
    damaged = [good[:cut] for cut in range(3, len(good), 61)]
    damaged.append(good[: frame + 5] + b"\xff\xff\xff\xff" + good[frame + 9 :])
    damaged.append(good[:tables] + good[tables + 2 + length :])
    (tmp_path / "set" / "class").mkdir(parents=True)
    for number, content in enumerate(damaged):
        for place, whole in (("a", other), ("b", content), ("c", good)):
            (tmp_path / "set" / "class" / f"{number:03}{place}.jpg").write_bytes(whole)
    with ImageDaemon({"corrupt": {"train": tmp_path / "set"}}, "[workers]\nthreads = 1") as daemon:
        daemon.start()
        crop = {"kind": "center", "size": 64}
        with loader(daemon, on_error="skip", shuffle=False, crop=crop) as stream:
            images, _, indices, _ = epoch(stream)
    assert list(indices) == [n for n in range(3 * len(damaged)) if n % 3 != 1]
    for index, image in zip(indices, images, strict=True):
        assert (image == images[0 if index % 3 == 0 else 1]).all()


def test_what_is_no_file_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    picture(9, 9, seed=1).save(tmp_path / "class" / "a.png")
    os.mkfifo(tmp_path / "class" / "pipe.png")
    with ImageDaemon({"corrupt": {"train": tmp_path}}) as daemon:
        with pytest.raises(AssertionError, match=r"pipe\.png: not a regular file; remove it"):
            daemon.start()
        (tmp_path / "class" / "pipe.png").unlink()
        (tmp_path / "class" / "link.png").symlink_to(tmp_path / "nowhere.png")
        with pytest.raises(AssertionError, match=r"link\.png: a link that leads to no"):
            daemon.start()
        (tmp_path / "class" / "link.png").unlink()
        daemon.start()


def test_a_file_that_is_gone_or_changed_is_no_bad_sample(tmp_path: Path) -> None:
    """It may come back: the stream ends, whatever `on_error` says."""
    for number in range(4):
        (tmp_path / "class").mkdir(exist_ok=True)
        picture(60, 40, seed=number).save(tmp_path / "class" / f"{number}.png")
    with ImageDaemon({"corrupt": {"train": tmp_path}}) as daemon:
        daemon.start()
        for change, words in (
            (lambda path: path.write_bytes(b"other"), "changed since the dataset was opened"),
            (lambda path: path.unlink(), "it is gone"),
        ):
            change(tmp_path / "class" / "2.png")
            with (
                loader(daemon, on_error="substitute") as stream,
                pytest.raises(fastaa.DataError, match=words),
            ):
                list(stream)
