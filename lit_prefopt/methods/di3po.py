"""Di3PO: preference optimisation on the two panels of diptychs (arXiv 2602.06355, 2026)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_prefopt.batches import Batch, Pairs
from lit_prefopt.datamodules.base import StoredPairs
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO


class Di3PO(DiffusionDPO):
    """Diffusion-DPO on pairs that differ in one attribute, optionally masked to where they differ.

    `lit-prefopt predict --config toy-diptychs` generates such pairs.

    Args:
        masked: Count errors only inside a pair's mask.png, where its sides differ; the paper
            counts them everywhere.
        mask_dilation: Positions of latents (usually 8 pixels each) by which masks are enlarged in
            each direction, so that errors count at the edges of the change too.
    """

    def __init__(
        self, *args: Any, masked: bool = False, mask_dilation: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("mask_dilation", mask_dilation, 0)
        if mask_dilation and not masked:
            raise InputError(
                "`mask_dilation` enlarges masks, and errors count everywhere: set `--model.masked "
                "true`, or `--model.mask_dilation 0`."
            )
        self.masked, self.mask_dilation = masked, mask_dilation
        self._warned = False

    def form_pairs(self, batch: Batch) -> Pairs:
        """Return the pairs to train on; warn once if `masked` is set and they have no masks."""
        pairs = super().form_pairs(batch)
        if self.masked and self.training and pairs.masks is None and not self._warned:
            self._warned = True  # pairs with and without masks may be mixed
            rank_zero_warn(
                "`masked` is set and no pair of a batch has a mask.png, so errors count "
                "everywhere: generate pairs with `--model.masks true`, or set `masked` to false."
            )
        return pairs

    def on_fit_start(self) -> None:
        """Warn if training pairs are mirrored, which also mirrors text."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StoredPairs) and data.mirrors:
            rank_zero_warn(
                "Mirrored pairs mirror the text in images of Di3PO: set `--data.flip false`, "
                "unless the pairs differ in other attributes."
            )
