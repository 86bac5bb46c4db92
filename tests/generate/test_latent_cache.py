"""Cached pairs: what is kept, and that training from it is training from the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from torch import nn

from lit_prefopt.backbones import StableDiffusion, StableDiffusionXL
from lit_prefopt.batches import ImagePairs, LatentPairs, Pairs
from lit_prefopt.data.latents.latent_reader import LatentReader, LatentSample
from lit_prefopt.data.shards.index import index_shards, read_index
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules import PairShards
from lit_prefopt.datamodules.generation import StoredGroup
from lit_prefopt.diffusion.encoding import draw_latents, encode_pairs
from lit_prefopt.errors import InputError
from lit_prefopt.generate import LatentCache, ReferenceErrors
from lit_prefopt.generate.latent_cache import EncodedPair
from lit_prefopt.methods import SupervisedFineTuning
from lit_prefopt.optimizers import AdamW
from lit_prefopt.prepare import validate
from tests.helpers.caching import cache, data, frozen
from tests.helpers.generating import samples as pairs_from_record

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # VAE and text encoders saw batches of another size


def samples(folder: str) -> list[LatentSample]:
    """Return what cached shards hold."""
    reader = LatentReader(read_index(folder))
    return [reader(s, n) for s, count in enumerate(reader.counts) for n in range(count)]


def same_but_for_encoding(images: Pairs, latents: Pairs) -> None:
    """Assert that two batches are the same draws of the same pairs."""
    for name in ("seeds", "labels", "weights", "frames"):
        assert torch.equal(getattr(images, name), getattr(latents, name)), name
    torch.testing.assert_close(latents.latents, images.latents, **CLOSE)
    torch.testing.assert_close(latents.prompt["hidden"], images.prompt["hidden"], **CLOSE)
    if images.masks is not None:
        assert torch.equal(images.masks, latents.masks)


def test_what_is_kept_is_the_posterior_of_both_sides(
    cached: str, tiny_folder: str, shards: str
) -> None:
    backbone = frozen(tiny_folder)
    kept = samples(cached)
    assert [one.text for one in kept] == [f"picture number {n}" for n in range(24)]
    scores = {"chosen": 0.75, "rejected": 0.5}
    assert kept[6].meta == {"gap": 6 / 24, "scores": scores}
    module = PairShards(shards, 4, resolution=32, validation=shards, workers=0)
    module.setup("validate")
    batch = next(iter(module.val_dataloader()))
    mean, deviation = (
        x.unflatten(0, (4, 2)) for x in backbone.posterior(batch.scaled().images.flatten(0, 1))
    )
    hidden = backbone.embed(batch.texts)["hidden"]
    for i in range(4):
        tensors = kept[i].tensors
        assert tensors["mean"].shape == (2, 2, 4, 8, 8)
        torch.testing.assert_close(tensors["mean"][0], mean[i], **CLOSE)
        torch.testing.assert_close(tensors["deviation"][0], deviation[i], **CLOSE)
        torch.testing.assert_close(tensors["hidden"], hidden[i], **CLOSE)
        assert not torch.allclose(tensors["mean"][1], mean[i], **CLOSE)  # mirrored
        assert kept[i].sizes == [(48, 40)] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_its_batches_are_those_of_the_images(
    cached: str, tiny_folder: str, shards: str, workers: int
) -> None:
    """Same order, seeds, mirrorings, dropped captions and draws of the VAE, in two epochs."""
    backbone = frozen(tiny_folder)
    options = {"caption_dropout": 0.3, "seed": 1, "validation": shards}
    images = PairShards(shards, 4, resolution=32, flip=True, workers=0, **options)
    images.setup("fit")
    latents = data(cached, **options | {"validation": cached}, workers=workers)
    loaders = (images.train_dataloader(), latents.train_dataloader())
    dropped = 0
    for one, other in [
        *zip(*loaders, strict=True),
        *zip(images.val_dataloader(), latents.val_dataloader(), strict=True),
    ]:
        assert isinstance(one, ImagePairs)
        assert isinstance(other, LatentPairs)
        assert one.texts == other.texts
        assert one.keys == other.keys
        dropped += one.texts.count("")
        same_but_for_encoding(encode_pairs(backbone, one), draw_latents(backbone, other))
    assert dropped > 2


def test_masks_and_labels_come_along(tiny_folder: str, shards: str, tmp_path: Path) -> None:
    mask = np.zeros((40, 48, 3), np.uint8)
    mask[:20, 7:30] = 255
    with ShardWriter(tmp_path / "pairs") as writer:
        for n, sample in enumerate(pairs_from_record(Path(shards))[:4]):
            meta = {"label": 0.25 * n, "weight": 2.0}
            writer.add(sample.text, *sample.sides, meta, mask if n % 2 else None)
    folder = cache(frozen(tiny_folder), str(tmp_path / "pairs"), tmp_path / "out")
    images = PairShards(str(tmp_path / "pairs"), 4, resolution=32, workers=0)
    images.setup("fit")
    [one], [other] = images.train_dataloader(), data(folder, seed=0).train_dataloader()
    assert other.masks.shape == (4, 1, 8, 8)
    backbone = frozen(tiny_folder)
    same_but_for_encoding(encode_pairs(backbone, one), draw_latents(backbone, other))
    assert sorted(other.labels.tolist()) == [0, 0.25, 0.5, 0.75]


def test_random_views_and_means_alone(tiny_folder: str, shards: str, tmp_path: Path) -> None:
    options = {"crop": "random", "views": 3, "flip": True, "deviation": False}
    folder = cache(frozen(tiny_folder), shards, tmp_path / "out", **options)
    kept = samples(folder)
    assert {tuple(one.tensors["mean"].shape) for one in kept} == {(6, 2, 4, 8, 8)}
    frames = torch.stack([one.tensors["frames"] for one in kept])
    assert (frames[:, :, 0] == frames[:, :, 1]).all()  # both sides are cut alike
    assert len(frames[:, :3, 0, 3].unique()) > 3
    module = data(folder)
    seen = [batch.frames[:, 0, 3] for _ in range(3) for batch in module.train_dataloader()]
    assert len(torch.cat(seen).unique()) > 4
    batch = next(iter(module.train_dataloader()))
    assert batch.deviation is None
    backbone = frozen(tiny_folder)
    assert torch.equal(draw_latents(backbone, batch).latents, backbone.scaled(batch.mean))
    with pytest.warns(UserWarning, match="cached with random crops"):
        held_out = data(folder, validation=folder)
    for _ in range(2):  # always the first view
        batches = list(held_out.val_dataloader())
        shown = torch.cat([batch.frames for batch in batches])
        assert torch.equal(shown, frames[: len(shown), 0])


class Stopped(Exception):
    """Stands for whatever ends a process."""


def test_a_stopped_cache_ends_with_the_same_bytes(
    cached: str,
    tiny_folder: str,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, options = tmp_path / "out", {"flip": True, "batch_size": 8}
    make = LatentCache.make

    def halting(self: LatentCache, group: StoredGroup) -> list[EncodedPair]:
        if group.number == 2:
            raise Stopped
        return make(self, group)

    monkeypatch.setattr(LatentCache, "make", halting)
    for _ in range(2):
        with pytest.raises(Stopped):
            cache(frozen(tiny_folder), shards, output, **options)
        assert not output.exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="another generation, which differs in deviation: "):
        cache(frozen(tiny_folder), shards, output, **options, deviation=False)
    facts = tmp_path / "out.parts" / "generation.json"
    told = json.loads(facts.read_text())
    facts.write_text(json.dumps(told | {"notes": {"torch": "1.0"}}))  # which decides nothing
    cache(frozen(tiny_folder), shards, output, **options)
    whole = {path.name: path.read_bytes() for path in Path(cached).iterdir()}
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole


def test_the_denoiser_and_the_places_of_the_encoders_make_no_difference(
    cached: str, tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    """Without the denoiser's weights, and with one encoder at a time on the device."""
    whole = {path.name: path.read_bytes() for path in Path(cached).iterdir()}
    for name, offload in (("as-before", False), ("offloaded", True)):
        backbone = frozen(tiny_folder, denoiser_weights=False)
        assert [*backbone.policy.parameters()] == []
        output = tmp_path / name
        cache(backbone, shards, output, flip=True, offload=offload)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == whole


def test_one_encoder_at_a_time_is_moved_to_the_device(
    tiny_xl_folder: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each group the VAE for all images, then each text encoder; the last one leaves."""
    backbone = StableDiffusionXL(tiny_xl_folder, reference="none", denoiser_weights=False)
    names = {id(network): name for name, network in backbone.encoders.items()}
    moves: list[str] = []
    comes, goes = CpuOffload.pre_forward, UserCpuOffloadHook.offload

    def noted_comes(hook: CpuOffload, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moves.append(names[id(module)])
        return comes(hook, module, *args, **kwargs)

    def noted_goes(hook: UserCpuOffloadHook) -> None:
        moves.append(f"{names[id(hook.model)]} back")
        goes(hook)

    monkeypatch.setattr(CpuOffload, "pre_forward", noted_comes)
    monkeypatch.setattr(UserCpuOffloadHook, "offload", noted_goes)
    cache(backbone, shards, tmp_path / "out", offload=True, batch_size=100)
    assert moves == [*names.values(), "text_encoder_2 back"] * 5  # on a CPU the others stay


def test_a_run_that_needs_the_denoiser_ends_at_the_start(tiny_folder: str, tmp_path: Path) -> None:
    backbone = frozen(tiny_folder, denoiser_weights=False)
    cure = "set `--backbone.denoiser_weights true`"
    with pytest.raises(InputError, match=f"SupervisedFineTuning needs the denoiser.*{cure}"):
        SupervisedFineTuning(backbone, AdamW(1e-4))
    with pytest.raises(InputError, match=f"ReferenceErrors needs the denoiser.*{cure}"):
        ReferenceErrors(backbone, str(tmp_path), draws=1)


def test_it_is_validated_and_indexed_like_other_shards(
    cached: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = validate(cached)
    assert not report.would_stop
    assert (report.samples, report.broken.count, report.odd.count) == (24, 0, 0)
    assert "24 samples" in capsys.readouterr().out
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in Path(cached).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    index_shards(str(folder))
    assert {shard.kind for shard in read_index(folder)} == {"latents"}
    assert len(data(str(folder)).train_dataloader()) == 6
    tar = folder / "pairs-000000.tar"
    content = bytearray(tar.read_bytes())
    at = content.find(b"000000003.cache.safetensors") + 512
    content[at : at + 8] = b"\xff" * 8  # the length of the header
    tar.write_bytes(content)
    assert validate(str(folder)).broken.count == 1
    batches = list(data(str(folder)).train_dataloader())
    [broken] = [name for batch in batches for name in batch.broken]
    assert "latents that cannot be read" in broken


def test_the_wrong_sort_of_shards_ends_with_a_sentence(
    cached: str, tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match="contains latents: train on them with `--data CachedPairs`"
    ):
        PairShards(cached, 4, resolution=32, workers=0).setup("fit")
    with pytest.raises(InputError, match="contains images: cache them with"):
        data(shards)
    with pytest.raises(InputError, match="contains latents"):
        cache(frozen(tiny_folder), cached, tmp_path / "out")
    with pytest.raises(InputError, match="set `views` to 1, or `crop` to random"):
        LatentCache(frozen(tiny_folder), "x", 32, views=2)
    with pytest.raises(InputError, match="multiple of 4"):
        LatentCache(frozen(tiny_folder), "x", 30)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in Path(cached).iterdir():
        if path.suffix == ".tar" or path.name == "index.json":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="no generation.json: copy the whole output folder"):
        data(str(bare))
    means = cache(frozen(tiny_folder), shards, tmp_path / "means", deviation=False)
    with pytest.raises(InputError, match=r"cached differently \(flip, deviation\)"):
        data([cached, means])


def test_sdxl_from_the_cache(tiny_xl_folder: str, shards: str, tmp_path: Path) -> None:
    """Two encoders, a pooled prompt, the picture's frame, and zeros for the empty prompt."""
    whole = StableDiffusionXL(tiny_xl_folder, reference="none")
    folder = cache(StableDiffusionXL(tiny_xl_folder, reference="none"), shards, tmp_path / "out")
    images = PairShards(shards, 4, resolution=32, workers=0, caption_dropout=0.4)
    images.setup("fit")
    latents = data(folder, seed=0, caption_dropout=0.4)
    module = SupervisedFineTuning(whole, AdamW(1e-3)).eval()
    for one, other in zip(images.train_dataloader(), latents.train_dataloader(), strict=True):
        pairs, kept = module.form_pairs(one), module.form_pairs(other)
        same_but_for_encoding(pairs, kept)
        torch.testing.assert_close(kept.prompt["pooled"], pairs.prompt["pooled"], **CLOSE)
        with torch.no_grad():
            errors = [module.log_ratios(p).policy_error for p in (pairs, kept)]
        torch.testing.assert_close(*errors, **CLOSE)
    facts = json.loads((Path(folder) / "generation.json").read_text())
    assert facts["text"] == {"hidden": 56, "pooled": 20}


def test_what_a_cached_batch_is_without_its_second_side(cached: str, tiny_folder: str) -> None:
    batch = next(iter(data(cached).train_dataloader()))
    module = SupervisedFineTuning(StableDiffusion(tiny_folder), AdamW(1e-3)).train()
    pairs = module.form_pairs(batch)
    assert pairs.sides == 1
    assert torch.equal(pairs.latents[:, 0], draw_latents(module.backbone, batch).latents[:, 0])
