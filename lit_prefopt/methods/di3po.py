"""Di3PO: preference optimisation on the two halves of diptychs (arXiv 2602.06355, 2026)."""

from __future__ import annotations

from collections.abc import Callable

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import Batch, Pairs
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.errors import InputError
from lit_prefopt.losses import sigmoid
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.optimizers import OptimizerConfig


class Di3PO(DiffusionDPO):
    """Diffusion-DPO on pairs that differ in one thing only, optionally where they differ alone.

    `lit-prefopt predict --config toy-diptychs` makes such pairs.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        beta: Pull to the reference, on mean errors with the factor 1/2 of the released code.
        masked: Count errors only where a pair's mask.png says that its sides differ; the paper
            counts them everywhere.
        link: Loss of a difference of log-ratios: `lit_prefopt.losses.sigmoid`, `.ipo`, `.hinge`,
            or any function of that form.
        label_smoothing: Share of the labels that are taken to be wrong.
        anchor: Weight of the chosen side's denoising error, added to the loss.
        chosen_protection: Scale the rejected side's gradient so that the chosen side's error does
            not rise (mu of Diffusion-SDPO); off where it is not given.
        gamma: Weight of a noise level against one that is a `gamma_steps`-th of all levels noisier.
        gamma_steps: See `gamma`.
        validation_draws: Draws of timestep and noise per held-out pair.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        beta: float,
        masked: bool = False,
        link: Callable = sigmoid,
        label_smoothing: float = 0.0,
        anchor: float = 0.0,
        chosen_protection: float | None = None,
        gamma: float = 1.0,
        gamma_steps: int = 50,
        validation_draws: int = 4,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            beta,
            link,
            label_smoothing,
            anchor,
            chosen_protection,
            gamma,
            gamma_steps,
            validation_draws,
        )
        self.masked = masked

    def form_pairs(self, batch: Batch) -> Pairs:
        """Return what to learn from; where errors count inside masks alone, there must be some."""
        pairs = super().form_pairs(batch)
        if self.masked and self.training and pairs.masks is None:
            raise InputError(
                "`masked` counts errors inside the pairs' masks, and no pair of a batch has a "
                "mask.png: generate the pairs with `--model.masks true`, or set `masked` to false."
            )
        return pairs

    def on_fit_start(self) -> None:
        """Refuse data that mirrors text, or left and right."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StoredPairs) and data.mirrors:
            raise InputError(
                "Di3PO's pairs must not be mirrored, since text would read backwards: set "
                "`--data.flip false`."
            )
