"""Replay: the same batches again and again; and `stream headspace`, which measures by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import fastaa
import pytest
from support import CLIENT_SRC, Daemon, ctl_binary

TRAINING = """
import sys, warnings, fastaa
warnings.simplefilter("ignore")
loader = fastaa.Loader("toy", batch_size=100, output="numpy", policy="randaugment(9,9)")
while True:
    for images, labels in loader:
        pass
"""


SHORT = TRAINING.replace("while True", "for _ in range(2)").replace(
    "pass", "__import__('time').sleep(0.03)"
)


def headspace(daemon: Daemon, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What `fastaa-ctl stream headspace` says."""
    ctl = ctl_binary()
    if ctl is None:
        pytest.skip("no fastaa-ctl: build it, or set FASTAA_CTL")
    command = [ctl, "--runtime-dir", daemon.runtime_dir, *arguments]
    return subprocess.run(
        [*map(str, command)],
        env=dict(os.environ, PYTHONPATH=str(CLIENT_SRC)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_training_that_waits_for_data_has_headspace(shared_daemon: Daemon) -> None:
    training = ("--", sys.executable, "-c", TRAINING)
    done = headspace(shared_daemon, "--json", "stream", "headspace", "--seconds", 1.5, *training)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Nine operations per image cost many times what an announcement does.
    assert found["replayed_images_per_second"] > 2 * found["images_per_second"] > 0
    assert found["ratio"] == pytest.approx(
        found["replayed_images_per_second"] / found["images_per_second"]
    )
    done = headspace(shared_daemon, "stream", "headspace", "--seconds", 1, *training)
    assert "upper bound" in done.stdout


@pytest.mark.parametrize(
    ("command", "seconds", "code", "message"),
    [
        (("-c", "raise SystemExit(3)"), 1, 1, "failed: exit status: 3"),
        (("-c", "pass"), 1, 1, "took no batch of this daemon before it ended"),
        (("-c", SHORT), 1, 1, "for more epochs"),
        (("-c", "pass"), 0, 2, "--seconds 0 is not between"),
    ],
)
def test_what_cannot_be_measured_is_told(
    shared_daemon: Daemon, command: tuple[str, ...], seconds: int, code: int, message: str
) -> None:
    training = ("--", sys.executable, *command)
    done = headspace(shared_daemon, "stream", "headspace", "--seconds", seconds, *training)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stdout == ""


def test_replay_announces_what_is_there(
    shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTAA_REPLAY", "1")
    with pytest.warns(fastaa.ReplayWarning, match="again and again"):
        loader = shared_daemon.loader(batch_size=100, n_slots=3)
    batches = [batch.indices.tolist() for batch in loader.batches()]
    assert len(batches) == len(loader) == 10
    assert len({tuple(indices) for indices in batches}) == 3
    assert loader.epoch_digest != loader.expected_digest(0)
    assert [stream["is_replay"] for stream in shared_daemon.streams()] == [True]
    monkeypatch.setenv("FASTAA_REPLAY", "yes")
    with pytest.raises(fastaa.InvalidRequestError, match="FASTAA_REPLAY"):
        shared_daemon.loader()
