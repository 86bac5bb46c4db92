"""Rectified flow: straight paths from noise to latents, with a denoiser that predicts velocity.

Liu et al., arXiv 2209.03003, in the conventions of Stable Diffusion 3 (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.processes.base import Process, Reading, ReverseStep
from lit_prefopt.processes.flow_schedule import (
    STEPS,
    Linear,
    Shift,
    flow_schedule,
    linear_levels,
)
from lit_prefopt.processes.flow_steps import flow_step
from lit_prefopt.processes.samplers import Sampler
from lit_prefopt.processes.settings import LevelDraw, Sampling

LEAST = 1e-6
"""Least noise level that is drawn; at 0 there would be none."""

DRAW_STEPS = 50
"""Sampling steps for which a shift by resolution and steps is computed in training."""


class RectifiedFlow(Process):
    """Rectified flow x = (1 - sigma) latents + sigma noise, with velocity noise - latents.

    A noise level is sigma, the share of noise: float64 in (0, 1], 1 being pure noise. It is float64
    so that `sigma.float()` and `(1000 * sigma).float()` are bit for bit the float32 sigmas and
    timesteps of the stock sampler.

    Args:
        config: The configuration of the checkpoint's FlowMatchEulerDiscreteScheduler.
        levels: Distribution of the noise levels in training.
        mu: Returns the family's shift by resolution, for a configuration with
            `use_dynamic_shifting`.
        patch: Side of the square of latents that is one token, to count them.
        linear: Whether the stock pipeline has levels of 1, 1 - 1/n, ..., 1/n before the shift, as
            FLUX's; by default they are those of the scheduler's `set_timesteps(n)`, as SD3's.
            `float32` if it computes them in that precision, as Z-Image's.

    Raises:
        InputError: The scheduler is not a rectified flow's, or contradicts itself.
    """

    PREDICTIONS: ClassVar[tuple[str, ...]] = ("velocity",)

    WRONG_TIMES: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]] = {
        "1 - t": lambda t: 1 - t,
        "1000 t": lambda t: STEPS * t,
        "t / 1000": lambda t: t / STEPS,
    }

    prediction = "velocity"

    def __init__(
        self,
        config: dict[str, Any],
        levels: LevelDraw | None = None,
        mu: Shift | None = None,
        patch: int = 2,
        linear: Linear = False,
    ) -> None:
        super().__init__()
        self.scheduler = flow_schedule(config, has_mu=mu is not None)
        self.levels, self.mu = levels or LevelDraw(), mu
        self.patch, self.linear = patch, linear

    def settings(self) -> dict[str, Any]:
        """Return the settings of noise levels and target by name."""
        names = ("shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
        stated = {name: self.scheduler.config[name] for name in names}
        drawn: dict[str, Any] = {"draw": self.levels.draw}
        if self.levels.draw.startswith("logit-normal"):
            drawn |= {"mean": self.levels.mean, "deviation": self.levels.deviation}
        return {"steps": self.steps, "prediction": self.prediction, **stated, **drawn}

    # Noise levels -------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Number of timesteps; that of level sigma is 1000 sigma."""
        return STEPS

    def shift(self, shape: tuple[int, int, int], steps: int = DRAW_STEPS) -> float:
        """Return the factor s of the shift towards noise, sigma -> s sigma / (1 + (s - 1) sigma).

        Args:
            shape: (C, H, W) of the latents.
            steps: Number of sampling steps.
        """
        mu = self._mu(shape, steps)
        if mu is None:
            return float(self.scheduler.config["shift"])
        return math.exp(mu) if self.scheduler.config["time_shift_type"] == "exponential" else mu

    def draw_levels(self, u: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Return the levels at quantiles u of the distribution in training, (B,) float64."""
        how, sigma = self.levels, u.double()
        if how.draw == "schedule":
            place = (sigma * STEPS).long() + 1  # 1 to 1000
            sigma = place.double() / STEPS
            factor = self._static_shift
        else:
            if how.draw.startswith("logit-normal"):
                sigma = torch.sigmoid(how.mean + how.deviation * torch.special.ndtri(sigma))
            factor = self.shift(shape) if how.draw.endswith("shifted") else 1.0
        return shifted(sigma, factor).clamp(LEAST, 1)

    def quantile(self, t: Tensor) -> Tensor:
        """Return the place of levels in the checkpoint's own schedule, in [0, 1), float64."""
        return shifted(t.double(), 1 / self._static_shift).clamp(max=1 - 1e-9)

    def level_at(self, share: float) -> Tensor:
        """Return the level with this share of the signal's variance, ()."""
        signal, noise = math.sqrt(share), math.sqrt(1 - share)
        return torch.tensor(noise / (signal + noise), dtype=torch.float64)

    def timestep(self, t: Tensor) -> Tensor:
        """Return 1000 sigma, rounded and at most 999, int64."""
        return (STEPS * t).round().long().clamp(max=STEPS - 1)

    def level(self, timestep: Tensor) -> Tensor:
        """Return the levels of timesteps, a thousandth of them, float64."""
        return timestep.double() / STEPS

    @property
    def _static_shift(self) -> float:
        """Factor of the shift in the scheduler's own table, which has none by resolution."""
        config = self.scheduler.config
        return 1.0 if config["use_dynamic_shifting"] else float(config["shift"])

    def _mu(self, shape: tuple[int, int, int], steps: int) -> float | None:
        if self.mu is None or not self.scheduler.config["use_dynamic_shifting"]:
            return None
        return self.mu(self.scheduler.config, shape[1] * shape[2] // self.patch**2, steps)

    # Noising and training target ----------------------------------------------------------------

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return (1 - sigma) latents + sigma noise, all (B, C, H, W) with t (B,)."""
        sigma = t.to(latents.dtype).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity, noise - latents, (B, C, H, W)."""
        return noise - latents

    def targets(self, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the targets of all prediction types by name, each (B, C, H, W)."""
        velocity = noise - latents
        return {
            "velocity": velocity,
            "negative velocity": -velocity,
            "epsilon": noise,
            "sample": latents,
        }

    def error_weight(self, t: Tensor, of: Reading) -> Tensor:
        """Return (1 - sigma)^2 for the noise, 1 for the velocity, sigma^2 for the image."""
        sigma = t.double()
        factors = {"noise": 1 - sigma, "velocity": torch.ones_like(sigma), "image": sigma}
        return factors[of].square().float()

    # Reverse steps ------------------------------------------------------------------------------

    def clean(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean latents x - sigma v, (B, C, H, W) float32."""
        return latents.float() - t.float().view(-1, 1, 1, 1) * prediction.float()

    def noise(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise x + (1 - sigma) v, (B, C, H, W) float32."""
        return latents.float() + (1 - t).float().view(-1, 1, 1, 1) * prediction.float()

    def step(
        self, prediction: Tensor, latents: Tensor, t: Tensor, t_next: Tensor, how: Sampling
    ) -> ReverseStep:
        """Return the stochastic step of the form `how.stochastic`; see `flow_step`."""
        clean = self.clean(prediction, latents, t)
        mean, deviation = flow_step(prediction.float(), latents.float(), t, t_next, how)
        return ReverseStep(mean, deviation, clean)

    def sampler(self, how: Sampling, shape: tuple[int, int, int]) -> Sampler:
        """Return a new Euler sampler; with eta above 0 its steps are those of `step`."""
        # a scheduler keeps the state of its run: a new one for each sampler
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        mu = self._mu(shape, how.steps)
        if self.linear:
            scheduler.set_timesteps(sigmas=linear_levels(how.steps, self.linear), mu=mu)
        else:
            scheduler.set_timesteps(how.steps, mu=mu)
        if not scheduler.sigmas.isfinite().all():
            raise InputError(
                f"The levels of {how.steps} sampling steps are not finite with this scheduler's "
                "shift_terminal: set `steps` of the sampling to 2 or more."
            )
        return Euler(self, scheduler.sigmas, how)


class Euler(Sampler):
    """Euler sampler of a flow, bit for bit the step of diffusers' scheduler.

    Args:
        process: The flow.
        sigmas: Levels of the steps and 0, (steps + 1,) float32.
        how: Number of steps and eta.
    """

    def __init__(self, process: RectifiedFlow, sigmas: Tensor, how: Sampling) -> None:
        super().__init__(sigmas.double())
        self.process, self.how, self.sigmas = process, how, sigmas

    def draws_noise(self, number: int) -> bool:
        """Whether step `number` adds noise: eta is above 0."""
        return self.how.eta > 0

    def step(
        self, prediction: Tensor, latents: Tensor, number: int, noise: Tensor | None
    ) -> Tensor:
        """Return the next latents, (B, C, H, W)."""
        if not self.draws_noise(number):
            change = (self.sigmas[number + 1] - self.sigmas[number]) * prediction
            return (latents.float() + change).to(prediction.dtype)
        if noise is None:
            raise InputError(f"Step {number} adds noise: pass it, as `draws_noise` says.")
        t, t_next = (
            torch.full((len(latents),), float(level), dtype=torch.float64, device=latents.device)
            for level in self.levels[number : number + 2]
        )
        return self.process.step(prediction, latents, t, t_next, self.how).sample(noise)


def shifted(sigma: Tensor, factor: float) -> Tensor:
    """Return levels shifted towards noise by a factor s, s sigma / (1 + (s - 1) sigma)."""
    return factor * sigma / (1 + (factor - 1) * sigma)
