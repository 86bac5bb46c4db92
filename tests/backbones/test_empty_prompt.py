"""The empty prompt is embedded once, and asked for only where guidance needs it."""

from __future__ import annotations

import copy

import pytest
import torch

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.methods import SPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.judges import SEEDS, SMALL_SPO, TEXTS, Brightness

Encoded = dict[str, list[int]]


def encoded(backbone: StableDiffusion) -> Encoded:
    """Rows of every forward of each text encoder from now on."""
    rows: Encoded = {name: [] for name in backbone.ENCODERS}
    for name, seen in rows.items():
        getattr(backbone, name).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(len(args[0]))
        )
    return rows


@pytest.fixture(params=[StableDiffusion, StableDiffusionXL])
def family(request: pytest.FixtureRequest, tiny_folder: str, tiny_xl_folder: str):
    folder = tiny_xl_folder if request.param is StableDiffusionXL else tiny_folder
    return request.param(folder, lora=LoRA(4))


def same(one: Prompt, other: Prompt) -> bool:
    """Whether two prompts have the same rows, type included."""
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_a_run_embeds_it_once(family: StableDiffusion) -> None:
    how = Sampling(steps=4, guidance=3.0, eta=1.0)
    module = SPO(family, AdamW(1e-3), judge=Brightness(), sampling=how, **SMALL_SPO)
    rows = encoded(family)
    for _ in range(2):
        steps = module.collect(TEXTS, SEEDS)
        module.log_ratios(steps).values.sum().backward()
    sample(family, TEXTS, SEEDS, how)
    for seen in rows.values():
        assert sorted(seen) == [1, 2, 2, 2]  # the texts of each collection and of the sample


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_guidance_nobody_asks_for_it(family: StableDiffusion, guidance: float) -> None:
    rows = encoded(family)
    sample(family, TEXTS, SEEDS, Sampling(steps=2, guidance=guidance))
    assert all(sorted(seen) == ([2] if guidance == 1 else [1, 2]) for seen in rows.values())


def test_guidance_draws_away_from_it(family: StableDiffusion) -> None:
    prompt, latents, t = family.embed(TEXTS), torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    without = family.predict(latents, t, family.embed(["", ""]))
    expected = without + 5.0 * (family.predict(latents, t, prompt) - without)
    torch.testing.assert_close(guided(family, latents, t, prompt, 5.0), expected)


def test_it_follows_moves_and_copies(family: StableDiffusion) -> None:
    assert same(family.empty, family.embed([""]))
    assert not any("empty" in name for name in family.state_dict())
    other = copy.deepcopy(family)
    assert same(other.empty, family.empty)
    assert other.empty["hidden"] is not family.empty["hidden"]
    outer = torch.nn.ModuleList([other]).to(torch.bfloat16)  # as a Trainer moves a module
    assert outer[0].empty["hidden"].dtype == torch.bfloat16
    assert same(other.empty, other.embed([""]))
    assert family.empty["hidden"].dtype == torch.float32


def test_what_was_embedded_in_inference_mode_serves_in_training(family: StableDiffusion) -> None:
    with torch.inference_mode():
        empty = family.empty
    assert not empty["hidden"].is_inference()
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    guided(family, latents, t, family.embed(TEXTS), 5.0).sum().backward()
    grads = [p.grad for p in family.policy.parameters() if p.requires_grad]
    assert all(torch.isfinite(grad).all() for grad in grads)
