"""Policy gradient: roll-outs with densities, noise on few steps, first update, losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3, trained
from lit_prefopt.backbones.base import Backbone
from lit_prefopt.batches import LogRatios, Steps
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.rollout import Rollout, logp
from lit_prefopt.diffusion.sampling import sample_latents
from lit_prefopt.errors import InputError
from lit_prefopt.judges import Judge
from lit_prefopt.methods import PolicyGradient
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.reward_losses import clipped_surrogate
from tests.helpers.judges import SEEDS, TEXTS, Brightness
from tests.helpers.step_zero import moved

UNET = Sampling(steps=4, guidance=3.0, eta=1.0, batch_size=3)
FLOW = Sampling(steps=4, guidance=3.0, eta=0.7, batch_size=3)


@pytest.fixture(scope="module")
def folders(tiny_folder: str, tiny_sd35_folder: str) -> dict[str, str]:
    return {"unet": tiny_folder, "flow": tiny_sd35_folder}


@pytest.fixture(params=["unet", "flow"])
def network(request: pytest.FixtureRequest, folders: dict[str, str]) -> Backbone:
    torch.manual_seed(0)
    kind = StableDiffusion if request.param == "unet" else StableDiffusion3
    return kind(folders[request.param], lora=LoRA(4))


def method(backbone: Backbone, **changes: Any) -> PolicyGradient:
    how = FLOW if isinstance(backbone, StableDiffusion3) else UNET
    settings = {"judge": Brightness(), "sampling": how, "eps": 0.1, "kl": 0.04, "trajectories": 3}
    return PolicyGradient(backbone, AdamW(1e-3), **settings | changes).train()


def every(module: PolicyGradient, collected: Any) -> Steps:
    rows = torch.arange(len(collected.seeds))
    return module.draw(collected, rows, rows + 50)


def test_at_the_first_update_the_ratio_is_one_and_the_divergence_zero(network: Backbone) -> None:
    module = method(network, trust_region=1e-5)
    steps = every(module, module.collect(TEXTS, SEEDS))
    ratios = module.log_ratios(steps)
    assert ratios.values.shape == (6, 1, 4)
    # kernels of other batch sizes differ in the last bits
    assert ratios.values.abs().max() < 1e-4
    assert ratios.terms is not None
    assert (ratios.terms["reference_kl"] == 0).all()
    assert ratios.terms["sampling_kl"].max() < 1e-6
    losses = method(network).losses(ratios, steps)
    assert steps.advantages is not None
    torch.testing.assert_close(losses, -steps.advantages[:, 0], atol=1e-3, rtol=0)
    losses.mean().backward()
    weights = trained(network).values()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in weights)
    assert any(w.grad.abs().max() > 0 for w in weights)


def test_the_stored_density_is_that_of_the_step_that_was_sampled(network: Backbone) -> None:
    """To the last bit, with as many rows in a forward as in the roll-out."""
    module = method(network)
    collected = module.collect(TEXTS[:1], SEEDS[:1])
    steps = every(module, collected)
    assert steps.logp is not None
    for number in range(4):
        one = Steps(
            steps.parents[:, :, number : number + 1],
            steps.children[:, :, number : number + 1],
            steps.t[:, number : number + 1],
            steps.t_next[:, number : number + 1],
            *steps[4:8],
        )
        with torch.no_grad():
            again = logp(network, module.sampling, one)
        assert torch.equal(again[..., 0], steps.logp[..., number])


def test_the_loss_against_double_precision(network: Backbone) -> None:
    """Surrogate and exact divergence of two Gaussians, worked out from means and deviations."""
    module = method(network, eps=1e-3, kl=0.3)
    steps = every(module, module.collect(TEXTS, SEEDS))
    moved(network, 0.05)
    ratios = module.log_ratios(steps)
    found = module.losses(ratios, steps)
    process, how = network.process, module.sampling
    prompt = steps.prompt.repeat(4)
    t, t_next = steps.t.flatten(), steps.t_next.flatten()
    parents = steps.parents.flatten(0, 2)

    def gaussian() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            negative = network.empty.repeat(len(t))
            with_prompt = network.predict(parents, t, prompt).float()
            without = network.predict(parents, t, negative).float()
            guided = without + 3.0 * (with_prompt - without)
            step = process.step(guided, parents, t, t_next, how)
        return step.mean.double(), step.sigma.double()

    mean, sigma = gaussian()
    with network.as_reference():
        base, _ = gaussian()
    z = (steps.children.flatten(0, 2).double() - mean) / sigma
    new = (-z.square() / 2 - sigma.log() - math.log(2 * math.pi) / 2).mean((1, 2, 3))
    assert steps.logp is not None
    assert steps.advantages is not None
    log_ratio = (new - steps.logp.flatten().double()).view(6, 4)
    kl = ((mean - base).square() / (2 * sigma**2)).mean((1, 2, 3)).view(6, 4)
    a, r = steps.advantages.double(), log_ratio.exp()
    surrogate = -torch.minimum(a * r, a * r.clamp(1 - 1e-3, 1 + 1e-3))
    assert (log_ratio.abs() > 2e-3).any()
    assert kl.max() > 1e-4
    expected = (surrogate + 0.3 * kl).mean(1)
    torch.testing.assert_close(found.double(), expected, atol=5e-4, rtol=2e-3)
    measured = module.measure(ratios, steps, found.mean())
    assert 0 < measured["clipped"] <= 1
    assert measured["reference_kl"] > 0


def test_noise_on_few_steps(network: Backbone) -> None:
    """Outside of the window the roll-out is deterministic, with the steps of the plain sampler."""
    module = method(network, noisy_steps=2, latest_start=2, same_start=True)
    collected = module.collect(TEXTS, SEEDS)
    assert collected.states.shape[:3] == (6, 1, 3)
    firsts = (draws.uniform(SEEDS, "first noisy step") * 3).long()
    levels = module.rollout.levels
    expected = torch.stack([levels[n : n + 3] for n in firsts.repeat_interleave(3).tolist()])
    assert torch.equal(collected.t, expected)
    # up to the first noisy step all roll-outs of a prompt are one, then they part
    alike = collected.states[:, 0].view(2, 3, *collected.states.shape[2:])
    assert torch.equal(alike[:, 0, 0], alike[:, 1, 0])
    assert not torch.equal(alike[:, 0, 1], alike[:, 1, 1])
    assert every(module, collected).parents.shape[:3] == (6, 1, 2)


def test_without_noisy_steps_it_is_the_plain_sampler(network: Backbone) -> None:
    rollout, prompt = Rollout(network, method(network).sampling), network.embed(TEXTS)
    how = rollout.how
    past = torch.full((2,), how.steps)  # a window behind the last step
    path_end = rollout.path(SEEDS, prompt, past - how.steps, how.steps, SEEDS, torch.float32).end
    states = rollout.roll_out(SEEDS, prompt, torch.float32)
    assert torch.equal(path_end.cpu(), states[:, -1])
    quiet = Sampling(how.steps, how.guidance, eta=0.0)
    if isinstance(network, StableDiffusion3):  # DDIM's sampler ends at another level than its steps
        plain = sample_latents(network, prompt, SEEDS, quiet)
        one = rollout.path(SEEDS, prompt, past - 1, 1, SEEDS, torch.float32)
        before = rollout.path(SEEDS, prompt, torch.zeros_like(past), 1, SEEDS, torch.float32)
        assert not torch.allclose(before.end, plain, atol=1e-3)
        with torch.no_grad():
            t = one.t[:, 0]
            velocity = network.GUIDANCE(
                network.predict, one.states[:, 0], t, prompt, network.empty, how.guidance
            )
        torch.testing.assert_close(
            one.states[:, 0] - t.float().view(-1, 1, 1, 1) * velocity, plain, atol=1e-4, rtol=1e-4
        )


def test_drawn_steps_come_once_and_in_order(network: Backbone) -> None:
    module = method(network, drawn_steps=2)
    collected = module.collect(TEXTS, SEEDS)
    which = torch.arange(6).repeat(20)
    steps = module.draw(collected, which, torch.arange(120))
    assert (steps.t[:, 0] > steps.t[:, 1]).all()
    assert {*steps.t.flatten().tolist()} == {*module.rollout.levels[:-1].tolist()}
    again = module.draw(collected, which, torch.arange(120))
    assert torch.equal(again.t, steps.t)


class Alike(Judge):
    """All images of one prompt are alike."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        other = torch.tensor([text != "a cat" for text in texts])
        return 0.1 + images.mean((1, 2, 3)) * other


def test_a_prompt_whose_scores_are_equal_gets_no_gradient(network: Backbone) -> None:
    module = method(network, judge=Alike(), kl=1.0)
    collected = module.collect(TEXTS, SEEDS)
    steps = every(module, collected)
    assert steps.weights.tolist() == [0, 0, 0, 1, 1, 1]
    assert steps.advantages is not None
    assert (steps.advantages[:3] == 0).all()
    moved(network, 0.05)
    alike = module.draw(collected, torch.arange(3), torch.arange(3))
    (alike.weights * module.losses(module.log_ratios(alike), alike)).mean().backward()
    assert all(w.grad is None or (w.grad == 0).all() for w in trained(network).values())
    assert module.window.close()["alike"] == 0.5


def test_without_a_divergence_it_needs_no_reference(folders: dict[str, str]) -> None:
    bare = StableDiffusion(folders["unet"], reference="none")
    module = method(bare, kl=0.0)
    assert not module.needs_reference
    steps = every(module, module.collect(TEXTS, SEEDS))
    ratios = module.log_ratios(steps)
    assert ratios.terms == {}
    module.losses(ratios, steps).mean().backward()
    assert method(StableDiffusion(folders["unet"])).needs_reference


def test_the_global_deviation_of_a_collection(network: Backbone) -> None:
    module = method(network, deviation="global")
    rounds = [module.collect(TEXTS, SEEDS), module.collect(TEXTS, SEEDS + 7)]
    ended = module.complete(rounds)
    scores = torch.cat([one.scores for one in rounds]).double().view(4, 3)
    deviation = ((scores - scores.mean()) ** 2).mean().sqrt()
    expected = (scores - scores.mean(1, keepdim=True)) / (deviation + 1e-4)
    found = torch.cat([one.advantages for one in ended]).view(4, 3)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"noisy_steps": 3, "latest_start": 2}, "3 noisy steps from step 2 on do not fit into 4"),
        ({"drawn_steps": 3, "noisy_steps": 2}, "drawn_steps is 3; give a number from 1 up to 2"),
        ({"trajectories": 1}, "trajectories is 1; give a number from 2"),
        ({"eps": 0.0}, "eps is 0.0; give a number above 0"),
        ({"kl": -1.0}, "kl is -1.0; give a number from 0"),
        ({"trust_region": 0.0}, "trust_region is 0.0; give a number above 0"),
        ({"sampling": Sampling(steps=4, eta=0.0)}, "deterministic sampler"),
    ],
)
def test_bad_settings(backbone: StableDiffusion, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        method(backbone, **change)


@pytest.mark.parametrize("form", ["flow", "dance", "cps"])
def test_the_gradient_is_that_of_the_expected_reward(form: Any) -> None:
    """With the exact velocity of a Gaussian, moved by b, and the mean of the end as the reward.

    The end is the last level but two, 0.34: below it the noise of `cps` is next to nothing, and the
    estimate's variance accordingly large. A roll-out is a linear map of its noise, so that the
    derivative of the expected reward by b is that of the roll-out without noise; the surrogate's
    gradient estimates it, times the number of elements, since densities are means over them.
    """
    mean, variance, rows, size = 0.7, 0.6, 4000, 16
    how = Sampling(steps=6, eta=0.7, stochastic=form)
    process = RectifiedFlow({"shift": 2.0})
    levels = process.sampler(how, (1, 4, 4)).levels
    b = torch.zeros((), requires_grad=True)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        s = float(sigma[0])
        total = (1 - s) ** 2 * variance + s**2
        return -mean + (s - (1 - s) * variance) / total * (x - (1 - s) * mean) + b

    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 4, 4, generator=random)
    noiseless, logs = torch.zeros(1, 1, 4, 4), []
    for here, there in pairwise(levels[:-2]):
        t, t_next = here.expand(rows), there.expand(rows)
        step = process.step(velocity(x, t), x, t, t_next, how)
        x = step.sample(torch.randn(x.shape, generator=random)).detach()
        logs.append(step.logp(x))
        alone = process.step(velocity(noiseless, t[:1]), noiseless, t[:1], t_next[:1], how)
        noiseless = alone.mean
    [exact] = torch.autograd.grad(noiseless.mean(), b)
    rewards = x.mean((1, 2, 3))
    log_ratios = torch.stack(logs, 1)[:, None]  # to the same policy: 0, with its gradient
    log_ratios = log_ratios - log_ratios.detach()
    advantages = (rewards - rewards.mean())[:, None]
    loss = clipped_surrogate(log_ratios, advantages, 0.1).sum(2).mean() * size
    [found] = torch.autograd.grad(-loss, b)
    assert exact.item() < -0.3
    assert found.item() == pytest.approx(exact.item(), rel=0.1)


def test_losses_are_means_over_the_steps(backbone: StableDiffusion) -> None:
    module = method(backbone, kl=2.0)
    values, kl = torch.tensor([[[0.05, -0.05]]]), torch.tensor([[[0.1, 0.3]]])
    ratios = LogRatios(values, torch.zeros(1, 2), terms={"reference_kl": kl})
    steps = Steps(*[None] * 6, torch.ones(1), torch.ones(1), advantages=torch.tensor([[1.5]]))
    expected = (-1.5 * (math.exp(0.05) + math.exp(-0.05)) + 2 * 0.4) / 2
    assert module.losses(ratios, steps).tolist() == pytest.approx([expected])
