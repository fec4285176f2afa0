"""What a newcomer's trial of the client found, each as it should be."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import fastaa
import pytest
from support import Daemon


def test_the_daemon_s_default_policy_counts_and_can_be_overridden(shared_daemon: Daemon) -> None:
    # The fixture's configuration says "none".
    with shared_daemon.loader() as loader:
        assert loader.recipe["policy"] == "none"
    with shared_daemon.loader(policy="active") as loader:
        assert loader.recipe["policy"] == "active"
        assert repr(loader).startswith("<fastaa.Loader toy/train batch_size=")


def test_a_policy_file_is_found_from_the_client_s_folder_and_pinned_by_content(
    shared_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([[["Invert", 1.0, 0.5]]]))
    with shared_daemon.loader(policy="mine.json", batch_size=7) as loader:
        batches = loader.batches()
        first = next(batches)
        assert first.policy == f"id:{first.policy_id}"
        path.write_text(json.dumps([[["Solarize", 1.0, 0.5]]]))
        state = loader.state_dict()
    with shared_daemon.loader(policy="./mine.json", batch_size=7) as resumed:
        resumed.load_state_dict(state)
        assert {batch.policy_id for batch in resumed.batches()} == {first.policy_id}
        assert {batch.policy_id for batch in resumed.batches()} != {first.policy_id}


@pytest.mark.parametrize(
    "arguments",
    [
        {"address": "tcp://", "token": "x"},
        {"address": "tcp://127.0.0.1:abc", "token": "x"},
        {"address": 5, "token": "x"},
        {"mode": []},
        {"batch_size": 2.0},
        {"seed": True},
    ],
)
def test_wrong_arguments_are_refused_as_fastaa_errors(
    shared_daemon: Daemon, arguments: dict[str, Any]
) -> None:
    where = {} if "address" in arguments else {"runtime_dir": shared_daemon.runtime_dir}
    with pytest.raises(fastaa.InvalidRequestError):
        fastaa.Loader("toy", **where, **arguments)


@pytest.mark.parametrize(
    "damage",
    [
        {"epoch": 1 << 40},
        {"epoch": 1 << 64},
        {"offset": "150"},
        {"offset": 1.7},
        {"offset": -1},
        {"offset": 10**9},
        {"step": 1 << 80},
        {"policy": 7},
        {"policy": "x" * 100_000},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(
    shared_daemon: Daemon, damage: dict[str, Any]
) -> None:
    with shared_daemon.loader() as loader:
        next(iter(loader))
        before = loader.state_dict()
        with pytest.raises(fastaa.StateError):
            loader.load_state_dict({**before, **damage})
        assert loader.state_dict() == before


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_torchrun_s_variables_is_refused(
    shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for other in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    with pytest.raises(fastaa.InvalidRequestError, match="belong together"):
        shared_daemon.loader()


def test_a_full_backlog_is_waited_for(shared_daemon: Daemon) -> None:
    path = os.fspath(Path(shared_daemon.runtime_dir) / "hello.sock")
    idle = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(400)]
    try:
        for connection in idle:
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.connect(path)
        with shared_daemon.loader() as loader:
            assert len(loader) > 0
    finally:
        for connection in idle:
            connection.close()
