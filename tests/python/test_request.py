"""Requests, states and digests as values; no daemon needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import pytest
from fastaa import _digest, _hello, _request, _state
from support import python
from test_lease import WELCOME

ARGUMENTS: dict[str, Any] = {
    "dataset": "toy",
    "split": "train",
    "batch_size": 8,
    "seed": 0,
    "rank": None,
    "world_size": None,
    "group": None,
    "mode": "shard",
    "drop_last": False,
    "shuffle": True,
    "recipe": "{}",
    "n_slots": 0,
}


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def request(**changes: Any) -> Any:
    return _request.stream_request(**{**ARGUMENTS, **changes})


def test_rank_and_group_come_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (request().rank, request().world_size, request().group) == (0, 1, "")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-7")
    assert (request().rank, request().world_size, request().group) == (2, 4, "run-7")
    given = request(rank=1, world_size=2, group="mine")
    assert (given.rank, given.world_size, given.group) == (1, 2, "mine")
    broadcast = request(mode="broadcast")
    assert (broadcast.rank, broadcast.world_size) == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert request().group.startswith("torchrun-")


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"batch_size": True},
        {"seed": -1},
        {"seed": 1 << 64},
        {"rank": 1},
        {"rank": 2, "world_size": 2},
        {"mode": "scatter"},
        {"mode": []},
        {"mode": {}},
        {"dataset": 3},
        {"dataset": None},
        {"split": ["train"]},
        {"group": 0},
        {"group": []},
        {"n_slots": -1},
        {"n_slots": None},
        {"batch_size": "8"},
        {"batch_size": np.True_},
        {"batch_size": [8]},
        {"batch_size": 10**5000},
        {"seed": 1.0},
        {"seed": np.float64(1)},
        {"rank": True, "world_size": 2},
        {"rank": [], "world_size": 2},
        {"drop_last": "false"},
        {"drop_last": None},
        {"shuffle": 1},
        {"shuffle": np.ones(2)},
    ],
)
def test_refuses_values_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(fastaa.InvalidRequestError) as caught:
        request(**changes)
    assert isinstance(caught.value, ValueError)
    assert next(iter(changes)) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_numpys_values_are_as_good_as_pythons() -> None:
    exact = request(batch_size=np.int32(8), seed=np.uint64(7), drop_last=np.True_)
    assert [type(value) for value in (exact.batch_size, exact.seed, exact.drop_last)] == [
        int,
        int,
        bool,
    ]
    assert exact == request(batch_size=8, seed=7, drop_last=True)


@pytest.mark.parametrize(("name", "missing"), [("WORLD_SIZE", "RANK"), ("RANK", "WORLD_SIZE")])
def test_half_of_torchruns_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    monkeypatch.setenv(name, "4")
    with pytest.raises(fastaa.InvalidRequestError, match="belong together") as caught:
        request()
    assert f"{name}='4' but no {missing}" in str(caught.value)
    given = request(rank=1, world_size=2)
    assert (given.rank, given.world_size) == (1, 2)
    # There are no shares there.
    assert request(mode="broadcast").world_size == 1
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(fastaa.InvalidRequestError, match="RANK in the environment=5"):
        request()


def test_recipe_overrides_and_policy(tmp_path: Path) -> None:
    assert json.loads(_request.recipe("active", {"hflip": False})) == {
        "policy": "active",
        "hflip": False,
    }
    assert json.loads(_request.recipe(None, {})) == {}
    path = tmp_path / "policy.json"
    assert json.loads(_request.recipe(path, {})) == {"policy": str(path)}
    assert fastaa.Loader.__init__.__kwdefaults__["policy"] is None
    with pytest.raises(fastaa.InvalidRequestError, match="recipe"):
        _request.recipe("none", {"normalize": np.ones(3)})


@pytest.mark.parametrize(
    ("policy", "sent"),
    [
        ("policy.json", "{cwd}/policy.json"),
        (" ./policy", "{cwd}/policy"),
        ("policies/new.JSON", "{cwd}/policies/new.JSON"),
        ("../policy.json", "{parent}/policy.json"),
        (Path("policy"), "{cwd}/policy"),
        ("/etc/policy.json", "/etc/policy.json"),
        ("policy.json@3", "policy.json@3"),
        ("toy@7", "toy@7"),
        ("active", "active"),
        ("randaugment(2,9)", "randaugment(2,9)"),
        ("id:" + "0f" * 16, "id:" + "0f" * 16),
    ],
)
def test_a_policys_path_is_sent_absolute_and_a_name_as_it_is(
    policy: Any, sent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sent = sent.format(cwd=tmp_path, parent=tmp_path.parent)
    assert json.loads(_request.recipe(policy, {})) == {"policy": sent}


@pytest.mark.parametrize("policy", [3, ["active"], b"active", True])
def test_a_policy_that_is_no_string_is_refused(policy: Any) -> None:
    with pytest.raises(fastaa.InvalidRequestError, match="policy="):
        _request.recipe(policy, {})


def test_tcp_wants_an_address_and_a_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    for token in ("secret", file, str(file)):
        target = _request.target(None, "tcp://127.0.0.1:1", token, "numpy", None)
        assert target.token == "secret"
    for address, token in (("udp://x", "secret"), ("tcp://x:1", None), (None, "secret")):
        with pytest.raises(fastaa.InvalidRequestError):
            _request.target(None, address, token, "numpy", None)
    for unreadable in (tmp_path / "absent", tmp_path, binary_file(tmp_path)):
        with pytest.raises(fastaa.InvalidRequestError, match="token file"):
            _request.target(None, "tcp://x:1", unreadable, "numpy", None)
    for token in (3, b"secret", []):
        with pytest.raises(fastaa.InvalidRequestError, match="token="):
            _request.target(None, "tcp://x:1", token, "numpy", None)


def binary_file(directory: Path) -> Path:
    path = directory / "binary"
    path.write_bytes(b"\xff\xfe\xff")
    return path


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:abc",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:" + "9" * 5000,
        "tcp://127.0.0.1:1\n",
        "tcp://:1",
        "tcp://*:1",
        "tcp://a b:1",
        "tcp://\udc80:1",
        "ipc:///tmp/socket",
        b"tcp://127.0.0.1:1",
        ("127.0.0.1", 1),
        1,
        [],
    ],
)
def test_a_malformed_address_is_refused_in_words(address: Any) -> None:
    with pytest.raises(fastaa.InvalidRequestError, match="address="):
        fastaa.Loader("toy", address=address, token="x")


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:1", "tcp://some-host.org:65535", "tcp://[::1]:7"]
)
def test_a_good_address_is_taken_as_it_is(address: str) -> None:
    assert _request.target(None, address, "x", "numpy", None).address == address


@pytest.mark.parametrize(
    "arguments",
    [
        {"runtime_dir": 3},
        {"runtime_dir": b"/tmp"},
        {"runtime_dir": "/tmp/\0"},
        {"output": []},
        {"output": np.ones(2)},
        {"dataset": "\ud800"},
        {"dataset": "x" * 100_000},
        {"dtype": np.float32},
        {"crop": {"kind": {1, 2}}},
    ],
)
def test_whatever_is_wrong_is_an_error_of_this_package(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(fastaa.Error) as caught:
        fastaa.Loader(**{"dataset": "toy", "runtime_dir": tmp_path, **arguments})
    assert arguments.keys() & {"runtime_dir"} or isinstance(
        caught.value, fastaa.InvalidRequestError
    )


def test_what_libzmq_refuses_is_an_error_of_this_package() -> None:
    target = _request.Target(Path(), "tcp://127.0.0.1", "x")
    with pytest.raises(fastaa.DaemonNotRunning, match="cannot be connected"):
        target.connect(request())


def test_the_runtime_directory_follows_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAA_RUNTIME_DIR", "/a")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/b")
    assert _hello.runtime_dir_of("/given") == Path("/given")
    assert _hello.runtime_dir_of(None) == Path("/a")
    monkeypatch.delenv("FASTAA_RUNTIME_DIR")
    assert _hello.runtime_dir_of(None) == Path("/b/fastaa")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert _hello.runtime_dir_of(None) == Path("/run/fastaa")
    monkeypatch.setattr("os.geteuid", lambda: 123456)
    assert _hello.runtime_dir_of(None) == Path("/tmp/fastaa-123456")


def test_a_state_is_small_and_comes_back() -> None:
    stream = request(dataset="d" * 128, split="s" * 64)
    position = _state.Position(1 << 39, 77, 9, "p" * 128 + "@123", (1 << 64) - 1, 0)
    state = _state.state_of(position, stream, WELCOME._replace(fingerprint="f" * 64))
    assert len(json.dumps(state)) <= 1024
    restored = json.loads(json.dumps(state))
    assert _state.position_of(restored, stream, WELCOME._replace(fingerprint="f" * 64)) == position


def test_a_state_of_another_stream_is_refused() -> None:
    stream = request()
    state = _state.state_of(_state.Position(offset=8), stream, WELCOME)
    for other, welcome, word in (
        (request(seed=1), WELCOME, "seed"),
        (request(shuffle=False), WELCOME, "shuffle"),
        (request(drop_last=True), WELCOME, "drop_last"),
        (request(split="test"), WELCOME, "split"),
        (stream, WELCOME._replace(fingerprint="g"), "fingerprint"),
    ):
        with pytest.raises(fastaa.StateError, match=word):
            _state.position_of(state, other, welcome)
    for broken in ({}, {**state, "version": 2}, {**state, "offset": 101}, {**state, "digest": "x"}):
        with pytest.raises(fastaa.StateError):
            _state.position_of(broken, stream, WELCOME)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epoch", value) for value in (-1, 1 << 40, 1 << 64, 1.0, True, "1", None, [])),
        pytest.param("epoch", 10**5000, id="epoch-huge"),
        *(("offset", value) for value in (-1, 101, 8.0, True, "8", None, float("nan"))),
        *(("step", value) for value in (-1, 9, 1 << 80, 1.0, True, "1", None)),
        *(("digest_since", value) for value in (-1, 9, 0.0, False, "0", None)),
        *(("policy", value) for value in (None, 3, b"none", ["none"], "x" * 4097, "\ud800")),
        *(("digest", value) for value in (None, 0, "0" * 15, "0" * 17, "0x" + "0" * 14, "_" * 16)),
        *(("digest_of", value) for value in (None, 3, "abc", [], [0, 1], [0, 1, "0"], [True] * 3)),
        *(("version", value) for value in (0, 2, True, 1.0, "1", [])),
        *(("seed", value) for value in (1, 0.0, False, "0", None, np.ones(2))),
        *(("shuffle", value) for value in (1, "True", None)),
        *(("dataset", value) for value in (3, None, ["toy"], np.ones(2))),
    ],
)
def test_a_damaged_state_says_what_is_wrong_and_changes_nothing(key: str, value: Any) -> None:
    stream = request()
    state = _state.state_of(_state.Position(offset=8, step=1, policy="none"), stream, WELCOME)
    loader = fastaa.Loader.__new__(fastaa.Loader)
    loader._connection, loader._request, loader._welcome = None, stream, WELCOME
    loader._position = before = _state.Position(epoch=3)
    for damaged in ({**state, key: value}, {k: v for k, v in state.items() if k != key}):
        with pytest.raises(fastaa.StateError) as caught:
            loader.load_state_dict(damaged)
        assert key in str(caught.value) or key == "version"
        assert len(str(caught.value)) < 400
        assert loader._position is before


def test_a_state_may_name_a_policy_as_the_daemon_likes() -> None:
    stream = request()
    for policy in ("id:" + "0123456789abcdef" * 2, "toy@3", "/" + "p" * 4095, ""):
        position = _state.Position(offset=8, step=1, policy=policy)
        state = json.loads(json.dumps(_state.state_of(position, stream, WELCOME)))
        assert _state.position_of(state, stream, WELCOME) == position
    numpys = {**state, "epoch": np.int64(5), "offset": np.int32(8), "seed": np.uint8(0)}
    assert _state.position_of(numpys, stream, WELCOME) == position._replace(epoch=5)


def test_a_finished_epoch_resumes_as_the_next_one() -> None:
    stream = request()
    finished = _state.Position(epoch=4, offset=100, is_complete=True, policy="p@1", digest=5)
    state = _state.state_of(finished, stream, WELCOME)
    assert _state.position_of(state, stream, WELCOME) == _state.Position(epoch=5)
    # Eight samples at a time left four over; sixteen at a time have no step for them.
    dropping = request(drop_last=True, batch_size=16)
    state = _state.state_of(_state.Position(epoch=4, offset=96), dropping, WELCOME)
    assert _state.position_of(state, dropping, WELCOME) == _state.Position(epoch=5)


def test_the_digest_goes_on_only_for_the_same_share() -> None:
    position = _state.Position(epoch=1, offset=32, step=2, digest=99)
    alone = request()
    state = _state.state_of(position, alone, WELCOME)
    assert _state.position_of(state, request(batch_size=5), WELCOME).digest == 99
    other = _state.position_of(state, request(rank=0, world_size=2), WELCOME)
    assert (other.digest, other.digest_since, other.offset) == (0, 32, 32)
    state = _state.state_of(position, request(rank=0, world_size=2), WELCOME)
    assert _state.position_of(state, request(rank=0, world_size=2), WELCOME).digest == 99
    assert _state.position_of(state, request(rank=1, world_size=2), WELCOME).digest == 0


def test_splitmix64_gives_the_known_answers() -> None:
    """The first three numbers of Vigna's splitmix64.c from the state 1234567."""
    gamma = 0x9E37_79B9_7F4A_7C15
    states = np.array([(1234567 + k * gamma) & ((1 << 64) - 1) for k in range(3)], np.uint64)
    assert _digest.splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_digests_add_up_in_any_order() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(200_000)
    parts = np.array_split(order, 7)
    total = 0
    for part in parts:
        total = _digest.add(total, _digest.digest_of(part))
    assert total == _digest.digest_of_first(200_000)
    assert total != _digest.digest_of_first(199_999)
    twice = np.concatenate([order[:-1], order[:1]])
    assert _digest.digest_of(twice) != total


def test_importing_has_no_side_effects() -> None:
    """No torch, no threads, no sockets, no environment: `-W error -X dev` stays quiet, too."""
    code = """
import sys, threading
before = threading.active_count()
import fastaa
assert "torch" not in sys.modules
assert threading.active_count() == before
"""
    process = python(code)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
