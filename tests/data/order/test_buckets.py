"""Buckets: one shape a batch, every pair near its own, and one order for all numbers of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lit_prefopt.data.order.buckets import (
    LEFT_OUT,
    BucketPlan,
    bucket_shapes,
    choose_buckets,
    nearest,
)
from lit_prefopt.data.order.plan import Plan
from lit_prefopt.data.order.position import EpochProgress
from lit_prefopt.errors import InputError
from tests.helpers.pair_data import epoch_on

COUNTS = [50, 0, 170, 30, 110, 10, 80, 90, 20, 300, 40]
SHAPES = [(8, 16), (12, 12), (16, 8)]


def bucketed(group: int, seed: int = 0, left_out: bool = False) -> BucketPlan:
    """Return a plan over samples whose buckets are drawn."""
    random = np.random.default_rng(7)
    choices = [LEFT_OUT, 0, 1, 1, 2] if left_out else [0, 0, 0, 1, 2]
    buckets = [random.choice(choices, count).astype(np.int16) for count in COUNTS]
    return BucketPlan(Plan(COUNTS, seed, 2), buckets, SHAPES, group)


def by_queues(plan: BucketPlan, epoch: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return the groups as one would make them by hand: a queue for each bucket."""
    queues: dict[int, list[tuple[int, int]]] = {}
    groups = []
    for shard, sample in plan.plan.slice(epoch, 0, plan.plan.samples):
        bucket = int(plan.buckets_of(shard)[sample])
        queue = queues.setdefault(bucket, [])
        queue.append((shard, sample))
        if len(queue) == plan.group and bucket != LEFT_OUT:
            groups.append((bucket, queues.pop(bucket)))
    return groups


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("group", [1, 3, 8, 64])
def test_the_order_is_that_of_queues(group: int, left_out: bool):
    plan = bucketed(group, left_out=left_out)
    for epoch in (0, 3):
        expected = by_queues(plan, epoch)
        assert plan.samples == len(expected) * group
        assert plan.slice(epoch, 0, plan.samples) == [p for _, group in expected for p in group]
        buckets = [plan.bucket(epoch, n * group) for n in range(len(expected))]
        assert buckets == [bucket for bucket, _ in expected]
        assert plan.kept - plan.samples < group * len(SHAPES)


def test_any_cut_gives_the_same_order():
    whole = bucketed(8).slice(2, 0, bucketed(8).samples)
    for step in (1, 5, 8, 100):
        plan = bucketed(8)
        cuts = reversed(range(0, plan.samples, step))
        parts = [plan.slice(2, at, min(at + step, plan.samples)) for at in cuts]
        assert [place for part in reversed(parts) for place in part] == whole
    with pytest.raises(IndexError):
        plan.slice(0, 0, plan.samples + 1)


def test_epochs_leave_out_others_and_differ():
    plan = bucketed(64)
    orders = [plan.slice(epoch, 0, plan.samples) for epoch in range(4)]
    assert len(set(map(tuple, orders))) == 4
    assert all(len(set(order)) == plan.samples for order in orders)
    assert len({frozenset(order) for order in orders}) == 4
    assert plan.samples < plan.kept == sum(COUNTS)


@pytest.mark.parametrize("world", [1, 3, 7])
def test_all_numbers_of_ranks_read_one_order_in_batches_of_one_bucket(world: int):
    plan = bucketed(4)
    read = epoch_on(plan, 2, world, batch_size=4)
    assert read == plan.slice(2, 0, plan.samples)[: len(read)]
    assert plan.samples - len(read) < 4 * world
    for first in range(0, len(read), 4):
        buckets = {int(plan.buckets_of(shard)[n]) for shard, n in read[first : first + 4]}
        assert buckets == {plan.bucket(2, first)}


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 7), (7, 2)])
def test_other_ranks_in_mid_epoch_neither_repeat_nor_lose(old: int, new: int):
    plan = bucketed(4)
    stage = EpochProgress(plan.samples, old * 4).position_after(plan.samples // (old * 4) + 3)
    before = epoch_on(plan, stage.epoch, old, batch_size=4)[: stage.position]
    after = epoch_on(plan, stage.epoch, new, batch_size=4, first=stage.position)
    assert before + after == plan.slice(1, 0, plan.samples)[: len(before) + len(after)]
    assert plan.samples - len(before) - len(after) < 4 * new


def test_fingerprints_tell_orders_apart():
    plans = [bucketed(group, seed, out) for group in (1, 4) for seed in (0, 1) for out in (0, 1)]
    other = BucketPlan(plans[0].plan, [plans[0].buckets_of(n) for n in range(11)], SHAPES[::-1], 1)
    assert len({plan.fingerprint() for plan in [*plans, other, plans[0].plan]}) == 10
    assert bucketed(4, 1).fingerprint() == bucketed(4, 1).fingerprint()


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (768, 32), (32, 8)])
def test_shapes_have_about_the_pixels_of_the_square(resolution: int, step: int):
    shapes = bucket_shapes(resolution, step)
    assert (resolution, resolution) in shapes
    assert {(height, width) for width, height in shapes} == set(shapes)
    ratios = [width / height for width, height in shapes]
    assert ratios == sorted(set(ratios))
    assert 0.5 <= ratios[0] <= ratios[-1] <= 2
    for width, height in shapes:
        assert width % step == height % step == 0
        assert 1 - step / min(width, height) < width * height / resolution**2 <= 1
    assert len(shapes) >= 5 if resolution > 500 else 3


def test_sdxl_gets_its_usual_shapes():
    assert bucket_shapes(1024, 64)[6:] == [
        *[(1024, 1024), (1088, 960), (1152, 896), (1216, 832)],
        *[(1280, 768), (1344, 768), (1408, 704)],
    ]


def test_a_resolution_that_is_no_multiple_of_the_step_is_refused():
    for step in (0, 48, 1024):
        with pytest.raises(InputError, match="is not a multiple of bucket_step"):
            bucket_shapes(512, step)


def test_each_size_goes_to_the_nearest_ratio():
    shapes = bucket_shapes(1024, 64)
    random = np.random.default_rng(0)
    sizes = random.integers(1, 3000, (500, 2))
    logs = np.log([width / height for width, height in shapes])
    expected = np.abs(np.log(sizes[:, 0] / sizes[:, 1])[:, None] - logs).argmin(1)
    assert (nearest(sizes, shapes) == expected).all()
    assert shapes[nearest(np.asarray([[0, 0]]), shapes)[0]] == (1024, 1024)  # of a broken image


def test_a_shape_with_too_few_samples_is_given_up():
    shapes = bucket_shapes(1024, 64)
    sizes = np.repeat([[1024, 1024], [1344, 768], [1408, 704], [704, 1408]], [20, 6, 3, 1], axis=0)
    [buckets], chosen = choose_buckets([sizes], shapes, 4)
    assert chosen == [(1024, 1024), (1344, 768)]
    assert Counter(buckets.tolist()) == {0: 21, 1: 9}
    _, alone = choose_buckets([sizes], shapes, 31)
    assert len(alone) == 1


def test_small_samples_are_left_out():
    sizes = np.asarray([[600, 512], [511, 900], [0, 0], [512, 512]])
    [buckets], _ = choose_buckets([sizes], [(512, 512)], 1, min_side=512)
    assert buckets.tolist() == [0, LEFT_OUT, LEFT_OUT, 0]
