"""The loader against the real daemon: order, epochs, position, memory."""

from __future__ import annotations

import gc
import json
import os
import queue
import threading
import warnings
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import pytest
import torch
from support import COLOUR, TOY, TOY_TEST, TOY_TRAIN, Daemon, python, wait_until

BATCH = 64
TRUTH = TOY["train"]


def indices_of(batches: Any) -> list[list[int]]:
    return [batch.indices.tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return [index for part in lists for index in part]


def n_open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def as_f32(split: Any, indices: Any) -> Any:
    """What an f32 stream without augmentation and normalisation holds, `[n, c, h, w]`."""
    return (split.images[indices].astype(np.float32) / np.float32(255)).transpose(0, 3, 1, 2)


# --- content --------------------------------------------------------------------------------------


def test_an_epoch_holds_every_sample_once_in_a_new_order(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH)
    assert len(loader) == 16
    epochs = [flat(indices_of(loader.batches())) for _ in range(2)]
    for order in epochs:
        assert sorted(order) == list(range(TOY_TRAIN))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert loader.epoch == 2


def test_without_shuffle_the_order_is_that_of_the_split(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=100, split="test", shuffle=False)
    assert indices_of(loader.batches()) == [
        list(range(100)),
        list(range(100, 200)),
        list(range(200, TOY_TEST)),
    ]


def test_labels_and_pixels_belong_to_the_indices(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, dtype="u8")
    for batch in loader.batches():
        indices = batch.indices.numpy()
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == TRUTH.labels[indices].tolist()
        assert batch.images.dtype == torch.uint8
        assert np.array_equal(batch.images.numpy(), TRUTH.images[indices].transpose(0, 3, 1, 2))


def test_iteration_yields_images_and_labels(shared_daemon: Daemon) -> None:
    pairs = shared_daemon.loader(batch_size=BATCH, seed=5)
    batches = shared_daemon.loader(batch_size=BATCH, seed=5).batches()
    for (images, labels), batch in zip(pairs, batches, strict=True):
        assert torch.equal(images, batch.images)
        assert torch.equal(labels, batch.labels)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["u8", "f16", "bf16", "f32"])
@pytest.mark.parametrize("dataset", ["toy", "colour"])
def test_every_dtype_and_layout_is_the_normalised_u8(
    shared_daemon: Daemon, dataset: str, dtype: str, layout: str
) -> None:
    """Guarantee 1: ((x/255) - mean)/std in f32, in this order; f16 and bf16 round that."""
    split = {"toy": TOY, "colour": COLOUR}[dataset]["train"]
    channels = split.images.shape[3]
    mean = np.array([0.4914, 0.4822, 0.4465][:channels], np.float32)
    std = np.array([0.247, 0.2435, 0.2616][:channels], np.float32)
    loader = shared_daemon.loader(
        dataset,
        batch_size=BATCH,
        dtype=dtype,
        layout=layout,
        normalize={"mean": mean.astype(float).tolist(), "std": std.astype(float).tolist()},
    )
    batch = next(loader.batches())
    pixels = split.images[batch.indices.numpy()]
    if dtype == "u8":
        expected = torch.from_numpy(pixels)
    else:
        exact = torch.from_numpy((pixels.astype(np.float32) / np.float32(255) - mean) / std)
        rounded = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
        expected = exact.to(rounded[dtype])
    if layout == "nchw":
        expected = expected.permute(0, 3, 1, 2)
    assert batch.images.dtype == expected.dtype
    assert torch.equal(batch.images, expected.contiguous())


@pytest.mark.parametrize("dtype", ["u8", "f16", "f32"])
def test_numpy_arrays_equal_the_tensors(shared_daemon: Daemon, dtype: str) -> None:
    arrays = shared_daemon.loader(batch_size=BATCH, dtype=dtype, output="numpy")
    tensors = shared_daemon.loader(batch_size=BATCH, dtype=dtype)
    for array, tensor in zip(arrays.batches(), tensors.batches(), strict=True):
        assert isinstance(array.images, np.ndarray)
        assert array.images.dtype == tensor.images.numpy().dtype
        assert np.array_equal(array.images, tensor.images.numpy())
        assert np.array_equal(array.labels, tensor.labels.numpy())
        assert np.array_equal(array.indices, tensor.indices.numpy())
    del array, tensor


def test_numpy_output_never_imports_torch(shared_daemon: Daemon) -> None:
    code = """
import sys, fastaa
loader = fastaa.Loader("toy", batch_size=64, output="numpy", runtime_dir=sys.argv[1])
assert sum(len(labels) for images, labels in loader) == 1000
assert "torch" not in sys.modules
"""
    process = python(code, shared_daemon.runtime_dir)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_bf16_is_refused_for_numpy(shared_daemon: Daemon) -> None:
    with pytest.raises(fastaa.InvalidRequestError, match="bfloat16"):
        shared_daemon.loader(output="numpy", dtype="bf16")


def test_augmented_pixels_depend_on_the_sample_alone(shared_daemon: Daemon) -> None:
    """Another batch size, start and order of arrival change no pixel of a sample."""
    recipe: dict[str, Any] = {
        "policy": "trivial-wide",
        "crop": {"kind": "pad", "size": 28, "pad": 4},
        "hflip": True,
        "dtype": "u8",
    }
    by_index: dict[int, Any] = {}
    with shared_daemon.loader(batch_size=100, seed=3, **recipe) as loader:
        for batch in loader.batches():
            by_index.update(zip(batch.indices.tolist(), batch.images.clone(), strict=True))
    assert len(by_index) == TOY_TRAIN
    with shared_daemon.loader(batch_size=37, seed=3, shuffle=False, **recipe) as loader:
        for batch in loader.batches():
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                assert torch.equal(image, by_index[index])
        assert batch.policy == "trivial-wide"
    plain = torch.from_numpy(TRUTH.images[:100].transpose(0, 3, 1, 2))
    changed = sum(not torch.equal(by_index[index], plain[index]) for index in range(100))
    assert changed > 90


def test_a_batch_says_what_it_is(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH)
    for step, batch in enumerate(loader.batches()):
        assert (batch.epoch, batch.step, batch.policy) == (0, step, "none")
        assert batch.policy_version == 0
        assert len(bytes.fromhex(batch.policy_id)) == 16
        assert batch.n_global == (BATCH if step < 15 else TOY_TRAIN - 15 * BATCH)
    assert (loader.n_samples, loader.n_classes) == (TOY_TRAIN, 10)
    assert loader.image_shape == (1, 28, 28)
    assert loader.recipe["policy"] in ("none", "active")


# --- position -------------------------------------------------------------------------------------


def test_a_break_goes_on_where_it_was(shared_daemon: Daemon) -> None:
    whole = indices_of(shared_daemon.loader(batch_size=BATCH).batches())
    loader = shared_daemon.loader(batch_size=BATCH)
    seen: list[list[int]] = []
    for batch in loader.batches():
        seen.append(batch.indices.tolist())
        if len(seen) == 3:
            break
    assert loader.epoch == 0
    seen += indices_of(loader.batches())
    assert seen == whole
    assert loader.epoch == 1


def test_a_break_on_the_last_batch_leaves_no_empty_epoch(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH)
    for epoch in range(3):
        for step, _ in enumerate(loader, start=1):
            assert loader.epoch == epoch
            if step == len(loader):
                break
        assert step == 16


def test_set_epoch_restarts_and_jumps(shared_daemon: Daemon) -> None:
    through = shared_daemon.loader(batch_size=BATCH)
    epochs = [indices_of(through.batches()) for _ in range(4)]
    loader = shared_daemon.loader(batch_size=BATCH)
    loader.set_epoch(3)
    assert indices_of(loader.batches()) == epochs[3]
    assert loader.epoch == 4
    loader.set_epoch(1)
    iterator = loader.batches()
    assert next(iterator).indices.tolist() == epochs[1][0]
    loader.set_epoch(1)
    with pytest.raises(fastaa.UsageError, match="iterat"):
        next(iterator)
    assert indices_of(loader.batches()) == epochs[1]


def test_a_state_resumes_in_another_process_as_if_nothing_happened(shared_daemon: Daemon) -> None:
    whole = shared_daemon.loader(batch_size=BATCH)
    whole.set_epoch(2)
    order = indices_of(whole.batches())
    first = shared_daemon.loader(batch_size=BATCH)
    first.set_epoch(2)
    iterator = first.batches()
    seen = [next(iterator).indices.tolist() for _ in range(5)]
    text = json.dumps(first.state_dict())
    assert len(text) <= 1024
    # What the first loader takes after the state comes again.
    next(iterator)
    second = shared_daemon.loader(batch_size=BATCH)
    second.load_state_dict(json.loads(text))
    assert second.epoch == 2
    rest = [(batch.indices.tolist(), batch.step) for batch in second.batches()]
    assert seen + [indices for indices, _ in rest] == order
    assert [step for _, step in rest] == list(range(5, 16))
    assert second.epoch_digest == whole.epoch_digest == second.expected_digest(2)


def test_any_ranks_state_serves_any_number_of_ranks(shared_daemon: Daemon) -> None:
    ranks = [shared_daemon.loader(batch_size=32, rank=rank, world_size=2) for rank in range(2)]
    seen: list[int] = []
    for loader in ranks:
        iterator = loader.batches()
        seen += flat([next(iterator).indices.tolist() for _ in range(4)])
    state = ranks[1].state_dict()
    steps = []
    for rank in range(3):
        loader = shared_daemon.loader(batch_size=50, rank=rank, world_size=3)
        loader.load_state_dict(state)
        parts = indices_of(loader.batches())
        steps.append(len(parts))
        seen += flat(parts)
    assert sorted(seen) == list(range(TOY_TRAIN))
    assert len(set(steps)) == 1


def test_the_state_of_a_finished_epoch_is_the_next_one(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=500)
    for _ in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["offset"]) == (1, 0)
    other = shared_daemon.loader(batch_size=500, seed=1)
    with pytest.raises(fastaa.StateError, match="seed"):
        other.load_state_dict(state)


def test_ranks_share_each_batch_and_make_equally_many_steps(shared_daemon: Daemon) -> None:
    """210 samples by 4 x 52: two are left for the last step, so two shares are empty."""
    parts = []
    for rank in range(4):
        loader = shared_daemon.loader(split="test", batch_size=52, rank=rank, world_size=4)
        assert len(loader) == 2
        batches = list(loader.batches())
        assert [batch.n_global for batch in batches] == [208, 2]
        for batch in batches:
            assert batch.images.shape == (len(batch.indices), 1, 28, 28)
        parts.append(indices_of(batches))
    assert sorted(len(steps[1]) for steps in parts) == [0, 0, 1, 1]
    assert sorted(flat([flat(steps) for steps in parts])) == list(range(TOY_TEST))


def test_drop_last_drops_the_incomplete_global_batch(shared_daemon: Daemon) -> None:
    sizes = []
    for rank in range(2):
        loader = shared_daemon.loader(batch_size=BATCH, rank=rank, world_size=2, drop_last=True)
        assert len(loader) == 7
        sizes += [len(batch.indices) for batch in loader.batches()]
    assert sizes == [BATCH] * 14


def test_the_digest_tells_what_came(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH)
    assert loader.epoch_digest is None
    for epoch in range(2):
        for _ in loader:
            pass
        assert loader.epoch_digest == loader.expected_digest(epoch)
    state = shared_daemon.loader(batch_size=BATCH)
    next(state.batches())
    skipping = state.state_dict()
    skipping["digest"] = "0" * 16
    state.load_state_dict(skipping)
    for _ in state:
        pass
    assert state.epoch_digest != state.expected_digest(0)


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_daemon_knows_a_ranks_digest(shared_daemon: Daemon, drop_last: bool) -> None:
    for rank in range(2):
        arguments = {"batch_size": 24, "rank": rank, "world_size": 2, "drop_last": drop_last}
        loader = shared_daemon.loader(**arguments)
        for _ in loader:
            pass
        assert loader.epoch_digest == loader.expected_digest(0)
        assert loader.expected_digest(1) != loader.epoch_digest


def test_the_digest_of_a_resumed_rank_counts_from_there(shared_daemon: Daemon) -> None:
    first = shared_daemon.loader(batch_size=24, rank=0, world_size=2)
    for _ in zip(range(5), first, strict=False):
        pass
    second = shared_daemon.loader(batch_size=24, rank=1, world_size=2)
    second.load_state_dict(first.state_dict())
    for _ in second:
        pass
    assert second.epoch_digest == second.expected_digest(0)


# --- memory ---------------------------------------------------------------------------------------


def test_a_slice_keeps_its_batch(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, dtype="u8")
    iterator = loader.batches()
    batch = next(iterator)
    index = int(batch.indices[3])
    kept = batch.images[3:4]
    del batch
    for _ in range(2):
        for _ in loader:
            pass
    assert np.array_equal(kept[0, 0].numpy(), TRUTH.images[index, :, :, 0])


def test_batches_are_views_of_the_slab(shared_daemon: Daemon) -> None:
    """No more places than slots, and none is a copy, as long as batches are dropped."""
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = {images.data_ptr() for _ in range(3) for images, _ in loader}
    assert len(places) <= 4
    first = min(places)
    slot_bytes = loader._welcome.slot_bytes
    assert all((place - first) % slot_bytes == 0 for place in places)


def test_keeping_all_batches_copies_them_with_one_warning(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, dtype="u8", n_slots=3)
    with pytest.warns(fastaa.AllSlotsHeldWarning) as caught:
        batches = list(loader.batches())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(batches) == 16
    for batch in batches:
        expected = TRUTH.images[batch.indices.numpy()].transpose(0, 3, 1, 2)
        assert np.array_equal(batch.images.numpy(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = list(loader)
    assert len(more) == 16


def test_writing_to_a_batch_harms_nobody(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=3)
    for epoch in range(2):
        for batch in loader.batches():
            indices = batch.indices.numpy().copy()
            assert np.array_equal(batch.images.numpy(), as_f32(TRUTH, indices)), epoch
            assert batch.labels.tolist() == TRUTH.labels[indices].tolist()
            batch.images.fill_(float("nan"))
            batch.labels.fill_(-1)
            batch.indices.fill_(-1)
        assert loader.epoch_digest == loader.expected_digest(epoch)


def test_batches_may_die_in_another_thread(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=4)
    handed: queue.Queue[Any] = queue.Queue(maxsize=1)

    def drop() -> None:
        while handed.get() is not None:
            gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    total = 0
    for _ in range(3):
        for batch in loader.batches():
            total += len(batch.indices)
            cycle = [batch]
            cycle.append(cycle)  # type: ignore[arg-type]
            handed.put(cycle)
            del batch, cycle
    handed.put(None)
    thread.join(30)
    assert not thread.is_alive()
    assert total == 3 * TOY_TRAIN


def test_leases_go_back_while_the_consumer_computes(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH, n_slots=3)
    releases = loader._connection._releases
    batch = next(loader.batches())
    assert releases.n_alive == 1
    del batch
    assert releases.n_alive == 0
    wait_until(lambda: not releases._waiting, "the background thread gave the lease back")


def test_batches_outlive_the_loader(shared_daemon: Daemon) -> None:
    with shared_daemon.loader(batch_size=BATCH, dtype="u8") as loader:
        batch = next(loader.batches())
    loader.close()
    with pytest.raises(fastaa.UsageError, match="closed"):
        iter(loader)
    del loader
    gc.collect()
    # Another session may get memory of its own now, but never this.
    other = shared_daemon.loader(batch_size=BATCH, dtype="u8", seed=9)
    for _ in other:
        pass
    expected = TRUTH.images[batch.indices.numpy()].transpose(0, 3, 1, 2)
    assert np.array_equal(batch.images.numpy(), expected)


def test_a_dropped_loader_ends_its_session(shared_daemon: Daemon) -> None:
    before = threading.active_count()
    fds = n_open_fds()
    for _ in range(20):
        loader = shared_daemon.loader(batch_size=BATCH)
        next(iter(loader))
        del loader
    gc.collect()
    wait_until(lambda: threading.active_count() <= before, "the lease threads ended")
    wait_until(lambda: n_open_fds() <= fds, "all descriptors are closed")


def test_the_interpreter_exits_with_everything_alive(shared_daemon: Daemon) -> None:
    code = """
import sys, fastaa
loader = fastaa.Loader("toy", batch_size=64, runtime_dir=sys.argv[1], output=sys.argv[2])
iterator = loader.batches()
kept = [next(iterator), next(iterator).images[:1]]
sys.modules["kept forever"] = kept
print("done")
"""
    for output in ("torch", "numpy"):
        process = python(code, shared_daemon.runtime_dir, output)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "done\n", "")


def test_a_forked_child_cannot_use_the_loader_nor_harm_it(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH)
    iterator = loader.batches()
    seen = [next(iterator).indices.tolist()]
    batch = next(iterator)
    with warnings.catch_warnings():
        # Python and torch warn that threads exist; that is what is tested.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                next(iterator)
            except fastaa.UsageError as error:
                status = 0 if "fork" in str(error) else 2
            del batch
            gc.collect()
            loader.close()
            del loader, iterator
            gc.collect()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    seen.append(batch.indices.tolist())
    seen += indices_of(iterator)
    assert sorted(flat(seen)) == list(range(TOY_TRAIN))


# --- use ------------------------------------------------------------------------------------------


def test_one_iteration_at_a_time(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=BATCH)
    with pytest.raises(fastaa.UsageError, match="one iteration at a time"):
        for _ in zip(loader, loader, strict=True):
            pass
    # The second iteration had not begun; the first one's error costs nothing.
    assert sorted(flat(indices_of(loader.batches()))) == list(range(TOY_TRAIN))


def test_an_exhausted_iterator_stays_exhausted(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=500)
    iterator = iter(loader)
    assert len(list(iterator)) == 2
    assert list(iterator) == []
    assert loader.epoch == 1


def test_many_loaders_live_side_by_side(shared_daemon: Daemon) -> None:
    loaders = [shared_daemon.loader(batch_size=BATCH, seed=seed) for seed in range(6)]
    for batches in zip(*(loader.batches() for loader in loaders), strict=True):
        assert len({batch.indices.tolist()[0] for batch in batches}) > 1
    digests = {loader.epoch_digest for loader in loaders}
    assert digests == {loaders[0].expected_digest(0)}
