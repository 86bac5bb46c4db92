"""Fixed draws: the random numbers of a pair's first epochs, again."""

from __future__ import annotations

import numpy as np
import pytest

from lit_prefopt.data.order.buckets import BucketPlan
from lit_prefopt.data.order.fixed_draws import FixedDraws
from lit_prefopt.data.order.plan import Plan, SampleOrder

COUNTS = [5, 0, 7, 3]


def bucketed() -> BucketPlan:
    """Return an order that leaves out samples of each epoch."""
    buckets = [np.arange(count, dtype=np.int16) % 2 for count in COUNTS]
    return BucketPlan(Plan(COUNTS, 3, 2), buckets, [(8, 8), (16, 8)], group=4)


@pytest.mark.parametrize("order", [Plan(COUNTS, 3, 2), bucketed()])
def test_every_pair_has_the_draws_of_its_first_epochs(order: SampleOrder) -> None:
    fixed, draws = FixedDraws(order, COUNTS, 2), {}
    for epoch in range(2):
        for position, place in enumerate(order.slice(epoch, 0, order.samples)):
            assert fixed.draw(epoch, position, *place) == (epoch, position)
            draws[epoch, place] = (epoch, position)
    left_out = set()
    for epoch in range(2, 6):
        for position, place in enumerate(order.slice(epoch, 0, order.samples)):
            found = fixed.draw(epoch, position, *place)
            if (known := draws.get((epoch % 2, place))) is not None:
                assert found == known
            else:
                left_out.add((place, found))
                assert found[0] == epoch % 2
                assert found[1] >= order.samples
    assert len({found for _, found in left_out}) == len(left_out)
    assert bool(left_out) == isinstance(order, BucketPlan)
