"""The loader over TCP: the same batches, inline."""

from __future__ import annotations

import signal
import warnings
from typing import Any

import fastaa
import pytest
import torch
from support import TOY_TRAIN, Daemon
from test_errors import drain, take

BATCH = 20


def tcp_loader(daemon: Daemon, **arguments: Any) -> fastaa.Loader:
    return fastaa.Loader(
        "toy",
        **{
            "batch_size": BATCH,
            "address": daemon.address,
            "token": daemon.token_file,
            **arguments,
        },
    )


def test_the_same_batches_as_locally(shared_daemon: Daemon) -> None:
    remote = tcp_loader(shared_daemon, policy="trivial-wide")
    local = shared_daemon.loader(batch_size=BATCH, policy="trivial-wide")
    for _ in range(2):
        for there, here in zip(remote.batches(), local.batches(), strict=True):
            assert torch.equal(there.images, here.images)
            assert torch.equal(there.labels, here.labels)
            assert torch.equal(there.indices, here.indices)
            assert there[3:] == here[3:]
            there.images.fill_(0)
    assert remote.epoch_digest == local.epoch_digest == remote.expected_digest(1)


def test_keeping_all_batches_is_no_problem(shared_daemon: Daemon) -> None:
    loader = tcp_loader(shared_daemon, token="the-token-of-the-tests", n_slots=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(loader.batches())
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(
        range(TOY_TRAIN)
    )


def test_empty_shares_come_too(shared_daemon: Daemon) -> None:
    loader = tcp_loader(shared_daemon, split="test", batch_size=52, rank=3, world_size=4)
    assert [len(labels) for _, labels in loader] == [52, 0]


def test_a_wrong_token_is_refused(shared_daemon: Daemon) -> None:
    with pytest.raises(fastaa.ForbiddenError) as caught:
        tcp_loader(shared_daemon, token="guessed")
    assert isinstance(caught.value, PermissionError)


def test_an_unknown_dataset_is_refused(shared_daemon: Daemon) -> None:
    with pytest.raises(fastaa.NotFoundError, match="toi"):
        fastaa.Loader("toi", address=shared_daemon.address, token=shared_daemon.token_file)


def test_nobody_at_the_address() -> None:
    with pytest.raises(fastaa.DaemonNotRunning, match=r"tcp://127\.0\.0\.1:1"):
        fastaa.Loader("toy", address="tcp://127.0.0.1:1", token="x")


def test_an_unknown_host_is_told_at_once() -> None:
    with pytest.raises(fastaa.DaemonNotRunning, match=r"host of tcp://no-such-host\.invalid"):
        fastaa.Loader("toy", address="tcp://no-such-host.invalid:5599", token="t")


def test_a_killed_daemon_is_told_and_the_epoch_goes_on_exactly(daemon: Daemon) -> None:
    loader = tcp_loader(daemon, reconnect_seconds=0)
    batches = loader.batches()
    seen = take(batches, 7)
    daemon.kill()
    more, error = drain(batches)
    assert isinstance(error, fastaa.DaemonGone)
    daemon.start()
    rest, error = drain(loader.batches())
    assert error is None
    assert sorted(seen + more + rest) == list(range(TOY_TRAIN))


def test_the_end_of_a_daemon_that_stops_is_told(daemon: Daemon) -> None:
    loader = tcp_loader(daemon, reconnect_seconds=0)
    take(loader.batches(), 3)
    daemon.signal(signal.SIGTERM)
    error = None
    while error is None:
        _, error = drain(loader.batches())
    # The goodbye may be lost: TCP drops it when the daemon's socket closes with unread releases.
    assert isinstance(error, fastaa.DaemonStopping | fastaa.DaemonGone), repr(error)


def test_the_digest_of_a_rank_is_asked_for_on_the_daemons_host(shared_daemon: Daemon) -> None:
    loader = tcp_loader(shared_daemon, rank=0, world_size=2)
    with pytest.raises(fastaa.UnsupportedError, match="control socket"):
        loader.expected_digest(0)
