"""Roll-outs: stochastic sampling from noise to latents, with the log-density of each step."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

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


class Path(NamedTuple):
    """The noisy steps of B roll-outs with their densities, and where the roll-outs end."""

    states: Tensor  # (B, N + 1, C, H, W) on the CPU: latents before each step and after the last
    t: Tensor  # (B, N + 1) in the process's dtype: their noise levels
    logp: Tensor  # (B, N) float32 on the CPU: log-densities of the rounded states
    means: Tensor  # (B, N, C, H, W) float32 on the CPU: means of the steps
    end: Tensor  # (B, C, H, W) float32: latents after all steps


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

    def path(
        self,
        seeds: Tensor,
        prompt: Prompt,
        first: Tensor,
        count: int,
        start: Tensor,
        dtype: torch.dtype,
    ) -> Path:
        """Return `count` noisy steps of complete roll-outs, whose other steps are deterministic.

        Args:
            seeds: (B,) int64, one per roll-out.
            prompt: B rows.
            first: Number of each roll-out's first noisy step, (B,) int64.
            count: Number of noisy steps.
            start: Seeds of the noise that the roll-outs start from, (B,) int64.
            dtype: Precision of the states, to which each is rounded before the next step.
        """
        device, process = prompt.device, self.backbone.process
        latents = self.start(start, device).to(dtype)
        states, logs, means = [latents.cpu()], [], []
        for number in range(self.how.steps):
            here = latents.float()
            t, t_next = (self.level(n, len(here), device) for n in (number, number + 1))
            prediction = guided(self.backbone, here, t, prompt, self.how.guidance)
            step = process.step(prediction, here, t, t_next, self.how)
            after = step.sample(self.noise(seeds, f"step {number}", device))
            noisy = (first <= number) & (number < first + count)
            if not noisy.all():
                plain = process.step(prediction, here, t, t_next, replace(self.how, eta=0.0)).mean
                after = torch.where(noisy.to(device).view(-1, 1, 1, 1), after, plain)
            latents = after.to(dtype)
            states.append(latents.cpu())
            logs.append(step.logp(latents).cpu())
            means.append(step.mean.cpu())
        row = torch.arange(len(seeds))[:, None]
        steps, places = (first[:, None] + torch.arange(n) for n in (count, count + 1))
        kept = (torch.stack(part, 1) for part in (logs, means))
        log, mean = (part[row, steps] for part in kept)
        return Path(
            torch.stack(states, 1)[row, places], self.levels[places], log, mean, latents.float()
        )


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


def reverse_steps(backbone: Backbone, how: Sampling, steps: Steps) -> ReverseStep:
    """Return the active network's distribution of every step, B * K * S rows.

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
    return ReverseStep(*(x.expand(*shape, *x.shape[3:]).flatten(0, 2) for x in every))


def logp(backbone: Backbone, how: Sampling, steps: Steps) -> Tensor:
    """Return the log-density of every step under the active network, (B, K, S).

    Args:
        backbone: Predicts as policy, or as reference inside `backbone.as_reference()`.
        how: Guidance and eta, as the steps were sampled with.
        steps: The steps.
    """
    per_side = reverse_steps(backbone, how, steps)
    return per_side.logp(steps.children.flatten(0, 2)).view(steps.children.shape[:3])
