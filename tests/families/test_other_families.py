"""Caches between families: one VAE's latents for all that share it, and none of another model's."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.cache_checks import check_latents
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from tests.families.all_cases import CASES, FIRST
from tests.families.conftest import CacheOf, FolderOf
from tests.helpers.caching import cache, cache_again, data
from tests.helpers.generating import samples as pairs_of

SHARED = [
    (one, other)
    for one, other in permutations(FIRST.values(), 2)
    if CASES[one].backbone.FAMILY.vae.class_name == CASES[other].backbone.FAMILY.vae.class_name
    and "flux1" in (one, other)
] + [("sd35", "sd35-without-t5")]
"""Cases of which the second can have the first one's VAE: FLUX.1 and those with such a VAE."""


def with_vae_of(one: str, other: str, folder_of: FolderOf) -> TransformerBackbone:
    """Load the second case's backbone with the VAE of the first."""
    return CASES[other].ours(folder_of(other), reference="none", vae=str(folder_of(one) / "vae"))


def content(folder: str) -> dict[str, bytes]:
    """Return the files of a cache by name, without its manifest."""
    found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert found.pop("generation.json")
    return found


@pytest.mark.parametrize(("one", "other"), SHARED)
def test_the_latents_of_one_vae_serve_another_family(
    one: str,
    other: str,
    few: str,
    folder_of: FolderOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache is in every byte that of the images, and nothing was encoded by the VAE."""
    side = max(CASES[name].sizes[0][0] for name in (one, other))
    options = {"resolution": side, "batch_size": 4, "flip": True}
    source = CASES[one].ours(folder_of(one), reference="none")
    first = cache(source, few, tmp_path / "first", **options)
    from_images = cache(with_vae_of(one, other, folder_of), few, tmp_path / "images", **options)
    backbone = with_vae_of(one, other, folder_of)

    def encode(*_: object) -> None:
        raise AssertionError("the VAE was run")

    monkeypatch.setattr(backbone.vae, "encode", encode)
    again = cache_again(backbone, first, tmp_path / "again", **options)
    assert content(again) == content(from_images)
    assert content(again) != content(first)
    ours, theirs = (LatentSet.from_shards(read_index(x)).settings for x in (again, from_images))
    assert {name for name in ours if ours[name] != theirs.get(name)} == {"prompts", "latents"}
    check_latents(with_vae_of(one, other, folder_of), LatentSet.from_shards(read_index(again)))
    both = data([again, from_images], batch_size=6).train_dataloader()  # of one kind
    assert sum(len(batch.texts) for batch in both) == 12


@pytest.mark.parametrize("name", ["sd3"])
def test_the_latents_of_another_vae_are_refused(
    name: str, folder_of: FolderOf, cache_of: CacheOf, tmp_path: Path
) -> None:
    case, side = CASES[name], CASES[name].sizes[0][0]
    backbone = case.ours(folder_of(name), reference="none")
    with torch.no_grad():
        next(backbone.vae.parameters()).mul_(1.001)
    backbone.vae.save_pretrained(tmp_path / "vae")
    for options in ({"vae": str(tmp_path / "vae")}, {"dtype": "bfloat16"}):
        other = case.ours(folder_of(name), reference="none", **options)
        with pytest.raises(InputError, match="whose VAE has other weights or another precision"):
            cache_again(other, cache_of(name), tmp_path / "out", resolution=side)
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize("name", ["sd3"])
def test_latents_of_other_images_are_refused(
    name: str, folder_of: FolderOf, cache_of: CacheOf, few: str, tmp_path: Path
) -> None:
    """Of another size or view, or for an output that was made of other pairs."""
    case, side = CASES[name], CASES[name].sizes[0][0]

    def again(cached: str, **options: Any) -> str:
        backbone = case.ours(folder_of(name), reference="none")
        return cache_again(backbone, cached, tmp_path / "out", **{"resolution": side} | options)

    cure = f"set `--model.resolution {side} --model.flip false`, or encode the images"
    with pytest.raises(
        InputError,
        match=f"with resolution {side} and not {2 * side}, flip false and not true: {cure}",
    ):
        again(cache_of(name), resolution=2 * side, flip=True)
    again(cache_of(name))
    with ShardWriter(tmp_path / "two") as writer:
        for sample in pairs_of(Path(few))[:2]:
            writer.add(sample.text, *sample.sides, {})
    backbone = case.ours(folder_of(name), reference="none")
    two = cache(backbone, str(tmp_path / "two"), tmp_path / "cache", resolution=side)
    with pytest.raises(InputError, match="another generation, which differs in latents, prompts"):
        again(two)


@pytest.mark.parametrize(("one", "other"), [*permutations(FIRST.values(), 2)])
@pytest.mark.parametrize("encoders", [True, False])
def test_a_cache_of_another_family_is_refused(
    one: str, other: str, encoders: bool, folder_of: FolderOf, cache_of: CacheOf
) -> None:
    """Before training, and whether or not the VAE and the text encoders are loaded."""
    latents = LatentSet.from_shards(read_index(cache_of(one)))
    backbone = CASES[other].ours(folder_of(other), reference="none", encoders=encoders)
    with pytest.raises(InputError, match=r"The pairs were cached for another model .*: train .*"):
        check_latents(backbone, latents)
