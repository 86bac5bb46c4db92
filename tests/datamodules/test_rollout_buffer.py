"""What is kept of earlier collections: the newest rows, each once, and in any round."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_prefopt.batches import Steps, Trajectories
from lit_prefopt.conditioning import Prompt, Ragged
from lit_prefopt.datamodules.rollout_buffer import RolloutBuffer
from lit_prefopt.record_rows import select_rows


def trajectories(*numbers: int) -> Trajectories:
    """Rows that say their number everywhere."""
    value = torch.tensor(numbers)
    return Trajectories(
        value.view(-1, 1, 1, 1, 1, 1).expand(-1, 3, 5, 4, 2, 2).to(torch.bfloat16),
        torch.arange(5, 0, -1).expand(len(value), -1).contiguous(),
        torch.tensor([3.0, 2.0, 1.0]).expand(len(value), -1).contiguous(),
        Prompt({"hidden": value.view(-1, 1, 1).float()}),
        value,
    )


def draw(one: Trajectories, which: Tensor, seeds: Tensor) -> Steps:
    sides, numbers = torch.tensor([[0, 2]]), torch.tensor([[1]])
    return one.steps(which, sides.expand(len(which), -1), numbers.expand(len(which), -1), seeds)


def test_the_oldest_go_first() -> None:
    buffer = RolloutBuffer(Trajectories)
    for numbers in ([0, 1, 2], [3, 4], [5, 6]):
        buffer.add(trajectories(*numbers), most=5)
    assert [one.seeds.tolist() for one in buffer.rounds] == [[2], [3, 4], [5, 6]]
    buffer.add(trajectories(7, 8, 9, 10), most=5)
    assert [one.seeds.tolist() for one in buffer.rounds] == [[6], [7, 8, 9, 10]]


def test_a_batch_takes_rows_of_all_rounds_in_their_order() -> None:
    buffer = RolloutBuffer(Trajectories)
    for numbers in ([0, 1, 2], [3], [4, 5, 6]):
        buffer.add(trajectories(*numbers))
    which = torch.tensor([6, 0, 3, 3, 5, 1])
    batch = buffer.batch(which, which + 100, draw)
    assert batch.prompt["hidden"].flatten().tolist() == which.tolist()
    assert batch.parents[:, 0, 0, 0, 0, 0].tolist() == which.tolist()
    assert batch.seeds.tolist() == (which + 100).tolist()
    assert batch.parents.dtype == torch.float32


def test_it_comes_back_from_its_tensors() -> None:
    buffer, again = RolloutBuffer(Trajectories), RolloutBuffer(Trajectories)
    for numbers in ([0, 1, 2], [3, 4]):
        buffer.add(trajectories(*numbers), most=4)
    again.fill(buffer.tensors())
    which = torch.tensor([3, 0])
    assert torch.equal(
        again.batch(which, which, draw).parents, buffer.batch(which, which, draw).parents
    )
    assert [one.seeds.tolist() for one in again.rounds] == [[1, 2], [3, 4]]


def test_prompts_of_unequal_lengths_come_back_from_a_file(tmp_path: Path) -> None:
    """Row n has n words, so the row of no words is in the file as well."""
    buffer, again = RolloutBuffer(Trajectories), RolloutBuffer(Trajectories)
    for numbers in ([2, 0, 1], [3], [0, 4, 1]):
        words = Ragged(torch.arange(sum(numbers) * 2.0).view(-1, 2), tuple(numbers))
        one = trajectories(*numbers)
        text = {"words": words, "mask": torch.tensor(numbers)[:, None]}
        buffer.add(one._replace(prompt=Prompt(text)), most=6)
    assert [one.prompt.ragged("words").lengths for one in buffer.rounds] == [
        (0, 1),
        (3,),
        (0, 4, 1),
    ]
    save_file(buffer.tensors(), tmp_path / "buffer.safetensors")
    again.fill(load_file(tmp_path / "buffer.safetensors"))
    which = torch.tensor([4, 0, 2, 1, 2])
    before, after = (b.batch(which, which, draw) for b in (buffer, again))
    assert before.prompt.ragged("words").lengths == (4, 0, 3, 1, 3)
    assert before.prompt["mask"].flatten().tolist() == [4, 0, 3, 1, 3]
    own, loaded = (b.prompt.ragged("words") for b in (before, after))
    assert torch.equal(own.values, loaded.values)
    assert loaded.lengths == own.lengths


def test_every_state_lies_in_memory_once() -> None:
    buffer = RolloutBuffer(Trajectories)
    one = trajectories(*range(8))
    buffer.add(one)
    states = buffer.rounds[0].states
    assert states.nbytes == 8 * 3 * 5 * 4 * 2 * 2 * 2
    part = select_rows(buffer.rounds[0], slice(3, None))
    assert part.states.untyped_storage().data_ptr() == states.untyped_storage().data_ptr()
