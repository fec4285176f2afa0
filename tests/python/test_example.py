"""The example runs as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image
from support import CLIENT_SRC, ROOT, Daemon

SCRIPT = ROOT / "clients" / "examples" / "train_fashion_mnist.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=dict(os.environ, PYTHONPATH=str(CLIENT_SRC)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_trains_evaluates_and_draws(shared_daemon: Daemon, tmp_path: Path) -> None:
    picture = tmp_path / "out" / "augmented.png"
    arguments = ("--runtime-dir", shared_daemon.runtime_dir, "--picture", picture)
    done = run("--epochs", 2, "--batch-size", 100, "--policy", "trivial-wide", *arguments)
    assert done.returncode == 0, done.stderr
    for line in ("test accuracy: ", "throughput: ", "policy: trivial-wide (version 0, id "):
        assert line in done.stdout
    assert "exactly once: yes" in done.stdout
    # Not on a terminal: a plain line per epoch.
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["epoch 0", "epoch 1"]
    with Image.open(picture) as image:
        assert (image.mode, image.size) == ("L", (12 * 58, 5 * 58))
        assert len(set(image.tobytes())) > 50


def test_without_a_daemon_it_says_what_to_do(tmp_path: Path) -> None:
    done = run("--runtime-dir", tmp_path)
    assert done.returncode == 1
    assert "no fastaa-loaderd listens" in done.stderr
    assert "Traceback" not in done.stderr
