"""The data module in a real Trainer: stopped and resumed, nothing is repeated or lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_prefopt.data.order.plan import RankSplit
from lit_prefopt.datamodules import PairShards
from tests.helpers.pair_data import data, equal, keys, seen_keys, train

OPTIONS = {"crop": "random", "flip": True, "caption_dropout": 0.3}


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_at_any_step_the_following_batches_are_the_same(make_shards, tmp_path, workers):
    folder = make_shards(23)  # 5 batches of 4 an epoch: steps after batches 2, 4, 5, 7, 9, 10, ...
    whole = train(data(folder, **OPTIONS, workers=workers), tmp_path / "whole")
    assert len(whole.seen) == 15
    after_step = [2, 4, 5, 7, 9, 10, 12, 14]
    for step, batches in enumerate(after_step if workers == 0 else [2, 4, 5], 1):
        if workers and step == 2:
            continue
        module = data(folder, **OPTIONS, workers=workers)
        resumed = train(module, tmp_path / f"{step}", tmp_path / f"whole/step={step}.ckpt")
        expected = whole.seen[batches:]
        assert [epoch for epoch, _ in resumed.seen] == [epoch for epoch, _ in expected]
        assert all(equal(a[1], b[1]) for a, b in zip(resumed.seen, expected, strict=True))
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_every_epoch_has_an_order_of_its_own(make_shards, tmp_path):
    recorder = train(data(make_shards()), tmp_path)
    orders = [tuple(k for e, k in seen_keys(recorder) if e == epoch) for epoch in range(3)]
    assert len(set(orders)) == 3
    assert len({frozenset(order) for order in orders}) == 1


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (6, 4), (4, 6), (3, 8)])
def test_with_other_batches_the_run_goes_on_at_the_same_sample(make_shards, tmp_path, old, new):
    # another batch size is, for the plan, the same as another number of ranks
    folder = make_shards(27)
    first = train(data(folder, batch_size=old), tmp_path / "a", max_steps=1)
    second = train(data(folder, batch_size=new), tmp_path / "b", tmp_path / "a/step=1.ckpt")
    plan = data(folder).train_dataloader().batches.plan
    read = seen_keys(first) + seen_keys(second)
    for epoch in range(3):
        trained = [key for number, key in read if number == epoch]
        assert trained == order_of(plan, epoch)[: len(trained)]
        assert 27 - len(trained) < new
    # and once more, from a checkpoint of the second run
    checkpoint = tmp_path / "b/step=2.ckpt"
    fit = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]["total"]["processed"]
    place = fit["state_dict"]["combined_loader"][0]
    assert (place["epoch"], place["position"]) == (0, 2 * old + (batches - 2) * new)
    third = train(data(folder, batch_size=old), tmp_path / "c", checkpoint)
    trained = [key for epoch, key in seen_keys(third) if epoch == 0]
    assert trained == order_of(plan, 0)[place["position"] :][: len(trained)]
    assert 0 <= 27 - place["position"] - len(trained) < old
    last = [key for epoch, key in seen_keys(third) if epoch == 2]
    assert last == order_of(plan, 2)[: 27 // old * old]


def order_of(plan: Any, epoch: int) -> list[str]:
    """Return the keys of an epoch in order."""
    places = plan.slice(epoch, 0, plan.samples)
    return [f"pairs-{shard:06d}.tar/{6 * shard + n:09d}" for shard, n in places]


def test_an_epoch_finished_with_other_batches_is_not_begun_again(make_shards, tmp_path):
    folder = make_shards(27)
    first = train(data(folder, batch_size=13), tmp_path / "a", max_epochs=1)
    assert len(first.seen) == 2
    second = train(data(folder, batch_size=2), tmp_path / "b", tmp_path / "a/step=1.ckpt")
    assert {epoch for epoch, _ in seen_keys(second)} == {1, 2}
    assert len(second.seen) == 26


def test_a_batch_that_was_cut_short_is_read_again(make_shards, tmp_path):
    folder = make_shards(23)
    whole = train(data(folder), tmp_path / "whole", accumulate_grad_batches=1)
    train(data(folder), tmp_path / "cut", accumulate_grad_batches=1, fail_at=7)
    [saved] = (tmp_path / "cut").glob("*step=7*.ckpt")
    resumed = train(data(folder), tmp_path / "on", saved, accumulate_grad_batches=1)
    assert seen_keys(resumed) == seen_keys(whole)[28:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("limit", [3, 0.6])
def test_limited_epochs_resume_too(make_shards, tmp_path, limit):
    folder = make_shards(23)
    whole = train(data(folder, workers=2), tmp_path / "whole", limit_train_batches=limit)
    assert len(whole.seen) == 9
    for step, batches in [(1, 2), (2, 3), (3, 5)]:
        resumed = train(
            data(folder),
            tmp_path / f"{step}",
            tmp_path / f"whole/step={step}.ckpt",
            limit_train_batches=limit,
        )
        assert seen_keys(resumed) == seen_keys(whole)[4 * batches :]


def test_other_data_or_another_order_are_refused_at_resume(make_shards, tmp_path):
    train(data(make_shards(20)), tmp_path, max_steps=1)
    ckpt = tmp_path / "step=1.ckpt"
    with pytest.raises(ValueError, match="20 training samples, not with 15; give the same shards"):
        train(data(make_shards(15, name="b")), tmp_path / "x", ckpt)
    with pytest.raises(ValueError, match="another order of the data.*`seed`"):
        train(data(make_shards(20, name="c"), seed=2), tmp_path / "y", ckpt)


def test_validation_is_the_same_every_time_and_complete(make_shards, tmp_path):
    held_out = make_shards(10, name="validation")
    module = data(make_shards(), validation=held_out, **OPTIONS)
    recorder = train(module, tmp_path, max_epochs=2, num_sanity_val_steps=0)
    first, second = recorder.held_out[:3], recorder.held_out[3:]
    assert all(equal(*both) for both in zip(first, second, strict=True))
    assert [len(batch.keys) for batch in first] == [4, 4, 2]
    assert [text for batch in first for text in batch.texts] == [f"prompt {n}" for n in range(10)]
    module.validation_pairs = 5
    assert len(keys(list(module.val_dataloader()))) == 5


@pytest.mark.parametrize(("world", "sizes"), [(1, [4, 4, 2]), (2, [4]), (3, [3]), (7, [1])])
def test_validation_is_split_evenly_over_ranks(make_shards, monkeypatch, world, sizes):
    held_out = make_shards(10, name="validation")
    read = []
    for rank in range(world):
        monkeypatch.setattr(PairShards, "_ranks", lambda _, size, r=rank: RankSplit(r, world, size))
        read.append(list(data(make_shards(name=f"{rank}"), validation=held_out).val_dataloader()))
    assert [[len(batch.keys) for batch in batches] for batches in read] == [sizes] * world
    everything = [key for batches in read for key in keys(batches)]
    assert len(set(everything)) == len(everything) == sum(sizes) * world


def test_a_test_run_reads_the_held_out_pairs(make_shards, tmp_path):
    module = data(make_shards(), validation=make_shards(5, name="validation"))
    assert keys(list(module.test_dataloader())) == keys(list(module.val_dataloader()))


def test_without_held_out_pairs_there_is_no_validation(make_shards, tmp_path):
    assert train(data(make_shards()), tmp_path, max_epochs=1).held_out == []


def test_several_folders_make_one_set(make_shards):
    module = data([make_shards(7), make_shards(5, name="more")], batch_size=12)
    [batch] = module.train_dataloader()
    assert len(batch.texts) == 12


def test_wrong_numbers_are_refused_at_the_start(make_shards):
    folder = make_shards(5)
    with pytest.raises(ValueError, match="has 5 pairs, less than one batch of 6 on each of 1"):
        data(folder, batch_size=6).train_dataloader()
    for wrong in ({"batch_size": 0}, {"resolution": 0}, {"shards_per_block": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is 0; give at least 1"):
            data(folder, **wrong)
    with pytest.raises(ValueError, match="caption_dropout is 2"):
        data(folder, caption_dropout=2)
