"""Two real processes: disjoint samples, and a resume from two ranks to one and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_prefopt.data.order.plan import Plan
from tests.helpers.pair_data import data, seen_keys, train
from tests.helpers.runs import TORCHRUN, finished, launch

pytestmark = pytest.mark.slow


def train_on_two(*arguments: object) -> list[dict]:
    """Run two_ranks_data.py through torchrun and return what each rank saw."""
    process = launch(list(map(str, arguments)), [*TORCHRUN, "-m", "tests.helpers.two_ranks_data"])
    said = finished(process)
    assert process.returncode == 0, said
    output = Path(str(arguments[1]))
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


def merged(ranks: list[dict], epoch: int) -> list[str]:
    """Return the global order of an epoch: rank 0's two samples, rank 1's two, and so on."""
    mine, other = ([k for e, k in rank["trained"] if e == epoch] for rank in ranks)
    assert len(mine) == len(other)
    return [k for at in range(0, len(mine), 2) for k in mine[at : at + 2] + other[at : at + 2]]


def test_two_ranks_and_back(make_shards, tmp_path):
    folder = make_shards(23)
    orders = [
        [f"pairs-{s:06d}.tar/{6 * s + n:09d}" for s, n in Plan([6, 6, 6, 5], 1).slice(e, 0, 23)]
        for e in range(2)
    ]
    both = train_on_two(folder, tmp_path / "two")
    assert [merged(both, epoch) for epoch in range(2)] == [order[:20] for order in orders]
    assert not set(both[0]["held_out"]) & set(both[1]["held_out"])

    # three steps on two ranks, the rest of the epoch on one
    module = data(folder, batch_size=2)
    alone = train(
        module,
        tmp_path / "one",
        tmp_path / "two/step=3.ckpt",
        accumulate_grad_batches=1,
        max_epochs=2,
    )
    first = [key for epoch, key in seen_keys(alone) if epoch == 0]
    assert first == orders[0][12:22]

    # one more on one rank, the rest of the epoch on two
    again = train_on_two(folder, tmp_path / "back", tmp_path / "one/step=4.ckpt")
    assert merged(again, 0) == orders[0][14:22]
    assert merged(again, 1) == orders[1][:20]
