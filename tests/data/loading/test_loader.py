"""The loader: the same batches for any number of workers, and stand-ins for broken samples."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lit_prefopt.data.images import Augment
from lit_prefopt.data.loading.image_samples import collate, load_sample
from lit_prefopt.data.order.plan import RankSplit
from lit_prefopt.data.shards.reader import Sample
from lit_prefopt.datamodules import PairShards
from tests.helpers.pair_data import data, equal, keys
from tests.helpers.shards import picture


def test_a_batch_holds_what_its_record_says(make_shards):
    loader = data(make_shards()).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    first = batches[0]
    assert first.images.shape == (4, 2, 3, 8, 8)
    assert first.images.dtype == torch.uint8
    assert first.seeds.dtype == torch.int64
    assert (first.labels.tolist(), first.weights.tolist()) == ([1.0] * 4, [1.0] * 4)
    assert (first.masks, first.broken) == (None, ())
    assert first.frames is not None
    assert (first.frames.dtype, first.frames.shape) == (torch.int64, (4, 2, 6))
    assert first.frames.tolist() == [[[10, 12, 0, 1, 8, 8]] * 2] * 4  # 12 x 10 becomes 10 x 8
    assert len(set(keys(batches))) == 20
    for image, text in zip(first.images, first.texts, strict=True):
        number = int(text.split()[1])  # the chosen side is drawn as bright as 100 + its number
        assert image.amax((1, 2, 3)).tolist() == [number + 100, number + 10]


def test_workers_make_the_same_batches(make_shards):
    options = {"crop": "random", "flip": True, "caption_dropout": 0.3, "batch_size": 3}
    folder = make_shards()
    alone = list(data(folder, **options).train_dataloader())
    shared = data(folder, **options, workers=2).train_dataloader()
    for batches in (list(shared), list(shared)):  # the second time in workers that live on
        assert len(alone) == len(batches) == 6
        assert all(equal(*both) for both in zip(alone, batches, strict=True))


@pytest.mark.parametrize("world", [1, 3, 7])
def test_ranks_read_disjoint_parts_of_one_order(make_shards, monkeypatch, world: int):
    folder = make_shards(22)
    read = []
    for rank in range(world):
        monkeypatch.setattr(PairShards, "_ranks", lambda *_, r=rank: RankSplit(r, world, 1))
        read.append(list(data(folder, crop="random").train_dataloader()))
    assert {len(batches) for batches in read} == {22 // world}
    together = [batch for step in zip(*read, strict=True) for batch in step]
    monkeypatch.undo()
    whole = list(data(folder, crop="random", batch_size=1).train_dataloader())
    assert all(equal(*both) for both in zip(together, whole, strict=False))
    assert len(set(keys(together))) == len(together)


def test_a_flipped_pair_is_flipped_on_both_sides(make_shards):
    [batch] = data(make_shards(), batch_size=20, flip=True).train_dataloader()
    bright_left = batch.images[..., 0].amax(dim=(2, 3)) > batch.images[..., -1].amax(dim=(2, 3))
    assert (bright_left[:, 0] == bright_left[:, 1]).all()
    assert 0 < bright_left[:, 0].sum() < 20


def test_caption_dropout_empties_the_text_of_the_pair(make_shards):
    [batch] = data(make_shards(), batch_size=20, caption_dropout=1.0).train_dataloader()
    assert batch.texts == [""] * 20
    [batch] = data(make_shards(name="b"), batch_size=20, caption_dropout=0.5).train_dataloader()
    assert 4 <= batch.texts.count("") <= 16


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_replaced_and_named(make_shards, workers: int):
    folder = make_shards(broken={7: b"no image"})
    whole = list(data(make_shards(name="whole")).train_dataloader())
    module = data(folder, workers=workers)
    batches = list(module.train_dataloader())
    changed = [(a, b) for a, b in zip(whole, batches, strict=True) if a.keys != b.keys]
    [(before, after)] = changed
    [slot] = [n for n in range(4) if before.keys[n] != after.keys[n]]
    name = "pairs-000001.tar/000000007: chosen is not a png, jpg or webp image"
    assert before.keys[slot] in name
    assert after.broken == (name,)
    assert module.broken == [name]
    # the same slot of the next global batch stands in, with the seed of the one it stands in for
    place = next(n for n, batch in enumerate(whole) if batch is before)
    assert after.keys[slot] == whole[(place + 1) % 5].keys[slot]
    assert torch.equal(before.seeds, after.seeds)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_samples_stop_the_run_with_their_names(make_shards, workers: int):
    folder = make_shards(broken=dict.fromkeys(range(8), b"no image"))
    loader = data(folder, workers=workers).train_dataloader()
    with pytest.raises(ValueError, match="Broken samples: 6 of .*`broken_share`.*000.*chosen"):
        list(loader)


def test_a_share_of_zero_stops_at_the_first(make_shards):
    folder = make_shards(broken={3: b"no image"})
    with pytest.raises(ValueError, match="Broken samples: 1 of"):
        list(data(folder, broken_share=0).train_dataloader())


def test_when_nothing_can_be_read_the_run_stops(make_shards):
    folder = make_shards(3, broken=dict.fromkeys(range(3), b"no image"))
    with pytest.raises(ValueError, match="No sample can be read"):
        list(data(folder, batch_size=1).train_dataloader())


def test_the_same_few_broken_samples_do_not_add_up_over_epochs(make_shards):
    loader = data(make_shards(broken=dict.fromkeys(range(4), b"no image"))).train_dataloader()
    for _ in range(4):
        list(loader)
    assert len(loader.broken.names) == 4


def test_each_side_has_a_frame_of_its_own():
    sides = [picture(200, (24, 20)), picture(10, (12, 10))]
    item = load_sample(Sample("a.tar/1", "text", sides, None, {}), Augment((8, 8)), 5)
    assert item.frames == [[20, 24, 0, 1, 8, 8], [10, 12, 0, 1, 8, 8]]


def test_memory_is_pinned_for_a_gpu_alone(make_shards):
    """Whatever devices the machine has: the run's own decides."""
    module = data(make_shards())
    assert module.train_dataloader().pin_memory is False  # of no run
    for kind, pinned in (("cpu", False), ("cuda", True)):
        device = SimpleNamespace(root_device=torch.device(kind))
        module.trainer = SimpleNamespace(strategy=device)
        assert module._pinned() is pinned


def test_a_bug_in_a_worker_keeps_its_trace(make_shards):
    module = data(make_shards())
    module.order.seed = "no number"  # type: ignore[assignment]
    module.order.slice = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError, match="not callable"):
        list(module.train_dataloader())


def test_masks_labels_and_weights_come_along():
    sides = [picture(200), picture(10)]
    plain = Sample("a.tar/1", "text", sides, None, {})
    masked = plain._replace(mask=picture(255), meta={"label": 0.5, "weight": 2})
    augment = Augment((8, 8), crop="random", flip=True)
    items = [load_sample(sample, augment, 5) for sample in (plain, masked)]
    batch = collate(items)
    assert (batch.labels.tolist(), batch.weights.tolist()) == ([1.0, 0.5], [1.0, 2.0])
    assert batch.masks is not None
    assert batch.masks.shape == (2, 1, 8, 8)
    assert (batch.masks[0] == 1).all()
    brightest = batch.images[1, 0, 0].max()
    assert ((batch.images[1, 0, 0] == brightest) == (batch.masks[1, 0] == 1)).all()


@pytest.mark.parametrize("meta", [{"label": 2}, {"label": "yes"}, {"weight": -1}])
def test_numbers_out_of_range_make_a_sample_broken(meta):
    sample = Sample("a.tar/1", "text", [picture(1)] * 2, None, meta)
    with pytest.raises(ValueError, match="a.tar/1 has a .* that is no number up to"):
        load_sample(sample, Augment((8, 8)), 5)


def test_an_epoch_that_is_left_early_loses_nothing_of_the_next(make_shards):
    folder = make_shards(23)
    alone = [batch.keys for batch in data(folder).train_dataloader()]
    loader = data(folder, workers=2).train_dataloader()
    for taken in (1, 0, 2):
        begun = iter(loader)
        assert [next(begun).keys for _ in range(taken)] == alone[:taken]
    assert [batch.keys for batch in loader] == alone
