"""The one training step: form pairs, weigh policy against reference, take the loss."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Batch, ImagePairs, LatentPairs, LogRatios, Pairs
from lit_prefopt.cache_checks import check_data
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.denoising import (
    DenoisingErrors,
    NoisedPairs,
    error_log_ratios,
    noise_pairs,
    predict_errors,
)
from lit_prefopt.diffusion.encoding import draw_latents, encode_pairs
from lit_prefopt.effective_batch import scale_last_step
from lit_prefopt.errors import check_number
from lit_prefopt.learner import Learner
from lit_prefopt.metrics import PreferenceMetric, batch_means
from lit_prefopt.optimizers import OptimizerConfig


class PreferenceDiffusionModule(Learner):
    """Trains a backbone's policy; a method is a subclass that answers one to three questions.

    1. `form_pairs(batch)`: where do the pairs come from?
    2. `log_ratios(pairs)`: how much likelier does the policy find each side than the reference?
    3. `losses(ratios, pairs)`: what is minimised, one value per pair?

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        validation_draws: Draws of timestep and noise per held-out pair; they are the same at
            every validation.
    """

    beta: float = 1.0
    """What the margin is measured in; methods with a pull to the reference set their own."""

    masked: bool = False
    """Whether errors count only where a pair's mask says so, if it has one."""

    def __init__(
        self, backbone: Backbone, optimizer: OptimizerConfig, validation_draws: int = 4
    ) -> None:
        super().__init__(backbone, optimizer)
        check_number("validation_draws", validation_draws, 1)
        self.validation_draws = validation_draws
        self.held_out = PreferenceMetric(backbone.process.steps, validation_draws)

    def setup(self, stage: str | None = None) -> None:
        """Refuse data that were made for another backbone or method, before anything is trained."""
        check_data(self, getattr(self.trainer, "datamodule", None))

    # The three questions ------------------------------------------------------------------------

    def form_pairs(self, batch: Batch) -> Pairs:
        """Return what to learn from; here images are encoded, and latents pass.

        Args:
            batch: What the data module yields.
        """
        if isinstance(batch, ImagePairs):
            return encode_pairs(self.backbone, batch)
        return draw_latents(self.backbone, batch) if isinstance(batch, LatentPairs) else batch

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return how much likelier the policy finds each side than the reference does.

        Here: half the drop in denoising error, at one timestep and with one noise for all sides.
        """
        noised = self.add_noise(pairs)
        reference = self.reference_error(pairs, noised)
        policy = self.errors(noised)
        values = error_log_ratios(policy.value, reference)
        return LogRatios(values, noised.t, policy.value, reference, policy.overlap)

    def losses(self, ratios: LogRatios, pairs: Pairs) -> Tensor:
        """Return the loss of every pair, (B,)."""
        raise NotImplementedError

    # What the answers are made of ---------------------------------------------------------------

    def draw_timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps at quantiles u of their distribution; here it is uniform.

        Args:
            u: Uniform draws in [0, 1), (B,) float64.
        """
        return (u * self.backbone.process.steps).long()

    def add_noise(self, pairs: Pairs) -> NoisedPairs:
        """Noise all sides of a pair alike: one timestep and one noise, drawn from its seed."""
        u = draws.uniform(pairs.seeds, "t", device=pairs.latents.device)
        return noise_pairs(self.backbone.process, pairs, self.draw_timesteps(u), masked=self.masked)

    def errors(self, noised: NoisedPairs) -> DenoisingErrors:
        """Return the denoising errors of the network that speaks now, all sides in one forward."""
        return predict_errors(self.backbone, noised)

    def reference_error(self, pairs: Pairs, noised: NoisedPairs) -> Tensor | None:
        """Return the reference's errors, (B, K), known or asked now; None without a reference.

        Args:
            pairs: B pairs.
            noised: What `add_noise` made of them.
        """
        if pairs.reference_error is not None:
            return pairs.reference_error[:, 0]
        if not self.backbone.has_reference:
            return None
        with self.backbone.as_reference():
            return self.errors(noised).value

    @property
    def takes_reference_errors(self) -> bool:
        """Whether the reference's denoising errors are all that is asked of it."""
        return type(self).log_ratios is PreferenceDiffusionModule.log_ratios

    # What is the same for all methods -----------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        pairs = self.form_pairs(batch)
        ratios = self.log_ratios(pairs)
        losses = self.losses(ratios, pairs)
        loss = (pairs.weights * losses).mean()
        self.measured = self.measure(ratios, pairs, loss)
        self.window.add(self.measured)
        return scale_last_step(loss, self._trainer)

    def measure(self, ratios: LogRatios, pairs: Pairs, loss: Tensor) -> dict[str, Tensor]:
        """Return what is logged of a training batch, by name."""
        return batch_means(ratios, pairs, loss, self.beta)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure held-out preference on draws that depend on the pair alone."""
        pairs = self.form_pairs(batch)
        for draw in range(self.validation_draws):
            seeded = pairs.at_draw(draw)
            self.held_out.update(self.log_ratios(seeded), seeded, self.beta)

    def on_validation_epoch_end(self) -> None:
        """Log held-out accuracy and margin, over all timesteps and by quarter of them."""
        self._log_held_out("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure held-out preference, as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log what validation logs, under `test/`."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> None:
        means = self.held_out.compute()  # already over all ranks
        self.log_dict({f"{stage}/{name}": mean for name, mean in means.items()}, sync_dist=True)
        self.held_out.reset()

    def save(self, folder: Path) -> Path:
        """Write the policy in diffusers' layout."""
        return self.backbone.save(folder)
