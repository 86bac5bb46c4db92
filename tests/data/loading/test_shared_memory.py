"""Batches on their way out of a worker."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lit_prefopt.batches import LatentPairs, Prompt
from lit_prefopt.data.latents.latent_samples import _stacked
from lit_prefopt.data.loading.shared_memory import (
    SMALL,
    TURNS,
    Carried,
    Large,
    Receiver,
    Sender,
    Small,
)


def batch(seed: int, side: int = 64) -> LatentPairs:
    """Return a batch with tensors of all kinds: large, small, turned, empty, a number."""
    torch.manual_seed(seed)
    return LatentPairs(
        mean=torch.randn(2, side, 4, 64).permute(0, 3, 1, 2),
        deviation=torch.randn(2, 2, 8, 64, 64)[:, :, ::2],
        prompt=Prompt(torch.randn(2, 3, 5).bfloat16().mT, torch.ones(2, 0)),
        texts=["one", "two"],
        seeds=torch.tensor([seed, 2**62 + 1]),
        labels=torch.tensor([1.0, 0.5]),
        weights=torch.ones(2),
        keys=["a", "b"],
        broken=("c is broken",),
        reference_error=torch.tensor(0.5),
    )


def assert_same(one: LatentPairs, other: LatentPairs) -> None:
    assert type(one) is type(other)
    for mine, theirs in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        else:
            assert mine == theirs


def test_a_batch_arrives_as_it_was_sent() -> None:
    sender, receiver = Sender(3), Receiver()
    carried = sender.send(batch(0))
    assert isinstance(carried.parts.mean, Large)
    assert isinstance(carried.parts.deviation, Large)
    assert isinstance(carried.parts.seeds, Small)
    got = receiver.receive(carried)
    assert_same(got, batch(0))
    assert got.mean.stride() == batch(0).mean.stride()
    got.weights.mul_(2)  # it may be written to
    assert got.weights.tolist() == [2, 2]


def test_rooms_are_used_again_and_batches_stay() -> None:
    sender, receiver = Sender(0), Receiver()
    got, new = [], []
    for seed in range(3 * TURNS):
        carried = sender.send(batch(seed))
        new.append(len(carried.rooms))
        got.append(receiver.receive(carried))
    assert new == [1 + 2] + [2] * (TURNS - 1) + [0] * 2 * TURNS  # and once the numbers
    for seed, one in enumerate(got):
        assert_same(one, batch(seed))
    larger = sender.send(batch(0, side=100))
    assert len(larger.rooms) == 1
    assert_same(receiver.receive(larger), batch(0, side=100))
    sender.begin()
    sender.send(batch(5))  # of an epoch that is left before this one arrives
    sender.begin()
    for seed in range(2 * TURNS):
        assert_same(receiver.receive(sender.send(batch(seed, side=100))), batch(seed, side=100))
    again = Sender(0)  # a new process of the same number
    assert_same(receiver.receive(again.send(batch(7))), batch(7))
    assert_same(receiver.receive(again.send(batch(8))), batch(8))


def test_what_was_made_in_a_room_is_not_copied() -> None:
    sender = Sender(0)
    rows = [torch.randn(SMALL), torch.randn(SMALL)]
    mean = _stacked(rows, sender.room)
    deviation = _stacked(rows[::-1], sender.room)
    carried = sender.send(batch(1)._replace(mean=mean, deviation=deviation))
    places = [carried.rooms[carried.parts[i].room].data_ptr() for i in (0, 1)]
    assert places == [mean.data_ptr(), deviation.data_ptr()]
    got = Receiver().receive(carried)
    torch.testing.assert_close(got.mean, torch.stack(rows), rtol=0, atol=0)
    torch.testing.assert_close(got.deviation, torch.stack(rows[::-1]), rtol=0, atol=0)


def test_a_batch_that_was_written_over_is_not_handed_out() -> None:
    sender, receiver = Sender(0), Receiver()
    late: list[Carried] = [sender.send(batch(seed)) for seed in range(TURNS)]
    assert_same(receiver.receive(late[0]), batch(0))
    sender.send(batch(TURNS))  # in the turn of the first one
    assert_same(receiver.receive(late[1]), batch(1))
    sender.send(batch(TURNS + 1))
    sender.send(batch(TURNS + 2))
    with pytest.raises(RuntimeError, match="written over a batch"):
        receiver.receive(late[2])
