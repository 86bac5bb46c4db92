"""Check that the base predicts what its checkpoint states, on the first batch of a training.

A network that is read with another prediction type than its own trains without an error, and into
nothing. At a noisy level the targets of the types differ so much that one forward separates them:
the shipped toy model has an error of 0.01 of the target's variance read as what it is, epsilon, and
of 1.4 read as v. A network with random weights has an error above 1 whatever it is read as, and may
be trained.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Pairs
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.denoising import NoisedPairs
from lit_prefopt.errors import InputError

EXPLAINED = 0.7
"""Error, as a share of the target's variance, up to which a prediction type explains a network."""

IMPOSSIBLE = 2.0
"""Error, as a share of the target's variance, that no base has; predicting zero has 1."""


class BaseErrors(NamedTuple):
    """Mean squared errors of a network, read as each prediction type."""

    names: list[str]  # of the prediction types
    errors: Tensor  # (types,) float32
    variances: Tensor  # (types,) float32: mean squares of the targets


def base_errors(backbone: Backbone, pairs: Pairs) -> BaseErrors | None:
    """Return the errors of the untrained network on a batch, at a noisy level.

    Args:
        backbone: The backbone before its first step; its reference is used if it has one.
        pairs: B pairs.

    Returns:
        None if the noise process has no targets, as that of a consistency model.
    """
    process = backbone.process
    if not process.HAS_TARGETS:
        return None
    noise = draws.normal(pairs.seeds, pairs.latents.shape[2:], "base check", pairs.latents.device)
    t = torch.full_like(pairs.seeds, process.distinct_timestep).to(pairs.latents.device)
    noised = NoisedPairs.from_pairs(process, pairs, t, noise)
    denoiser = backbone.policy.denoiser
    training = denoiser.training
    denoiser.eval()  # dropout would draw random numbers that belong to the training
    try:
        if backbone.has_reference:
            with backbone.as_reference():
                prediction = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
        else:
            with torch.no_grad():
                prediction = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    finally:
        denoiser.train(training)
    targets = process.targets(
        pairs.latents.flatten(0, 1), noise.repeat_interleave(pairs.sides, 0), noised.t_per_side
    )
    errors = [(prediction.float() - target.float()).square().mean() for target in targets.values()]
    variances = [target.float().square().mean() for target in targets.values()]
    return BaseErrors(list(targets), torch.stack(errors), torch.stack(variances))


def check_base_errors(found: BaseErrors, stated: str) -> None:
    """Check that errors are possible for the stated prediction type.

    Args:
        found: The errors, over all devices.
        stated: The prediction type.

    Raises:
        InputError: The network predicts something else.
    """
    shares = dict(zip(found.names, (found.errors / found.variances).tolist(), strict=True))
    best = min(shares, key=lambda name: shares[name])
    own = found.names.index(stated)
    # latents of small variance make v small, and any error large as a share of it
    size = float(found.errors[own] / found.variances[own].clamp(min=1))
    if shares[stated] > 1 and shares[best] < EXPLAINED:
        cure = (
            "name a base that predicts epsilon or v"
            if best == "sample"
            else f"set `--backbone.prediction {best}`"
        )
        raise InputError(
            f"The untouched base does not predict {stated}: at a noisy level of the first batch "
            f"its error is {shares[stated]:.2f} of the target's variance, and {shares[best]:.2f} "
            f"if it is read as {best}: {cure}, or `--model.check_base false` if it is to learn "
            "another prediction."
        )
    if size > IMPOSSIBLE:
        raise InputError(
            f"The untouched base cannot predict {stated}: at a noisy level of the first batch its "
            f"error is {size:.2f} of the target's variance, where predicting nothing has 1: check "
            "that denoiser, VAE and scheduler belong together, or set `--model.check_base false`."
        )
