"""Methods on a flow: levels of draws, roll-outs, held-out quarters, timesteps of judges."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.batches import Steps
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.diffusion.rollout import Rollout, logp
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.methods import D3PO, SPO, DiffusionDPO, SPINDiffusion
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import LevelDraw, Sampling
from tests.helpers.batches import image_pairs
from tests.helpers.converted_flow import ConvertedFlow
from tests.helpers.judges import SEEDS, SMALL_SPO, TEXTS, Brightness

SHAPE = 4, 8, 8
FORMS = [("flow", 0.7), ("dance", 0.3), ("cps", 0.7)]


@pytest.fixture(scope="module")
def flow() -> ConvertedFlow:
    return ConvertedFlow(levels=LevelDraw("shifted"))


def how(form: Any = "flow", eta: float = 0.7, steps: int = 4) -> Sampling:
    return Sampling(steps, guidance=2.0, eta=eta, batch_size=4, stochastic=form)


def test_levels_are_drawn_from_the_seeds(flow: ConvertedFlow) -> None:
    module = DiffusionDPO(flow, AdamW(1e-3), beta=100.0).eval()
    pairs = module.form_pairs(image_pairs(4))
    noised = module.add_noise(pairs)
    u = draws.uniform(pairs.seeds, "t")
    assert noised.t.dtype == torch.float64
    assert torch.equal(noised.t, flow.process.draw_levels(u, SHAPE))
    noise = draws.normal(pairs.seeds, SHAPE, "noise").repeat_interleave(2, 0)
    latents, sigma = pairs.latents.flatten(0, 1), noised.t_per_side.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.latents, (1 - sigma) * latents + sigma * noise)
    assert torch.equal(noised.target.flatten(0, 1), noise - latents)
    tilted = DiffusionDPO(flow, AdamW(1e-3), beta=100.0, gamma=0.9).add_noise(pairs).t
    assert (tilted > noised.t).all()  # noisier


def test_held_out_pairs_by_quarter_of_the_schedule(flow: ConvertedFlow) -> None:
    module = DiffusionDPO(flow, AdamW(1e-3), beta=100.0, validation_draws=2).eval()
    batch = image_pairs(11)
    with torch.no_grad():
        module.validation_step(batch, 0)
    means = module.held_out.compute()
    assert means["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert means["margin"] == 0
    u = torch.cat([draws.uniform(batch.seeds + draw, "t") for draw in range(2)])
    counts = torch.bincount((4 * u).long(), minlength=4)  # the shift undone
    assert counts.min() > 0
    names = [f"accuracy_t{quarter}" for quarter in range(4)]
    assert {name for name in means if name.startswith("accuracy_t")} == {*names}
    stored = [module.held_out.names.index(name) for name in names]
    assert torch.equal(module.held_out.counts[stored], counts.float())


@pytest.mark.parametrize(("form", "eta"), FORMS)
def test_a_roll_out_and_its_density_by_hand(flow: ConvertedFlow, form: Any, eta: float) -> None:
    settings, prompt = how(form, eta), flow.embed(TEXTS)
    with torch.no_grad():
        states = Rollout(flow, settings).roll_out(SEEDS, prompt, torch.float32)
        levels = flow.process.sampler(settings, SHAPE).levels
        assert levels[0] == 1
        assert levels[-1] == 0
        x, by_hand, noises, deviations = draws.normal(SEEDS, SHAPE, "start"), [], [], []
        by_hand.append(x)
        for number, (t, t_next) in enumerate(pairwise(levels)):
            velocity = guided(flow, x, t.expand(2), prompt, 2.0)
            step = flow.process.step(velocity, x, t.expand(2), t_next.expand(2), settings)
            noises.append(draws.normal(SEEDS, SHAPE, f"step {number}"))
            deviations.append(step.sigma)
            x = step.sample(noises[-1])
            by_hand.append(x)
        torch.testing.assert_close(states, torch.stack(by_hand, 1), atol=1e-4, rtol=1e-4)
        ones = torch.ones(2)
        t, t_next = (part.expand(2, -1) for part in (levels[:-1], levels[1:]))
        parents, children = states[:, None, :-1], states[:, None, 1:]
        found = logp(flow, settings, Steps(parents, children, t, t_next, prompt, SEEDS, ones, ones))
    z, s = torch.stack(noises, 1), torch.stack(deviations, 1)
    exact = -z.square() / 2 - s.log() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(found[:, 0], exact.mean((2, 3, 4)), atol=2e-3, rtol=1e-3)


def test_images_are_sampled(flow: ConvertedFlow) -> None:
    """Without noise the steps are Euler's; the trained network's images differ from noise's."""
    plain = sample(flow, TEXTS, SEEDS, how(eta=0.0, steps=8))
    assert plain.isfinite().all()
    assert torch.equal(plain, sample(flow, TEXTS, SEEDS, how(eta=0.0, steps=8)))
    noisy = sample(flow, TEXTS, SEEDS, how(eta=0.3, steps=8))
    assert (plain - noisy).abs().max() > 0.05


def first_loss(module: Any, batch: Any) -> Tensor:
    ratios = module.log_ratios(batch)
    assert (ratios.values == 0).all()
    return module.losses(ratios, batch)


def test_d3po_and_its_judge(flow: ConvertedFlow) -> None:
    judge = Brightness()
    module = D3PO(
        *(flow, AdamW(1e-3)),
        **{"beta": 0.1, "eps": 0.1, "drawn_steps": 2, "trajectories": 2},
        judge=judge,
        sampling=how(),
    ).train()
    made = module.collect(TEXTS, SEEDS)
    levels = flow.process.sampler(how(), SHAPE).levels
    assert made.t.dtype == torch.float64
    assert torch.equal(made.t, levels.expand(2, -1))
    assert [t for _, times in judge.asked for t in times] == [0] * 4  # clean images
    steps = module.draw(made, torch.tensor([0, 1]), SEEDS)
    assert set(steps.t.flatten().tolist()) <= set(levels.tolist())
    assert first_loss(module, steps).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(("form", "eta"), FORMS)
def test_spo_and_its_judge(flow: ConvertedFlow, form: Any, eta: float) -> None:
    judge = Brightness()
    settings = how(form, eta)
    module = SPO(flow, AdamW(1e-3), judge=judge, sampling=settings, **SMALL_SPO).train()
    steps = module.collect(TEXTS, SEEDS)
    levels = flow.process.sampler(settings, SHAPE).levels
    asked = [times[0] for _, times in judge.asked]
    assert asked == [round(1000 * level) for level in levels[2:].tolist()]
    assert steps.t.dtype == torch.float64
    loss = first_loss(module, steps).mean()
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()


def test_exact_spin(flow: ConvertedFlow) -> None:
    settings = how()
    module = SPINDiffusion(flow, AdamW(1e-3), beta=1.0, exact=True, sampling=settings).train()
    pairs = module.form_pairs(image_pairs(3))
    assert first_loss(module, pairs).tolist() == pytest.approx([math.log(2)] * 3)
