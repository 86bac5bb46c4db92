"""Caches of prompts with lengths of their own, from the embedding to the loss and to the judge."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from lit_prefopt.cache_checks import check_latents
from lit_prefopt.conditioning import Prompt
from lit_prefopt.data.latents.latent_reader import LatentReader
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.shards.index import index_shards, read_index
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules import PairShards
from lit_prefopt.diffusion.encoding import draw_latents, encode_pairs
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.caching import cache, data, errors
from tests.helpers.generating import samples as stored_pairs
from tests.helpers.ragged import SCALE, SHIFT, RaggedBackbone

TEXTS = ["a", "a red fox", "the sea at night in winter", "rain on glass", "two cats", "snow", "ice"]


@pytest.fixture(scope="module")
def pairs(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven pairs with prompts of one to six words."""
    folder = tmp_path_factory.mktemp("ragged") / "pairs"
    with ShardWriter(folder, max_count=4) as writer:
        for text, sample in zip(TEXTS, stored_pairs(Path(shards)), strict=False):
            writer.add(text, *sample.sides, {})
    return str(folder)


@pytest.fixture(scope="module")
def ragged(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of them."""
    return cache(RaggedBackbone(), pairs, tmp_path_factory.mktemp("ragged") / "cache")


def same(one: Prompt, other: Prompt) -> None:
    """Assert that two prompts are equal to the last bit."""
    a, b = one.tensors(), other.tensors()
    assert sorted(a) == sorted(b) == ["caption.lengths", "caption.values", "pooled"]
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert a[name].dtype == b[name].dtype, name


def test_every_prompt_is_kept_without_padding(ragged: str) -> None:
    backbone = RaggedBackbone()
    reader = LatentReader(read_index(ragged))
    kept = [reader(s, n) for s, count in enumerate(reader.counts) for n in range(count)]
    assert [one.text for one in kept] == TEXTS
    for one in kept:
        assert sorted(one.prompt) == ["caption", "pooled"]
        assert sorted(one.views) == ["deviation", "frames", "mean"]
        row = backbone.embed([one.text]).row(0)
        assert len(row["caption"]) == len(one.text.split())
        assert one.prompt["caption"].dtype == torch.bfloat16
        for name, tensor in row.items():
            assert torch.equal(one.prompt[name], tensor), name
    same(LatentSet.from_shards(reader.shards).empty, backbone.embed([""]))
    assert load_file(Path(ragged) / "empty.safetensors")["caption.lengths"].tolist() == [0]
    settings = json.loads((Path(ragged) / "generation.json").read_text())
    assert settings["text"] == {"caption": 6, "pooled": 3}
    assert (settings["scaling_factor"], settings["shift_factor"]) == (SCALE, SHIFT)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_images(ragged: str, pairs: str, workers: int) -> None:
    """Prompts to the last bit, dropped captions as rows of no words, and latents with the shift."""
    backbone, options = RaggedBackbone(), {"caption_dropout": 0.3, "seed": 6}
    images = PairShards(pairs, 3, resolution=32, workers=0, **options)
    images.setup("fit")
    latents = data(ragged, batch_size=3, workers=workers, **options)
    lengths = []
    for one, other in zip(images.train_dataloader(), latents.train_dataloader(), strict=True):
        assert one.texts == other.texts
        encoded, drawn = encode_pairs(backbone, one), draw_latents(backbone, other)
        same(encoded.prompt, drawn.prompt)
        torch.testing.assert_close(drawn.latents, encoded.latents, rtol=1e-4, atol=1e-5)
        lengths += drawn.prompt.ragged("caption").lengths
    assert lengths.count(0) == 2
    assert len({*lengths}) > 2


def test_a_shift_moves_the_means_and_no_deviation(ragged: str) -> None:
    backbone = RaggedBackbone()
    batch = next(iter(data(ragged, batch_size=3).train_dataloader()))
    drawn = draw_latents(backbone, batch).latents
    mean = draw_latents(backbone, batch._replace(deviation=None)).latents
    torch.testing.assert_close(mean, (batch.mean - SHIFT) * SCALE)
    unit = draw_latents(backbone, batch._replace(mean=torch.full_like(mean, SHIFT)))
    torch.testing.assert_close(unit.latents, drawn - mean, rtol=1e-4, atol=1e-6)
    ratio = (drawn - mean) / batch.deviation  # the noise, times the scale
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1], rtol=1e-3, atol=1e-3)
    assert ratio[:, 0].std() == pytest.approx(SCALE, rel=0.1)


def test_training_starts_at_the_reference_and_moves(ragged: str, tmp_path: Path) -> None:
    module = DiffusionDPO(RaggedBackbone(), AdamW(1e-2), beta=500.0).train()
    batch = next(iter(data(ragged, batch_size=4, caption_dropout=0.3).train_dataloader()))
    pairs = module.form_pairs(batch)
    ratios = module.log_ratios(pairs)
    assert (ratios.values == 0).all()
    module.losses(ratios, pairs).mean().backward()
    net = module.backbone.policy.denoiser
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    table = errors(RaggedBackbone(), ragged, tmp_path / "errors")
    known = data(ragged, batch_size=4, reference=table, seed=0)
    for batch in known.train_dataloader():
        pairs = module.form_pairs(batch)
        stored = module.log_ratios(pairs).reference_error
        own = module.log_ratios(pairs._replace(reference_error=None)).reference_error
        torch.testing.assert_close(stored, own)


def test_without_encoders_the_empty_prompt_is_the_caches(ragged: str) -> None:
    latents = LatentSet.from_shards(read_index(ragged))
    backbone = RaggedBackbone(encoders=False)
    check_latents(backbone, latents)
    backbone.set_empty_prompt(latents.empty)
    same(backbone.empty, RaggedBackbone().embed([""]))
    assert backbone.double().empty.ragged("caption").dtype == torch.float64


class Other(RaggedBackbone):
    """The same with other settings."""

    changes: dict = {}

    def latent_settings(self) -> dict:
        return super().latent_settings() | self.changes


@pytest.mark.parametrize("encoders", [True, False])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"text": {"caption": 6, "mask": 9}},
            r"text tensors caption \(6\), pooled \(3\) and not caption \(6\), mask \(9\)",
        ),
        (
            {"text": {"caption": 8, "pooled": 3}},
            r"pooled \(3\) and not caption \(8\), pooled \(3\)",
        ),
        ({"tokens": 333}, "tokens None and not 333"),
        ({"shift_factor": None}, "shift_factor 0.3 and not None"),
        ({"template": "chat"}, "template None and not chat"),
    ],
)
def test_a_cache_of_other_prompts_is_refused(
    ragged: str, encoders: bool, changes: dict, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Other, "changes", changes)
    latents = LatentSet.from_shards(read_index(ragged))
    with pytest.raises(InputError, match=f"cached for another model .*{sentence}"):
        check_latents(Other(encoders=encoders), latents)


def test_a_cache_with_an_encoder_more_or_less_is_refused(ragged: str) -> None:
    latents = LatentSet.from_shards(read_index(ragged))
    backbone = RaggedBackbone()
    backbone.second = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="without second, and the backbone has one: cache them"):
        check_latents(backbone, latents)
    latents.settings["encoders"] |= {"third": "ab"}
    with pytest.raises(InputError, match="with third, which the backbone lacks: cache them again"):
        check_latents(RaggedBackbone(), latents)


def test_folders_of_other_prompts_are_not_mixed(
    ragged: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Other, "changes", {"tokens": 12, "template": "chat"})
    other = cache(Other(), pairs, tmp_path / "other")
    with pytest.raises(InputError, match=r"cached differently \(tokens, template\)"):
        data([ragged, other])
    twin = cache(RaggedBackbone(), pairs, tmp_path / "twin", batch_size=4)
    assert len(data([ragged, twin]).train_dataloader()) == 2 * len(TEXTS) // 4


def test_a_family_that_embeds_other_tensors_than_it_states_is_refused(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Other, "changes", {"text": {"caption": 6}})
    sentence = r"Other embeds prompts as caption \(6\), pooled \(3\).* have caption \(6\) as `text`"
    with pytest.raises(InputError, match=sentence):
        cache(Other(), pairs, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pooled": None}, "has other parts of a prompt than its set (only its set has pooled)"),
        (
            {"mask": torch.ones(2)},
            "has other parts of a prompt than its set (not its set has mask)",
        ),
        (
            {"caption": torch.zeros(2, 5, dtype=torch.bfloat16)},
            "a prompt of another shape than its",
        ),
        ({"caption": torch.zeros(2, 6)}, "a prompt of another shape than its set"),
        ({"caption": None, "pooled": None}, "has latents without an embedded prompt"),
    ],
)
def test_a_sample_with_another_prompt_is_broken(
    ragged: str, tmp_path: Path, change: dict, sentence: str
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in Path(ragged).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    first = min(folder.glob("*.tar"))
    with tarfile.open(first) as tar:
        members = {one.name: tar.extractfile(one).read() for one in tar.getmembers()}
    name = next(name for name in members if name.endswith(".cache.safetensors"))
    tensors = load(members[name]) | change
    members[name] = save({key: x for key, x in tensors.items() if x is not None})
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in members.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    index_shards(str(folder))
    batches = [*data(str(folder), batch_size=1, broken_share=0.5).train_dataloader()]
    [broken] = {name for batch in batches for name in batch.broken}
    assert sentence in broken
    assert sum(len(batch.texts) for batch in batches) == len(TEXTS)  # another one stands in
