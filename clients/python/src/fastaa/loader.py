"""`Loader`: the batches of one dataset split, an epoch per `for`.

Owns the position: which epoch, how many of its samples were yielded, under which policy, and the
digest of what was received. A connection may come and go; the position stays, and a new connection
goes on from it.

*Invariant*: the position counts batches that were *yielded*. What the daemon prefetched is not in
it, and is delivered again after a resume.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from . import _device, _digest, _messages, _reconnect, _request, _state, _stream
from ._arrays import ArrayMaker
from ._batch import Batch
from ._connection import Connection, Delivery, Event
from ._state import Position
from .errors import (
    AllSlotsHeldWarning,
    DaemonGone,
    DaemonStopping,
    DataError,
    Error,
    GpuFailedError,
    ProtocolError,
    ReplayWarning,
    UsageError,
)

_T = TypeVar("_T")


class Loader:
    """Streams policy-augmented batches of a dataset split from the fastaa-loaderd of this host.

    ::

        loader = fastaa.Loader("fashion-mnist", split="train", batch_size=256)
        for epoch in range(3):
            for images, labels in loader:
                ...

    Each `for` runs one epoch. After a `break`, the next `for` goes on with the same epoch at the
    same position; `set_epoch` restarts. Tensors are views of shared memory: a batch's place is
    free again when its last tensor, view or slice is gone, and in-place operations are harmless.

    Not for several threads at once; and after a fork the child needs a loader of its own.

    Args:
        dataset: Name in the daemon's configuration.
        split: `"train"`, `"test"`, …
        batch_size: Samples per rank and step.
        seed: Keys the order and every random draw, 0 to 2^64 - 1.
        rank: This consumer's place. Default: torchrun's `RANK`, else 0.
        world_size: Ranks that share each global batch. Default: torchrun's `WORLD_SIZE`, else 1.
        group: The run whose ranks agree on each epoch's policy. Default: torchrun's run id, else
            this connection alone. The name stands for one run: whoever uses it again, a resumed
            run above all, gets the policy that this run had in each epoch. A new run takes a new
            name.
        mode: `"shard"`: the ranks share the epoch. `"broadcast"`: each sees all of it, and members
            of one `group` with equal arguments read batches that are made once, if they are not
            over TCP, nor further apart than 128 MiB of batches, or 256 batches.
        drop_last: Drop an epoch's last, incomplete global batch.
        shuffle: A new keyed permutation each epoch, or index order.
        policy: `"active"` (the one that the daemon's search published last), `"none"`, a built-in's
            name, `"NAME@VERSION"`, or a policy file's path: a `pathlib.Path`, or a string with a
            `/` in it or `.json` at its end; relative to this process's working directory. Default:
            `policy` under `[stream.defaults]` in the daemon's configuration, which is `"active"`
            unless it says something else.
        device: `"cuda:0"`, …: images and labels come as tensors on that GPU, for the stream that is
            current when a batch is taken. Another one that uses a batch must be done with it before
            its tensors are dropped (`record_stream` does nothing for memory that is not PyTorch's),
            and other processes get clones. `indices` stay on the host. The daemon puts them there
            if it shares memory of the GPU with this process; else they are copied beside the
            computation, with one `GpuCopyWarning`. `"auto"`: the current GPU if there is one and
            `output="torch"`. Default: they stay in shared memory. Batches that a broadcast group
            shares, and those over TCP, are copied while the program waits.
        runtime_dir: Where the daemon's sockets are. Default: `$FASTAA_RUNTIME_DIR`, else
            `$XDG_RUNTIME_DIR/fastaa`, else `/run/fastaa` for root, else `/tmp/fastaa-UID`.
        output: `"torch"` tensors or `"numpy"` arrays (then torch is never imported).
        address: `"tcp://HOST:PORT"` of the daemon, instead of `runtime_dir`.
        token: The TCP token, or the path of the file that holds it.
        total_epochs: Epochs of the whole run, if known. Near its end the run keeps its policy,
            whatever the search publishes (`search.freeze_last` in the daemon's configuration).
        n_slots: Batches that fit into shared memory; 0 lets the daemon choose.
        reconnect_seconds: How long to wait, with one warning, for a daemon that is being restarted;
            the loader then goes on at the same sample. 0 raises at once. The first connection, of
            this constructor, is never waited for.
        recipe_overrides: Keys of `[stream.defaults]` to override: `crop`, `hflip`, `cutout`,
            `normalize`, `dtype`, `layout`, …

    Raises:
        fastaa.Error: Of the subclass that says what is wrong; its text says what to do.
    """

    def __init__(
        self,
        dataset: str,
        *,
        split: str = "train",
        batch_size: int = 256,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        group: str | None = None,
        mode: str = "shard",
        drop_last: bool = False,
        shuffle: bool = True,
        policy: str | os.PathLike[str] | None = None,
        device: object = None,
        runtime_dir: str | os.PathLike[str] | None = None,
        output: str = "torch",
        address: str | None = None,
        token: str | os.PathLike[str] | None = None,
        n_slots: int = 0,
        total_epochs: int | None = None,
        reconnect_seconds: float = 60.0,
        **recipe_overrides: Any,
    ) -> None:
        self._connection: Connection | None = None
        self._closed = False
        self._pid = os.getpid()
        self._request = _request.stream_request(
            dataset=dataset,
            split=split,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            group=group,
            mode=mode,
            drop_last=drop_last,
            shuffle=shuffle,
            recipe=_request.recipe(policy, recipe_overrides, total_epochs),
            n_slots=n_slots,
        )
        if self._request.replay:
            warnings.warn(
                "FASTAA_REPLAY is set: the same few batches come again and again, to measure how "
                "fast a training is without a loader; nothing that is learned from them is of use",
                ReplayWarning,
                stacklevel=2,
            )
        self._copier = _device.copier(device, output)
        self._output = output
        self._target = _request.target(
            runtime_dir, address, token, output, recipe_overrides.get("dtype")
        )
        self._position = Position()
        self._is_started = False
        self._iteration = 0
        self._n_received = 0
        self._busy = threading.Lock()
        self._patience = _reconnect.Patience(
            _request.seconds("reconnect_seconds", reconnect_seconds)
        )
        self._warned = False
        self._finished: Position | None = None
        # The name under which the daemon remembers what this run reports.
        self._run = self._request.group or f"loader-{uuid.uuid4().hex}"
        self._connection = self._target.connect(self._request, self._copier)
        self._welcome = self._connection.welcome
        try:
            self._maker = ArrayMaker(self._welcome, output)
            self._attach(self._connection)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        request = self._request
        policy = self._position.policy or self.recipe.get("policy")
        return (
            f"<fastaa.Loader {request.dataset}/{request.split} batch_size={request.batch_size} "
            f"rank={request.rank}/{request.world_size} epoch={self.epoch} policy={policy!r}"
            f"{' closed' if self._closed else ''}>"
        )

    # --- what the stream is -------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps per epoch; the same for all ranks."""
        n_samples, per_step = self._welcome.n_samples, _state.samples_per_step(self._request)
        return n_samples // per_step if self._request.drop_last else -(-n_samples // per_step)

    @property
    def n_samples(self) -> int:
        """Samples in the split."""
        return self._welcome.n_samples

    @property
    def n_classes(self) -> int | None:
        """Classes of the labels, or `None` if labels are vectors."""
        labels = self._welcome.labels
        return labels.n_classes if isinstance(labels, _messages.ClassLabels) else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image, whatever the layout."""
        return self._welcome.channels, self._welcome.height, self._welcome.width

    @property
    def recipe(self) -> dict[str, Any]:
        """The whole recipe in effect: the daemon's defaults with this loader's overrides."""
        recipe: dict[str, Any] = json.loads(self._welcome.recipe_json)
        return recipe

    @property
    def fingerprint(self) -> str:
        """Identity of the split: of a packed one's content; else of its files' paths, sizes and
        times, so that a copy is another one."""
        return self._welcome.fingerprint

    # --- iteration ----------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or else the one that the next `for` runs."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """The next `for` runs `epoch` from its beginning."""
        epoch = _request.integer("epoch", epoch, 0, _state.EPOCHS_MAX - 1)
        self._move_to(Position(epoch=epoch))

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """One epoch of `(images, labels)`, or the rest of the one under way."""
        return _Pairs(self)

    def batches(self) -> Iterator[Batch]:
        """As iteration, with everything that is known of each batch."""
        return _Batches(self)

    def _begin_iteration(self) -> int:
        self._check_open()
        if self._position.is_complete:
            self._move_to(Position(epoch=self._position.epoch + 1))
        self._iteration += 1
        return self._iteration

    def _move_to(self, position: Position) -> None:
        self._position = position
        self._is_started = False
        self._iteration += 1

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this loader is closed", "make a new fastaa.Loader")
        if os.getpid() != self._pid:
            raise UsageError(
                "this loader belongs to the process that made it, not to its forked child",
                "make a fastaa.Loader of its own in the child, after the fork",
            )

    def _next(self, iteration: int) -> Batch | None:
        """The next batch, or `None` at the epoch's end."""
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "two threads iterate over one loader",
                "make one loader per thread, or share its batches by a queue",
            )
        try:
            self._check_open()
            if iteration != self._iteration:
                raise UsageError(
                    "this iteration is over: the loader was iterated anew, or moved",
                    "a loader runs one iteration at a time; make another one for a second",
                )
            return self._patiently(self._next_in_epoch)
        except BaseException as error:
            # After a failure, or a Ctrl-C between a message's arrival and its effect, nobody
            # knows what the session has delivered. The position is known: a new session goes on.
            if isinstance(error, Error) and not isinstance(error, UsageError):
                self._disconnect(alive=not isinstance(error, DaemonGone | DaemonStopping))
            elif self._connection is not None and self._connection.torn:
                self._disconnect(alive=True)
            raise
        finally:
            self._busy.release()

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, if need be from the daemon that comes after this one."""
        while True:
            try:
                result = call()
            except GpuFailedError as error:
                if self._copier is None or self._copier.uuid is None:
                    raise
                self._disconnect(alive=True)
                self._copier.copies_because(str(error).split("\n", 1)[0])
            except _reconnect.PASSING as error:
                self._disconnect(alive=False)
                if not self._patience.wait(error):
                    raise
                self._check_open()
            else:
                self._patience.reset()
                return result

    def _next_in_epoch(self) -> Batch | None:
        position = self._position
        if position.is_complete:
            self._position = Position(epoch=position.epoch + 1)
            self._is_started = False
            return None
        connection = self._connected()
        if self._copier is not None:
            self._copier.reap()
        if not self._is_started:
            connection.start(position.epoch, position.offset, position.policy)
            self._is_started, self._n_received = True, 0
        while True:
            message = connection.receive()
            batch = self._take(connection, message)
            connection.torn = False
            if batch is not None:
                return batch
            if self._position.is_complete:
                return self._next_in_epoch()

    def _take(self, connection: Connection, message: Event) -> Batch | None:
        """Lets a message take effect."""
        if isinstance(message, Delivery):
            return self._take_batch(connection, message)
        if message.epoch != self._position.epoch:
            raise ProtocolError(
                f"the daemon speaks of epoch {message.epoch} in epoch {self._position.epoch}"
            )
        if isinstance(message, _messages.EpochBegin):
            self._position = self._position._replace(policy=message.policy)
        elif message.n_steps != self._n_received:
            raise ProtocolError(
                f"the daemon sent {message.n_steps} batches, {self._n_received} came"
            )
        else:
            self._complete(self._position)
        return None

    def _take_batch(self, connection: Connection, delivery: Delivery) -> Batch:
        position, descriptor = self._position, delivery.descriptor
        if (
            descriptor.epoch != position.epoch
            or descriptor.step != self._n_received
            or descriptor.next_offset <= position.offset
        ):
            raise ProtocolError(
                f"batch {descriptor.step} of epoch {descriptor.epoch}, up to sample "
                f"{descriptor.next_offset}, came where batch {self._n_received} of epoch "
                f"{position.epoch} after sample {position.offset} belongs"
            )
        stream = 0 if self._copier is None else self._copier.stream()
        root, copied, on_gpu = connection.lend(delivery, stream)
        if copied and not self._warned:
            self._warned = True
            warnings.warn(
                f"the program keeps {self._welcome.n_slots - 1} of {self._welcome.n_slots} batches "
                "alive, so further ones are copied; drop batches when they are done with, or "
                "pass n_slots= to keep more",
                AllSlotsHeldWarning,
                stacklevel=7,
            )
        if self._copier is not None and on_gpu is not None:
            slot = self._copier.flat(on_gpu, copied=copied)
            arrays = self._maker.on_gpu(root, slot, descriptor.n_samples)
            del slot
        else:
            arrays = self._maker.arrays(root, descriptor.n_samples)
            if self._copier is not None:
                arrays = self._copier.move(arrays)
        # A skipped sample was visited, too.
        self._n_received += 1
        position = position.after(descriptor.next_offset, arrays.places)
        batch = Batch(
            arrays.images,
            arrays.labels,
            arrays.indices,
            descriptor.epoch,
            position.step - 1,
            descriptor.policy_id.hex(),
            descriptor.policy_version,
            position.policy,
            descriptor.n_global,
            len(arrays.places) - len(arrays.indices),
        )
        if descriptor.last:
            self._complete(position)
        else:
            self._position = position
        return batch

    def _complete(self, position: Position) -> None:
        self._position = position.settled()._replace(is_complete=True)
        self._finished = self._position

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as at most 1 kB of JSON: batches yielded, not those prefetched.

        Any rank's state serves all ranks; world size and batch size may be others on resume.
        """
        return _state.state_of(self._position, self._request, self._welcome)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next `for` goes on where `state` was taken.

        Raises `StateError`, and changes nothing, if `state` is damaged or of another stream.
        """
        self._move_to(_state.position_of(state, self._request, self._welcome))
        self._finished = None

    @property
    def epoch_digest(self) -> str | None:
        """Digest of the samples that came in the last finished epoch; `None` before the first.

        Sixteen hexadecimal digits; the order of the samples does not matter. Equal to
        `expected_digest` of that epoch if every sample came exactly once. It counts what was
        yielded: a Ctrl-C may keep a batch from the program that the loader has yielded.
        """
        return None if self._finished is None else _digest.to_text(self._finished.digest)

    def expected_digest(self, epoch: int) -> str:
        """What `epoch_digest` must be after `epoch`.

        If another rank's state was loaded in the epoch, both count from there on.
        """
        epoch = _request.integer("epoch", epoch, 0, _state.EPOCHS_MAX - 1)
        since = 0
        for position in (self._finished, self._position):
            if position is not None and position.epoch == epoch:
                since = position.digest_since
                break
        request, per_step = self._request, _state.samples_per_step(self._request)
        is_alone = per_step == request.batch_size
        is_whole = not request.drop_last or self._welcome.n_samples % per_step == 0
        if since == 0 and is_alone and is_whole:
            return _digest.to_text(_digest.digest_of_first(self._welcome.n_samples))
        return self._patiently(lambda: self._target.expected_digest(request, epoch, since))

    def report(self, *, accuracy: float) -> None:
        """Tells the daemon how good the model is after the last finished epoch.

        `accuracy` is any metric on clean validation data that is higher for better models; report
        it after each epoch. If it falls by more than its noise after the run has switched to a
        policy of the daemon's search, the daemon goes back to the policy before. In a group one
        rank's report is enough.
        """
        if self._finished is None or not self._finished.policy:
            raise UsageError(
                "no epoch was finished yet, so there is nothing to report",
                "call report after the loop over an epoch's batches",
            )
        finished, number = self._finished, _request.metric("accuracy", accuracy)
        self._patiently(
            lambda: self._target.report(
                self._request.dataset, self._run, finished.epoch, finished.policy, number
            )
        )

    # --- connection ---------------------------------------------------------------------------

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = self._target.connect(self._request, self._copier)
            if _stream.identity(connection.welcome) != _stream.identity(self._welcome):
                connection.close()
                changes = _stream.changes(self._welcome, connection.welcome)
                raise DataError(
                    f"{self._request.dataset}/{self._request.split} or its recipe has changed "
                    f"since this loader was made: {changes}",
                    "start the daemon with the old configuration and files and iterate again, or "
                    "make a new fastaa.Loader",
                )
            self._connection, self._is_started = connection, False
            # What a stream is stays; where its parts lie in a slot may be another matter now.
            self._welcome = connection.welcome
            self._maker = ArrayMaker(connection.welcome, self._output)
            self._attach(connection)
            if self._closed:
                self._disconnect(alive=True)
                self._check_open()
            return connection
        return self._connection

    def _attach(self, connection: Connection) -> None:
        if self._copier is not None:
            self._copier.attach(connection.memory, connection.welcome.n_slots)

    def _disconnect(self, *, alive: bool) -> None:
        connection, self._connection = self._connection, None
        self._is_started = False
        if connection is not None:
            connection.close(alive=alive)
        if self._copier is not None:
            self._copier.drain()

    def close(self) -> None:
        """Ends the session with the daemon. Batches that are still held stay valid. Idempotent."""
        self._closed = True
        self._patience.stop()
        self._disconnect(alive=True)

    def __reduce__(self) -> Any:
        raise UsageError(
            "a loader belongs to the process that made it, and cannot be pickled",
            "make a fastaa.Loader of its own in each process",
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batches(Iterator[Batch]):
    """The rest of an epoch. Holds no batch: what is yielded belongs to the consumer alone."""

    def __init__(self, loader: Loader) -> None:
        self._loader: Loader | None = loader
        self._iteration = loader._begin_iteration()

    def __next__(self) -> Batch:
        if self._loader is not None:
            batch = self._loader._next(self._iteration)
            if batch is not None:
                return batch
            self._loader = None
        raise StopIteration


class _Pairs(Iterator[tuple[Any, Any]]):
    """As `_Batches`, but yields what a training loop wants."""

    def __init__(self, loader: Loader) -> None:
        self._loader: Loader | None = loader
        self._iteration = loader._begin_iteration()

    def __next__(self) -> tuple[Any, Any]:
        if self._loader is not None:
            batch = self._loader._next(self._iteration)
            if batch is not None:
                return batch.images, batch.labels
            self._loader = None
        raise StopIteration
