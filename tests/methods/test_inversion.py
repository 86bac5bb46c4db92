"""DDIM-InPO and SmPO: the inversion against closed forms, and losses at inverted noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3, trained
from lit_prefopt.backbones.base import Backbone
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.inversion import Solver, invert
from lit_prefopt.errors import InputError
from lit_prefopt.losses import preference_loss, sigmoid
from lit_prefopt.methods import DiffusionDPO, InPO, SmPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import image_pairs
from tests.helpers.step_zero import moved

CENTRE, WIDTH = 0.4, 0.7
SCORES = torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.3, 0.7]])


@pytest.fixture(params=["UNet", "UNet, v prediction", "flow"])
def any_backbone(
    request: pytest.FixtureRequest, tiny_folder: str, tiny_sd35_folder: str
) -> Backbone:
    """UNets, all weights trained, and a flow with a LoRA."""
    torch.manual_seed(0)  # the LoRA's start
    if request.param == "flow":
        return StableDiffusion3(tiny_sd35_folder, lora=LoRA(4))
    more = {"prediction": "v_prediction"} if "v pred" in request.param else {}
    return StableDiffusion(tiny_folder, **more)


def inpo(backbone: Backbone, **options: object) -> InPO:
    numbers = {"beta": 50.0, "inversion_steps": 3} | options
    return InPO(backbone, AdamW(1e-3), **numbers).train()


def smpo(backbone: Backbone, **options: object) -> SmPO:
    numbers = {"beta": 5.0, "inversion_steps": 2, "score_range": (0.0, 1.0)} | options
    return SmPO(backbone, AdamW(1e-3), **numbers).train()


def scored(module: InPO) -> Pairs:
    return module.form_pairs(image_pairs()._replace(scores=SCORES))


def of_gaussian(backbone: Backbone) -> Callable[..., Tensor]:
    """Return the exact prediction for latents that are all N(CENTRE, WIDTH^2)."""
    process = backbone.process

    def predict(latents: Tensor, t: Tensor, prompt: object) -> Tensor:
        signal, rest = process.factors(t)
        spread = signal**2 * WIDTH**2 + rest**2
        apart = (latents.double() - signal * CENTRE) / spread
        noise, image = rest * apart, CENTRE + signal * WIDTH**2 * apart
        kinds = {"epsilon": noise, "velocity": noise - image}
        kinds["v_prediction"] = signal * noise - rest * image
        return kinds[process.prediction]

    return predict


def exact_noise(backbone: Backbone, pairs: Pairs, t: Tensor) -> Tensor:
    """Return the noise at the end of the probability-flow path, which keeps the standard score."""
    process = backbone.process
    (signal, rest), (start, start_rest) = process.factors(t), process.factors(t * 0)
    (signal, rest, start, start_rest) = (x[:, None] for x in (signal, rest, start, start_rest))
    clean = pairs.latents.double()
    score = (clean - start * CENTRE) / (start**2 * WIDTH**2 + start_rest**2).sqrt()
    end = signal * CENTRE + (signal**2 * WIDTH**2 + rest**2).sqrt() * score
    return (end - signal * clean) / rest


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("trapezoid", 2)])
def test_inversion_converges_to_the_path_of_a_gaussian(
    solver: Solver, order: int, any_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error falls with the number of steps, for the trapezoid with its square."""
    monkeypatch.setattr(any_backbone, "predict", of_gaussian(any_backbone))
    pairs = inpo(any_backbone).form_pairs(image_pairs())
    # multiples of 64 steps: parts of a timestep are not rounded
    level = 640 if any_backbone.process.prediction != "velocity" else 0.64
    t = torch.full((3,), level).to(
        any_backbone.process.draw_levels(torch.zeros(3).double(), (4, 8, 8))
    )
    expected = exact_noise(any_backbone, pairs, t)
    errors = [
        (invert(any_backbone, pairs, t, steps, solver) - expected).abs().max().item()
        for steps in (16, 64)
    ]
    assert errors[0] > 4**order * 0.5 * errors[1]
    assert errors[1] < (0.2 if order == 1 else 0.02)


def test_the_random_share_is_that_of_ddim(
    backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no noise predicted, what is added is DDIM's sigma times eta, by its own formula."""
    monkeypatch.setattr(backbone, "predict", lambda latents, t, prompt: 0 * latents)
    pairs = inpo(backbone).form_pairs(image_pairs())
    t = torch.tensor([600, 300, 900])
    with_noise, without = (invert(backbone, pairs, t, 1, "euler", eta) for eta in (0.3, 0.0))
    levels = backbone.process.scheduler.alphas_cumprod.double()
    here, there = levels[0], levels[t]
    sigma = ((1 - here) / (1 - there) * (1 - there / here)).sqrt()
    drawn = (with_noise - without) * (1 - there).sqrt().view(-1, 1, 1, 1, 1)
    assert torch.allclose(drawn[:, 0], drawn[:, 1], atol=1e-6)  # the same for both sides
    standard = drawn / (0.3 * sigma.view(-1, 1, 1, 1, 1))
    assert standard.mean().abs() < 0.1
    assert standard.std().item() == pytest.approx(1, abs=0.1)
    again = invert(backbone, pairs, t, 1, "euler", 0.3)
    assert torch.equal(again, with_noise)


def test_noised_sides_hold_the_inverted_noise(any_backbone: Backbone) -> None:
    """Level per pair, noise per side; the target is that noise's, and no gradient is kept."""
    moved(any_backbone, 0.02)
    module, process = inpo(any_backbone), any_backbone.process
    pairs = scored(module)
    noised = module.add_noise(pairs)
    assert not noised.latents.requires_grad
    assert torch.equal(noised.t, DiffusionDPO.add_noise(module, pairs).t)
    noise = invert(any_backbone, pairs, noised.t, 3, "euler", 0.1)
    assert (noise[:, 0] - noise[:, 1]).abs().max() > 1e-3
    t, clean = noised.t_per_side, pairs.latents.flatten(0, 1)
    signal, rest = process.factors(t)
    made = signal * clean.double() + rest * noise.flatten(0, 1).double()
    torch.testing.assert_close(noised.latents.double(), made, atol=1e-5, rtol=1e-5)
    target = process.target(clean, noise.flatten(0, 1), t).view_as(noised.target)
    assert torch.equal(noised.target, target)


def test_inpo_by_hand(any_backbone: Backbone) -> None:
    """Diffusion-DPO in double precision at those noised sides."""
    moved(any_backbone, 0.02)
    module = inpo(any_backbone)
    pairs = scored(module)
    noised = module.add_noise(pairs)

    def errors() -> Tensor:
        predicted = any_backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
        residual = predicted.double().view_as(noised.target) - noised.target.double()
        return residual.square().mean((2, 3, 4))

    policy = errors()
    with any_backbone.as_reference():
        reference = errors()
    change = (reference - policy).tolist()
    value = module.losses(module.log_ratios(pairs), pairs).tolist()
    for (chosen, rejected), own in zip(change, value, strict=True):
        expected = math.log1p(math.exp(-0.5 * 50.0 * (chosen - rejected)))
        assert own == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", [inpo, smpo])
def test_step_zero(make: Callable[[Backbone], InPO], any_backbone: Backbone) -> None:
    module = make(any_backbone)
    pairs = scored(module)
    ratios = module.log_ratios(pairs)
    assert (ratios.values == 0).all()
    losses = module.losses(ratios, pairs)
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)))
    losses.mean().backward()
    weights = trained(module)
    assert all(w.grad is not None and w.grad.isfinite().all() for w in weights.values())
    assert any(w.grad.abs().max() > 0 for w in weights.values())


def test_autocast_keeps_the_gradients(backbone: StableDiffusion) -> None:
    """Weights that the inversion casts without gradients are cast again for the training."""
    module = inpo(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = scored(module)
        module.losses(module.log_ratios(pairs), pairs).mean().backward()
    assert all(weight.grad is not None for weight in trained(module).values())


@pytest.mark.parametrize(("make", "forwards"), [(inpo, 3), (smpo, 4)])
def test_all_ranks_take_the_same_forwards(
    make: Callable[[Backbone], InPO], forwards: int, backbone: StableDiffusion,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As many as there are steps, whatever the levels; and two for a step of the trapezoid."""
    module, calls, predict = make(backbone), [], backbone.predict
    monkeypatch.setattr(backbone, "predict", lambda *a: calls.append(a[1].tolist()) or predict(*a))
    noised = module.add_noise(scored(module))
    assert len(calls) == forwards
    assert len(set(noised.t.tolist())) == 3


RANGE = (11.54, 28.20)


def bare_smpo(**numbers: object) -> SmPO:
    """Return SmPO without a network, for its loss alone."""
    module = SmPO.__new__(SmPO)
    torch.nn.Module.__init__(module)
    shared = {"anchor": 0.0, "chosen_protection": None, "label_smoothing": 0.0}
    own = {"beta": 2000.0, "smoothing_scale": 10.0, "score_range": RANGE}
    for name, value in (shared | own | numbers).items():
        setattr(module, name, value)
    return module


def two_pairs(scores: list[list[float]], size: float) -> tuple[LogRatios, Pairs]:
    values = torch.tensor([[size, -size]] * len(scores), dtype=torch.float64, requires_grad=True)
    ones = torch.ones(len(scores), dtype=torch.float64)
    pairs = Pairs(
        torch.zeros(len(scores), 2, 1, 1, 1), None, torch.arange(len(scores)), ones, ones,
        scores=torch.tensor(scores, dtype=torch.float64),
    )  # fmt: skip
    return LogRatios(values, torch.zeros(len(scores))), pairs


def test_smpo_by_hand() -> None:
    """PickScores to shares of their range, a softmax, the winner by score, and beta for each."""
    scores = [[24.0, 21.0], [19.0, 22.0], [20.0, 20.0]]
    ratios, pairs = two_pairs(scores, 2e-4)
    value = bare_smpo(link=sigmoid).losses(ratios, pairs).tolist()
    for row, own in zip(scores, value, strict=True):
        shares = [(s - RANGE[0]) / (RANGE[1] - RANGE[0]) for s in row]
        weights = [math.exp(s) for s in shares]
        p = max(weights) / sum(weights)
        swapped = row[1] > row[0]
        beta = 2000.0 * 10 * (2 * p - 1)
        z = beta * (-4e-4 if swapped else 4e-4)
        assert own == pytest.approx(math.log1p(math.exp(-z)), rel=1e-10)
    assert value[2] == pytest.approx(math.log(2))


def test_smpo_of_a_certain_preference_is_diffusion_dpo() -> None:
    ratios, pairs = two_pairs([[1e3, -1e3]], 1e-4)
    own = bare_smpo(link=sigmoid, smoothing_scale=1.0).losses(ratios, pairs)
    expected = preference_loss(ratios.chosen - ratios.rejected, pairs.labels, 2000.0)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [-100.0, 100.0])
def test_smpo_has_finite_gradients_far_out(size: float) -> None:
    ratios, pairs = two_pairs([[24.0, 21.0], [10.0, 50.0]], size)
    loss = bare_smpo(link=sigmoid).losses(ratios, pairs)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert ratios.values.grad.isfinite().all()


def test_smpo_trains_on_the_side_of_the_higher_score(backbone: StableDiffusion) -> None:
    """The third pair is swapped in training, with its frames; held-out pairs keep their labels."""
    module, frames = smpo(backbone), torch.arange(36).view(3, 2, 6)
    batch = image_pairs()._replace(scores=SCORES, frames=frames)
    pairs, held_out = module.form_pairs(batch), module.eval().form_pairs(batch)
    assert torch.equal(held_out.scores, SCORES)
    for name in ("latents", "scores", "frames"):
        own, given = getattr(pairs, name), getattr(held_out, name)
        assert torch.equal(own[:2], given[:2])
        assert torch.equal(own[2], given[2].flip(0))
    assert (pairs.scores[:, 0] > pairs.scores[:, 1]).all()


def test_a_range_of_scores_is_checked(backbone: StableDiffusion) -> None:
    with pytest.raises(InputError, match="score_range is 1 to 0: give the judge's lowest"):
        smpo(backbone, score_range=(1.0, 0.0))
