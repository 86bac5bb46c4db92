"""Count of unreadable samples, and the check that stops a run with too many."""

from __future__ import annotations

from lit_prefopt.errors import InputError

ALWAYS_ALLOWED = 5  # a few broken files in a small set are no reason to stop
MAX_NAMED = 10  # names in the message


class TooManyBroken(InputError):
    """Error of a run that found more broken samples than `broken_share` allows."""


class BrokenSamples:
    """Count unreadable samples by name and stop the run when there are too many.

    Args:
        share: Largest share of unreadable samples; 0 stops at the first one.
        samples: Samples of an epoch: a name comes back in every epoch and counts once.
    """

    def __init__(self, share: float, samples: int) -> None:
        self.share, self.samples = share, samples
        self.read = 0
        self.names: dict[str, None] = {}  # in the order in which they came

    def add(self, name: str) -> None:
        """Count an unreadable sample; raise TooManyBroken if there are too many."""
        self.names[name] = None
        allowed = max(ALWAYS_ALLOWED, self.share * min(self.read, self.samples))
        if len(self.names) > (allowed if self.share else 0):
            raise TooManyBroken(
                f"Broken samples: {len(self.names)} of the {self.read} read so far, more than the "
                f"{self.share} that `broken_share` allows; repair or remove them: {self.listed()}."
            )

    def listed(self) -> str:
        """Return the first names in one line."""
        names = list(self.names)
        more = f"; and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return "; ".join(names[:MAX_NAMED]) + more
