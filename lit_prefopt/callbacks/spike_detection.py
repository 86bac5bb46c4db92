"""When a step of a run is out of the ordinary: robust statistics over the steps before it."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
SURE = 4.0  # standard errors by which a rise must exceed the noise
FLOOR = 0.25  # a run that hardly varies may still go up by half
OVERFLOWS = 20  # steps in a row that mixed precision in fp16 may take to find its scale


class StepStatistics(NamedTuple):
    """What is known about an optimizer step before it is taken; an error below 0 is not known."""

    number: int
    loss: float
    chosen_error: float
    chosen_reference_error: float
    gradient: float  # its norm


class RunningMedian:
    """The usual level of one number: median and median absolute deviation of its last values.

    Args:
        window: How many values are looked back at; nothing is out of the ordinary before that.
        floor: Smallest deviation that counts.
    """

    def __init__(self, window: int, floor: float = 1e-12) -> None:
        self.window, self.floor = window, floor
        self.values: deque[float] = deque(maxlen=window)

    def excess(self, value: float) -> float:
        """Return by how many deviations a value lies above the median."""
        if len(self.values) < self.window:
            return 0.0
        middle = median(self.values)
        spread = MAD_TO_DEVIATION * median(abs(v - middle) for v in self.values)
        return (value - middle) / max(spread, self.floor)


class ErrorTrend:
    """Whether an error has risen over what it is compared with, beyond the noise.

    Compared with is the reference's error on the same noise where there is one, and else the
    error of the run's first steps.

    Args:
        window: How many values a mean is taken over.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.first: list[float] = []
        self.errors: deque[float] = deque(maxlen=window)
        self.references: deque[float] = deque(maxlen=window)

    def add(self, error: float, reference: float) -> None:
        """Add a step; a reference below 0 is none."""
        if reference < 0 and len(self.first) < self.window:
            self.first.append(error)
            return
        self.errors.append(error)
        if reference >= 0:
            self.references.append(reference)

    def share(self) -> float:
        """Return the rise as a share of what it is compared with; 0 where noise may explain it."""
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
    """Looks at one optimizer step after the other.

    Args:
        threshold: Deviations above the median that make a spike.
        window: Optimizer steps that are looked back at.
    """

    def __init__(self, threshold: float, window: int) -> None:
        self.threshold = threshold
        # Of logarithms: on a large beta losses of healthy small batches reach 200 times their
        # median, and a deviation in the logarithm bears that.
        self.loss, self.gradient = RunningMedian(window, FLOOR), RunningMedian(window, FLOOR)
        self.chosen = ErrorTrend(window)
        self.overflows = 0

    def spike(self, step: StepStatistics, *, scaled: bool = False) -> str | None:
        """Return what is wrong with a step, in words.

        Args:
            step: The step.
            scaled: Whether a gradient scaler leaves out steps whose gradients overflow.
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
        """Take a step into the statistics, unless it has nothing to say."""
        if math.isfinite(step.loss) and math.isfinite(step.gradient):
            self.loss.values.append(_log(step.loss))
            self.gradient.values.append(_log(step.gradient))
            if step.chosen_error >= 0:
                self.chosen.add(step.chosen_error, step.chosen_reference_error)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, as lists."""
        state = {name: list(values) for name, values in self._values().items()}
        return {**state, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was seen."""
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
