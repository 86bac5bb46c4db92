"""Dense-reward DPO and D3PO: their roll-outs, what is drawn from them, and their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.batches import LogRatios, Steps, Trajectories
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.errors import InputError
from lit_prefopt.judges import Judge
from lit_prefopt.methods import D3PO, DenseRewardDPO, DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.judges import Brightness, Broken

TEXTS, SEEDS = ["a cat", "two dogs"], torch.tensor([3, 8])
HOW = Sampling(steps=4, guidance=3.0, eta=1.0, batch_size=3)


def dense(backbone: StableDiffusion, **changes: object) -> DenseRewardDPO:
    settings = {
        "judge": Brightness(),
        "beta": 10.0,
        "delta": 0.1,
        "gamma": 0.9,
        "drawn_steps": 3,
        "sampling": HOW,
        "trajectories": 5,
        "kept": 3,
    }
    return DenseRewardDPO(backbone, AdamW(1e-3), **settings | changes).train()


def d3po(backbone: StableDiffusion, **changes: object) -> D3PO:
    settings = {
        "judge": Brightness(),
        "beta": 0.1,
        "eps": 0.1,
        "drawn_steps": 3,
        "sampling": HOW,
        "trajectories": 4,
    }
    return D3PO(backbone, AdamW(1e-3), **settings | changes).train()


def test_a_trajectory_by_hand(backbone: StableDiffusion) -> None:
    """Two steps worked out from their parts, for the first roll-out of each prompt."""
    how = Sampling(steps=2, guidance=3.0, eta=1.0)
    module = dense(backbone, sampling=how, trajectories=2, kept=2)
    made = module.collect(TEXTS, SEEDS)
    own = draws.subseeds(SEEDS, 2, "trajectory")
    process, prompt = backbone.process, backbone.embed(TEXTS)
    with torch.no_grad():
        start = draws.normal(own[:, 0], (4, 8, 8), "start")
        t, t_next = (torch.full((2,), x) for x in (501, 1))
        said = guided(backbone, start, t, prompt, 3.0)
        noise = [draws.normal(own[:, 0], (4, 8, 8), f"step {i}") for i in range(2)]
        middle = process.step(said, start, t, t_next, how).sample(noise[0])
        again = guided(backbone, middle, t_next, prompt, 3.0)
        last = process.step(again, middle, t_next, torch.zeros(2, dtype=torch.int64), how)
        end = last.sample(noise[1])
    assert made.t.tolist() == [[501, 1, 0]] * 2
    for row in range(2):
        firsts = made.states[row, :, 0]
        place = int((firsts == start[row]).flatten(1).all(1).nonzero())
        expected = torch.stack([start, middle, end], 1)[row]
        torch.testing.assert_close(made.states[row, place], expected, atol=1e-4, rtol=1e-4)


def test_trajectories_are_ranked_and_thinned_out(backbone: StableDiffusion) -> None:
    """Of five, the best, the middle one and the worst stay, in this order."""
    everything = dense(backbone, kept=5).collect(TEXTS, SEEDS)
    some = dense(backbone).collect(TEXTS, SEEDS)
    assert everything.states.shape == (2, 5, 5, 4, 8, 8)
    assert (everything.scores.diff(dim=1) < 0).all()
    assert torch.equal(some.scores, everything.scores[:, [0, 2, 4]])
    assert torch.equal(some.states, everything.states[:, [0, 2, 4]])
    bright = backbone.decode(some.states[0, :, -1]).mean((1, 2, 3))
    torch.testing.assert_close(bright, some.scores[0])


def test_the_judge_sees_clean_images_and_each_state_is_predicted_once(
    backbone: StableDiffusion,
) -> None:
    module, rows = dense(backbone), []
    backbone.policy.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    module.collect(TEXTS, SEEDS)
    assert rows == [6] * 4 + [6] * 4 + [6] * 4 + [2] * 4  # 3 + 3 + 3 + 1 roll-outs, guided
    asked = module.judge.asked
    assert [text for texts, _ in asked for text in texts] == ["a cat"] * 5 + ["two dogs"] * 5
    assert [t for _, times in asked for t in times] == [0] * 10


def test_kept_states_are_those_that_the_network_saw(backbone: StableDiffusion) -> None:
    """Every state is kept once, and the density of a step is that of the rounded states."""
    module = dense(backbone, states="bfloat16")
    made = module.collect(TEXTS, SEEDS)
    assert made.states.dtype == torch.bfloat16
    assert made.states.numel() == 2 * 3 * 5 * 4 * 8 * 8
    module.sampling = Sampling(steps=4, guidance=3.0, eta=1.0)
    steps = made.steps(*(torch.arange(2), *(torch.tensor([[0, 2]] * 2),) * 2, SEEDS))
    with torch.no_grad():
        parents = steps.parents[:, 0, 0]
        prompt = backbone.embed(TEXTS)
        again = module.rollout.step(parents, 0, prompt)
        z = (steps.children[:, 0, 0] - again.mean) / again.sigma
    assert 0.5 < z.std() < 1.5  # the noise that was drawn, and not the rounding


def test_the_same_steps_of_all_sides_and_the_best_one_first(backbone: StableDiffusion) -> None:
    module = dense(backbone, sides=3)
    made = module.collect(TEXTS, SEEDS)
    which, seeds = torch.tensor([1, 0, 1, 1]), torch.tensor([5, 6, 7, 8])
    steps = module.draw(made, which, seeds)
    assert steps.parents.shape == (4, 3, 3, 4, 8, 8)
    times = {501: 1, 251: 2, 751: 0, 1: 3}
    for row in range(4):
        numbers = [times[t] for t in steps.t[row].tolist()]
        of = made.states[which[row]]
        assert torch.equal(steps.parents[row], of[:, numbers])
        assert torch.equal(steps.children[row], of[:, [n + 1 for n in numbers]])
    assert torch.equal(steps.prompt["hidden"], made.prompt["hidden"][which])
    again = module.draw(made, which, seeds)
    assert torch.equal(again.parents, steps.parents)
    assert torch.equal(again.t, steps.t)


def test_two_sides_are_any_two_in_the_order_of_the_judge(backbone: StableDiffusion) -> None:
    module = dense(backbone)
    made = module.collect(TEXTS, SEEDS)
    count = 300
    steps = module.draw(made, torch.zeros(count, dtype=torch.int64), torch.arange(count))
    starts = made.states[0, :, 0]

    def place(latents: Tensor) -> int:
        return int((starts == latents).flatten(1).all(1).nonzero())

    numbers = (steps.t == 751).nonzero()
    seen = [
        (place(steps.parents[row, 0, step]), place(steps.parents[row, 1, step]))
        for row, step in numbers.tolist()
    ]
    assert set(seen) == {(0, 1), (0, 2), (1, 2)}
    assert steps.labels.eq(1).all()
    assert steps.weights.eq(1).all()


def test_a_tie_says_nothing(backbone: StableDiffusion) -> None:
    class Alike(Judge):
        def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
            return torch.ones(len(images))

    module = dense(backbone, judge=Alike())
    steps = module.draw(module.collect(TEXTS, SEEDS), torch.arange(2), SEEDS)
    assert steps.weights.tolist() == [0, 0]


@pytest.mark.parametrize(("gamma", "steps"), [(0.9, 4), (0.5, 4), (1.0, 4)])
def test_steps_are_drawn_with_discounted_weights(
    backbone: StableDiffusion, gamma: float, steps: int
) -> None:
    """The noisiest step is the heaviest, and each next one weighs gamma times as much."""
    module = dense(backbone, gamma=gamma, drawn_steps=50)
    made = Trajectories(
        torch.zeros(1, 3, 5, 1, 1, 1),
        torch.tensor([[751, 501, 251, 1, 0]]),
        torch.tensor([[3.0, 2.0, 1.0]]),
        backbone.embed(["a cat"]),
        torch.zeros(1, dtype=torch.int64),
    )
    drawn = module.draw(made, torch.zeros(400, dtype=torch.int64), torch.arange(400)).t
    shares = torch.stack([(drawn == t).double().mean() for t in (751, 501, 251, 1)])
    weights = torch.tensor([gamma**k for k in range(steps)], dtype=torch.float64)
    expected = weights / weights.sum()
    error = (expected * (1 - expected) / drawn.numel()).sqrt()
    assert ((shares - expected).abs() < 4 * error).all()


def test_losses_by_hand(backbone: StableDiffusion) -> None:
    """Each step is clipped by itself, then their mean goes into the order's likelihood."""
    values = torch.tensor([[[0.05, 0.3], [-0.02, 0.0], [-0.5, 0.1]]])
    means = [(0.05 + 0.1) / 2, -0.01, (-0.1 + 0.1) / 2]
    steps = Steps(*[None] * 6, torch.ones(1), torch.ones(1))
    at = [10 * mean for mean in means]
    whole, rest = sum(map(math.exp, at)), math.exp(at[1]) + math.exp(at[2])
    expected = -math.log(math.exp(at[0]) / whole) - math.log(math.exp(at[1]) / rest)
    losses = dense(backbone).losses(LogRatios(values, torch.zeros(1, 2)), steps)
    assert losses.tolist() == pytest.approx([expected], rel=1e-5)
    two = dense(backbone).losses(LogRatios(values[:, :2], torch.zeros(1, 2)), steps)
    margin = 10 * (means[0] - means[1])
    assert two.tolist() == pytest.approx([math.log1p(math.exp(-margin))], rel=1e-5)
    single = d3po(backbone).losses(LogRatios(values[:, :2], torch.zeros(1, 2)), steps)
    margins = [0.1 * (0.05 + 0.02), 0.1 * math.log(1.1)]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 2
    assert single.tolist() == pytest.approx([expected], rel=1e-6)


def test_of_one_step_d3po_is_dense_reward_without_a_discount(backbone: StableDiffusion) -> None:
    """In the limit of ratios that are not clipped yet."""
    values = torch.tensor([[[0.03], [-0.02]], [[-0.01], [0.04]]])
    steps = Steps(*[None] * 6, torch.ones(2), torch.ones(2))
    one = d3po(backbone, beta=2.0).losses(LogRatios(values, torch.zeros(2, 1)), steps)
    other = dense(backbone, beta=2.0, gamma=1.0)
    assert torch.allclose(one, other.losses(LogRatios(values, torch.zeros(2, 1)), steps))


@pytest.mark.parametrize("make", [dense, d3po])
@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_step_zero(make, family, lora: LoRA | None, tiny_folder: str, tiny_xl_folder: str) -> None:
    folder = tiny_xl_folder if family is StableDiffusionXL else tiny_folder
    module = make(family(folder, lora=lora))
    steps = module.draw(module.collect(TEXTS, SEEDS), torch.arange(2), SEEDS)
    ratios = module.log_ratios(steps)
    assert ratios.values.shape == (2, 2, 3)
    assert (ratios.values == 0).all()
    losses = module.losses(ratios, steps)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    measured = module.measure(ratios, steps, losses.mean())
    assert measured["clipped"] == 0
    assert measured["margin"] == 0
    losses.mean().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_discounted_offline_timesteps(backbone: StableDiffusion) -> None:
    """With gamma below 1, Diffusion-DPO draws noisy timesteps more often; 1 changes nothing."""
    plain = DiffusionDPO(backbone, AdamW(1e-3), beta=5000.0)
    tilted = DiffusionDPO(backbone, AdamW(1e-3), beta=5000.0, gamma=0.9)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    draw = partial(backbone.process.draw_levels, shape=(4, 8, 8))
    assert torch.equal(draw(plain.level_quantiles(u)), (u * 1000).long())
    drawn = draw(tilted.level_quantiles(u))
    bins = torch.bincount(49 - drawn // 20, minlength=50) / len(u)  # 0 is the noisiest
    weights = 0.9 ** torch.arange(50, dtype=torch.float64)
    torch.testing.assert_close(bins.double(), weights / weights.sum(), atol=1e-4, rtol=0)
    assert drawn.min() >= 0
    assert drawn.max() <= 999


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gamma": 0.0}, "gamma is 0.0; give a number above 0 up to 1"),
        ({"gamma": 1.1}, "gamma is 1.1; give a number above 0 up to 1"),
        ({"sampling": Sampling(steps=4, eta=0.0)}, "deterministic sampler"),
        ({"kept": 6}, "`kept` 6 and `trajectories` 5: set 2 <= `sides`"),
        ({"sides": 1}, "`sides` is 1, `kept` 3"),
    ],
)
def test_bad_settings(backbone: StableDiffusion, change: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        dense(backbone, **change)


def test_one_trajectory_has_no_rival(backbone: StableDiffusion) -> None:
    with pytest.raises(InputError, match="trajectories is 1; give a number from 2"):
        d3po(backbone, trajectories=1)


@pytest.mark.parametrize("scores", [[1.0, 2.0], [float("nan")] * 3])
def test_a_judge_that_gives_nonsense(backbone: StableDiffusion, scores: list[float]) -> None:
    with pytest.raises(InputError, match="fix the judge"):
        dense(backbone, judge=Broken(scores)).collect(TEXTS, SEEDS)
