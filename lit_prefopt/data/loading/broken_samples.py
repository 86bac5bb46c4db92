"""How many samples could not be read, and when it is too many."""

from __future__ import annotations

from lit_prefopt.errors import InputError

HANDFUL = 5  # a few broken files in a small set are no reason to stop
NAMED = 10  # names in the message


class TooManyBroken(InputError):
    """More samples are broken than a run may pass over."""


class Tally:
    """Counts unreadable samples by name and stops the run when there are too many.

    Args:
        share: Largest share of unreadable samples; 0 stops at the first one.
        samples: Samples of an epoch: a name comes back in every epoch and counts once.
    """

    def __init__(self, share: float, samples: int) -> None:
        self.share, self.samples = share, samples
        self.read = 0
        self.names: dict[str, None] = {}  # in the order in which they came

    def add(self, name: str) -> None:
        """Note an unreadable sample."""
        self.names[name] = None
        allowed = max(HANDFUL, self.share * min(self.read, self.samples)) if self.share else 0
        if len(self.names) > allowed:
            raise TooManyBroken(
                f"Broken samples: {len(self.names)} of the {self.read} read so far, more than the "
                f"{self.share} that `broken_share` allows; repair or remove them: {self.listed()}."
            )

    def listed(self) -> str:
        """Return the first names in one line."""
        names = list(self.names)
        more = f"; and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return "; ".join(names[:NAMED]) + more
