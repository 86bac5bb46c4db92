"""Diffusion-DPO: direct preference optimisation of diffusion models (arXiv 2311.12908, 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_prefopt.batches import LogRatios
from lit_prefopt.errors import check_number
from lit_prefopt.losses import Comparisons, preference_loss, sigmoid, smooth
from lit_prefopt.pairwise import PairwiseModule


class DiffusionDPO(PairwiseModule):
    """Increases the margin between chosen and rejected side, regularised to the reference.

    Args:
        beta: Strength of the regularisation to the reference, on mean errors with the factor 1/2 of
            the released code.
        link: Loss of a difference of log-ratios: `lit_prefopt.losses.sigmoid`, `.ipo`, `.hinge`,
            or any function of that form.
        label_smoothing: Share of the labels that are assumed to be wrong.
    """

    least_beta: float = 10.0
    """A smaller beta gets a warning: it belongs to log-ratios that are sums, not means."""

    def __init__(
        self,
        *args: Any,
        beta: float,
        link: Callable = sigmoid,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("beta", beta, above=0)
        check_number("label_smoothing", label_smoothing, 0, 1)
        self.beta = beta
        self.link = link
        self.label_smoothing = label_smoothing

    def on_train_start(self) -> None:
        """Warn of a beta that is too small for mean errors."""
        super().on_train_start()
        if self.beta < self.least_beta:
            rank_zero_warn(
                f"beta is {self.beta:g}, as for a language model, but errors are means here and "
                "not sums, so that nothing would hold the policy to the reference: published runs "
                "have 200 to 5000, such as `--model.beta 2000`."
            )

    def pair_losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the link's loss of each pair, (B,) (Eq. 14)."""
        labels = smooth(pairs.labels, self.label_smoothing)
        return preference_loss(ratios.chosen - ratios.rejected, labels, self.beta, self.link)
