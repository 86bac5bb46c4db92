"""Garbage collection of a process that imports large libraries."""

from __future__ import annotations

import gc
import sys


class Collection:
    """Postpones garbage collection while large libraries are imported.

    Imports create some million objects that stay, and each full collection looks at all of them.
    """

    def __init__(self) -> None:
        self._postponed = False

    def postpone(self) -> None:
        """Collect no garbage until `resume`, if the large libraries are not imported yet."""
        if "torch" not in sys.modules and gc.isenabled():
            gc.disable()
            self._postponed = True

    def resume(self) -> None:
        """Collect garbage again, if it was postponed, without the objects that exist by now.

        It is called before anything with weights is loaded, so that none is kept alive.
        """
        if self._postponed:
            gc.freeze()
            gc.enable()
            self._postponed = False


collection = Collection()
