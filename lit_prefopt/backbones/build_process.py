"""Build the noise process of a checkpoint from its scheduler and from the marks of its file."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_prefopt.errors import InputError
from lit_prefopt.processes.flow_schedule import Linear, Shift
from lit_prefopt.processes.marks import source_marks
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.schedule import last_level
from lit_prefopt.processes.settings import LevelDraw
from lit_prefopt.processes.variance_preserving import VariancePreserving

Kind = TypeVar("Kind", bound=VariancePreserving)


def build_process(
    kind: type[Kind],
    config: dict[str, Any],
    source: str,
    denoiser: str | None = None,
    prediction: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> Kind:
    """Build the noise process of a UNet's checkpoint, and log what its file is marked as.

    The marks of a single file override the scheduler, which belongs to the pipeline that only gives
    the file's architecture; the recipe overrides both.

    Args:
        kind: Class of the noise process.
        config: The scheduler's configuration.
        source: Hub name, folder or file of the checkpoint.
        denoiser: The same of a denoiser from elsewhere, whose marks come first.
        prediction: Prediction type by the recipe.
        zero_terminal_snr: Whether the last noise level is pure noise, by the recipe.
    """
    marks = source_marks(denoiser, source)
    process = kind(config | marks.config, prediction, zero_terminal_snr)
    ends = "zero terminal SNR" if process.zero_terminal_snr else "no zero terminal SNR"
    if any(marks):
        rank_zero_info(
            f"The checkpoint is marked as a model with {marks.summary}; it is read with "
            f"{process.prediction} and {ends}."
        )
    known = process.zero_terminal_snr or zero_terminal_snr is not None
    if process.prediction == "v_prediction" and (prediction or marks.v) and not known:
        rank_zero_warn(
            f"{source} is read with v prediction, and its last noise level keeps "
            f"{last_level(process.scheduler):.2g} of the signal's variance: if it was trained with "
            "zero terminal SNR, as most SDXL models with v prediction, set "
            "`--backbone.zero_terminal_snr true`; if not, false."
        )
    return process


def build_flow(
    config: dict[str, Any],
    source: str,
    denoiser: str | None = None,
    levels: LevelDraw | None = None,
    mu: Shift | None = None,
    patch: int = 2,
    linear: Linear = False,
) -> RectifiedFlow:
    """Build the rectified flow of a transformer's checkpoint.

    Args:
        config: The scheduler's configuration.
        source: Hub name, folder or file of the checkpoint.
        denoiser: The same of a denoiser from elsewhere.
        levels: Distribution of the noise levels in training.
        mu: Returns the family's shift by resolution and sampling steps.
        patch: Side of the square of latents that is one token.
        linear: Whether the stock pipeline has levels of 1 to 1/n before the shift; `float32` in
            that precision.

    Raises:
        InputError: Scheduler or file state another noise process.
    """
    marks = source_marks(denoiser, source)
    if any(marks):
        raise InputError(
            f"{denoiser or source} is marked as a model with {marks.summary}, which a flow has "
            "not: name a checkpoint of the family."
        )
    return RectifiedFlow(config, levels, mu, patch, linear)
