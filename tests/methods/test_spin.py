"""SPIN-Diffusion: its approximate form, its exact form, and when there is nothing to learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion, trained
from lit_prefopt.batches import Pairs
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO, SPINDiffusion
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.batches import image_pairs

TWO_STEPS = Sampling(steps=2, guidance=1.0, eta=1.0)
BETA = 3.0


def spin(backbone: StableDiffusion, **changes: object) -> SPINDiffusion:
    return SPINDiffusion(backbone, AdamW(1e-3), **{"beta": BETA} | changes).train()


def moved(backbone: StableDiffusion) -> StableDiffusion:
    """Return the backbone with a policy that differs from its reference."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trained(backbone).values():
            weight += 0.02 * torch.randn(weight.shape, generator=random)
    return backbone


def gradient(module: SPINDiffusion | DiffusionDPO, pairs: Pairs) -> Tensor:
    """Return the gradient of the mean loss, all weights in a row."""
    losses = module.losses(module.log_ratios(pairs), pairs)
    weights = list(trained(module).values())
    grads = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
    pairs_from_record = zip(weights, grads, strict=True)
    return torch.cat(
        [(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs_from_record]
    )


def test_the_approximate_form_is_diffusion_dpo(backbone: StableDiffusion) -> None:
    backbone = moved(backbone)
    one, other = spin(backbone), DiffusionDPO(backbone, AdamW(1e-3), beta=BETA).train()
    pairs = one.form_pairs(image_pairs(4))
    assert torch.equal(one.log_ratios(pairs).values, other.log_ratios(pairs).values)
    assert one.log_ratios(pairs).values.abs().min() > 0
    assert torch.equal(gradient(one, pairs), gradient(other, pairs))


def levels(backbone: StableDiffusion, t: Tensor) -> Tensor:
    return backbone.process.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)


def mean_and_sigma(noise: Tensor, x: Tensor, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Return DDPM's posterior in the form of arXiv 2006.11239, Eqs. 6 and 7, for any two levels."""
    clean = (x - (1 - here).sqrt() * noise) / here.sqrt()
    alpha = here / there
    mean = (there.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - there) * x) / (1 - here)
    return mean, ((1 - there) / (1 - here) * (1 - alpha)).sqrt()


def test_the_exact_form_on_two_steps_by_hand(backbone: StableDiffusion) -> None:
    """Trajectories, loss and gradient against formulas in double precision."""
    module = spin(moved(backbone), exact=True, sampling=TWO_STEPS)
    pairs = module.form_pairs(image_pairs(6))
    number = (draws.uniform(pairs.seeds, "step") * 2).long()
    assert set(number.tolist()) == {0, 1}
    times = torch.tensor([501, 1, 0])  # of two steps, as in tests/methods/test_dense_reward.py
    t, t_next = times[number], times[number + 1]
    here, there = levels(backbone, t), levels(backbone, t_next)
    random = {n: draws.normal(pairs.seeds, (4, 8, 8), n).double() for n in ("real", "real step")}

    real = pairs.latents[:, 0].double()
    parents = here.sqrt() * real + (1 - here).sqrt() * random["real"]
    mean, sigma = mean_and_sigma(random["real"], parents, here, there)
    children = mean + sigma * random["real step"]

    def said(x: Tensor, at: Tensor) -> Tensor:
        return backbone.predict(x.float(), at, pairs.prompt).double()

    start = draws.normal(pairs.seeds, (4, 8, 8), "start").double()
    ends = [time.expand(6) for time in times]
    with backbone.as_reference():
        states = [start]
        for n in (0, 1):
            mean, sigma = mean_and_sigma(
                said(states[-1], ends[n]), states[-1], levels(backbone, ends[n]),
                levels(backbone, ends[n + 1]),
            )  # fmt: skip
            noise = draws.normal(pairs.seeds, (4, 8, 8), f"step {n}").double()
            states.append(mean + sigma * noise)
    every = torch.stack(states, 1)
    rows = torch.arange(6)
    other_parents, other_children = every[rows, number], every[rows, number + 1]

    made = module.steps(pairs, module.rollout)
    for ours, theirs in (
        (made.parents, torch.stack([parents, other_parents], 1)),
        (made.children, torch.stack([children, other_children], 1)),
    ):
        torch.testing.assert_close(ours[:, :, 0].double(), theirs, atol=2e-4, rtol=2e-4)

    def distance(x: Tensor, x_next: Tensor) -> Tensor:
        mean, sigma = mean_and_sigma(said(x, t), x, here, there)
        return ((x_next - mean).square() / (2 * sigma.square())).mean((1, 2, 3))

    sides = [(parents, children), (other_parents, other_children)]
    with backbone.as_reference():
        opponent = [distance(*side) for side in sides]
    policy = [distance(*side) for side in sides]
    z = -BETA * ((policy[0] - opponent[0]) - (policy[1] - opponent[1]))
    loss = torch.log1p((-z).exp()).mean()
    values = module.losses(module.log_ratios(pairs), pairs)
    assert abs(float(values.detach().mean()) - math.log(2)) > 0.01
    torch.testing.assert_close(values.mean().double(), loss, atol=1e-4, rtol=1e-4)
    weights = list(trained(module).values())
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    expected = torch.cat([g.flatten() for g in grads if g is not None])
    found = gradient(module, pairs)
    assert float(torch.cosine_similarity(found[: len(expected)], expected, 0)) > 0.9999
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_it_starts_at_the_opponent(backbone: StableDiffusion, exact: bool) -> None:
    module = spin(backbone, exact=exact, sampling=TWO_STEPS)
    pairs = module.form_pairs(image_pairs(3))
    values = module.log_ratios(pairs).values
    assert values.shape == (3, 2)
    assert not values.any()
    assert gradient(module, pairs).norm() > 0


def each_gradient(module: SPINDiffusion, pairs: Pairs) -> Tensor:
    """Return the gradient of every pair's own loss, (B, weights)."""
    alone = [type(pairs)(*(_row(field, i) for field in pairs)) for i in range(len(pairs.seeds))]
    return torch.stack([gradient(module, pair) for pair in alone])


def z_scores(each: Tensor, directions: Tensor) -> Tensor:
    """Return how many standard errors the mean gradient lies from zero in each direction (N, D)."""
    along = each @ directions.T
    return along.mean(0) / (along.std(0) / math.sqrt(len(along)))


def _row(field: object, i: int) -> object:
    if isinstance(field, Tensor):
        return field[i : i + 1]
    return None if field is None else field.rows(torch.tensor([i]))  # type: ignore[attr-defined]


def test_data_from_the_opponent_leave_nothing_to_learn(backbone: StableDiffusion) -> None:
    """The expected gradient is zero: below three standard errors in nearly every direction."""
    count, how = 64, Sampling(steps=4, guidance=1.0, eta=1.0)
    module = spin(backbone)
    drawn = [torch.arange(count) + start for start in (1000, 2000)]
    sides = [sample(backbone, ["a cat"] * count, seeds, how) for seeds in drawn]
    batch = image_pairs(count)._replace(images=torch.stack(sides, 1), texts=["a cat"] * count)
    pairs = module.form_pairs(batch)
    shift = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1)
    other = pairs._replace(latents=pairs.latents + shift)  # data that the opponent does not make
    null, real = (each_gradient(module, some) for some in (pairs, other))
    random = torch.Generator().manual_seed(2)
    directions = torch.randn(24, null.shape[1], generator=random)
    to_the_data = real[count // 2 :].mean(0, keepdim=True)  # of the other half than what is tested
    zero = z_scores(null[: count // 2], torch.cat([to_the_data, directions]))
    assert zero[0].abs() < 3
    assert (zero.abs() > 3).sum() <= 1
    assert zero.square().mean() < 2.5  # 1 in the mean, under the hypothesis
    assert z_scores(real[: count // 2], to_the_data) > 5


def test_without_noise_a_step_has_no_density(backbone: StableDiffusion) -> None:
    with pytest.raises(InputError, match="eta"):
        spin(backbone, exact=True, sampling=Sampling(steps=2, eta=0.0))


@pytest.mark.parametrize("option", [{"anchor": 0.1}, {"chosen_protection": 0.5}, {"gamma": 0.9}])
def test_exact_steps_have_no_errors(backbone: StableDiffusion, option: dict[str, float]) -> None:
    spin(backbone, **option)
    with pytest.raises(InputError, match="`exact` compares steps.*set `exact` to false"):
        spin(backbone, exact=True, **option)
