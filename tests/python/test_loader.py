"""The loader against the real daemon: content, order, epochs, position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastaa
import numpy as np
import pytest
import torch
from fastaa import _control
from support import COLOUR, TOY, TOY_TEST, TOY_TRAIN, Daemon, flat, indices_of, python

BATCH = 64
TRUTH = TOY["train"]


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


def test_a_batch_may_be_larger_than_the_split(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=4096, split="test")
    assert len(loader) == 1
    assert sorted(flat(indices_of(loader.batches()))) == list(range(TOY_TEST))


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
    assert loader.recipe["policy"] == "none"


def test_the_daemons_default_policy_counts_unless_one_is_asked_for(daemon: Daemon) -> None:
    daemon.kill()
    config = daemon.config.read_text()
    daemon.config.write_text(config.replace('policy = "none"', 'policy = "trivial-wide"'))
    daemon.start()
    assert next(daemon.loader().batches()).policy == "trivial-wide"
    assert next(daemon.loader(policy=None).batches()).policy == "trivial-wide"
    assert next(daemon.loader(policy="none").batches()).policy == "none"
    assert daemon.loader(policy="active").recipe["policy"] == "active"


def test_a_policy_files_path_is_relative_to_the_program(
    shared_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.json").write_text('[[["Contrast", 0.9, 0.7], ["TranslateX", 0.5, 0.4]]]')
    monkeypatch.chdir(tmp_path)
    ids = set()
    for policy in ("mine.json", "./mine.json", Path("mine.json"), str(tmp_path / "mine.json")):
        loader = shared_daemon.loader(batch_size=BATCH, policy=policy)
        batches = loader.batches()
        first = next(batches)
        ids.add(first.policy_id)
        assert first.policy not in ("", "none")
    assert len(ids) == 1
    # Whatever the daemon calls a file's policy, the name leads back to it.
    resumed = shared_daemon.loader(batch_size=BATCH, policy="mine.json")
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert {(batch.policy, batch.policy_id) for batch in resumed.batches()} == {
        (first.policy, first.policy_id)
    }


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


def test_an_interrupt_between_arrival_and_yield_loses_no_batch(
    shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C can come at any instruction; here it comes when the slot is just lent."""
    loader = shared_daemon.loader(batch_size=BATCH)
    batches = loader.batches()
    seen = [next(batches).indices.tolist() for _ in range(3)]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loader._maker, "arrays", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    seen += indices_of(batches)
    assert seen == indices_of(shared_daemon.loader(batch_size=BATCH).batches())


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


def test_every_member_of_a_broadcast_group_gets_everything(shared_daemon: Daemon) -> None:
    arguments = {"batch_size": BATCH, "group": "sweep", "mode": "broadcast"}
    members = [shared_daemon.loader(**arguments) for _ in range(2)]
    for here, there in zip(*(member.batches() for member in members), strict=True):
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.indices, there.indices)
    assert [len(member) for member in members] == [16, 16]
    assert {member.epoch_digest for member in members} == {members[0].expected_digest(0)}


def test_a_new_policy_waits_for_the_next_epoch_also_over_a_resume(daemon: Daemon) -> None:
    """Guarantee 8: an epoch keeps the policy it began with; every batch names its policy."""
    loader = daemon.loader(batch_size=BATCH, policy="active")
    batches = loader.batches()
    first = next(batches)
    before = (first.policy, first.policy_id)
    state = loader.state_dict()
    del first
    policy = [[["Contrast", 0.9, 0.7], ["TranslateX", 0.5, 0.4]]]
    request = {"request": "policy-publish", "dataset": "toy", "policy": policy}
    published = _control.ask(daemon.runtime_dir, request)
    assert (published["version"], published["is_active"]) == (1, True)
    assert {(batch.policy, batch.policy_id) for batch in batches} == {before}
    after = {(batch.policy_version, batch.policy_id) for batch in loader.batches()}
    assert after == {(1, published["id"])}
    resumed = daemon.loader(batch_size=BATCH, policy="active")
    resumed.load_state_dict(state)
    assert {(batch.policy, batch.policy_id) for batch in resumed.batches()} == {before}
    assert {batch.policy_version for batch in resumed.batches()} == {1}


def publish(daemon: Daemon, magnitude: float, source: str) -> None:
    """A new version of `toy`'s policy, as the search or a person publishes it."""
    policy = [[["Solarize", 1.0, magnitude]]]
    request = {"request": "policy-publish", "dataset": "toy", "policy": policy}
    _control.ask(daemon.runtime_dir, {**request, "evidence": {"source": source}})


def test_a_run_that_says_how_long_it_is_ends_on_one_policy(daemon: Daemon) -> None:
    loaders = [
        daemon.loader(batch_size=500, policy="active", total_epochs=total) for total in (3, None)
    ]
    assert [loader.recipe.get("total_epochs") for loader in loaders] == [3, None]
    for epoch in range(2):
        for loader in loaders:
            assert {batch.policy_version for batch in loader.batches()} == {0}, epoch
    publish(daemon, 0.5, "search")
    versions = [{batch.policy_version for batch in loader.batches()} for loader in loaders]
    assert versions == [{0}, {1}]
    with pytest.raises(fastaa.InvalidRequestError, match="total_epochs=-1"):
        daemon.loader(total_epochs=-1)


def test_a_reported_fall_takes_the_search_s_policy_back(daemon: Daemon) -> None:
    loader = daemon.loader(batch_size=500, policy="active")
    with pytest.raises(fastaa.UsageError, match="no epoch was finished"):
        loader.report(accuracy=0.5)
    policies = []
    for accuracy in (0.8, 0.81, 0.8, 0.5, np.float32(0.5), torch.tensor(0.8)):
        if len(policies) == 3:
            publish(daemon, 0.5, "search")
        policies += list({batch.policy for batch in loader.batches()})
        loader.report(accuracy=accuracy)
    assert policies == ["none"] * 3 + ["toy@1"] * 2 + ["none"]
    for wrong in ("0.5", None, float("nan"), True, [0.5, 0.6]):
        with pytest.raises(fastaa.InvalidRequestError, match="no finite number"):
            loader.report(accuracy=wrong)


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


def test_a_loader_says_what_it_is(shared_daemon: Daemon) -> None:
    loader = shared_daemon.loader(batch_size=50, rank=1, world_size=2, policy="active")
    loader.set_epoch(7)
    said = "<fastaa.Loader toy/train batch_size=50 rank=1/2 epoch=7 policy='active'"
    assert repr(loader) == said + ">"
    next(loader.batches())
    # What "active" means in this epoch is known now.
    assert "epoch=7 policy='none'" in repr(loader)
    loader.close()
    assert repr(loader).endswith(" closed>")


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
