"""The plan: every sample once, the same order for all, and only what is asked for is made."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lit_prefopt.data.order.plan import Plan, RankSplit, replacement_positions
from lit_prefopt.data.order.position import EpochProgress
from lit_prefopt.utils.seeds import sample_seed, stable_seed
from tests.helpers.pair_data import epoch_on

COUNTS = [5, 0, 17, 3, 11, 1, 8, 9, 2, 30, 4]


def test_an_epoch_holds_every_sample_once():
    plan = Plan(COUNTS, seed=3, shards_per_block=2)
    everything = {(shard, n) for shard, count in enumerate(COUNTS) for n in range(count)}
    order = plan.slice(0, 0, plan.samples)
    assert len(order) == len(everything) == sum(COUNTS)
    assert set(order) == everything


def test_any_cut_gives_the_same_order():
    plan = Plan(COUNTS, seed=3, shards_per_block=2)
    whole = plan.slice(4, 0, plan.samples)
    for step in (1, 7, 40):
        cuts = range(0, plan.samples, step)
        parts = [plan.slice(4, at, min(at + step, plan.samples)) for at in reversed(cuts)]
        assert [place for part in reversed(parts) for place in part] == whole


def test_epochs_and_seeds_differ_and_equal_ones_agree():
    orders = [Plan(COUNTS, seed).slice(epoch, 0, 90) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert Plan(COUNTS, 1).slice(1, 0, 90) == orders[3]


def test_samples_are_shuffled_inside_their_block_only():
    plan = Plan([10] * 8, shards_per_block=2)
    blocks = [plan.slice(0, at, at + 20) for at in range(0, 80, 20)]
    shards = [{shard for shard, _ in block} for block in blocks]
    assert all(len(pair) == 2 for pair in shards)
    assert set.union(*shards) == set(range(8))
    assert all(block != sorted(block) for block in blocks)


def test_without_shuffling_the_order_is_the_stored_one():
    plan = Plan(COUNTS, shuffle=False)
    order = plan.slice(0, 0, plan.samples)
    assert order == sorted(order)
    assert order == plan.slice(7, 0, plan.samples)


def test_one_shard_may_hold_everything():
    order = Plan([50]).slice(0, 0, 50)
    assert sorted(order) == [(0, n) for n in range(50)]
    assert order != sorted(order)


@pytest.mark.parametrize("world", [1, 3, 7])
def test_all_numbers_of_ranks_read_one_global_order(world: int):
    plan = Plan(COUNTS, seed=5)
    read = epoch_on(plan, 2, world, batch_size=2)
    assert read == plan.slice(2, 0, plan.samples)[: len(read)]
    assert plan.samples - len(read) < 2 * world  # less than a global batch is dropped


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 7), (7, 2)])
def test_other_ranks_in_mid_epoch_neither_repeat_nor_lose(old: int, new: int):
    plan = Plan(COUNTS, seed=5)
    course = EpochProgress(plan.samples, old * 2)
    stage = course.position_after(course.whole + 3)  # three batches into the second epoch
    before = epoch_on(plan, stage.epoch, old, batch_size=2)[: stage.position]
    after = epoch_on(plan, stage.epoch, new, batch_size=2, first=stage.position)
    assert before + after == plan.slice(1, 0, plan.samples)[: len(before) + len(after)]
    assert plan.samples - len(before) - len(after) < 2 * new


def test_thousands_of_ranks_and_workers_share_an_epoch_and_change_in_its_middle():
    # as benchmarks/plan_scale.py does with ten million samples
    counts = np.random.default_rng(0).integers(200, 800, 200)
    starts = np.concatenate(([0], np.cumsum(counts)))
    plan, world, workers = Plan(counts, seed=1), 4096, 8

    def ids(places: list[tuple[int, int]]) -> list[int]:
        return [int(starts[shard]) + sample for shard, sample in places]

    batches = plan.samples // (world * 2)
    by_worker: list[list[int]] = []
    steps = {number: [] for number in range(batches)}
    for worker in range(workers):
        mine = []
        for number in range(worker, batches, workers):
            stretches = [
                RankSplit(rank, world, 2).rank_positions(0, number) for rank in range(world)
            ]
            steps[number] = [n for stretch in stretches for n in ids(plan.slice(1, *stretch))]
            mine += steps[number]
        by_worker.append(mine)
    together = [n for mine in by_worker for n in mine]
    assert len(set(together)) == len(together) == batches * world * 2
    assert 0 <= plan.samples - len(together) < world * 2
    in_order = [n for number in range(batches) for n in steps[number]]
    assert in_order == ids(plan.slice(1, 0, len(in_order)))
    few = ids(epoch_on(plan, 1, 7, 2))  # seven ranks read the same order
    assert few[: len(in_order)] == in_order

    position = batches // 2 * world * 2
    rest = ids(epoch_on(plan, 1, 7, 2, first=position))
    read = in_order[:position] + rest
    assert len(set(read)) == len(read)
    assert plan.samples - len(read) < 7 * 2


def test_a_large_plan_makes_only_what_is_touched(monkeypatch: pytest.MonkeyPatch):
    counts = np.random.RandomState(0).randint(500, 1500, 10_000)
    made: list = []
    make = Plan._make_block

    def noted(plan, key):
        made.append(key)
        return make(plan, key)

    monkeypatch.setattr(Plan, "_make_block", noted)
    ranks = RankSplit(4_095, 4_096, 8)
    tracemalloc.start()
    plan = Plan(counts)
    read = plan.slice(3, *ranks.rank_positions(0, 200))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == 8
    assert len(made) <= 2
    assert peak < 5e6  # ten million places would be 80 MB


def test_stand_ins_belong_to_the_same_rank_and_come_once_each():
    samples, ranks = 26, RankSplit(1, 2, 4)
    candidates = list(replacement_positions(5, samples, ranks.global_batch))
    assert candidates[:3] == [5, 13, 21]
    assert sorted(candidates) == list(range(24))
    assert list(replacement_positions(1, 3, 8)) == [1, 2, 0]  # less than one batch


def test_seeds_are_the_same_for_ever():
    # written down: a change of these numbers breaks every resume
    assert stable_seed("a", 1) == 9175697276159024743
    assert sample_seed(1, 2, 3) == 6864941841312856744
    assert Plan([3, 4], 1).slice(0, 0, 4) == [(0, 1), (1, 1), (1, 3), (1, 2)]
    seeds = {sample_seed(s, e, p) for s in range(3) for e in range(3) for p in range(50)}
    assert len(seeds) == 450


def test_fingerprints_tell_orders_apart():
    prints = {Plan(c, s, b).fingerprint() for c in ([3, 4], [4, 3]) for s in (0, 1) for b in (1, 8)}
    assert len(prints) == 8
