"""Count prompts that a text encoder truncates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch.utilities import rank_zero_warn

PROMPTS = 1000  # number of checked prompts


class LongPromptCounter:
    """Counts the long prompts among the first ones, and warns at the first one and of the count.

    Args:
        fits: Returns whether a prompt fits the text encoder's context.
        which: Which prompts they are, for the message, such as `training`.
    """

    def __init__(self, fits: Callable[[str], bool], which: str) -> None:
        self.fits, self.which = fits, which
        self.prompts = self.long = 0
        self.done = False

    def count(self, texts: Sequence[str]) -> None:
        """Count the prompts of a batch."""
        if self.done:
            return
        before, texts = self.long, texts[: PROMPTS - self.prompts]
        self.prompts += len(texts)
        self.long += sum(not self.fits(text) for text in texts)
        if self.prompts >= PROMPTS:
            self.finish()
        elif self.long and not before:
            self._warn()

    def finish(self) -> None:
        """Warn of the count, and count no more."""
        if self.long and not self.done:
            self._warn()
        self.done = True

    def _warn(self) -> None:
        rank_zero_warn(
            f"{self.long} of the first {self.prompts} {self.which} prompts are longer than a "
            "text encoder's context, and it does not read what is beyond: shorten them if it "
            "matters."
        )
