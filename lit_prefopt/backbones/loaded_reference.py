"""Have a reference to compare a policy with, also where it was trained without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lit_prefopt.backbones.base import Backbone
from lit_prefopt.errors import InputError


def check_reference_can_be_loaded(backbone: Backbone) -> None:
    """Check that a backbone has a reference, or can load the weights that training started from.

    Raises:
        InputError: It has none and cannot load one.
    """
    if backbone.has_reference or backbone.policy.adapter:
        return
    if backbone.start is None or not backbone.start.can_be_loaded:
        raise InputError(
            "An evaluation compares the policy with a reference, and the weights that training "
            "starts from cannot be loaded again: set `--backbone.reference initial`."
        )


@contextmanager
def reference_loaded(backbone: Backbone) -> Iterator[None]:
    """Have a reference inside the block, to compare a policy that is trained without one.

    Where there is none, it is the network without its adapter, or the weights that training started
    from are loaded again; afterwards it is dropped.

    Args:
        backbone: The backbone, with or without a reference.
    """
    if backbone.has_reference:
        yield
        return
    check_reference_can_be_loaded(backbone)
    start = backbone.start
    backbone.policy.set_reference(
        "adapter-off" if backbone.policy.adapter or start is None else start.load()
    )
    try:
        yield
    finally:
        backbone.policy.drop_reference()
