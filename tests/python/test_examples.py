"""The examples run as a user runs them: DDP, sweeps, Lightning, and numpy alone.

The images are random, so what counts is that every sample came once, and that one way of training
gives the same model as another.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import CLIENT_SRC, ROOT, TOY_TRAIN, Daemon

EXAMPLES = ROOT / "clients" / "examples"
EXACT = "exactly once: yes"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(*command: object, path: Path = CLIENT_SRC) -> subprocess.CompletedProcess[str]:
    """Runs `python COMMAND` to its end."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=dict(os.environ, PYTHONPATH=f"{path}:{CLIENT_SRC}", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output_of(script: str, daemon: Daemon, *arguments: object, path: Path = CLIENT_SRC) -> str:
    """What an example prints on the toy dataset; it must end well and warn of nothing."""
    stream = ("--runtime-dir", daemon.runtime_dir, "--dataset", "toy")
    done = run(EXAMPLES / script, *arguments, *stream, path=path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


# --- DDP ---------------------------------------------------------------------------------------


def ddp(daemon: Daemon, n_ranks: int, batch_size: int, checkpoint: Path, *more: object) -> str:
    """What ddp.py prints; every sample must have come once."""
    stream = ("--runtime-dir", daemon.runtime_dir, "--dataset", "toy", "--batch-size", batch_size)
    script = (EXAMPLES / "ddp.py", "--checkpoint", checkpoint)
    done = run(*TORCHRUN, n_ranks, *script, *stream, *more)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert EXACT in done.stdout
    assert f"ranks: {n_ranks}," in done.stdout
    return done.stdout


def losses_of(printed: str) -> list[float]:
    """The epochs' losses; a NaN equals nothing."""
    return [float(loss) for loss in re.findall(r"loss (\S+)$", printed, re.MULTILINE)]


def test_ddp_with_an_empty_share_and_a_resume_trains_the_model_of_one_process(
    shared_daemon: Daemon, tmp_path: Path
) -> None:
    """Three ranks make an epoch, and one goes on; in each last step one sample is left for all."""
    assert TOY_TRAIN % (3 * 333) == 1
    three, resumed, alone = (tmp_path / f"{name}.pt" for name in ("three", "resumed", "alone"))
    printed = ddp(shared_daemon, 3, 333, three, "--epochs", 1)
    printed += ddp(shared_daemon, 1, 999, resumed, "--epochs", 2, "--resume", three)
    expected = ddp(shared_daemon, 1, 999, alone, "--epochs", 2)
    assert losses_of(printed) == pytest.approx(losses_of(expected), abs=1e-3)
    assert len(losses_of(printed)) == 2
    model, expected_model = (
        torch.load(path, weights_only=True)["model"] for path in (resumed, alone)
    )
    assert model.keys() == expected_model.keys()
    # Equal but for the order of the sums.
    for name, parameter in expected_model.items():
        torch.testing.assert_close(model[name], parameter, rtol=0, atol=1e-5)


# --- the others --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ("policies", ["none", "trivial-wide", "randaugment(2,9)"]),
        ("learning-rates", [f"learning rate {rate}" for rate in (0.01, 0.03, 0.1)]),
    ],
)
def test_a_sweep_prints_a_table(shared_daemon: Daemon, subject: str, names: list[str]) -> None:
    printed = output_of("sweep.py", shared_daemon, subject, "--epochs", 1)
    title, *rows = printed.splitlines()
    assert title == "test accuracy after 1 epochs:"
    assert [re.sub(r" +\d+\.\d\d %$", "", row) for row in rows] == names


def test_numpy_alone_needs_no_torch(shared_daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    printed = output_of("numpy_only.py", shared_daemon, path=tmp_path)
    assert "test accuracy: " in printed
    assert EXACT in printed


def test_lightning_resumes_in_the_middle_of_an_epoch(shared_daemon: Daemon, tmp_path: Path) -> None:
    """Ten steps an epoch; the last checkpoint is from the second epoch's fourth."""
    folder = tmp_path / "checkpoints"
    arguments = ("--epochs", 2, "--batch-size", 100, "--checkpoint-dir", folder)
    arguments += ("--checkpoint-steps", 7)
    stream = ("--runtime-dir", shared_daemon.runtime_dir, "--dataset", "toy")
    script = EXAMPLES / "lightning_module.py"
    # Lightning warns of its own code: stderr is not looked at.
    whole = run(script, *arguments, *stream)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.startswith("steps: 20\n")
    assert EXACT in whole.stdout
    checkpoint = folder / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 14
    resumed = run(script, *arguments, *stream, "--resume", checkpoint)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout


@pytest.mark.parametrize("command", [("numpy_only.py",), ("sweep.py", "policies")])
def test_without_a_daemon_they_say_what_to_do(tmp_path: Path, command: tuple[str, ...]) -> None:
    script, *arguments = command
    done = run(EXAMPLES / script, *arguments, "--runtime-dir", tmp_path)
    assert done.returncode == 1
    assert "no fastaa-loaderd listens" in done.stderr
    assert "Traceback" not in done.stderr
