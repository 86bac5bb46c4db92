"""A step that is computed from tensor shapes leaves nothing behind, in every flow family."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lit_prefopt.backbones import LoRA
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.cli import main
from lit_prefopt.estimate.restore import parts_with_state, without_cached_results
from lit_prefopt.estimate.step_cost import (
    checkpointing,
    flop_counter,
    forward_activations,
    step_cost,
)
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.families.all_cases import CASES, FIRST
from tests.families.conftest import CacheOf, FolderOf
from tests.families.test_training import from_cache, pairs_of
from tests.helpers.caching import data
from tests.helpers.runs import scalars

first_of_families = pytest.mark.parametrize("name", [*FIRST.values()])


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an attribute, inside dicts and lists too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)


def held(backbone: TransformerBackbone) -> dict[str, Any]:
    """Return every attribute of the backbone's modules, by the place where it is held."""
    return {
        f"{type(part).__name__} {number} {name}": value
        for number, part in enumerate(parts_with_state(backbone))
        for name, value in vars(part).items()
    }


def losses(backbone: TransformerBackbone, cached: str, dry: int | None) -> list[float]:
    """Return the losses of three steps.

    Args:
        backbone: The backbone.
        cached: Folder of its cache.
        dry: Number of the step before which the shapes are run; None for never.
    """
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=1000.0, check_base=False).train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    found = []
    for number, batch in enumerate(data(cached, batch_size=2).train_dataloader()):
        if number == dry:
            before = held(backbone)
            forward_activations(module, batch)
            for on in (False, True):
                with checkpointing(module, on):
                    assert step_cost(module, batch).activations > 0
            after = held(backbone)
            assert before.keys() == after.keys()
            changed = [name for name, value in before.items() if after[name] is not value]
            # `checkpointing` itself enables and disables it
            assert {name.split()[-1] for name in changed} <= {"_gradient_checkpointing_func"}
            assert not [x for x in tensors([*after.values()]) if isinstance(x, FakeTensor)]
        loss: Any = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@first_of_families
@pytest.mark.parametrize("dry", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_losses_after_a_dry_run_are_those_without(
    dry: int, name: str, folder_of: FolderOf, cache_of: CacheOf
) -> None:
    """Before the first forward, when tables are not there yet, and after it."""
    case, folder, cached = CASES[name], folder_of(name), cache_of(name)
    plain = losses(case.ours(folder, lora=LoRA(4)), cached, None)
    assert len({*plain}) == 3
    assert losses(case.ours(folder, lora=LoRA(4)), cached, dry) == plain


@first_of_families
def test_a_step_from_images_is_computed_with_prompts_of_full_length(
    name: str, folder_of: FolderOf
) -> None:
    case = CASES[name]
    backbone = case.ours(folder_of(name), lora=LoRA(4))
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=1000.0).train()
    pairs = pairs_of(case)
    cost = step_cost(module, pairs)
    with flop_counter() as counter:
        loss: Any = module.training_step(pairs, 0)
        loss.backward()
    real = counter.get_total_flops()
    # only Z-Image pads no prompt to the longest one
    assert cost.flops > real if name == "z-image" else cost.flops == real


@first_of_families
def test_a_run_chooses_checkpointing_by_memory(
    name: str,
    folder_of: FolderOf,
    cache_of: CacheOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run that computes from shapes has the losses of the run that does not."""
    said: list[str] = []
    monkeypatch.setattr("lit_prefopt.callbacks.checkpointing.rank_zero_info", said.append)
    for choice in ("auto", "true"):
        arguments = from_cache(CASES[name], folder_of(name), cache_of(name), tmp_path / choice)
        main(["fit", *arguments, "--backbone.gradient_checkpointing", choice])
    assert [line[:38] for line in said] == ["Gradient checkpointing is off: a step "]
    auto, stated = (scalars(tmp_path / choice)["train/loss"] for choice in ("auto", "true"))
    assert auto == stated
    assert len({*auto}) == 4


class Counted(nn.Module):
    """A module with a method that caches its results."""

    calls = 0

    @functools.cache  # noqa: B019  # as diffusers does
    def table(self, length: int) -> Tensor:
        Counted.calls += 1
        return torch.zeros(length)


def test_cached_results_are_neither_read_nor_added_inside_the_block() -> None:
    module, caching = Counted(), vars(Counted)["table"]
    first = module.table(3)
    with without_cached_results(nn.Sequential(module)):
        assert module.table(3) is not first
        module.table(4)
    assert vars(Counted)["table"] is caching
    assert caching.cache_info().currsize == 1
    assert module.table(3) is first
    module.table(4)
    assert Counted.calls == 4


def test_diffusers_caches_are_found() -> None:
    """Qwen-Image's table of positions, whose cache is inside a function of diffusers."""
    net = QwenEmbedRope(10000, [2, 2, 2])
    kept = net._compute_video_freqs(1, 2, 2, 0, None)
    with without_cached_results(net):
        assert net._compute_video_freqs(1, 2, 2, 0, None) is not kept
    assert net._compute_video_freqs(1, 2, 2, 0, None) is kept
