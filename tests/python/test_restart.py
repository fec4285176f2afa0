"""A daemon that is restarted under running loaders: they go on by themselves, exactly."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections import deque
from typing import Any

import fastaa
import pytest
import torch
from fastaa import _control
from support import TOY_TRAIN, Daemon, wait_until

BATCH = 20


def restart(daemon: Daemon, number: signal.Signals) -> None:
    daemon.signal(number)
    daemon.wait()
    daemon.start()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_epoch_goes_on_by_itself_with_one_warning(
    daemon: Daemon, number: signal.Signals
) -> None:
    loader = daemon.loader(batch_size=BATCH, policy="trivial-wide")
    expected = [
        (batch.images.clone(), batch.indices.tolist())
        for batch in daemon.loader(batch_size=BATCH, policy="trivial-wide").batches()
    ]
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, batch in enumerate(loader.batches()):
            assert torch.equal(batch.images, expected[step][0])
            assert batch.step == step
            seen.append(batch.indices.tolist())
            if step in (7, 23):
                restart(daemon, number)
    assert seen == [indices for _, indices in expected]
    assert loader.epoch_digest == loader.expected_digest(0)
    found = [warning for warning in caught if warning.category is fastaa.DaemonRestartWarning]
    # Per outage; none if the daemon was back before it was missed.
    assert 1 <= len(found) <= 2
    assert "going on at the same sample" in str(found[0].message)
    assert found[0].filename == __file__


def test_a_loader_over_tcp_goes_on_too(daemon: Daemon) -> None:
    loader = fastaa.Loader("toy", batch_size=BATCH, address=daemon.address, token=daemon.token_file)
    seen: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastaa.DaemonRestartWarning)
        for step, batch in enumerate(loader.batches()):
            seen += batch.indices.tolist()
            if step == 5:
                restart(daemon, signal.SIGKILL)
    assert sorted(seen) == list(range(TOY_TRAIN))


def test_all_consumers_of_a_daemon_go_on(daemon: Daemon) -> None:
    """Two ranks of one run and two members of a broadcast group, over one death of the daemon."""
    ranks = [daemon.loader(batch_size=BATCH, rank=r, world_size=2, group="run") for r in range(2)]
    members = [daemon.loader(batch_size=BATCH, group="sweep", mode="broadcast") for _ in range(2)]
    iterators = [loader.batches() for loader in (*ranks, *members)]
    parts: list[list[int]] = [[] for _ in iterators]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastaa.DaemonRestartWarning)
        for step in range(50):
            for part, iterator in zip(parts, iterators, strict=True):
                batch = next(iterator, None)
                part += [] if batch is None else batch.indices.tolist()
            if step == 9:
                restart(daemon, signal.SIGKILL)
    assert sorted(parts[0] + parts[1]) == list(range(TOY_TRAIN))
    assert parts[2] == parts[3]
    assert sorted(parts[2]) == list(range(TOY_TRAIN))


def test_a_daemon_that_does_not_come_back_is_told_in_time(daemon: Daemon) -> None:
    loader = daemon.loader(batch_size=BATCH, reconnect_seconds=0.5)
    batches = loader.batches()
    next(batches)
    daemon.kill()
    began = time.monotonic()
    with (
        pytest.warns(fastaa.DaemonRestartWarning, match=r"up to 0\.5 s"),
        pytest.raises((fastaa.DaemonGone, fastaa.DaemonNotRunning)),
    ):
        deque(batches, maxlen=0)
    assert time.monotonic() - began >= 0.5
    # The position is kept: the next attempt begins anew.
    daemon.start()
    state = loader.state_dict()
    rest = sum(len(batch.indices) for batch in loader.batches())
    assert state["offset"] + rest == TOY_TRAIN


def test_close_ends_the_wait(daemon: Daemon) -> None:
    loader = daemon.loader(batch_size=BATCH, reconnect_seconds=600)
    batches = loader.batches()
    next(batches)
    daemon.kill()
    caught: list[BaseException] = []

    def consume() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in batches:
                    pass
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    wait_until(lambda: loader._connection is None, "the loader misses the daemon")
    loader.close()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(caught[0], fastaa.Error)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "60", None])
def test_a_duration_that_is_none_is_refused(shared_daemon: Daemon, value: Any) -> None:
    with pytest.raises(fastaa.InvalidRequestError, match="reconnect_seconds"):
        shared_daemon.loader(reconnect_seconds=value)


# --- policies ------------------------------------------------------------------------------------


def test_a_policy_published_in_mid_training_comes_to_both_ranks_at_one_step(
    daemon: Daemon,
) -> None:
    """Rank 0 is ahead when it is published; the epoch under way ends with its policy, also after
    a restart of the daemon and in a resumed rank."""
    arguments: dict[str, Any] = {
        "batch_size": BATCH,
        "world_size": 2,
        "group": "run",
        "policy": "active",
    }
    ranks = [daemon.loader(rank=rank, **arguments) for rank in range(2)]
    iterators = [rank.batches() for rank in ranks]
    policies: list[list[str]] = [[], []]
    for step in range(25):
        for rank, iterator in enumerate(iterators):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fastaa.DaemonRestartWarning)
                policies[rank].append(next(iterator).policy)
        if step == 6:
            policy = [[["Contrast", 0.9, 0.7], ["TranslateX", 0.5, 0.4]]]
            request = {"request": "policy-publish", "dataset": "toy", "policy": policy}
            _control.ask(daemon.runtime_dir, request)
        if step == 11:
            state = ranks[0].state_dict()
            restart(daemon, signal.SIGKILL)
    assert policies[0] == policies[1] == ["none"] * 25
    assert [next(iterator, None) for iterator in iterators] == [None, None]
    resumed = daemon.loader(rank=1, **arguments)
    resumed.load_state_dict(state)
    assert {batch.policy for batch in resumed.batches()} == {"none"}
    second = [{batch.policy for batch in rank.batches()} for rank in ranks]
    assert second == [{"toy@1"}, {"toy@1"}]
