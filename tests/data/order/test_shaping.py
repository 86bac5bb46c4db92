"""Shapes in a real run: buckets, small images left out, and the warning about enlarged ones."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_prefopt.cli import main
from lit_prefopt.data.order.plan import RankSplit
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules import PairShards
from lit_prefopt.errors import InputError
from tests.helpers.pair_data import data, equal, keys, seen_keys, train
from tests.helpers.shards import edited, picture

SIZES = [(32, 32), (48, 32), (32, 48), (40, 20), (12, 10)]
BUCKETS = {"aspect_buckets": True, "bucket_step": 8, "resolution": 32, "batch_size": 3}


def size_of(number: int) -> tuple[int, int]:
    """Return the width and height of a pair: nine pairs of each size."""
    return SIZES[(number + number // 5) % 5]


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Return a folder of 45 pairs of several shapes."""
    with ShardWriter(tmp_path / "mixed", max_count=10) as writer:
        for n in range(45):
            size = size_of(n)
            writer.add(f"prompt {n}", picture(n + 100, size), picture(n, size))
    return str(tmp_path / "mixed")


def without_sizes(folder: str) -> str:
    """Take the sizes out of an index, as one of before has none."""
    return edited(folder, lambda index: [shard.pop("sizes") for shard in index["shards"]])


def shapes_of(batches: list) -> Counter:
    """Return how often each (width, height) comes."""
    return Counter((batch.images.shape[-1], batch.images.shape[-2]) for batch in batches)


def test_each_batch_has_the_shape_that_is_nearest_to_its_pairs(mixed: str):
    batches = list(data(mixed, **BUCKETS).train_dataloader())
    assert shapes_of(batches).keys() == {(32, 32), (40, 24), (24, 40)}
    assert len(set(keys(batches))) == sum(map(len, (b.keys for b in batches))) == 45
    for batch in batches:
        assert batch.frames is not None
        height, width = batch.images.shape[-2:]
        assert (batch.frames[..., 4:] == torch.tensor([height, width])).all()
        stored = {(w, h) for h, w in batch.frames[:, 0, :2].tolist()}
        near = {(32, 32): {(32, 32), (12, 10)}, (40, 24): {(48, 32), (40, 20)}}
        assert stored <= near.get((width, height), {(32, 48)})


def test_workers_and_ranks_make_the_same_batches_of_buckets(mixed: str, monkeypatch):
    alone = list(data(mixed, **BUCKETS, crop="random").train_dataloader())
    shared = list(data(mixed, **BUCKETS, crop="random", workers=2).train_dataloader())
    assert all(equal(*both) for both in zip(alone, shared, strict=True))
    read = []
    for rank in range(2):
        monkeypatch.setattr(PairShards, "_ranks", lambda *_, r=rank: RankSplit(r, 2, 3))
        read.append(list(data(mixed, **BUCKETS, crop="random").train_dataloader()))
    together = [batch for step in zip(*read, strict=True) for batch in step]
    assert all(equal(*both) for both in zip(alone, together, strict=False))
    assert len(together) == len(alone) // 2 * 2


def test_a_run_in_buckets_resumes_at_any_step(mixed: str, tmp_path: Path):
    whole = train(data(mixed, **BUCKETS), tmp_path / "whole", accumulate_grad_batches=1)
    assert len({key for epoch, key in seen_keys(whole) if epoch == 1}) == 45
    assert len(shapes_of([batch for _, batch in whole.seen])) == 3
    for step in (4, 15, 21):
        on = tmp_path / f"{step}"
        ckpt = tmp_path / f"whole/step={step}.ckpt"
        resumed = train(data(mixed, **BUCKETS), on, ckpt, accumulate_grad_batches=1)
        expected = whole.seen[step:]
        assert all(equal(a[1], b[1]) for a, b in zip(resumed.seen, expected, strict=True))
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_other_buckets_are_refused_at_resume(mixed: str, tmp_path: Path):
    train(data(mixed, **BUCKETS), tmp_path / "a", max_steps=1)
    for other in ({"batch_size": 5}, {"bucket_step": 16}, {"aspect_buckets": False}):
        with pytest.raises(InputError, match=r"`aspect_buckets` the same sizes and `batch_size`"):
            train(data(mixed, **{**BUCKETS, **other}), tmp_path / "b", tmp_path / "a/step=1.ckpt")


def test_a_stand_in_gets_the_shape_of_its_batch(mixed: str):
    for tar in Path(mixed).glob("*.tar"):
        content = tar.read_bytes()
        at = content.find(b"000000011.chosen.png")
        if at >= 0:
            tar.write_bytes(content[: at + 512] + b"no image" + content[at + 520 :])
    module = data(mixed, **BUCKETS)
    batches = list(module.train_dataloader())
    assert len(module.broken) == 1
    [batch] = [batch for batch in batches if batch.broken]
    assert len(batch.keys) == 3
    assert sum(shapes_of(batches).values()) == 15


def test_validation_keeps_to_squares(mixed: str):
    module = data(mixed, **BUCKETS, validation=mixed)
    assert shapes_of(list(module.val_dataloader())) == {(32, 32): 15}


def test_small_pairs_are_left_out_exactly_and_resumed(mixed: str, tmp_path: Path):
    module = data(mixed, resolution=32, min_side=32, batch_size=4)
    seen = train(module, tmp_path / "a", accumulate_grad_batches=1, max_epochs=2)
    kept = {f"pairs-{n // 10:06d}.tar/{n:09d}" for n in range(45) if min(size_of(n)) >= 32}
    assert {key for _, key in seen_keys(seen)} <= kept
    again = data(mixed, resolution=32, min_side=32, batch_size=2)  # the order is the same
    more = train(again, tmp_path / "b", tmp_path / "a/step=2.ckpt", max_epochs=2)
    first = [key for epoch, key in seen_keys(seen) if epoch == 0]
    rest = [key for epoch, key in seen_keys(more) if epoch == 0]
    assert rest[: len(first) - 8] == first[8:]
    assert len(set(first[:8] + rest)) == len(kept) // 2 * 2


@pytest.mark.parametrize("options", [BUCKETS, {"min_side": 8}])
def test_an_index_without_sizes_cannot_be_bucketed(mixed: str, options: dict):
    with pytest.raises(InputError, match="without image sizes.*lit-prefopt shards index"):
        data(without_sizes(mixed), **options)


def test_nothing_left_is_said(mixed: str):
    with pytest.raises(InputError, match="has 0 pairs, less than one batch"):
        data(mixed, min_side=500).train_dataloader()


def test_pairs_that_have_to_be_enlarged_are_told_at_the_start(mixed: str):
    with pytest.warns(UserWarning, match=r"40\.0% of the 45 training pairs .*upscaled.*`min_side`"):
        data(mixed, resolution=32).train_dataloader()
    with pytest.warns(UserWarning, match=r"20\.0% of the 45"):  # 40 x 20 is large enough for 24
        data(mixed, **{**BUCKETS, "resolution": 24}).train_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data(mixed, resolution=32, min_side=32).train_dataloader()
        data(mixed, resolution=10).train_dataloader()


def test_without_sizes_they_are_counted_and_told_once(mixed: str, make_shards):
    loader = data(without_sizes(mixed), resolution=32, batch_size=15).train_dataloader()
    with pytest.warns(UserWarning, match=r"40\.0% of the first 45 training pairs") as told:
        assert len([*loader, *loader]) == 6
    assert len([one for one in told if "upscaled" in str(one.message)]) == 1
    many = without_sizes(make_shards(400, 400))
    loader = data(many, resolution=11, batch_size=50).train_dataloader()
    with pytest.warns(UserWarning, match=r"100\.0% of the first 300 training pairs"):
        list(zip(range(6), loader, strict=False))


def test_what_an_epoch_leaves_out_is_said(mixed: str, caplog):
    with caplog.at_level("INFO"):
        data(mixed, **{**BUCKETS, "batch_size": 4, "min_side": 20}).train_dataloader()
    assert "9 of 45 pairs are smaller than `min_side`" in caplog.text
    assert "drops 4 of 36 pairs, different ones each time" in caplog.text


def test_the_writer_and_the_scan_agree_on_sizes(mixed: str):
    sizes = [
        s
        for shard in json.loads((Path(mixed) / "index.json").read_text())["shards"]
        for s in shard["sizes"]
    ]
    assert sizes == [list(size_of(n)) for n in range(45)]


@pytest.mark.slow
def test_a_real_model_trains_in_buckets(recipe: list[str], mixed: str, tmp_path: Path):
    buckets = ["--data.aspect_buckets", "true", "--data.bucket_step", "8"]
    main(["fit", *recipe, "--data.shards", mixed, *buckets])
    [last] = (tmp_path / "run/checkpoints").glob("last.ckpt")
    place = torch.load(last, weights_only=True)["loops"]["fit_loop"]["state_dict"]
    assert place["combined_loader"][0]["position"] % 4 == 0
    assert place["combined_loader"][0]["samples"] == 40
    assert list((tmp_path / "run/weights").rglob("*.safetensors"))
