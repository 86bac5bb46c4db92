"""Every loss against an independent formula, by hand, and at its limits."""

from __future__ import annotations

import math

import pytest
import torch

from lit_prefopt import losses

LINKS = {"sigmoid": losses.sigmoid, "ipo": losses.ipo, "hinge": losses.hinge}


def by_hand(name: str, difference: float, beta: float) -> float:
    """The textbook's formula in double precision, one number at a time."""
    if name == "sigmoid":
        margin = beta * difference
        return math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
    if name == "ipo":
        return (difference - 0.5 / beta) ** 2
    return max(0.0, 1.0 - beta * difference)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_links_agree_with_the_formula(name: str, beta: float) -> None:
    differences = torch.linspace(-3, 3, 25, dtype=torch.float64)
    expected = torch.tensor([by_hand(name, d, beta) for d in differences.tolist()])
    torch.testing.assert_close(
        LINKS[name](differences, beta), expected.double(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "at_zero"), [("sigmoid", math.log(2)), ("ipo", 1 / (4 * 5.0**2)), ("hinge", 1.0)]
)
def test_links_at_zero(name: str, at_zero: float) -> None:
    assert LINKS[name](torch.zeros(1), 5.0).item() == pytest.approx(at_zero, abs=1e-7)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
@pytest.mark.parametrize("label", [1.0, 0.5, 0.0])
def test_gradients_are_finite_at_large_ratios(name: str, log_ratio: float, label: float) -> None:
    chosen = torch.tensor([log_ratio], requires_grad=True)
    rejected = torch.tensor([-log_ratio], requires_grad=True)
    value = losses.preference_loss(
        chosen - rejected, torch.tensor([label]), beta=5000.0, link=LINKS[name]
    )
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


def test_published_loss_of_diffusion_dpo() -> None:
    """Errors .2, .4 against .3, .3 at beta 5000: z = -2500 (-.2 - 0) = 500 and its negative."""
    policy = torch.tensor([[0.2, 0.4], [0.4, 0.2], [0.3000, 0.3002]])
    reference = torch.full_like(policy, 0.3)
    z = -0.5 * 5000 * ((policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1]))
    ratios = 0.5 * (reference - policy)
    ours = losses.preference_loss(ratios[:, 0] - ratios[:, 1], torch.ones(3), beta=5000.0)
    torch.testing.assert_close(ours, torch.nn.functional.softplus(-z), atol=1e-6, rtol=1e-6)
    assert ours[2].item() == pytest.approx(math.log1p(math.exp(-0.5)), abs=1e-3)


def test_smoothing_is_an_expectation_over_wrong_labels() -> None:
    difference = torch.tensor([0.7])
    label = losses.smooth(torch.ones(1), 0.1)
    right, wrong = by_hand("sigmoid", 0.7, 2.0), by_hand("sigmoid", -0.7, 2.0)
    value = losses.preference_loss(difference, label, beta=2.0)
    assert value.item() == pytest.approx(0.9 * right + 0.1 * wrong, abs=1e-6)


def test_a_tie_pulls_nowhere_at_the_start() -> None:
    difference = torch.zeros(1, requires_grad=True)
    losses.preference_loss(difference, torch.full((1,), 0.5), beta=2.0).sum().backward()
    assert difference.grad.item() == 0


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_loser_scale_keeps_the_chosen_error_from_rising(mu: float) -> None:
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 64, 10, dtype=torch.float64)
    rejected = rejected + 0.3 * chosen  # most overlap, some do not
    error, overlap = (chosen * chosen).mean(1), (chosen * rejected).mean(1)
    scale = losses.rejected_gradient_scale(error, overlap, mu)
    # A step of gradient descent in output space moves the chosen side along this direction:
    step = -(chosen - scale[:, None] * rejected)
    change = (step * chosen).mean(1)
    assert (change <= -mu * error * (overlap > 0) + 1e-9).all()
    assert ((scale >= 0) & (scale <= 1)).all()
    assert (scale[overlap <= 0] == 1).all()
    assert (overlap <= 0).any()


def test_scale_gradient_leaves_the_value() -> None:
    values = torch.tensor([2.0, 3.0], requires_grad=True)
    scaled = losses.scale_gradient(values, torch.tensor([0.25, 0.0]))
    scaled.sum().backward()
    assert scaled.tolist() == [2.0, 3.0]
    assert values.grad.tolist() == [0.25, 0.0]


def test_clip_bounds_the_ratio_with_finite_gradients() -> None:
    log_ratios = torch.tensor([-100.0, 0.05, 100.0], requires_grad=True)
    clipped = losses.clip(log_ratios, 0.1)
    clipped.sum().backward()
    assert clipped.exp().tolist() == pytest.approx([0.9, math.exp(0.05), 1.1])
    assert log_ratios.grad.tolist() == [0, 1, 0]


def test_an_order_is_chosen_one_by_one() -> None:
    """Against the product of softmaxes in double precision; of two sides it is the sigmoid loss."""
    utilities = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    weights = [math.exp(u) for u in utilities[0].tolist()]
    by_hand = -sum(math.log(weights[k] / sum(weights[k:])) for k in range(4))
    assert losses.plackett_luce(utilities).item() == pytest.approx(by_hand, rel=1e-12)
    two = torch.tensor([[0.7, -0.4], [-2.0, 1.0]])
    expected = losses.sigmoid(two[:, 0] - two[:, 1], 1.0)
    torch.testing.assert_close(losses.plackett_luce(two), expected)


@pytest.mark.parametrize("size", [100.0, -100.0])
def test_an_order_that_is_sure_has_finite_gradients(size: float) -> None:
    utilities = torch.tensor([[size, 0.0, -size]], requires_grad=True)
    loss = losses.plackett_luce(utilities)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0 if size > 0 else 300.0, abs=1e-4)
    assert torch.isfinite(utilities.grad).all()


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_divergence_of_a_choice_is_kl(label: float) -> None:
    """Against torch's own divergence of two coins; it is 0 where the choice is the label."""
    differences = torch.linspace(-3, 3, 25, dtype=torch.float64)
    labels = torch.full_like(differences, label)
    coins = [torch.distributions.Bernoulli(labels)]
    coins.append(torch.distributions.Bernoulli(logits=differences))
    theirs = torch.distributions.kl_divergence(*coins)
    torch.testing.assert_close(losses.choice_divergence(differences, labels), theirs)
    if 0 < label < 1:
        at_label = torch.tensor([label], dtype=torch.float64)
        assert losses.choice_divergence(at_label.logit(), at_label).item() == pytest.approx(0)


@pytest.mark.parametrize("difference", [-100.0, 100.0])
@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
def test_the_divergence_is_finite_far_out(difference: float, label: float) -> None:
    x = torch.tensor([difference], requires_grad=True)
    loss = losses.choice_divergence(x, torch.tensor([label]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert x.grad.item() == pytest.approx(torch.sigmoid(x).item() - label, abs=1e-6)


def test_the_bernoulli_function_is_exact_everywhere() -> None:
    """Against double precision, values and slopes; at 0, at 1e-6 and where exp overflows."""
    points = [0.0, 1e-8, 1e-6, 1e-3, 0.05, 0.0999, 0.1001, 0.5, 3.0, 30.0, 100.0, 1e4, 1e30]
    x = torch.tensor(points, requires_grad=True)
    value = losses.bernoulli_function(x)
    value.sum().backward()
    for point, own, slope in zip(x.tolist(), value.tolist(), x.grad.tolist(), strict=True):
        if point < 1e-3:
            expected, falling = 1 - point / 2, -0.5 + point / 6
        elif point > 600:
            expected, falling = 0.0, 0.0
        else:
            below = math.expm1(point)
            expected, falling = point / below, (below - point * (below + 1)) / below**2
        assert own == pytest.approx(expected, rel=1e-6, abs=1e-37)
        assert slope == pytest.approx(falling, rel=2e-5, abs=1e-30)


def test_win_rates_of_a_list() -> None:
    """Against the sigmoids of all other sides, one by one; of two sides they add up to 1."""
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    own = losses.win_rates(scores)[0].tolist()
    for i, score in enumerate(scores[0].tolist()):
        others = [s for j, s in enumerate(scores[0].tolist()) if j != i]
        expected = sum(1 / (1 + math.exp(other - score)) for other in others) / 3
        assert own[i] == pytest.approx(expected, rel=1e-12)
    assert losses.win_rates(torch.tensor([[0.7, -0.4]])).sum().item() == pytest.approx(1)
