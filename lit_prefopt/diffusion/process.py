"""The noise process of a backbone: what noising and the denoiser's target are."""

from __future__ import annotations

from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from lit_prefopt.errors import InputError


class DiscreteProcess(nn.Module):
    """Discrete-time diffusion (DDPM) with a denoiser that predicts the noise or the velocity.

    Args:
        config: The checkpoint's scheduler configuration, as diffusers stores it.
        prediction: What the denoiser predicts, where the configuration says it wrongly.

    Raises:
        InputError: The denoiser predicts something that cannot be trained here.
    """

    PREDICTIONS = ("epsilon", "v_prediction")

    def __init__(self, config: dict, prediction: str | None = None) -> None:
        super().__init__()
        stated = {} if prediction is None else {"prediction_type": prediction}
        self.scheduler = DDPMScheduler.from_config(config, **stated)
        self.prediction = self.scheduler.config["prediction_type"]
        if self.prediction not in self.PREDICTIONS:
            raise InputError(
                f"The checkpoint's scheduler says prediction_type {self.prediction!r}, which "
                f"cannot be trained; use a checkpoint with one of {', '.join(self.PREDICTIONS)}."
            )

    @property
    def steps(self) -> int:
        """Number of noise levels T; t runs from 0 to T - 1."""
        return self.scheduler.config["num_train_timesteps"]

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return sqrt(abar_t) latents + sqrt(1 - abar_t) noise, all (B, C, H, W) with t (B,)."""
        return self.scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the denoiser should predict, (B, C, H, W)."""
        if self.prediction == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, t)
        return noise

    def sampler(self) -> DDIMScheduler:
        """Return a fresh DDIM sampler of this process.

        Latents are not clipped and timesteps start at 1, as in the stock pipeline, whatever
        sampler the checkpoint was saved with.
        """
        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False, steps_offset=1)
