"""SPO's resampler, followed by hand, and its loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.batches import LogRatios, Steps
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.errors import InputError
from lit_prefopt.methods import SPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.judges import SEEDS, TEXTS, Brightness, Broken


def spo(backbone: StableDiffusion, **changes: object) -> SPO:
    settings = {
        "judge": Brightness(),
        "beta": 10.0,
        "eps": 0.1,
        "sampling": Sampling(steps=4, guidance=3.0, eta=1.0),
        "candidates": 3,
        "first": 1,
        "inner": 0,
        "threshold": 0.0,
    }
    return SPO(backbone, AdamW(1e-3), **settings | changes).train()


def counted(module: SPO) -> list[int]:
    """Rows of every forward of the denoiser from now on."""
    rows: list[int] = []
    module.backbone.policy.denoiser.register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    return rows


def test_every_candidate_is_predicted_once(backbone: StableDiffusion) -> None:
    """Two prompts, three candidates, guidance doubles: 2 x (2 + 2 + 6 + 6) rows."""
    module = spo(backbone)
    rows = counted(module)
    steps = module.collect(TEXTS, SEEDS)
    assert rows == [4, 4, 12, 12]
    assert steps.t.flatten().tolist() == [501] * 2 + [251] * 2 + [1] * 2
    assert steps.t_next.flatten().tolist() == [251] * 2 + [1] * 2 + [0] * 2
    repeated = [text for text in TEXTS for _ in range(3)]
    assert module.judge.asked == [(repeated, [t] * 6) for t in (251, 1, 0)]
    assert torch.equal(steps.prompt["hidden"], backbone.embed(TEXTS)["hidden"].repeat(3, 1, 1))
    assert steps.seeds.tolist() == SEEDS.tolist() * 3
    # without inner steps both sides have one parent, which is asked of the denoiser once
    assert steps.parents.shape == (6, 1, 1, 4, 8, 8)
    assert steps.children.shape == (6, 2, 1, 4, 8, 8)
    rows.clear()
    module.log_ratios(steps)
    assert rows == [12]  # of the policy; the reference is a network of its own


def test_two_steps_by_hand(backbone: StableDiffusion) -> None:
    """One branching step and one inner step on a schedule of two, worked out from its parts."""
    how = Sampling(steps=2, guidance=3.0, eta=1.0)
    module = spo(backbone, sampling=how, candidates=2, first=0, inner=1)
    steps = module.collect(TEXTS, SEEDS)
    process, prompt = backbone.process, backbone.embed(TEXTS)

    def noise(purpose: str) -> Tensor:
        return draws.normal(SEEDS, (4, 8, 8), purpose)

    with torch.no_grad():
        start, ends, middles = noise("start"), [], []
        t, t_next = (torch.full((2,), x) for x in (501, 1))
        said = guided(backbone, start, t, prompt, 3.0)
        for c in range(2):
            step = process.step(said, start, t, t_next, how)
            middle = step.sample(noise(f"step 0 candidate {c}"))
            again = guided(backbone, middle, t_next, prompt, 3.0)
            end = process.step(again, middle, t_next, torch.zeros(2, dtype=torch.int64), how)
            middles.append(middle)
            ends.append(end.sample(noise(f"step 1 candidate {c}")))
        bright = torch.stack([backbone.decode(end).mean((1, 2, 3)) for end in ends], 1)
    order = bright.argsort(1, descending=True)
    row = torch.arange(2)[:, None]
    middle, end = (torch.stack(x, 1)[row, order] for x in (middles, ends))
    assert steps.t.flatten().tolist() == [501, 501, 1, 1]
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(steps.parents[:2, :, 0], start[:, None].expand_as(middle), **close)
    torch.testing.assert_close(steps.children[:2, :, 0], middle, **close)
    torch.testing.assert_close(steps.parents[2:, :, 0], middle, **close)
    torch.testing.assert_close(steps.children[2:, :, 0], end, **close)


def test_parents_in_common_count_as_each_sides_own(backbone: StableDiffusion) -> None:
    module = spo(backbone)
    once = module.collect(TEXTS, SEEDS)
    twice = once._replace(parents=once.parents.repeat(1, 2, 1, 1, 1, 1))
    with torch.no_grad():
        for parameter in backbone.policy.denoiser.parameters():
            parameter.add_(0.01)
        one, two = module.log_ratios(once).values, module.log_ratios(twice).values
    assert one.shape == (6, 2, 1)
    assert one.abs().min() > 0
    torch.testing.assert_close(one, two)


def test_a_chain_that_the_schedule_cuts_short_is_decided_at_its_end(
    backbone: StableDiffusion,
) -> None:
    module = spo(backbone, first=0, inner=2)
    steps = module.collect(TEXTS, SEEDS)
    assert [t for _, (t, *_) in module.judge.asked] == [1, 0]
    assert steps.t.flatten().tolist() == [751] * 2 + [501] * 2 + [251] * 2 + [1] * 2


def test_only_pairs_that_are_far_apart_are_kept(backbone: StableDiffusion) -> None:
    everything = spo(backbone).collect(TEXTS, SEEDS)
    nothing = spo(backbone, threshold=0.999).collect(TEXTS, SEEDS)
    assert len(everything.t) == 6
    assert nothing.children.shape == (0, 2, 1, 4, 8, 8)
    # tanh(d / 2) is the difference of the two probabilities
    module = spo(backbone, judge_scale=20.0, threshold=0.3)
    with torch.no_grad():
        some = module.collect(TEXTS, SEEDS)
    assert 0 <= len(some.t) <= 6


def test_the_next_parent_is_not_the_best(backbone: StableDiffusion) -> None:
    """Over many prompts each candidate is drawn, whatever the judge says."""
    count = 60
    texts, seeds = ["a cat"] * count, torch.arange(count)
    steps = spo(backbone).collect(texts, seeds)
    first, second = steps.children[:count, 0, 0], steps.parents[count : 2 * count, 0, 0]
    best = (first == second).flatten(1).all(1).float().mean()
    assert 0.15 < best < 0.55  # one third, within four standard errors


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_step_zero(
    family: type[StableDiffusion], lora: LoRA | None, tiny_folder: str, tiny_xl_folder: str
) -> None:
    folder = tiny_xl_folder if family is StableDiffusionXL else tiny_folder
    module = spo(family(folder, lora=lora))
    steps = module.form_pairs(module.collect(TEXTS, SEEDS))
    ratios = module.log_ratios(steps)
    assert ratios.values.shape == (6, 2, 1)
    assert (ratios.values == 0).all()
    losses = module.losses(ratios, steps)
    assert losses.tolist() == pytest.approx([math.log(2)] * 6)
    losses.mean().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_clipped_ratio_pulls_no_more(backbone: StableDiffusion) -> None:
    module = spo(backbone)
    values = torch.tensor([[[0.05], [-0.05]], [[0.2], [-0.05]], [[100.0], [-100.0]]])
    values.requires_grad_()
    steps = Steps(*[None] * 6, torch.ones(3), torch.ones(3))
    losses = module.losses(LogRatios(values, torch.zeros(3, 1)), steps)
    at = [10 * 0.1, 10 * (math.log(1.1) + 0.05), 10 * (math.log(1.1) - math.log(0.9))]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in at], rel=1e-5)
    losses.sum().backward()
    assert (values.grad != 0).flatten(1).tolist() == [[True, True], [False, True], [False, False]]
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sampling": Sampling(steps=4, eta=0.0)}, "deterministic sampler"),
        ({"sampling": Sampling(steps=4, eta=1.0, guided=0.5)}, "set `sampling.guided` to 1"),
        ({"candidates": 1}, "set it to 2 or more"),
        ({"first": 4}, "does not fit into 4 steps"),
    ],
)
def test_bad_settings(backbone: StableDiffusion, change: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        spo(backbone, **change)


@pytest.mark.parametrize("scores", [[1.0, 2.0], [float("nan")] * 6])
def test_a_judge_that_gives_nonsense(backbone: StableDiffusion, scores: list[float]) -> None:
    with pytest.raises(InputError, match="fix the judge"):
        spo(backbone, judge=Broken(scores)).collect(TEXTS, SEEDS)
