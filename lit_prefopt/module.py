"""The training step of all methods: form pairs, compute log-ratios, compute the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lit_prefopt.batches import Batch, ImagePairs, LatentPairs, LogRatios, Pairs, Steps
from lit_prefopt.cache_checks import check_data
from lit_prefopt.data.shards.sides import Known
from lit_prefopt.datamodules.side_checks import TrainsOn
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.base_check import check_base
from lit_prefopt.diffusion.denoising import (
    DenoisingErrors,
    NoisedPairs,
    error_log_ratios,
    noise_pairs,
    predict_errors,
)
from lit_prefopt.diffusion.encoding import draw_latents, encode_pairs
from lit_prefopt.diffusion.swapped import swapped
from lit_prefopt.effective_batch import scale_last_step
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.fit_caches import FitCaches
from lit_prefopt.learner import Learner
from lit_prefopt.losses import Comparisons
from lit_prefopt.metrics import PreferenceMetric, batch_means


class PreferenceDiffusionModule(Learner):
    """Base class of all methods: a subclass implements one to three hooks.

    1. `form_pairs(batch)`: return the pairs to train on.
    2. `log_ratios(pairs)`: return the log-ratio of policy to reference for each side.
    3. `losses(ratios, pairs)`: return the loss to minimise, one value per pair.

    A subclass with options of its own takes those by name and passes all others on:
    `def __init__(self, *args, delta: float = 0.1, **kwargs)`. The command line then lists the
    options of all classes, each with its docstring.

    Args:
        validation_draws: Draws of timestep and noise (and of whatever else is random) per held-out
            pair; they are the same at every validation.
        check_base: Stop at the first step if the base's error shows that it does not predict what
            its checkpoint or `--backbone.prediction` states; false to teach it another prediction.
        swapped: Train on the pairs in reverse order, to get a negative model (Diffusion-NPO): what
            it prefers is what guidance points away from (`--model.negative` of `evaluate`).
    """

    beta: float = 1.0
    """Factor of logged margins; methods regularised to the reference set their own."""

    masked: bool = False
    """Whether errors count only inside a pair's mask, if it has one."""

    mask_dilation: int = 0
    """Positions of latents by which masks are enlarged in each direction."""

    needs_reference: bool = True
    """Whether training and held-out comparison need a reference; without one, a run is refused.

    A method whose loss is of the policy alone sets this to False.
    """

    takes_reference_errors: bool = True
    """Whether denoising errors of stored pairs are all that it computes with the reference.

    Such errors can be read from a table (`CachedPairs`, `--data.reference`). A method whose
    `log_ratios` calls the reference for anything else sets this to False.
    """

    chosen_only: bool = False
    """Whether `form_pairs` makes training pairs of `batch.best()`, of which one side is encoded."""

    trains_on: TrainsOn = "pairs"
    """Samples that it compares: `pairs`, ranked `lists`, or single images with `likes`.

    Of a list, methods of pairs and of likes get the best and the worst side; a method of likes
    takes those of a pair as a liked and a disliked image.
    """

    needs_known: tuple[Known, ...] = ()
    """What must be known of each side of a sample: `scores`, `noise_seeds` (`batches.Pairs`)."""

    caches: FitCaches | None = None
    """Encodings and reference errors that a training from images stores."""

    def __init__(
        self,
        *args: Any,
        validation_draws: int = 4,
        check_base: bool = True,
        swapped: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backbone.require_denoiser(type(self).__name__)
        check_number("validation_draws", validation_draws, 1)
        if swapped and self.chosen_only:
            raise InputError(
                f"{type(self).__name__} trains on the chosen side alone, which `swapped` would "
                "replace: take a method of pairs, such as DiffusionDPO."
            )
        self.swapped = swapped
        self.validation_draws = validation_draws
        self.check_base = check_base
        self.base_to_check = self.checking_base = False
        self.held_out = PreferenceMetric(validation_draws)

    def setup(self, stage: str | None = None) -> None:
        """Check that the data fit backbone and method, before training starts."""
        data = getattr(self.trainer, "datamodule", None)
        check_data(self, data)
        self.caches = FitCaches.of_run(self, data) if stage == "fit" else None

    def on_train_start(self) -> None:
        """Arrange the check of the base, unless training has begun in an earlier run."""
        super().on_train_start()
        self.base_to_check = self.check_base and self.global_step == 0

    # The three hooks ----------------------------------------------------------------------------

    def form_pairs(self, batch: Batch) -> Pairs:
        """Return the pairs to train on; by default encode images and sample cached latents.

        Args:
            batch: A batch of the data module.
        """
        if isinstance(batch, ImagePairs):
            if self.caches is None or batch.records is None:
                return encode_pairs(self.backbone, batch)
            batch = self.caches.encode(batch, training=self.training)
        return draw_latents(self.backbone, batch) if isinstance(batch, LatentPairs) else batch

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the log-ratio of policy to reference for each side.

        By default half the drop in denoising error from reference to policy, at one timestep and
        with one noise for all sides.
        """
        noised = self.add_noise(pairs)
        reference = self.reference_error(pairs, noised)
        policy = self.errors(noised)
        values = error_log_ratios(policy.value, reference)
        return LogRatios(values, noised.t, policy.value, reference, policy.overlap)

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the loss of each pair, (B,).

        Args:
            ratios: Log-ratios of the pairs' sides.
            pairs: The pairs, for their labels.
        """
        raise NotImplementedError

    # Building blocks of the hooks ---------------------------------------------------------------

    def level_quantiles(self, u: Tensor) -> Tensor:
        """Return quantiles of the process's distribution of noise levels; u itself by default.

        A method that draws some levels more often than others transforms u here; how the levels
        themselves are distributed is the process's choice.

        Args:
            u: Uniform draws in [0, 1), (B,) float64; 0 is clean.
        """
        return u

    def add_noise(self, pairs: Pairs) -> NoisedPairs:
        """Add noise to all sides of each pair: one level and one noise, drawn from its seed."""
        u = self.level_quantiles(draws.uniform(pairs.seeds, "t"))
        process, dilation = self.backbone.process, self.mask_dilation
        return noise_pairs(process, pairs, u, masked=self.masked, mask_dilation=dilation)

    def errors(self, noised: NoisedPairs) -> DenoisingErrors:
        """Return the denoising errors of the active network, all sides in one forward."""
        return predict_errors(self.backbone, noised)

    def reference_error(self, pairs: Pairs, noised: NoisedPairs) -> Tensor | None:
        """Return the reference's errors, (B, K), cached or computed; None without a reference.

        They are not computed in the training of a method that does not need them.

        Args:
            pairs: B pairs.
            noised: The same pairs after `add_noise`.
        """
        if self.training and not self.needs_reference:
            return None
        if pairs.reference_error is not None:
            return pairs.reference_error[:, 0]
        if not self.backbone.has_reference:
            return None
        with self.backbone.as_reference():
            errors = self.errors(noised).value
        if self.caches is not None:
            self.caches.add_errors(pairs.seeds, errors.flip(1) if self.swapped else errors)
        return errors

    # Training and validation steps, the same for all methods ------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Args:
            batch: A batch of the data module.
            batch_idx: Its number in the epoch.
        """
        pairs = self._with_errors(batch)
        self.check_base_once(pairs)
        return self.weighted_loss(self.log_ratios(pairs), pairs)

    def _with_errors(self, batch: Any) -> Pairs:
        """Return the pairs of a batch, with the reference's errors where all are known."""
        pairs = self.form_pairs(batch)
        if self.caches is not None:
            pairs = self.caches.look_up_errors(batch, pairs, training=self.training)
        return swapped(pairs) if self.swapped else pairs

    def check_base_once(self, batch: Pairs | Steps) -> None:
        """Check on the first batch of a training that the base predicts what it is read as.

        Args:
            batch: The pairs or steps to train on.
        """
        if self.base_to_check:
            self.base_to_check, self.checking_base = False, True
            check_base(self.backbone, batch, self.trainer.strategy.reduce)
            self.checking_base = False

    def weighted_loss(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the mean loss of a training batch by the pairs' weights, and log its means.

        Args:
            ratios: Log-ratios of the pairs' sides.
            pairs: The pairs, for their labels and weights.
        """
        losses = self.losses(ratios, pairs)
        loss = (pairs.weights * losses).mean()
        self.measured = self.measure(ratios, pairs, loss)
        self.window.add(self.measured)
        return scale_last_step(loss, self._trainer)

    def measure(self, ratios: LogRatios, pairs: Comparisons, loss: Tensor) -> dict[str, Tensor]:
        """Return the logged means of a training batch by name."""
        return batch_means(ratios, pairs, loss, self.beta)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Compute held-out preference at timesteps and noise that depend on the pair only."""
        pairs = self._with_errors(batch)
        for draw in range(self.validation_draws):
            seeded = pairs.at_draw(draw)
            ratios = self.log_ratios(seeded)
            quantile = self.backbone.process.quantile(ratios.t)
            losses = self.held_out_losses(ratios, seeded)
            self.held_out.update(ratios, seeded, self.beta, quantile, losses)

    def held_out_losses(self, ratios: LogRatios, pairs: Pairs) -> Tensor | None:
        """Return the weighted loss of each held-out pair, (B,); None if the method has none.

        Args:
            ratios: Log-ratios of the pairs' sides.
            pairs: The pairs, for their labels and weights.
        """
        return pairs.weights * self.losses(ratios, pairs)

    def on_validation_epoch_end(self) -> None:
        """Log held-out loss, accuracy and margin; the accuracy also by quarter of the levels."""
        self._log_held_out("val")
        super().on_validation_epoch_end()
        if self.caches is not None:
            self.caches.flush()

    def on_train_epoch_end(self) -> None:
        """Write encodings and errors of the epoch's last batches."""
        if self.caches is not None:
            self.caches.end_epoch(self.trainer)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Compute held-out preference, as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log held-out accuracy and margin under `test/`."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> None:
        means = self.held_out.compute()  # already over all ranks
        self.log_dict({f"{stage}/{name}": mean for name, mean in means.items()}, sync_dist=True)
        self.held_out.reset()

    def save(self, folder: Path) -> Path:
        """Write the policy in diffusers' layout, and return its path."""
        return self.backbone.save(folder)
