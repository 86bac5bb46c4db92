"""Roll-outs: stochastic sampling from noise to latents, with the log-density of each step."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Steps
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.errors import InputError
from lit_prefopt.processes.base import ReverseStep
from lit_prefopt.processes.settings import Sampling


class Rollout:
    """Stochastic sampler of a backbone with a fixed schedule.

    Args:
        backbone: Predicts as policy, or as reference inside `backbone.as_reference()`.
        how: Steps, guidance and eta; eta must be above 0, else a step has no density.
    """

    def __init__(self, backbone: Backbone, how: Sampling) -> None:
        if how.eta <= 0:
            raise InputError(
                "A deterministic sampler's steps have no density: set `sampling.eta` above 0, "
                "usually to 1."
            )
        if not backbone.process.HAS_DENSITIES:
            raise InputError(
                "The reverse steps of a consistency model have no density: take a method that "
                "trains on stored pairs, such as ConsistencyDPO, or another backbone."
            )
        if how.guided < 1:
            raise InputError(
                "The density of a step is computed from its noise level alone, so that all steps "
                "of a roll-out are guided: set `sampling.guided` to 1."
            )
        self.backbone, self.how = backbone, how
        sampler = backbone.process.sampler(how, backbone.sampling_shape(how))
        self.levels = sampler.levels
        """Noise level before each step and after the last, (steps + 1,) on the CPU."""
        self._values = sampler.levels.tolist()

    def level(self, number: int, rows: int, device: torch.device | None = None) -> Tensor:
        """Return the noise level before step `number`, (rows,); after the last step the clean one.

        Args:
            number: Number of the step; 0 is the noisiest.
            rows: Number of rows that have this level.
            device: Device of the result.
        """
        value = self._values[number]  # a number of Python: the device is not synchronised
        return torch.full((rows,), value, dtype=self.levels.dtype, device=device)

    def start(self, seeds: Tensor, device: torch.device | None = None) -> Tensor:
        """Return pure noise, (B, C, H, W) float32."""
        return self.noise(seeds, "start", device)

    def noise(self, seeds: Tensor, purpose: str, device: torch.device | None = None) -> Tensor:
        """Return noise of the latents' shape for each seed, (B, C, H, W) float32."""
        return draws.normal(seeds, self.backbone.sampling_shape(self.how), purpose, device)

    def step(self, latents: Tensor, number: int, prompt: Prompt) -> ReverseStep:
        """Return step `number` from these latents, (B, C, H, W)."""
        t, t_next = (self.level(n, len(latents), latents.device) for n in (number, number + 1))
        return transition(self.backbone, self.how, latents, t, t_next, prompt)

    def roll_out(self, seeds: Tensor, prompt: Prompt, dtype: torch.dtype) -> Tensor:
        """Return all states of complete roll-outs, (B, steps + 1, C, H, W) on the CPU.

        States are rounded before the next step, so that the stored states are the network's inputs.

        Args:
            seeds: (B,) int64, one per roll-out.
            prompt: B rows.
            dtype: Precision of the states.
        """
        device = prompt.device
        latents = self.start(seeds, device).to(dtype)
        states = [latents.cpu()]
        for number in range(self.how.steps):
            noise = self.noise(seeds, f"step {number}", device)
            latents = self.step(latents.float(), number, prompt).sample(noise).to(dtype)
            states.append(latents.cpu())
        return torch.stack(states, 1)


def transition(
    backbone: Backbone,
    how: Sampling,
    latents: Tensor,
    t: Tensor,
    t_next: Tensor,
    prompt: Prompt,
) -> ReverseStep:
    """Return the guided reverse step from t to t_next.

    Args:
        backbone: Predicts as policy, or as reference inside `backbone.as_reference()`.
        how: Guidance, eta and form of the step.
        latents: (B, C, H, W).
        t: Noise levels, (B,).
        t_next: Less noisy ones, (B,).
        prompt: B rows.
    """
    prediction = guided(backbone, latents, t, prompt, how.guidance)
    return backbone.process.step(prediction, latents, t, t_next, how)


def logp(backbone: Backbone, how: Sampling, steps: Steps) -> Tensor:
    """Return the log-density of every step under the active network, (B, K, S).

    Args:
        backbone: Predicts as policy, or as reference inside `backbone.as_reference()`.
        how: Guidance and eta, as the steps were sampled with.
        steps: All of them in one forward: B * K * S rows, or B * S where sides share parents.
    """
    parent_shape, shape = steps.parents.shape[:3], steps.children.shape[:3]
    t, t_next = (x[:, None].expand(parent_shape).flatten() for x in (steps.t, steps.t_next))
    prompt = steps.prompt.repeat(parent_shape[1] * parent_shape[2])
    step = transition(backbone, how, steps.parents.flatten(0, 2), t, t_next, prompt)
    every = (part.unflatten(0, parent_shape) for part in step)
    per_side = ReverseStep(*(x.expand(*shape, *x.shape[3:]).flatten(0, 2) for x in every))
    return per_side.logp(steps.children.flatten(0, 2)).view(shape)
