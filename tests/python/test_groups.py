"""Many consumers of one dataset: shares, broadcast groups, and what each of them gets exactly."""

from __future__ import annotations

import itertools
import json
from typing import Any

import fastaa
import numpy as np
import pytest
import torch
from support import TOY_TRAIN, Daemon, flat, indices_of, python, wait_until

BATCH = 64
GROUPS = (f"group-{number}" for number in itertools.count())


def members_of(daemon: Daemon, n_members: int, **arguments: Any) -> list[fastaa.Loader]:
    """Loaders of one broadcast group that no other test has."""
    group = next(GROUPS)
    defaults: dict[str, Any] = {"batch_size": BATCH, "mode": "broadcast", "group": group}
    return [daemon.loader(**{**defaults, **arguments}) for _ in range(n_members)]


# --- every digest equals the expected one --------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_of_any_number_see_each_sample_once(
    shared_daemon: Daemon, world_size: int, drop_last: bool
) -> None:
    """Batch sizes that divide neither each other nor the 1,000 samples, one after the other."""
    for batch_size in (1, 7, 64, 96, 100, 128):
        global_batch = batch_size * world_size
        if drop_last and global_batch > TOY_TRAIN:
            continue  # Refused: no step would be left.
        seen: list[int] = []
        steps = set()
        for rank in range(world_size):
            loader = shared_daemon.loader(
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                drop_last=drop_last,
                dtype="u8",
            )
            parts = indices_of(loader.batches())
            assert loader.epoch_digest == loader.expected_digest(0)
            steps.add(len(parts))
            seen += flat(parts)
            loader.close()
        n_seen = TOY_TRAIN // global_batch * global_batch if drop_last else TOY_TRAIN
        assert len(steps) == 1
        assert len(seen) == len(set(seen)) == n_seen


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("first", "second"), [(64, 100), (96, 128), (1, 7)])
def test_another_batch_size_and_number_of_ranks_go_on_exactly(
    shared_daemon: Daemon, first: int, second: int, drop_last: bool
) -> None:
    """Half an epoch by three ranks, a quarter by two with another batch size, the rest by five."""
    seen: list[int] = []
    state: dict[str, Any] | None = None
    plans = ((first, 3, TOY_TRAIN // 2), (second, 2, 3 * TOY_TRAIN // 4), (first, 5, TOY_TRAIN))
    for batch_size, world_size, until in plans:
        states = []
        for rank in range(world_size):
            loader = shared_daemon.loader(
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                drop_last=drop_last,
                dtype="u8",
            )
            if state is not None:
                loader.load_state_dict(state)
            batches = loader.batches()
            while loader.epoch == 0 and loader.state_dict()["offset"] < until:
                batch = next(batches, None)
                if batch is None:
                    break
                seen += batch.indices.tolist()
            states.append(loader.state_dict())
            loader.close()
        state = states[0]
        assert all(other["offset"] == state["offset"] for other in states)
        if state["epoch"] == 1:
            break
    assert len(seen) == len(set(seen))
    n_left = TOY_TRAIN - len(seen)
    assert n_left == 0 if not drop_last else n_left < max(first, second) * 5


# --- broadcast ---------------------------------------------------------------------------------


def test_members_in_step_read_batches_that_were_made_once(shared_daemon: Daemon) -> None:
    members = members_of(shared_daemon, 3, policy="trivial-wide")
    alone = shared_daemon.loader(batch_size=BATCH, policy="trivial-wide")
    for epoch in range(2):
        iterators = [member.batches() for member in members]
        for expected in alone.batches():
            for iterator in iterators:
                batch = next(iterator)
                assert torch.equal(batch.images, expected.images)
                assert torch.equal(batch.labels, expected.labels)
                assert torch.equal(batch.indices, expected.indices)
                assert batch.step == expected.step
        assert all(next(iterator, None) is None for iterator in iterators)
        assert {member.epoch_digest for member in members} == {alone.expected_digest(epoch)}
    reports = [stream for stream in shared_daemon.streams() if stream["group"]]
    reports = [stream for stream in reports if stream["group"] == members[0]._request.group]
    assert len(reports) == 3
    for report in reports:
        assert report["window"] == "shared"
        assert report["batches_shared"] == report["batches_sent"] == 32


def test_what_a_member_writes_is_its_own(shared_daemon: Daemon) -> None:
    writer, reader = members_of(shared_daemon, 2, dtype="u8")
    for epoch in range(3):
        for dirty, clean in zip(writer.batches(), reader.batches(), strict=True):
            expected = clean.images.clone()
            dirty.images.fill_(epoch + 1)
            dirty.labels.fill_(-1)
            dirty.indices.fill_(-1)
            assert torch.equal(clean.images, expected)
            assert int(clean.labels.min()) >= 0
        # What was written is in no later batch of the writer, either.
        assert writer.epoch_digest == reader.epoch_digest == reader.expected_digest(epoch)


def test_a_member_beyond_the_window_gets_the_same_bytes_and_comes_back(
    shared_daemon: Daemon,
) -> None:
    """The fast one is epochs ahead; the slow one holds what it holds, and loses nothing."""
    fast, slow = members_of(shared_daemon, 2, policy="trivial-wide", batch_size=20, n_slots=6)
    alone = shared_daemon.loader(batch_size=20, policy="trivial-wide")
    slow_batches = slow.batches()
    held = next(slow_batches)
    expected = [batch.images.clone() for batch in alone.batches()]
    for epoch in range(3):
        assert sum(1 for _ in fast) == 50
        assert fast.epoch_digest == fast.expected_digest(epoch)
    assert torch.equal(held.images, expected[0])
    for step, batch in enumerate(slow_batches, start=1):
        assert torch.equal(batch.images, expected[step])
    assert slow.epoch_digest == slow.expected_digest(0)
    slow.set_epoch(3)
    for here, there in zip(fast.batches(), slow.batches(), strict=True):
        assert torch.equal(here.images, there.images)
    group = fast._request.group
    reports = {report["window"] for report in shared_daemon.streams() if report["group"] == group}
    assert reports == {"shared"}


def test_members_that_pause_with_full_hands_leave_the_others_their_sharing(
    shared_daemon: Daemon,
) -> None:
    members = members_of(shared_daemon, 5, batch_size=20, n_slots=20)
    for place, member in enumerate(members[2:]):
        batches = member.batches()
        for _ in range(1 + 10 * place):
            next(batches)
    first, second = members[:2]
    for epoch in range(2):
        for here, there in zip(first.batches(), second.batches(), strict=True):
            assert torch.equal(here.indices, there.indices)
        assert first.epoch_digest == first.expected_digest(epoch)
    group = first._request.group
    reports = [report for report in shared_daemon.streams() if report["group"] == group]
    active = [report for report in reports if report["batches_sent"] >= 100]
    assert len(active) == 2
    assert {report["window"] for report in active} == {"shared"}
    assert all(report["batches_shared"] == report["batches_sent"] for report in active)


def test_members_come_and_go_at_any_place(shared_daemon: Daemon) -> None:
    group = next(GROUPS)
    arguments: dict[str, Any] = {"batch_size": 50, "mode": "broadcast", "group": group}
    expected = indices_of(shared_daemon.loader(batch_size=50).batches())
    rng = np.random.default_rng(5)
    members: list[tuple[fastaa.Loader, Any, int]] = []
    for _ in range(300):
        choice = int(rng.integers(0, 12))
        if choice == 0 or not members:
            loader = shared_daemon.loader(**arguments)
            members.append((loader, loader.batches(), 0))
            continue
        place = int(rng.integers(0, len(members)))
        loader, batches, step = members.pop(place)
        if choice == 1:
            loader.close()
            continue
        batch = next(batches, None)
        if batch is None:
            assert step == len(expected)
            assert loader.epoch_digest == loader.expected_digest(0)
            loader.close()
        else:
            assert batch.indices.tolist() == expected[step]
            members.append((loader, batches, step + 1))


def test_a_member_that_is_killed_with_leases_leaves_the_window_free(
    shared_daemon: Daemon,
) -> None:
    group = next(GROUPS)
    code = """
import sys, fastaa
loader = fastaa.Loader("toy", batch_size=20, group=sys.argv[2], mode="broadcast", n_slots=4,
                       runtime_dir=sys.argv[1], output="numpy")
batches = loader.batches()
held = [next(batches) for _ in range(3)]
print("holds", flush=True)
sys.stdin.readline()
"""
    victims = [python(code, shared_daemon.runtime_dir, group) for _ in range(3)]
    for victim in victims:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "holds\n"
    survivors = [
        shared_daemon.loader(batch_size=20, group=group, mode="broadcast", n_slots=4)
        for _ in range(2)
    ]
    batches = zip(*(survivor.batches() for survivor in survivors), strict=True)
    first = next(batches)
    for victim in victims:
        victim.kill()
        victim.communicate()
    of_group = lambda: [s for s in shared_daemon.streams() if s["group"] == group]  # noqa: E731
    wait_until(lambda: len(of_group()) == 2, "the killed clients' sessions are gone")
    n_seen = len(first[0].indices) + sum(len(here.indices) for here, _ in batches)
    assert n_seen == TOY_TRAIN
    assert [stream["batches_shared"] for stream in of_group()] == [50, 50]


# --- resume ------------------------------------------------------------------------------------


def test_a_run_that_changes_its_size_gets_what_an_uninterrupted_one_gets(
    shared_daemon: Daemon,
) -> None:
    """Four ranks, then two, then eight, at ten random positions: the same samples, once each, and
    the same pixels as in a run of one rank without a break."""
    recipe: dict[str, Any] = {"policy": "trivial-wide", "hflip": True, "dtype": "u8"}
    whole: dict[int, torch.Tensor] = {}
    for batch in shared_daemon.loader(batch_size=100, **recipe).batches():
        whole.update(zip(batch.indices.tolist(), batch.images.clone(), strict=True))
    rng = np.random.default_rng(3)
    for _ in range(10):
        stops = sorted(rng.integers(1, 30, 2).tolist())
        seen: list[int] = []
        state: dict[str, Any] | None = None
        for world_size, n_steps in ((4, stops[0]), (2, stops[1]), (8, TOY_TRAIN)):
            batch_size = int(rng.integers(1, 9))
            states = []
            for rank in range(world_size):
                loader = shared_daemon.loader(
                    batch_size=batch_size, rank=rank, world_size=world_size, **recipe
                )
                if state is not None:
                    loader.load_state_dict(json.loads(json.dumps(state)))
                for batch in itertools.islice(loader.batches(), n_steps):
                    for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                        assert torch.equal(image, whole[index])
                        seen.append(index)
                states.append(loader.state_dict())
                loader.close()
            state = states[-1]
        assert sorted(seen) == list(range(TOY_TRAIN))
        assert state is not None
        assert (state["epoch"], state["offset"]) == (1, 0)


# --- a client that does nothing for long -------------------------------------------------------


@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_a_client_that_keeps_the_interpreter_to_itself_is_not_given_up(
    shared_daemon: Daemon, transport: str
) -> None:
    """C code that holds the GIL: no thread of the client runs. Over TCP for longer than the
    heartbeat waits, which libzmq's own thread answers."""
    code = """
import ctypes, sys, fastaa
where = {"runtime_dir": sys.argv[1]} if sys.argv[2] == "local" else {
    "address": sys.argv[3], "token": "the-token-of-the-tests"}
loader = fastaa.Loader("toy", batch_size=20, output="numpy", **where)
batches = loader.batches()
seen = next(batches).indices.tolist()
# PyDLL calls without letting go of the GIL.
ctypes.PyDLL(None).usleep(int(float(sys.argv[4]) * 1e6))
for batch in batches:
    seen += batch.indices.tolist()
print(sorted(seen) == list(range(1000)))
"""
    seconds = 2 if transport == "local" else 17
    where = (shared_daemon.runtime_dir, transport, shared_daemon.address, seconds)
    out, errors = python(code, *where).communicate(timeout=90)
    assert (out, errors) == ("True\n", "")
