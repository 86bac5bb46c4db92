from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.evaluate.comparison import repeated_images
from lit_prefopt.evaluate.reference_images import ReferenceImages, reference_settings

SEEDS = torch.tensor([3, 4])
TEXTS = ["a cat", "the sea"]
PLENTY = 2**30
CPU = torch.device("cpu")
EVALUATION = dict.fromkeys(
    ("reference", "sampler", "sampling", "resolution", "precision", "device", "versions"), "as is"
)


class Sampler:
    """Samples noise, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: list[str], seeds: Tensor) -> Tensor:
        self.calls += 1
        return torch.stack(
            [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
        )


def kept(folder: Path, sampler: Sampler, most: int = PLENTY, **settings: Any) -> ReferenceImages:
    images = ReferenceImages(sampler, folder / "kept", settings, most, CPU)
    images.prepare()
    return images


def test_images_are_sampled_once_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    sampler = Sampler()
    first = kept(tmp_path, sampler)(TEXTS, SEEDS)
    again = kept(tmp_path, sampler)(TEXTS, SEEDS)
    assert sampler.calls == 1
    assert torch.equal(first, again)
    assert torch.equal(first, Sampler()(TEXTS, SEEDS))
    names = {path.suffix for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json"}


def test_a_precision_is_kept(tmp_path: Path) -> None:
    images = kept(tmp_path, Sampler())
    images.sampler = lambda texts, seeds: torch.ones(2, 3, 4, 4, dtype=torch.bfloat16) / 3
    assert torch.equal(images(TEXTS, SEEDS), images(TEXTS, SEEDS))
    assert images(TEXTS, SEEDS).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("texts", "seeds", "settings"),
    [
        (["a dog", "the sea"], SEEDS, {}),
        (TEXTS, SEEDS + 1, {}),
        (TEXTS[:1], SEEDS[:1], {}),
        (TEXTS, SEEDS, {"sampling": {"steps": 3}}),
    ],
    ids=["text", "seed", "batch", "settings"],
)
def test_what_decides_the_images_makes_them_again(
    tmp_path: Path, texts: list[str], seeds: Tensor, settings: dict[str, Any]
) -> None:
    sampler = Sampler()
    kept(tmp_path, sampler)(TEXTS, SEEDS)
    kept(tmp_path, sampler, **settings)(texts, seeds)
    assert sampler.calls == 2
    held = [path for path in (tmp_path / "kept").iterdir() if path.is_dir()]
    assert len(held) == 1  # those of other settings are removed


def test_every_setting_of_the_reference_decides(backbone: StableDiffusion) -> None:
    before = reference_settings(backbone, EVALUATION)
    assert before == reference_settings(backbone, EVALUATION)
    for name in EVALUATION:
        assert before != reference_settings(backbone, EVALUATION | {name: "another"})
    for part in backbone.encoders.values():
        weight = next(part.parameters())
        weight.data.view(-1)[0] += 1
        assert before["encoders"] != reference_settings(backbone, EVALUATION)["encoders"]
        weight.data.view(-1)[0] -= 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut, flip, empty])
def test_a_damaged_file_is_made_again(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    sampler = Sampler()
    images = kept(tmp_path, sampler)
    first = images(TEXTS, SEEDS)
    [path] = images.folder.glob("*.safetensors")
    spoil(path)
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(images(TEXTS, SEEDS), first)
    assert torch.equal(images(TEXTS, SEEDS), first)
    assert sampler.calls == 2


def test_space_is_bounded(tmp_path: Path) -> None:
    sampler = Sampler()
    one = 2 * 3 * 4 * 4 * 4 + 500  # a batch, with the head of its file
    images = kept(tmp_path, sampler, one)
    for _ in range(2):
        images(TEXTS, SEEDS)
        images(TEXTS, SEEDS + 2)
    assert sampler.calls == 3  # the second batch has no room
    assert sum(path.stat().st_size for path in images.folder.glob("*.safetensors")) <= one


def test_nothing_is_kept_in_no_space(tmp_path: Path) -> None:
    sampler = Sampler()
    kept(tmp_path, sampler)(TEXTS, SEEDS)
    images = kept(tmp_path, sampler, 0)
    images(TEXTS, SEEDS)
    assert sampler.calls == 2
    assert not (tmp_path / "kept").exists()


def test_a_model_against_itself_is_sampled_once() -> None:
    sampler = Sampler()
    draw = repeated_images(sampler)
    first = draw(TEXTS, SEEDS)
    assert draw(list(TEXTS), SEEDS.clone()) is first
    draw(TEXTS, SEEDS + 1)
    draw(["a dog", "the sea"], SEEDS + 1)
    assert sampler.calls == 3
