"""Variance-preserving noise process in discrete time: what DDPM and consistency models share."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lit_prefopt.errors import InputError, quoted
from lit_prefopt.processes.base import Process, ReverseStep
from lit_prefopt.processes.schedule import last_level, noise_schedule
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.fingerprint import fingerprint


class VariancePreserving(Process):
    """Noise process x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise at discrete timesteps t.

    A noise level is an int64 timestep; the denoiser predicts the noise or the velocity.

    Args:
        config: The checkpoint's scheduler configuration, as diffusers stores it.
        prediction: Prediction type of the denoiser, if the configuration states a wrong one.
        zero_terminal_snr: Whether the last noise level is pure noise, if the configuration states
            it wrongly.

    Raises:
        InputError: The noise process or the prediction type is not supported.
    """

    PREDICTIONS: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    def __init__(
        self,
        config: dict[str, Any],
        prediction: str | None = None,
        zero_terminal_snr: bool | None = None,
    ) -> None:
        super().__init__()
        self.scheduler = noise_schedule(config, prediction, zero_terminal_snr)
        self.prediction = self.scheduler.config["prediction_type"]
        if self.prediction not in self.PREDICTIONS:
            raise InputError(
                f"The checkpoint's scheduler has prediction_type {quoted(self.prediction)}, which "
                f"cannot be trained; use a checkpoint with one of {', '.join(self.PREDICTIONS)}."
            )
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise InputError(
                "The noise schedule ends in pure noise (zero terminal SNR), of which a model that "
                "predicts epsilon cannot be sampled: set `--backbone.prediction v_prediction` if "
                "the model predicts v, or `--backbone.zero_terminal_snr false`."
            )

    def settings(self) -> dict[str, Any]:
        """Return the settings of noising and target by name."""
        levels = fingerprint({"levels": self.scheduler.alphas_cumprod})
        return {"steps": self.steps, "prediction": self.prediction, "levels": levels}

    @property
    def steps(self) -> int:
        """Number of noise levels T; t runs from 0 to T - 1."""
        return self.scheduler.config["num_train_timesteps"]

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last noise level is pure noise."""
        return last_level(self.scheduler) == 0

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return sqrt(abar_t) latents + sqrt(1 - abar_t) noise, all (B, C, H, W) with t (B,)."""
        return self.scheduler.add_noise(latents, noise, t)

    def draw_levels(self, u: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Return the timesteps at quantiles u of a uniform distribution, (B,) int64."""
        return (u * self.steps).long()

    def quantile(self, t: Tensor) -> Tensor:
        """Return timesteps as shares of their number, float64."""
        return t.double() / self.steps

    def level_at(self, share: float) -> Tensor:
        """Return the timestep whose share of the signal's variance is nearest to `share`, ()."""
        return (self.scheduler.alphas_cumprod - share).abs().argmin()

    def timestep(self, t: Tensor) -> Tensor:
        """Return the timesteps as they are."""
        return t

    def level(self, timestep: Tensor) -> Tensor:
        """Return the timesteps as they are."""
        return timestep

    def step(
        self, prediction: Tensor, latents: Tensor, t: Tensor, t_next: Tensor, how: Sampling
    ) -> ReverseStep:
        """Return the reverse step of stochastic DDIM (arXiv 2010.02502, Eqs. 12 and 16).

        A t_next below 0 counts as 0: the noise level there is small but not zero, so the last step
        has a density too, whatever final level the checkpoint has.

        Args:
            prediction: Prediction of the denoiser at (latents, t), (B, C, H, W).
            latents: (B, C, H, W).
            t: (B,) int64.
            t_next: (B,) int64, less noisy.
            how: Settings with `eta`, the share of DDPM's noise; above 0 for a density.
        """
        here, there = (self._signal(x.clamp(min=0)).view(-1, 1, 1, 1) for x in (t, t_next))
        sigma = how.eta * ((1 - there) / (1 - here) * (1 - here / there)).sqrt()
        noise, clean = self._noise_and_clean(prediction.float(), latents.float(), here)
        direction = (1 - there - sigma**2).clamp(min=0).sqrt().float()
        return ReverseStep(there.sqrt().float() * clean + direction * noise, sigma.float(), clean)

    def clean(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean latents, (B, C, H, W) float32.

        Args:
            prediction: Prediction of the denoiser at (latents, t), (B, C, H, W).
            latents: (B, C, H, W).
            t: (B,) int64.
        """
        level = self._signal(t).view(-1, 1, 1, 1)
        return self._noise_and_clean(prediction.float(), latents.float(), level)[1]

    def noise(self, prediction: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise, (B, C, H, W) float32, for arguments as in `clean`."""
        level = self._signal(t).view(-1, 1, 1, 1)
        return self._noise_and_clean(prediction.float(), latents.float(), level)[0]

    def _signal(self, t: Tensor) -> Tensor:
        """Return abar_t, the share of the signal's variance, float64."""
        levels: Tensor = self.scheduler.alphas_cumprod
        return levels.double().to(t.device)[t]

    def _noise_and_clean(
        self, prediction: Tensor, latents: Tensor, level: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the predicted noise and clean latents of a prediction of either type."""
        signal, rest = level.sqrt().float(), (1 - level).sqrt().float()
        if self.prediction == "v_prediction":
            return signal * prediction + rest * latents, signal * latents - rest * prediction
        return prediction, (latents - rest * prediction) / signal
