"""What goes wrong is told in words, and what can go on goes on exactly."""

from __future__ import annotations

import contextlib
import pickle
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastaa
import pytest
from fastaa import _hello
from support import TOY_TRAIN, Daemon, python, wait_until

BATCH = 20


def take(batches: Any, n_batches: int) -> list[int]:
    return [index for _ in range(n_batches) for index in next(batches).indices.tolist()]


def drain(batches: Any) -> tuple[list[int], fastaa.Error | None]:
    """All that comes, and the error that ended it."""
    seen: list[int] = []
    try:
        for batch in batches:
            seen += batch.indices.tolist()
    except fastaa.Error as error:
        return seen, error
    return seen, None


def test_a_missing_daemon_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(fastaa.DaemonNotRunning) as caught:
        fastaa.Loader("toy", runtime_dir=tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "hello.sock") in text
    assert "fastaa-loaderd --config" in text
    assert isinstance(caught.value, ConnectionError)


def test_a_path_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    with pytest.raises(fastaa.InvalidRequestError, match="shorter runtime_dir"):
        fastaa.Loader("toy", runtime_dir=tmp_path / ("x" * 120))


@pytest.fixture
def full_listener(tmp_path: Path) -> Iterator[tuple[Path, socket.socket]]:
    """A socket whose queue of connections is full, as that of a daemon under a burst of clients."""
    path = tmp_path / "hello.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(path))
        listener.listen(0)
        while True:
            other = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            other.setblocking(False)
            try:
                other.connect(str(path))
            except BlockingIOError:
                break
        yield path, listener


def test_a_full_queue_of_connections_is_waited_for(
    full_listener: tuple[Path, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, listener = full_listener
    pauses: list[float] = []

    def serve_one_at_the_third(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            listener.accept()[0].close()

    monkeypatch.setattr(_hello, "_pause", serve_one_at_the_third)
    with _hello.connect_socket(path, socket.SOCK_SEQPACKET) as connection:
        assert connection.getpeername() == str(path)
    assert len(pauses) == 3
    assert 0 < pauses[0] < pauses[1] < pauses[2] < 1


def test_the_wait_for_a_full_queue_ends(
    full_listener: tuple[Path, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hello, "ANSWER_SECONDS_MAX", 0.1)
    started = time.monotonic()
    with pytest.raises(fastaa.DaemonNotRunning, match="accepts no connection"):
        fastaa.Loader("toy", runtime_dir=full_listener[0].parent)
    assert 0.1 <= time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("arguments", "kind", "word"),
    [
        ({"dataset": "toi"}, fastaa.NotFoundError, "toi"),
        ({"split": "validation"}, fastaa.NotFoundError, "validation"),
        ({"batch_size": 0}, fastaa.InvalidRequestError, "batch_size"),
        ({"n_slots": 100_000}, fastaa.InvalidRequestError, "n_slots"),
        ({"hflop": True}, fastaa.InvalidRequestError, "hflop"),
        ({"dtype": "f64"}, fastaa.InvalidRequestError, "f64"),
        ({"crop": {"kind": "magic"}}, fastaa.InvalidRequestError, "magic"),
        ({"device": "mps"}, fastaa.UnsupportedError, "mps"),
        ({"device": "gpu"}, fastaa.InvalidRequestError, "gpu"),
        ({"device": "cuda:0", "output": "numpy"}, fastaa.InvalidRequestError, "numpy"),
        ({"output": "jax"}, fastaa.InvalidRequestError, "jax"),
    ],
)
def test_a_request_that_cannot_be_served(
    shared_daemon: Daemon, arguments: dict[str, Any], kind: type[fastaa.Error], word: str
) -> None:
    with pytest.raises(kind) as caught:
        shared_daemon.loader(**{"dataset": "toy", **arguments})
    assert word in str(caught.value)


def test_an_unknown_policy_is_told_at_the_latest_when_an_epoch_begins(
    shared_daemon: Daemon,
) -> None:
    with pytest.raises((fastaa.NotFoundError, fastaa.InvalidRequestError)) as caught:
        next(iter(shared_daemon.loader(policy="no-such-policy@7")))
    assert "no-such-policy" in str(caught.value)


def test_a_killed_daemon_is_told_and_the_epoch_goes_on_exactly(daemon: Daemon) -> None:
    """Guarantee 2: nothing is lost and nothing comes twice, over a crash in mid-epoch."""
    loader = daemon.loader(reconnect_seconds=0, batch_size=BATCH, policy="trivial-wide")
    loader.set_epoch(1)
    batches = loader.batches()
    seen = take(batches, 7)
    kept = loader.state_dict()
    daemon.kill()
    # What had arrived may still be yielded; then the death is told.
    more, error = drain(batches)
    assert isinstance(error, fastaa.DaemonGone)
    assert "again" in str(error)
    seen += more
    with pytest.raises(fastaa.DaemonNotRunning):
        next(iter(loader))
    daemon.start()
    for batch in loader.batches():
        seen += batch.indices.tolist()
        assert (batch.epoch, batch.policy) == (1, "trivial-wide")
    assert sorted(seen) == list(range(TOY_TRAIN))
    assert loader.epoch_digest == loader.expected_digest(1)
    resumed = daemon.loader(batch_size=BATCH, policy="trivial-wide")
    resumed.load_state_dict(kept)
    again, error = drain(resumed.batches())
    assert error is None
    assert again == seen[7 * BATCH :]


def test_a_daemon_that_stops_says_goodbye(daemon: Daemon) -> None:
    loader = daemon.loader(reconnect_seconds=0, batch_size=BATCH)
    batches = loader.batches()
    seen = take(batches, 3)
    daemon.signal(signal.SIGTERM)
    more, error = drain(batches)
    while error is None:
        # The epoch was over before the daemon noticed the signal.
        seen = []
        more, error = drain(loader.batches())
    seen += more
    assert isinstance(error, fastaa.DaemonStopping), repr(error)
    daemon.wait()
    daemon.start()
    rest, error = drain(loader.batches())
    assert error is None
    assert sorted(seen + rest) == list(range(TOY_TRAIN))


def test_a_death_between_two_epochs_is_told_at_the_next(daemon: Daemon) -> None:
    loader = daemon.loader(reconnect_seconds=0, batch_size=BATCH)
    first, error = drain(loader.batches())
    assert (len(first), error) == (TOY_TRAIN, None)
    daemon.kill()
    with pytest.raises(fastaa.DaemonGone):
        next(iter(loader))
    daemon.start()
    second, error = drain(loader.batches())
    assert (len(second), error) == (TOY_TRAIN, None)
    assert loader.epoch == 2


def test_another_dataset_under_the_same_name_is_refused(daemon: Daemon) -> None:
    loader = daemon.loader(reconnect_seconds=0, batch_size=BATCH)
    batches = loader.batches()
    take(batches, 2)
    daemon.kill()
    labels = daemon.directory / "toy" / "train-labels-idx1-ubyte"
    images = daemon.directory / "toy" / "train-images-idx3-ubyte"
    n_samples = TOY_TRAIN - 1
    count = n_samples.to_bytes(4, "big")
    labels.write_bytes(labels.read_bytes()[:4] + count + labels.read_bytes()[8:-1])
    data = images.read_bytes()
    images.write_bytes(data[:4] + count + data[8 : -28 * 28])
    drain(batches)
    daemon.start()
    with pytest.raises(fastaa.DataError, match="changed"):
        next(iter(loader))


def test_ctrl_c_ends_the_wait_at_once_and_loses_nothing(daemon: Daemon) -> None:
    code = """
import sys, fastaa
loader = fastaa.Loader("toy", batch_size=20, runtime_dir=sys.argv[1], output="numpy")
seen = []
def drain(batches):
    for batch in batches:
        seen.extend(batch.indices.tolist())
batches = loader.batches()
seen += next(batches).indices.tolist()
print("ready", flush=True)
sys.stdin.readline()
try:
    drain(batches)
except KeyboardInterrupt:
    print("interrupted", flush=True)
drain(loader.batches())
print(sorted(seen) == list(range(1000)), loader.epoch, flush=True)
"""
    process = python(code, daemon.runtime_dir)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    # A stopped daemon sends no more than what is on its way, which is no whole epoch.
    daemon.signal(signal.SIGSTOP)
    process.stdin.write("go\n")
    process.stdin.flush()
    wait_until_asleep(process.pid)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    assert time.monotonic() - sent < 2
    daemon.signal(signal.SIGCONT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "True 1\n", "")


def wait_until_asleep(pid: int) -> None:
    """Until the process waits for something, for a tenth of a second on end."""
    deadline = time.monotonic() + 30
    since = time.monotonic()
    while time.monotonic() - since < 0.1:
        assert time.monotonic() < deadline
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state != "S":
            since = time.monotonic()
        time.sleep(0.002)


def test_two_threads_on_one_loader_and_a_close_under_a_wait(daemon: Daemon) -> None:
    loader = daemon.loader(batch_size=BATCH)
    daemon.signal(signal.SIGSTOP)
    caught: list[BaseException] = []

    def consume() -> None:
        try:
            for _ in loader:
                pass
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not loader._busy.locked():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    # The waiting thread's iteration is the one that runs, so this one never gets its turn.
    with pytest.raises(fastaa.UsageError, match="two threads"):
        loader._next(loader._iteration)
    loader.close()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(caught[0], fastaa.UsageError)
    assert "closed" in str(caught[0])
    daemon.signal(signal.SIGCONT)


def test_a_daemon_without_file_descriptors_refuses_and_serves_on(daemon: Daemon) -> None:
    """libzmq would end the process that has none left for a connection."""
    assert daemon.process is not None
    # 128 for itself, and 7 for each consumer (`limits.rs`).
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (170, 170))
    loaders = [daemon.loader(batch_size=BATCH) for _ in range(6)]
    for loader in loaders:
        next(loader.batches())
    with pytest.raises(fastaa.ExhaustedError, match="6 clients are connected") as caught:
        daemon.loader(batch_size=BATCH)
    assert "limit of open files" in str(caught.value)
    for loader in loaders:
        assert len(drain(loader.batches())[0]) == TOY_TRAIN - BATCH
    loaders.pop().close()
    wait_until(lambda: len(daemon.streams()) == 5, "one has left")
    assert len(drain(daemon.loader(batch_size=BATCH).batches())[0]) == TOY_TRAIN


def test_a_client_without_file_descriptors_says_so(shared_daemon: Daemon) -> None:
    code = """
import resource, sys, fastaa
first = fastaa.Loader("toy", batch_size=20, runtime_dir=sys.argv[1], output="numpy")
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
more = []
try:
    while True:
        more.append(fastaa.Loader("toy", batch_size=20, runtime_dir=sys.argv[1], output="numpy"))
except fastaa.Error as error:
    print(type(error).__name__, "ulimit -n" in str(error))
print(sum(len(labels) for _, labels in first))
"""
    out, errors = python(code, shared_daemon.runtime_dir).communicate(timeout=60)
    kind, is_named = out.splitlines()[0].split()
    assert kind == "ExhaustedError", (out, errors)
    assert is_named == "True", (out, errors)
    assert out.splitlines()[1] == "1000"


def test_a_loader_is_not_pickled(shared_daemon: Daemon) -> None:
    with pytest.raises(fastaa.UsageError, match="each process"):
        pickle.dumps(shared_daemon.loader(batch_size=BATCH))


def test_a_changed_recipe_is_named(daemon: Daemon) -> None:
    loader = daemon.loader(batch_size=BATCH, reconnect_seconds=0)
    take(loader.batches(), 2)
    daemon.kill()
    daemon.config.write_text(daemon.config.read_text().replace("hflip = false", "hflip = true"))
    drain(loader.batches())
    daemon.start()
    with pytest.raises(fastaa.DataError, match="hflip was False and is True"):
        next(iter(loader))
