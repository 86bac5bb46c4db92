"""Check that the base predicts what its checkpoint states, on the first batch of a training.

A network that is read with another prediction type than its own trains without an error, and into
nothing. At a noisy level the targets of the types differ so much that one forward separates them:
the shipped toy model has an error of 0.01 of the target's variance read as what it is, epsilon, and
of 1.4 read as v. A network with random weights has an error above 1 whatever it is read as, and may
be trained. Read as a flow, the toy model has an error of 0.08 of the velocity's variance, of 3.8
with the wrong sign, and of 0.33 to 0.62 where it is given the time in another convention than its
own.

Steps of roll-outs have no clean latents. With zeros in their place, which decode to plain grey, a
network that predicts epsilon returns the noise at every level, and one that predicts v less of it
the noisier they are; random weights return none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Pairs, Steps
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.denoising import NoisedPairs
from lit_prefopt.errors import InputError
from lit_prefopt.processes.base import Process

CLEAR, NOISY = 0.9, 0.1
"""Noise levels of the check, as the share of the signal's variance."""

EXPLAINED = 0.7
"""Error, as a share of the target's variance, up to which a prediction type explains a network."""

GOOD = 0.2
"""Error, as a share of the target's variance, up to which no other convention of time is tried."""

IMPOSSIBLE = 2.0
"""Error, as a share of the target's variance, that no base has; predicting zero has 1."""

RETURNED = 0.5
"""Share of the noise that a trained network returns at the least noisy level that is tried."""


class BaseErrors(NamedTuple):
    """Mean squared errors of a network, read as each prediction type."""

    names: list[str]  # of the prediction types
    errors: Tensor  # (types,) float32
    variances: Tensor  # (types,) float32: mean squares of the targets

    @property
    def shares(self) -> dict[str, float]:
        """Errors as shares of the targets' variance, by prediction type."""
        return dict(zip(self.names, (self.errors / self.variances).tolist(), strict=True))


class NoiseShares(NamedTuple):
    """Shares of the noise in a network's prediction from noise alone, and in the targets."""

    names: list[str]  # of the prediction types with noise in their target
    clear: Tensor  # () float32: share in the prediction at the least noisy level
    noisy: Tensor  # () float32: at the noisy level
    expected: Tensor  # (types,) float32: share in the target at the noisy level


def check_base(
    backbone: Backbone, batch: Pairs | Steps, mean: Callable[[Tensor], Tensor] = lambda x: x
) -> None:
    """Check the untrained network on the first batch of a training.

    Args:
        backbone: The backbone before its first step.
        batch: The batch.
        mean: Returns the mean of a tensor over all devices, so that all of them stop or none.

    Raises:
        InputError: The network predicts something else than its checkpoint states.
    """
    process = backbone.process
    if not process.HAS_TARGETS:
        return
    if isinstance(batch, Steps):
        names, *values = noise_shares(backbone, batch)
        packed = mean(torch.cat([value.flatten() for value in values]))
        check_noise_shares(NoiseShares(names, packed[0], packed[1], packed[2:]), process.prediction)
    else:
        names, errors, variances = base_errors(backbone, batch)
        found = BaseErrors(names, *mean(torch.stack([errors, variances])))
        if found.shares[process.prediction] > GOOD:
            for time in process.WRONG_TIMES:
                _, *values = base_errors(backbone, batch, time)
                other = BaseErrors(names, *mean(torch.stack(values)))
                check_time(found, other, process.prediction, time)
        check_base_errors(found, process.prediction)


def base_errors(backbone: Backbone, pairs: Pairs, time: str | None = None) -> BaseErrors:
    """Return the errors of the untrained network on pairs, at a noisy level.

    Args:
        backbone: The backbone before its first step; its reference is used if it has one.
        pairs: B pairs.
        time: One of the process's `WRONG_TIMES`, in whose place the network is given its level.
    """
    process = backbone.process
    noise = draws.normal(pairs.seeds, pairs.latents.shape[2:], "base check", pairs.latents.device)
    t = _levels(process, NOISY, pairs)
    noised = NoisedPairs.from_pairs(process, pairs, t, noise)
    given = noised.t_per_side if time is None else process.WRONG_TIMES[time](noised.t_per_side)
    prediction = _predict(backbone, noised.latents, given, noised.prompt)
    targets = process.targets(
        pairs.latents.flatten(0, 1), noise.repeat_interleave(pairs.sides, 0), noised.t_per_side
    )
    errors = [(prediction - target.float()).square().mean() for target in targets.values()]
    variances = [target.float().square().mean() for target in targets.values()]
    return BaseErrors(list(targets), torch.stack(errors), torch.stack(variances))


def noise_shares(backbone: Backbone, steps: Steps) -> NoiseShares:
    """Return how much of the noise the untrained network returns where the clean latents are zero.

    Args:
        backbone: The backbone before its first step; its reference is used if it has one.
        steps: B rows of steps, for their prompts and the size of their latents.
    """
    process = backbone.process
    noise = draws.normal(steps.seeds, steps.children.shape[3:], "base check", steps.children.device)
    zeros = torch.zeros_like(noise)

    def share(values: Tensor) -> Tensor:
        return (values.float() * noise).sum() / noise.square().sum()

    found = []
    for level in (CLEAR, NOISY):
        t = _levels(process, level, steps)
        noised = process.add_noise(zeros, noise, t)
        found.append(share(_predict(backbone, noised, t, steps.prompt)))
    targets = process.targets(zeros, noise, t)
    names = [name for name in targets if name != "sample"]  # whose target is zero
    clear, noisy = found
    return NoiseShares(names, clear, noisy, torch.stack([share(targets[name]) for name in names]))


def _levels(process: Process, share: float, batch: Pairs | Steps) -> Tensor:
    device = batch.prompt.device
    return process.level_at(share).to(device).expand(len(batch.seeds))


@torch.no_grad()
def _predict(backbone: Backbone, latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
    """Return the untrained network's prediction, float32."""
    denoiser = backbone.policy.denoiser
    training = denoiser.training
    denoiser.eval()  # dropout would draw random numbers that belong to the training
    try:
        with backbone.as_reference() if backbone.has_reference else nullcontext():
            return backbone.predict(latents, t, prompt).float()
    finally:
        denoiser.train(training)


def check_noise_shares(found: NoiseShares, stated: str) -> None:
    """Check that the noise in a network's predictions fits the stated prediction type.

    Args:
        found: The shares, over all devices.
        stated: The prediction type.

    Raises:
        InputError: The network predicts something else.
    """
    best = found.names[int((found.noisy - found.expected).abs().argmin())]
    # a flow with the wrong sign returns minus the noise
    clear = found.clear.abs() if (found.expected < 0).any() else found.clear
    if clear > RETURNED and best != stated:
        own, other = (float(found.expected[found.names.index(name)]) for name in (stated, best))
        raise InputError(
            f"The untouched base does not predict {stated}: of the noise in a noisy grey image it "
            f"returns {float(found.noisy):.2f}, where {stated} is {own:.2f} of it and {best} "
            f"{other:.2f}: {_cure(best, stated)}, or `--model.check_base false` if it is to learn "
            "another prediction."
        )


def check_base_errors(found: BaseErrors, stated: str) -> None:
    """Check that errors are possible for the stated prediction type.

    Args:
        found: The errors, over all devices.
        stated: The prediction type.

    Raises:
        InputError: The network predicts something else.
    """
    shares = found.shares
    best = min(shares, key=lambda name: shares[name])
    own = found.names.index(stated)
    # latents of small variance make v small, and any error large as a share of it
    size = float(found.errors[own] / found.variances[own].clamp(min=1))
    if shares[stated] > 1 and shares[best] < EXPLAINED:
        raise InputError(
            f"The untouched base does not predict {stated}: at a noisy level of the first batch "
            f"its error is {shares[stated]:.2f} of the target's variance, and {shares[best]:.2f} "
            f"if it is read as {best}: {_cure(best, stated)}, or `--model.check_base false` if it "
            "is to learn another prediction."
        )
    if size > IMPOSSIBLE:
        raise InputError(
            f"The untouched base cannot predict {stated}: at a noisy level of the first batch its "
            f"error is {size:.2f} of the target's variance, where predicting nothing has 1: check "
            "that denoiser, VAE and scheduler belong together, or set `--model.check_base false`."
        )


def check_time(found: BaseErrors, other: BaseErrors, stated: str, time: str) -> None:
    """Check that a network does not predict better with a time of another convention.

    Args:
        found: The errors with the time that the backbone gives, over all devices.
        other: Those with the time of another convention.
        stated: The prediction type.
        time: Name of the other convention.

    Raises:
        InputError: It does.
    """
    own, wrong = found.shares[stated], other.shares[stated]
    if wrong < EXPLAINED and wrong < EXPLAINED * own:
        raise InputError(
            f"The untouched base is given a wrong time: at a noisy level t of the first batch its "
            f"error is {own:.2f} of the target's variance, and {wrong:.2f} with the time of "
            f"{time}: correct `predict` of the backbone, or set `--model.check_base false`."
        )


def _cure(best: str, stated: str) -> str:
    """Return what to do about a network that predicts `best` and not what is stated."""
    if best == "negative velocity":
        return "negate the prediction in `predict` of the backbone"
    if stated == "velocity":
        return "name a base that predicts the velocity"
    if best == "sample":
        return "name a base that predicts epsilon or v"
    return f"set `--backbone.prediction {best}`"
