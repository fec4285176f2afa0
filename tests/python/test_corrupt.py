"""Samples that cannot be read: substituted, skipped, or an error that names the file."""

from __future__ import annotations

import json
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


def broken(kind: str, whole: bytes) -> bytes:
    """What is left of an image file."""
    return {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>"}[kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth image is broken, in one of three ways. JPEG and PNG in turn."""
    root = tmp_path_factory.mktemp("corrupt")
    for number in range(N_SAMPLES):
        path = (
            root / f"class{number * 2 // N_SAMPLES}" / f"{number:03}.{('jpg', 'png')[number % 2]}"
        )
        path.parent.mkdir(exist_ok=True)
        picture(60, 40, seed=number).save(path)
        if number % 10 == 7:
            path.write_bytes(broken(KINDS[number // 10 % 3], path.read_bytes()))
    return root


BAD = set(range(7, N_SAMPLES, 10))


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
    # Of twelve substitutes, about half come from the other class: labels go with the pixels.
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
        assert str(folder / "class0" / "007.png") in text, text
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
