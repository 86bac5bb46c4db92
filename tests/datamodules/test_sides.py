"""Lists and single images in batches, from images, caches and stores; what a method may read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.batches import ImagePairs
from lit_prefopt.cli import main
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules import PairShards
from lit_prefopt.datamodules.side_checks import check_sides
from lit_prefopt.diffusion.encoding import draw_latents, encode_pairs
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO, SupervisedFineTuning
from lit_prefopt.optimizers import AdamW
from tests.helpers import caching
from tests.helpers.caching import logged, recipe
from tests.helpers.pair_data import data

LIKE = [1, 0, 0, 1, 1, 0, 1, 1]


def picture(seed: int) -> np.ndarray:
    """Return a random picture of 32 x 32 pixels."""
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def written(folder: Path, *counts: int, scores: bool = True, seeds: bool = True) -> str:
    """Write samples with these numbers of images, and return the folder."""
    with ShardWriter(folder, max_count=5) as writer:
        for number, count in enumerate(counts):
            meta: dict = {"label": LIKE[number % 8]} if count == 1 else {}
            if scores:
                meta["scores"] = [float(number - side) for side in range(count)]
            if seeds:
                meta["seeds"] = [100 * number + side for side in range(count)]
            images = [picture(100 * number + side) for side in range(count)]
            writer.add_sides(f"prompt {number}", images, meta)
    return str(folder)


def method(trains_on: str = "pairs", *, chosen_only: bool = False, needs: tuple = ()) -> object:
    """Return what the check reads of a method."""
    return SimpleNamespace(trains_on=trains_on, chosen_only=chosen_only, needs_known=needs)


def batches(module: PairShards) -> list[ImagePairs]:
    """Return all training batches."""
    return [*module.train_dataloader()]


def test_a_batch_of_lists_has_all_images_scores_and_seeds(tmp_path: Path):
    module = data(written(tmp_path / "a", *[4] * 8), resolution=32)
    check_sides(method("lists", needs=("scores", "noise_seeds")), module)
    for batch in batches(module):
        assert batch.images.shape == (4, 4, 3, 32, 32)
        assert batch.frames is not None
        assert batch.frames.shape == (4, 4, 6)
        for row, key in enumerate(batch.keys):
            number = int(key[-9:])
            pixels = torch.from_numpy(picture(100 * number + 3)).permute(2, 0, 1)
            assert torch.equal(batch.images[row, 3], pixels)
            assert batch.scores is not None
            assert batch.scores[row].tolist() == [number, number - 1, number - 2, number - 3]
            assert batch.noise_seeds is not None
            assert batch.noise_seeds[row].tolist() == [100 * number + side for side in range(4)]
    best = batch.best()
    assert best.sides == 1
    assert torch.equal(best.scores, batch.scores[:, :1])


def test_a_method_of_pairs_gets_the_best_and_the_worst(tmp_path: Path):
    folder = written(tmp_path / "a", 4, 3, 2, 5, 4, 4, 2, 9)
    module = data(folder, resolution=32, workers=1)
    check_sides(method(), module)
    for batch in batches(module):
        assert batch.images.shape == (4, 2, 3, 32, 32)
        for row, key in enumerate(batch.keys):
            number = int(key[-9:])
            last = [4, 3, 2, 5, 4, 4, 2, 9][number] - 1
            worst = torch.from_numpy(picture(100 * number + last)).permute(2, 0, 1)
            assert torch.equal(batch.images[row, 1], worst)
            assert batch.noise_seeds is not None
            assert batch.noise_seeds[row].tolist() == [100 * number, 100 * number + last]


def test_single_images_have_their_labels(tmp_path: Path):
    module = data(written(tmp_path / "a", *[1] * 8), resolution=32)
    check_sides(method("likes"), module)
    seen = {
        key: label for b in batches(module) for key, label in zip(b.keys, b.labels, strict=True)
    }
    assert [float(seen[key]) for key in sorted(seen)] == LIKE


def test_numbers_that_some_samples_lack_are_none_in_their_batch(tmp_path: Path):
    module = data(written(tmp_path / "a", *[2] * 4, scores=False), resolution=32)
    [batch] = batches(module)
    assert batch.scores is None
    assert batch.noise_seeds is not None


def test_what_a_method_needs_stops_the_run_with_the_samples_name(tmp_path: Path):
    module = data(written(tmp_path / "a", *[3] * 4, scores=False), resolution=32)
    check_sides(method("lists", needs=("scores",)), module)
    with pytest.raises(InputError, match=r"pairs-000000.tar/\d+ has no scores of all its images"):
        batches(module)


def test_a_single_image_without_a_label_is_broken(tmp_path: Path):
    with ShardWriter(tmp_path / "a") as writer:
        for number, label in enumerate([{"label": 1}, {"label": 0.5}, {}, {"label": 2}]):
            writer.add_sides("a cat", [picture(number)], label)
    module = data(str(tmp_path / "a"), resolution=32, broken_share=1.0)
    check_sides(method("likes"), module)
    [batch] = batches(module)
    assert batch.labels.tolist() == [1, 1, 1, 1]
    assert sorted({name.partition(" is ")[2] for name in batch.broken}) == [
        "a single image without the label 1 (liked) or 0 (disliked) in its .json"
    ]
    assert len({*batch.broken}) == 3


@pytest.mark.parametrize(
    ("counts", "trains_on", "message"),
    [
        ((1, 1), "pairs", "compares images of one prompt, and .* has single images with likes"),
        ((1, 1), "lists", "compares images of one prompt"),
        ((1, 2), "likes", "has single images and pairs, which one training cannot mix"),
        ((3, 9), "lists", "has lists of 3 to 9 images, and a batch .* `--samples lists "),
        ((2, 4), "lists", "--list_size 4`, which takes the best, the worst"),
    ],
)
def test_samples_that_a_method_cannot_train_on(
    tmp_path: Path, counts: tuple[int, ...], trains_on: str, message: str
):
    module = data(written(tmp_path / "a", *counts), resolution=32)
    with pytest.raises(InputError, match=message):
        check_sides(method(trains_on), module)
    good = data(written(tmp_path / "good", 4, 4), resolution=32, validation=str(tmp_path / "a"))
    with pytest.raises(InputError, match=message):  # held-out samples too
        check_sides(method(trains_on), good)


def test_a_method_of_likes_may_be_validated_on_pairs(tmp_path: Path):
    pairs = written(tmp_path / "pairs", 2, 2)
    module = data(written(tmp_path / "a", 1, 1), resolution=32, validation=pairs)
    check_sides(method("likes"), module)
    check_sides(method(chosen_only=True), module)
    assert [reader.pairs_only for reader, _ in module.readers] == [False, False]


@pytest.mark.parametrize("count", [1, 4])
def test_a_cache_holds_what_the_images_give(count: int, tiny_folder: str, tmp_path: Path):
    """Latents, prompts, labels and numbers, and the reference's errors of each image."""
    folder = written(tmp_path / "a", *[count] * 8)
    backbone = caching.frozen(tiny_folder)
    cached = caching.cache(backbone, folder, tmp_path / "cache")
    module, latents = data(folder, resolution=32), caching.data(cached)
    for one, other in zip(batches(module), batches(latents), strict=True):
        a, b = encode_pairs(backbone, one.scaled()), draw_latents(backbone, other)
        torch.testing.assert_close(a.latents, b.latents)
        for name in ("seeds", "labels", "weights", "frames", "scores", "noise_seeds"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    table = caching.errors(backbone, cached, tmp_path / "errors")
    known = caching.data(cached, reference=table, seed=0)
    for batch in batches(known):
        assert batch.reference_error is not None
        assert batch.reference_error.shape == (4, 1, count)
    if count > 2:
        check_sides(method(), known)
        for whole, two in zip(batches(caching.data(cached, reference=table, seed=0)),
                              batches(known), strict=True):  # fmt: skip
            assert torch.equal(two.reference_error, whole.reference_error[..., [0, -1]])
            assert torch.equal(two.mean, whole.mean[:, [0, -1]])
            assert torch.equal(two.noise_seeds, whole.noise_seeds[:, [0, -1]])


def test_lists_of_several_lengths_are_cached_but_have_no_table(tiny_folder: str, tmp_path: Path):
    folder = written(tmp_path / "a", 3, 4, 4, 3, 2, 4)
    backbone = caching.frozen(tiny_folder)
    cached = caching.cache(backbone, folder, tmp_path / "cache")
    [first, *_] = caching.data(cached).reader.shards
    assert first.sides is not None
    assert first.sides.tolist() == [3, 4, 4, 3, 2]
    module = caching.data(cached, batch_size=2)
    check_sides(method(), module)
    assert {batch.sides for batch in batches(module)} == {2}
    with pytest.raises(InputError, match="the cache has pairs and lists of 3 to 4"):
        caching.errors(backbone, cached, tmp_path / "errors")


def module_of(kind: type, folder: str, **options: float) -> DiffusionDPO | SupervisedFineTuning:
    """Return a method that trains a tiny model."""
    return kind(StableDiffusion(folder), AdamW(1e-3), **options)


def test_supervised_training_has_no_gradient_from_disliked_images(tiny_folder: str, tmp_path: Path):
    module = module_of(SupervisedFineTuning, tiny_folder).train()
    [batch] = batches(data(written(tmp_path / "a", *[1] * 8), resolution=32, batch_size=8))
    batch = batch.scaled()
    liked = batch.labels == 1
    pairs = module.form_pairs(batch)
    assert torch.equal(pairs.weights, batch.labels)
    losses = module.losses(module.log_ratios(pairs), pairs)
    weights = [p for p in module.backbone.policy.parameters() if p.requires_grad]
    whole = torch.autograd.grad((pairs.weights * losses).sum(), weights, retain_graph=True)
    alone = torch.autograd.grad(losses[liked].sum(), weights)
    assert any(grad.abs().max() > 0 for grad in whole)
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", [1, 3])
def test_stored_encodings_give_the_same_run(count: int, tiny_folder: str, tmp_path: Path):
    """Of lists for a method of pairs, and of likes: with and without a store, to the last bit."""
    folder = written(tmp_path / "a", *[count] * 8)
    arguments = ["--data", "PairShards", "--data.shards", folder, "--data.validation", folder]
    arguments += ["--data.resolution", "32", "--data.workers", "0", "--data.draws", "2"]
    arguments += ["--data.cache", str(tmp_path / "cache")]
    kind = ["--model", "SupervisedFineTuning"] if count == 1 else []
    for name, keep in (("kept", "true"), ("plain", "false")):
        rest = [*arguments, "--data.keep_encodings", keep, *kind]
        main(["fit", *recipe(tiny_folder, tmp_path / name, *rest), "--trainer.max_steps", "8"])
    one, other = (logged(tmp_path / name) for name in ("kept", "plain"))
    assert one["train/loss"] == other["train/loss"]
    assert one["val/loss"] == other["val/loss"]
    assert len(set(one["train/loss"])) > 4
    assert [*(tmp_path / "cache" / "encodings").iterdir()]
