"""Detect outlier steps by robust statistics over the previous steps."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from lit_prefopt.utils.finite import OVERFLOWS

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
SURE = 4.0  # standard errors by which a rise must exceed the noise
FLOOR = 0.25  # even a very stable run may rise by half


class StepStatistics(NamedTuple):
    """Statistics of an optimizer step before it is taken; an error below 0 is unknown."""

    number: int
    loss: float
    chosen_error: float
    chosen_reference_error: float
    gradient: float  # its norm


class RunningMedian:
    """Running median and median absolute deviation (MAD) of a value.

    Args:
        window: Number of previous values; nothing is an outlier before that many.
        floor: Lower bound of the deviation.
    """

    def __init__(self, window: int, floor: float = 1e-12) -> None:
        self.window, self.floor = window, floor
        self.values: deque[float] = deque(maxlen=window)

    def excess(self, value: float) -> float:
        """Return the number of deviations by which a value exceeds the median."""
        if len(self.values) < self.window:
            return 0.0
        middle = median(self.values)
        spread = MAD_TO_DEVIATION * median(abs(v - middle) for v in self.values)
        return (value - middle) / max(spread, self.floor)


class ErrorTrend:
    """Test whether an error has risen above its baseline, beyond the noise.

    The baseline is the reference's error on the same noise, or without a reference the error of
    the run's first steps.

    Args:
        window: Number of values in a mean.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.first: list[float] = []
        self.errors: deque[float] = deque(maxlen=window)
        self.references: deque[float] = deque(maxlen=window)

    def add(self, error: float, reference: float) -> None:
        """Add a step; a reference below 0 means none."""
        if reference < 0 and len(self.first) < self.window:
            self.first.append(error)
            return
        self.errors.append(error)
        if reference >= 0:
            self.references.append(reference)

    def share(self) -> float:
        """Return the rise as a share of the baseline; 0 if it is within the noise."""
        count = len(self.errors)
        if count < self.window:
            return 0.0
        if self.references:
            base = fmean(self.references)
            apart = [e - r for e, r in zip(self.errors, self.references, strict=True)]
            noise = stdev(apart) / math.sqrt(count)
        else:
            base = fmean(self.first)
            noise = math.hypot(stdev(self.errors), stdev(self.first)) / math.sqrt(count)
        rise = fmean(self.errors) - base
        return rise / base if base > 0 and rise > SURE * noise else 0.0


class SpikeDetector:
    """Detects spikes in loss and gradient norm, step by step.

    Args:
        threshold: Deviations above the median that count as a spike.
        window: Number of previous optimizer steps.
    """

    def __init__(self, threshold: float, window: int) -> None:
        self.threshold = threshold
        # Of logarithms: with a large beta, losses of normal small batches reach 200 times their
        # median, which is a moderate deviation of the logarithm.
        self.loss, self.gradient = RunningMedian(window, FLOOR), RunningMedian(window, FLOOR)
        self.chosen = ErrorTrend(window)
        self.overflows = 0

    def spike(self, step: StepStatistics, *, scaled: bool = False) -> str | None:
        """Return a description of a step's anomaly, or None.

        Args:
            step: The step.
            scaled: Whether a gradient scaler skips steps whose gradients overflow.
        """
        finite = math.isfinite(step.loss)
        overflow = scaled and finite and not math.isfinite(step.gradient)
        self.overflows = self.overflows + 1 if overflow else 0
        if overflow and self.overflows < OVERFLOWS:
            return None
        if not finite or not math.isfinite(step.gradient):
            return f"the loss is {step.loss:.4g} and the gradient norm {step.gradient:.4g}"
        numbers = {
            "loss": (step.loss, self.loss.excess(_log(step.loss))),
            "gradient norm": (step.gradient, self.gradient.excess(_log(step.gradient))),
        }
        for name, (value, excess) in numbers.items():
            if excess > self.threshold:
                return f"the {name} jumps to {value:.4g}, {excess:.0f} deviations above the median"
        return None

    def add(self, step: StepStatistics) -> None:
        """Add a step to the statistics, unless it is not finite."""
        if math.isfinite(step.loss) and math.isfinite(step.gradient):
            self.loss.values.append(_log(step.loss))
            self.gradient.values.append(_log(step.gradient))
            if step.chosen_error >= 0:
                self.chosen.add(step.chosen_error, step.chosen_reference_error)

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as lists."""
        state = {name: list(values) for name, values in self._values().items()}
        return {**state, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics."""
        for name, values in self._values().items():
            values.clear()
            values.extend(state[name])
        self.overflows = state["overflows"]

    def _values(self) -> dict[str, Any]:
        chosen = self.chosen
        lists = {"first": chosen.first, "errors": chosen.errors, "references": chosen.references}
        return {"loss": self.loss.values, "gradient": self.gradient.values, **lists}


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
