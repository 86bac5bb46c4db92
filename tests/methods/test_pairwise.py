"""MaPO, DSPO and CaPO: their formulas in double precision, step 0, limits, and shared options."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3
from lit_prefopt.backbones.base import Backbone
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.diffusion.denoising import predict_sides
from lit_prefopt.errors import InputError
from lit_prefopt.losses import ipo, preference_loss
from lit_prefopt.methods import (
    DSPO,
    CaPO,
    Di3PO,
    DiffusionDPO,
    InPO,
    MaPO,
    SmPO,
    SPINDiffusion,
    SupervisedFineTuning,
)
from lit_prefopt.methods.capo import sigmoid_weight
from lit_prefopt.optimizers import AdamW
from lit_prefopt.pairwise import PairwiseModule
from tests.helpers.batches import image_pairs
from tests.helpers.step_zero import moved

SCORES = torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.3, 0.7]])
METHODS: dict[str, Callable[..., PairwiseModule]] = {
    "MaPO": lambda b, **o: MaPO(b, AdamW(1e-3), **o),
    "DSPO": lambda b, **o: DSPO(b, AdamW(1e-3), **{"beta": 0.05} | o),
    "CaPO": lambda b, **o: CaPO(b, AdamW(1e-3), **{"beta": 50.0} | o),
    "InPO": lambda b, **o: InPO(b, AdamW(1e-3), **{"beta": 50.0, "inversion_steps": 2} | o),
    "SmPO": lambda b, **o: SmPO(
        b, AdamW(1e-3), **{"beta": 5.0, "inversion_steps": 2, "score_range": (0.0, 1.0)} | o
    ),
    "Diffusion-DPO": lambda b, **o: DiffusionDPO(b, AdamW(1e-3), **{"beta": 50.0} | o),
    "Di3PO": lambda b, **o: Di3PO(b, AdamW(1e-3), **{"beta": 50.0} | o),
    "SPIN": lambda b, **o: SPINDiffusion(b, AdamW(1e-3), **{"beta": 50.0} | o),
}
OWN = {"MaPO": {}, "DSPO": {"beta": 0.05}, "CaPO": {"beta": 3.0}}


@pytest.fixture
def flow(tiny_sd35_folder: str) -> StableDiffusion3:
    """A small Stable Diffusion 3.5 with a LoRA."""
    torch.manual_seed(0)  # the LoRA's start
    return StableDiffusion3(tiny_sd35_folder, lora=LoRA(4))


@pytest.fixture(params=["UNet", "flow"])
def any_backbone(
    request: pytest.FixtureRequest, backbone: StableDiffusion, flow: StableDiffusion3
) -> Backbone:
    """A UNet that predicts the noise, all weights trained, and a flow with a LoRA."""
    return backbone if request.param == "UNet" else flow


def scored(module: PairwiseModule) -> Pairs:
    return module.form_pairs(image_pairs()._replace(scores=SCORES))


def made(name: str, backbone: Backbone, **options: object) -> PairwiseModule:
    return METHODS[name](backbone, **options).train()


def ratios_of(policy: Tensor, reference: Tensor, drift: Tensor | None = None) -> LogRatios:
    """Return log-ratios of errors in double precision."""
    t = torch.zeros(len(policy), dtype=torch.int64)
    return LogRatios(0.5 * (reference - policy), t, policy, reference, None, drift)


def bare(kind: type[PairwiseModule], **numbers: object) -> PairwiseModule:
    """Return a method without a network, for its loss alone."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    shared = {"anchor": 0.0, "chosen_protection": None}
    for name, value in (shared | numbers).items():
        setattr(module, name, value)
    return module


MAPO = {"weight": 0.1, "slope": 0.5, "scale": 1000.0}
CAPO = {"beta": 3.0, "calibrated": False, "score_scale": 1.0}


def labels(*values: float) -> Pairs:
    """Return pairs with these labels and the scores above."""
    given = torch.tensor(values, dtype=torch.float64)
    none: Tensor = torch.zeros(len(values), 2, 1, 1, 1)
    scores = SCORES[: len(values)]
    return Pairs(none, None, torch.arange(len(values)), given, given * 0 + 1, scores=scores)


def test_mapo_by_hand() -> None:
    """The released formula: snr / (exp(snr L) - 1) L, 1000 of their difference, weight 0.1."""
    errors = torch.tensor([[0.2, 0.21], [0.3, 0.28], [1.5, 0.7]], dtype=torch.float64)
    value = bare(MaPO, **MAPO).losses(ratios_of(errors, errors), labels(1, 1, 0.25))
    for row, label, loss in zip(errors.tolist(), (1, 1, 0.25), value.tolist(), strict=True):
        f = [0.5 * e / (math.exp(0.5 * e) - 1) for e in row]
        margin = 1000 * (f[0] - f[1])
        terms = [math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in (margin, -margin)]
        expected = row[0] + 0.1 * (label * terms[0] + (1 - label) * terms[1])
        assert loss == pytest.approx(expected, rel=1e-10)


def test_mapo_becomes_diffusion_dpo_without_a_reference() -> None:
    """As the slope goes to 0 at a fixed product with the scale, which is beta."""
    errors = torch.tensor([[0.2, 0.21], [0.3, 0.28], [0.7, 0.1]], dtype=torch.float64)
    ratios, pairs = ratios_of(errors, torch.zeros_like(errors)), labels(1, 1, 1)
    beta, slope = 40.0, 1e-7
    value = bare(MaPO, weight=0.3, slope=slope, scale=beta / slope).losses(ratios, pairs)
    dpo = preference_loss(ratios.chosen - ratios.rejected, pairs.labels, beta)
    torch.testing.assert_close(value, errors[:, 0] + 0.3 * dpo, rtol=1e-6, atol=1e-6)


def test_dspo_by_hand() -> None:
    """The mean of the squared elements, not of their means: random residuals, one by one."""
    torch.manual_seed(0)
    r, q = torch.randn(2, 3, 2, 5, 4, 4, dtype=torch.float64)
    beta = 0.4
    policy, reference, drift = (x.square().mean((2, 3, 4)) for x in (r, q, r - q))
    given = (1, 1, 0.25)
    value = bare(DSPO, beta=beta).losses(ratios_of(policy, reference, drift), labels(*given))
    for i, label in enumerate(given):
        expected = 0.0
        for better, worse, share in ((0, 1, label), (1, 0, 1 - label)):
            change = [reference[i, s].item() - policy[i, s].item() for s in (better, worse)]
            z = 0.5 * beta * (change[0] - change[1])
            k = beta * (1 - 1 / (1 + math.exp(-z)))
            one = ((r[i, better] - k * (r[i, better] - q[i, better])) ** 2).mean().item()
            expected += share * one
        assert value[i].item() == pytest.approx(expected, rel=1e-10)


def test_dspo_becomes_supervised_fine_tuning(any_backbone: Backbone) -> None:
    """As beta goes to 0, to the last bit where its square is nothing beside 1."""
    moved(any_backbone, 0.02)
    module = made("DSPO", any_backbone, beta=1e-12)
    pairs = scored(module)
    sft = SupervisedFineTuning(any_backbone, AdamW(1e-3)).train()
    alone = sft.log_ratios(pairs)
    torch.testing.assert_close(
        module.losses(module.log_ratios(pairs), pairs), alone.policy_error[:, 0]
    )


def test_capo_by_hand() -> None:
    policy = torch.tensor([[0.2, 0.21], [0.3, 0.28], [0.7, 0.1]], dtype=torch.float64)
    reference = torch.full_like(policy, 0.25)
    value = bare(CaPO, **CAPO).losses(ratios_of(policy, reference), labels(1, 1, 1))
    rows = zip(policy.tolist(), SCORES.double().tolist(), value.tolist(), strict=True)
    for (chosen, rejected), (high, low), loss in rows:
        wins = [1 / (1 + math.exp(-d)) for d in (high - low, low - high)]
        margin = 3.0 * 0.5 * ((0.25 - chosen) - (0.25 - rejected))
        assert loss == pytest.approx((wins[0] - wins[1] - margin) ** 2, rel=1e-6)


def test_capo_is_ipo_where_rewards_differ_by_a_half() -> None:
    policy = torch.tensor([[0.2, 0.21], [0.3, 0.28]], dtype=torch.float64)
    ratios = ratios_of(policy, torch.full_like(policy, 0.25))
    pairs = labels(1, 1)._replace(scores=torch.tensor([[0.9, 0.4], [0.6, 0.1]]).double())
    value = bare(CaPO, **CAPO | {"calibrated": True}).losses(ratios, pairs)
    expected = 3.0**2 * ipo(ratios.chosen - ratios.rejected, 3.0)
    torch.testing.assert_close(value, expected)


def test_calibrated_rewards_are_over_all_sides() -> None:
    """Best against worst of three: each reward is the mean over the two other sides."""
    scores = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
    policy = torch.full((1, 3), 0.3, dtype=torch.float64)
    pairs = labels(1)._replace(scores=scores)
    value = bare(CaPO, **CAPO).losses(ratios_of(policy, policy), pairs)
    sg = [1 / (1 + math.exp(-d)) for d in (1.5, 3.0, -3.0, -1.5)]
    assert value.item() == pytest.approx(((sg[0] + sg[1] - sg[2] - sg[3]) / 2) ** 2, rel=1e-10)


@pytest.mark.parametrize("kind", [MaPO, DSPO, CaPO])
@pytest.mark.parametrize("size", [-100.0, 100.0])
def test_gradients_are_finite_far_out(kind: type[PairwiseModule], size: float) -> None:
    """Log-ratios of 100 and -100, and errors from 0 to 400."""
    numbers = {MaPO: MAPO, DSPO: {"beta": 5000.0}, CaPO: CAPO}[kind]
    policy = torch.tensor([[200.0 - 2 * size, 200.0 + 2 * size], [0.0, 400.0]], requires_grad=True)
    ratios = ratios_of(policy, torch.full((2, 2), 200.0), (policy - 1).square())
    loss = bare(kind, **numbers).losses(ratios, labels(1, 0.5))
    loss.sum().backward()
    assert ratios.values.abs().max() >= 100
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()


def test_step_zero(any_backbone: Backbone) -> None:
    """Policy and reference are equal: the losses that follow from the base's errors alone."""
    for name in ("MaPO", "DSPO", "CaPO"):
        module = made(name, any_backbone)
        pairs = scored(module)
        ratios = module.log_ratios(pairs)
        losses = module.losses(ratios, pairs)
        if name == "MaPO":
            assert ratios.reference_error is None
        else:
            assert (ratios.values == 0).all()
        if name == "DSPO":
            assert (ratios.drift == 0).all()
            torch.testing.assert_close(losses, ratios.reference_error[:, 0])
        if name == "CaPO":
            gap = torch.tanh((SCORES[:, 0] - SCORES[:, 1]) / 2)  # 2 sigmoid(d) - 1
            torch.testing.assert_close(losses, gap.square())


def test_dspo_takes_the_chosen_sides_gradient_at_step_0(backbone: StableDiffusion) -> None:
    """There z is 0, so that it is supervised fine-tuning's gradient times 1 - beta / 2."""

    def gradient(module: PairwiseModule | SupervisedFineTuning) -> Tensor:
        module.zero_grad()
        pairs = module.form_pairs(image_pairs())
        module.losses(module.log_ratios(pairs), pairs).mean().backward()
        return backbone.policy.denoiser.conv_out.weight.grad.clone()

    supervised = gradient(SupervisedFineTuning(backbone, AdamW(1e-3)).train())
    own = gradient(made("DSPO", backbone, beta=0.4))
    torch.testing.assert_close(own, 0.8 * supervised, rtol=1e-4, atol=1e-6)


def test_drift_is_that_of_the_predictions(any_backbone: Backbone) -> None:
    module = made("DSPO", moved(any_backbone, 0.02))
    pairs = scored(module)
    ratios, noised = module.log_ratios(pairs), module.add_noise(pairs)
    with torch.no_grad():
        policy = predict_sides(any_backbone, noised)
        with any_backbone.as_reference():
            reference = predict_sides(any_backbone, noised)
    expected = (policy.double() - reference.double()).square().mean((2, 3, 4))
    assert expected.min() > 0
    torch.testing.assert_close(ratios.drift.double(), expected, rtol=1e-4, atol=1e-9)


def test_mapo_evaluates_no_reference_in_training(
    any_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training neither needs nor uses one; held-out pairs are compared with it, if there is one."""
    module = made("MaPO", any_backbone)
    pairs = scored(module)
    with monkeypatch.context() as patch:
        patch.setattr(any_backbone, "as_reference", lambda: pytest.fail("the reference was used"))
        trained = module.log_ratios(pairs._replace(reference_error=torch.zeros(3, 1, 2)))
    assert torch.equal(trained.values, -0.5 * trained.policy_error)
    held_out = module.eval().log_ratios(pairs)
    assert (held_out.values == 0).all()
    torch.testing.assert_close(module.losses(held_out, pairs), module.losses(trained, pairs))


def test_level_weight_of_capo(any_backbone: Backbone) -> None:
    """Sigmoid(bias - log SNR), against the signal and the noise in noised latents."""
    process = any_backbone.process
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    t = process.draw_levels(u, any_backbone.latent_shape)
    signal, noise = (part.flatten() for part in process.factors(t))
    expected = torch.sigmoid(1.5 - 2 * (signal / noise).log())
    own = sigmoid_weight(process.error_weight(t, "noise"), process.error_weight(t, "image"), 1.5)
    torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-7)
    assert sigmoid_weight(torch.zeros(1), torch.ones(1), 1.5).item() == 1
    plain, weighed = (
        made("CaPO", moved(any_backbone, 0.02)),
        made("CaPO", any_backbone, level_bias=1.5),
    )
    pairs = scored(plain)
    ratios, other = plain.log_ratios(pairs), weighed.log_ratios(pairs)
    factor = (other.values / ratios.values)[:, 0]
    signal, noise = (part.flatten() for part in process.factors(ratios.t))
    torch.testing.assert_close(
        factor.double(), torch.sigmoid(1.5 - 2 * (signal / noise).log()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["CaPO", "SmPO"])
def test_pairs_without_scores_are_refused(name: str, backbone: StableDiffusion) -> None:
    module = made(name, backbone)
    with pytest.raises(
        InputError, match=f"{name} needs a score of each side.*or take DiffusionDPO"
    ):
        module.training_step(image_pairs(), 0)


@pytest.mark.parametrize("name", METHODS)
def test_every_pairwise_method_has_winner_protection(name: str, backbone: StableDiffusion) -> None:
    """The anchor adds the chosen error; loser scaling changes gradients and no loss."""
    moved(backbone, 0.02)

    def gradient(**options: object) -> tuple[Tensor, Tensor, Tensor]:
        module = made(name, backbone, **options)
        module.zero_grad()
        pairs = scored(module)
        ratios = module.log_ratios(pairs)
        loss = module.losses(ratios, pairs)
        loss.mean().backward()
        return (
            loss.detach(),
            ratios.policy_error.detach(),
            backbone.policy.denoiser.conv_out.weight.grad.clone(),
        )

    loss, errors, plain = gradient()
    anchored = gradient(anchor=2.0)[0]
    torch.testing.assert_close(anchored, loss + 2 * errors[:, 0])
    same, _, scaled = gradient(chosen_protection=1.0)
    assert torch.equal(same, loss)
    assert not torch.allclose(plain, scaled, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_loser_scaling_keeps_the_chosen_error_from_rising(
    name: str, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in output space by both sides' gradients: the change of the chosen side's error.

    The sides differ by little, as where they share a noise, so that the losers' gradients point
    away from the chosen target unless they are scaled.
    """
    # a margin below the target that CaPO regresses to
    options = {"beta": 0.01} if name == "CaPO" else {}
    module, predict = made(name, moved(backbone, 0.02), **options), backbone.predict
    added: list[Tensor] = []

    def with_leaf(latents: Tensor, t: Tensor, prompt: object) -> Tensor:
        prediction = predict(latents, t, prompt)
        if torch.is_grad_enabled():
            # the rejected side's prediction is a little worse than the chosen one's
            noised = target[0]
            worse = torch.tensor([0.5, 0.8]).view(1, 2, 1, 1, 1)
            prediction = (noised + worse * torch.ones_like(noised)).flatten(0, 1)
            added.append(torch.zeros_like(prediction, requires_grad=True))
            prediction = prediction + added[-1]
        return prediction

    add_noise = module.add_noise
    target: list[Tensor] = []

    def remembered(pairs: Pairs) -> object:
        noised = add_noise(pairs)
        target[:] = [noised.target]
        return noised

    monkeypatch.setattr(module, "add_noise", remembered)
    monkeypatch.setattr(backbone, "predict", with_leaf)

    def change(protection: float | None) -> Tensor:
        module.chosen_protection = protection
        pairs = scored(module)
        module.losses(module.log_ratios(pairs), pairs).sum().backward()
        gradient = added[-1].grad.unflatten(0, (3, 2))
        residual = torch.full_like(gradient[:, 0], 0.5)  # of the chosen side
        return -(gradient.sum(1) * residual).sum((1, 2, 3))

    rows = slice(2 if name == "CaPO" else 3)  # the third pair's scores contradict its label
    assert (change(0.1)[rows] < 0).all()
    if name not in ("DSPO", "MaPO"):  # the chosen side's own error outweighs their margin
        assert (change(None)[rows] > 0).all()
