"""A policy that the search finds goes live in a training that knows nothing of it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fastaa
import numpy as np
import pytest
from PIL import Image
from support import ROOT, daemon_binary

SIDE = 16
N_TRAIN, N_TEST = 8000, 50
SECONDS_MAX = 240.0
# A trainer on a GPU leaves the processor alone between batches; the search runs then.
PAUSE_SECONDS = 0.2
CONFIG = """
runtime_dir = "run"
state_dir = "state"

[[dataset]]
name = "glyphs"
path = "glyphs"

[stream.defaults]
crop = { kind = "pad", size = 16, pad = 1 }
normalize = { mean = [0.15], std = [0.25] }

[search]
enabled = true
reduced = 48
folds = 2
fold_epochs = 150
gate_epochs = 200
gate_seeds = 5
rounds = 1
threads = 2

[idle]
policy = "always"

[telemetry]
log = "info"
"""


def glyphs(n_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three shapes in any direction, each bright or dark, in noise: six classes.

    Turning an image gives another one of its class; changing its brightness does not. So rotations
    help, and TrivialAugment's colour operations harm. The search gets few of the images: what they
    don't show, only augmentation can tell a model (about 10 points of accuracy).
    """
    rng = np.random.default_rng(seed)
    images = np.zeros((n_images, SIDE, SIDE), np.uint8)
    labels = (np.arange(n_images) % 6).astype(np.uint8)
    for index, label in enumerate(labels):
        canvas = np.zeros((64, 64), np.uint8)
        canvas[12:52, 28:36] = 255
        if label % 3 == 0:
            canvas[44:52, 28:52] = 255
        elif label % 3 == 1:
            canvas[12:20, 12:52] = 255
        else:
            canvas[28:36, 12:52] = 255
            canvas[12:20, 28:52] = 255
        turned = Image.fromarray(canvas).rotate(rng.uniform(-180, 180), Image.Resampling.BILINEAR)
        small = np.asarray(turned.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
        level = 230 if label >= 3 else 140
        images[index] = np.clip(small * level + rng.normal(0, 25, small.shape), 0, 255)
    return images, labels


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    header = np.array([0x803, *images.shape], ">u4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = np.array([0x801, len(labels)], ">u4").tobytes()
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def ctl(folder: Path, *arguments: str) -> dict[str, object]:
    named = os.environ.get("FASTAA_CTL")
    binary = named or str(ROOT / "target" / "release" / "fastaa-ctl")
    command = [binary, "--runtime-dir", str(folder / "run"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    parsed: dict[str, object] = json.loads(done.stdout)
    return parsed


@pytest.fixture
def searching() -> Iterator[Path]:
    """A daemon that searches; its folder."""
    if daemon_binary() is None:
        pytest.skip("no daemon: build target/release/fastaa-loaderd, or set FASTAA_LOADERD")
    with tempfile.TemporaryDirectory(prefix="fastaa-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "glyphs").mkdir()
        write_idx(folder / "glyphs", "train", *glyphs(N_TRAIN, 1))
        write_idx(folder / "glyphs", "t10k", *glyphs(N_TEST, 2))
        (folder / "config.toml").write_text(CONFIG)
        with (folder / "log").open("wb") as log:
            command = [str(daemon_binary()), "--config", str(folder / "config.toml")]
            process = subprocess.Popen(command, stderr=log)
            try:
                end = time.monotonic() + 60
                while not (folder / "run" / "hello.sock").exists() and time.monotonic() < end:
                    time.sleep(0.05)
                yield folder
            finally:
                process.terminate()
                assert process.wait(timeout=60) == 0, (folder / "log").read_text()


@pytest.mark.timeout(SECONDS_MAX + 60)
def test_a_found_policy_goes_live_at_an_epoch_s_boundary(searching: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIDE * SIDE, 6))
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    loader = fastaa.Loader("glyphs", batch_size=200, runtime_dir=str(searching / "run"))
    versions: list[set[int]] = []
    policy_ids: list[set[str]] = []
    end = time.monotonic() + SECONDS_MAX
    while time.monotonic() < end and not (versions and versions[-1] == {1}):
        seen: set[int] = set()
        ids: set[str] = set()
        for batch in loader.batches():
            loss = torch.nn.functional.cross_entropy(net(batch.images), batch.labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            seen.add(batch.policy_version)
            ids.add(batch.policy_id)
        versions.append(seen)
        policy_ids.append(ids)
        time.sleep(PAUSE_SECONDS)
    status = ctl(searching, "search", "status")
    assert versions[-1] == {1}, f"no policy in {len(versions)} epochs: {status}"
    assert versions[:-1] == [{0}] * (len(versions) - 1), "an epoch had two policies"
    # Batch, `policy show` and store name the same policy.
    shown = ctl(searching, "policy", "show")
    stored = json.loads((searching / "state/policies/glyphs/000001.json").read_text())
    assert policy_ids[-1] == {shown["id"]} == {stored["id"]}
    assert shown["version"] == 1
    evidence = stored["evidence"]
    assert evidence["source"] == "search"
    assert evidence["verdict"]["is_better"]
    assert all(one["lower"] > 0 for one in evidence["verdict"]["comparisons"])
    rivals = {one["rival"] for one in evidence["verdict"]["comparisons"]}
    assert any("trivial-wide" in rival for rival in rivals), rivals
