"""Trainers and daemon are killed at random moments; every epoch's history stays exact.

`FASTAA_STORM=100,20 pytest -s tests/python/test_storm.py` kills 100 clients and the daemon 20
times, and prints how long the leases of the killed took to come back.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support import TOY_TRAIN, Daemon, python, wait_until

N_CLIENT_KILLS, N_DAEMON_KILLS = map(int, os.environ.get("FASTAA_STORM", "12,3").split(","))

TRAINER = """
import json, os, sys, time, warnings
import fastaa
from fastaa import _digest

runtime_dir, folder, rank, world_size, mode, n_epochs = sys.argv[1:]
warnings.simplefilter("ignore", fastaa.DaemonRestartWarning)
while True:
    try:
        loader = fastaa.Loader(
            "toy", batch_size=7, rank=int(rank), world_size=int(world_size), mode=mode,
            group=mode, runtime_dir=runtime_dir, output="numpy", policy="trivial-wide", dtype="u8",
        )
        break
    except (fastaa.DaemonNotRunning, fastaa.DaemonGone):
        time.sleep(0.05)  # It is being restarted; a loader waits only for one that it had.
saved = os.path.join(folder, "state.json")
history = {"state": loader.state_dict(), "digest": 0, "n": 0, "policies": [], "epochs": []}
if os.path.exists(saved):
    with open(saved) as file:
        history = json.load(file)
    loader.load_state_dict(history["state"])

def save():
    # What survives a kill is what was renamed: state and history together.
    with open(saved + ".partial", "w") as file:
        json.dump(history, file)
    os.rename(saved + ".partial", saved)

if os.fork() == 0:
    # A data worker, say: it keeps the trainer's files and sockets open beyond its death.
    os.close(1)
    os.close(2)
    time.sleep(30)
    os._exit(0)
print("trains", flush=True)
while len(history["epochs"]) < int(n_epochs):
    epoch = loader.epoch
    for batch in loader.batches():
        history["digest"] = _digest.add(history["digest"], _digest.digest_of(batch.indices))
        history["n"] += len(batch.indices)
        history["policies"] = sorted({*history["policies"], batch.policy})
        history["state"] = loader.state_dict()
        if loader.epoch == epoch and history["state"]["epoch"] == epoch:
            save()
    history["epochs"].append({
        "epoch": epoch,
        "n": history["n"],
        "policies": history["policies"],
        "own": _digest.to_text(history["digest"]),
        "client": loader.epoch_digest,
        "expected": loader.expected_digest(epoch),
    })
    history |= {"digest": 0, "n": 0, "policies": [], "state": loader.state_dict()}
    save()
print("done", flush=True)
"""


class Trainer:
    """A trainer that is started again after each of its deaths."""

    def __init__(self, daemon: Daemon, rank: int, world_size: int, mode: str) -> None:
        self.folder = daemon.directory / f"{mode}-{rank}"
        self.folder.mkdir()
        self._arguments = (daemon.runtime_dir, self.folder, rank, world_size, mode)
        self.process: subprocess.Popen[str] | None = None
        self.n_epochs = 1_000_000

    def start(self) -> None:
        self.process = python(TRAINER, *self._arguments, self.n_epochs)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> int:
        """Its former process id."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return self.process.pid

    def epochs(self) -> list[dict[str, Any]]:
        """Its finished epochs."""
        path = self.folder / "state.json"
        found: list[dict[str, Any]] = json.loads(path.read_text())["epochs"]
        return found

    def finish(self) -> None:
        """Runs it to the end of an epoch more."""
        self.n_epochs = len(self.epochs()) + 1
        self.start()
        assert self.process is not None
        out, errors = self.process.communicate(timeout=120)
        assert (self.process.returncode, out.split()) == (0, ["trains", "done"]), errors


def slabs_of(daemon: Daemon) -> int:
    """Memories that the daemon maps for its clients."""
    assert daemon.process is not None
    maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    return maps.count("memfd:fastaa-slab")


def test_history_is_exact_whoever_is_killed_when(daemon: Daemon) -> None:
    rng = random.Random(11)
    shards = [Trainer(daemon, rank, 2, "shard") for rank in range(2)]
    trainers = [*shards, *(Trainer(daemon, rank, 2, "broadcast") for rank in range(2))]
    for trainer in trainers:
        trainer.start()
    kills = ["client"] * N_CLIENT_KILLS + ["daemon"] * N_DAEMON_KILLS
    rng.shuffle(kills)
    slowest = 0.0
    for kill in kills:
        # Until somebody is in the middle of something; when exactly is the point of a storm.
        time.sleep(rng.uniform(0.05, 0.5))
        if kill == "daemon":
            daemon.kill()
            daemon.start()
            continue
        victim = rng.choice(trainers)
        assert victim.is_running(), victim.process and victim.process.communicate()
        pid = victim.kill()
        began = time.monotonic()
        wait_until(
            lambda pid=pid: all(stream["pid"] != pid for stream in daemon.streams()),
            "the killed client's leases are back, though its child lives",
        )
        slowest = max(slowest, time.monotonic() - began)
        victim.start()
    sys.stdout.write(f"\n{N_CLIENT_KILLS} killed clients' leases: back within {slowest:.3f} s\n")
    for trainer in trainers:
        wait_until((trainer.folder / "state.json").exists, "each trainer has a state")
        trainer.kill()
    for trainer in trainers:
        trainer.finish()
        for number, epoch in enumerate(trainer.epochs()):
            assert epoch["epoch"] == number
            assert epoch["own"] == epoch["client"] == epoch["expected"]
            assert epoch["policies"] == ["trivial-wide"]
            assert epoch["n"] in ({500} if trainer in shards else {TOY_TRAIN})
    n_epochs = sum(len(trainer.epochs()) for trainer in trainers)
    sys.stdout.write(f"{n_epochs} epochs, each exact\n")
    wait_until(lambda: not daemon.streams(), "all sessions are gone")
    # The hello thread ends its part of a session a moment later.
    wait_until(lambda: slabs_of(daemon) == 0, "no memory is left behind")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
