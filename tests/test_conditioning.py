"""Embedded prompts: tensors and ragged rows by name, and what becomes of parts that are missing."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.precision import HalfPrecision
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from lit_prefopt.batches import Steps
from lit_prefopt.conditioning import RESERVED, Prompt, Ragged
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.errors import InputError
from lit_prefopt.estimate.memory import first_row
from lit_prefopt.record_rows import concatenate, select_rows
from tests.helpers.ragged import RaggedBackbone

LENGTHS = (3, 0, 1, 4)


def ragged(*lengths: int, width: int = 2, start: int = 0) -> Ragged:
    """Return rows whose numbers all differ."""
    values = torch.arange(sum(lengths) * width).view(-1, width).float() + start
    return Ragged(values, lengths)


def same(one: Ragged, other: Ragged) -> bool:
    return one.lengths == other.lengths and torch.equal(one.values, other.values)


def of_rows(rows: list[Tensor]) -> list[list]:
    return [row.tolist() for row in rows]


def prompt(*lengths: int, start: int = 0) -> Prompt:
    count = len(lengths)
    hidden = torch.arange(count * 6).view(count, 2, 3).float() + start
    return Prompt({"caption": ragged(*lengths, start=start), "hidden": hidden})


# Ragged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (0,), (0, 0), (2, 2, 2)])
def test_rows_come_back_as_they_were(lengths: tuple[int, ...]) -> None:
    rows = [torch.randn(n, 3) for n in lengths]
    one = Ragged.from_rows(rows)
    assert len(one) == len(lengths)
    assert one.lengths == lengths
    assert of_rows([*one]) == of_rows(rows)
    padded, mask = one.padded()
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [*lengths]
    assert [row[seen].tolist() for row, seen in zip(padded, mask, strict=True)] == of_rows(rows)
    assert (padded[~mask] == 0).all()


def test_no_rows_at_all() -> None:
    none = ragged(*LENGTHS).rows(torch.tensor([], dtype=torch.int64))
    assert (len(none), none.values.shape) == (0, (0, 2))
    padded, mask = none.padded()
    assert (padded.shape, mask.shape) == ((0, 0, 2), (0, 0))
    assert same(Ragged.cat([none, ragged(1, 2), none]), ragged(1, 2))


def test_rows_are_repeated_chosen_and_joined() -> None:
    one, rows = ragged(*LENGTHS), [*ragged(*LENGTHS)]
    assert one.repeat(2).lengths == (3, 3, 0, 0, 1, 1, 4, 4)
    assert of_rows([*one.repeat(2)]) == of_rows([row for row in rows for _ in range(2)])
    for which in ([3, 1, 0, 3], [1], [2, 2]):
        chosen = one.rows(torch.tensor(which))
        assert of_rows([*chosen]) == of_rows([rows[n] for n in which])
    for which in (slice(1, 3), slice(2), slice(2, None), slice(-1, None), slice(3, 1)):
        part = one.rows(which)
        assert of_rows([*part]) == of_rows(rows[which])
        if len(part.values):
            storages = {x.untyped_storage().data_ptr() for x in (part.values, one.values)}
            assert len(storages) == 1
    assert of_rows([*one.rows(slice(None, None, 2))]) == of_rows(rows[::2])
    both = Ragged.cat([one, ragged(2, start=100)])
    assert both.lengths == (*LENGTHS, 2)
    assert of_rows([*both]) == of_rows([*rows, *ragged(2, start=100)])


def test_rows_of_numbers_without_a_width() -> None:
    ids = Ragged.from_rows([torch.tensor([7, 8]), torch.tensor([9])])
    padded, mask = ids.padded()
    assert padded.tolist() == [[7, 8], [9, 0]]
    assert mask.tolist() == [[True, True], [True, False]]
    assert ids.map(lambda x: x + 1).values.tolist() == [8, 9, 10]


def test_gradients_reach_the_rows_through_the_padding() -> None:
    values = torch.randn(4, 2, requires_grad=True)
    rows, mask = Ragged(values, (1, 3)).repeat(2).padded()
    (rows * mask[..., None]).sum().backward()
    assert torch.equal(values.grad, torch.full((4, 2), 2.0))


# Prompt ------------------------------------------------------------------------------------------


def test_parts_by_name() -> None:
    one = prompt(*LENGTHS)
    assert len(one) == 4
    assert ("caption" in one, "pooled" in one) == (True, False)
    assert one["hidden"].shape == (4, 2, 3)
    assert same(one.ragged("caption"), ragged(*LENGTHS))
    assert one.get("pooled") is None
    assert torch.equal(one.get("hidden"), one["hidden"])
    assert one.device.type == "cpu"
    assert one.widths() == {"caption": 2, "hidden": 3}
    with pytest.raises(InputError, match="no `pooled`, which the denoiser needs, but only caption"):
        one["pooled"]
    with pytest.raises(InputError, match=r"unequal lengths: read it as `prompt.ragged\('caption'"):
        one["caption"]
    with pytest.raises(InputError, match=r"one length: read it as `prompt\['hidden'\]`"):
        one.ragged("hidden")


def test_all_parts_follow_the_rows() -> None:
    frames, scale = torch.arange(24).view(4, 6), torch.arange(4.0)
    one = prompt(*LENGTHS).replace(frames=frames, guidance=scale)
    twice = one.repeat(2)
    assert (len(twice), twice.ragged("caption").lengths) == (8, (3, 3, 0, 0, 1, 1, 4, 4))
    assert torch.equal(twice["hidden"], one["hidden"].repeat_interleave(2, 0))
    assert torch.equal(twice.frames, frames.repeat_interleave(2, 0))
    assert twice.guidance.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    which = torch.tensor([2, 0])
    some = one.rows(which)
    assert (some.ragged("caption").lengths, some.guidance.tolist()) == ((1, 3), [2, 0])
    assert torch.equal(some.frames, frames[which])
    rows = [one.row(n) for n in range(4)]
    assert [len(row["caption"]) for row in rows] == [*LENGTHS]
    again = Prompt.from_rows(rows, one)
    assert same(again.ragged("caption"), one.ragged("caption"))
    assert torch.equal(again["hidden"], one["hidden"])
    joined = one.prepend(some)
    assert joined.ragged("caption").lengths == (1, 3, *LENGTHS)
    assert torch.equal(joined["hidden"], torch.cat([some["hidden"], one["hidden"]]))
    assert joined.guidance.tolist() == [2, 0, 0, 1, 2, 3]
    assert (joined.replace(frames=None).frames, joined.frames.shape) == (None, (6, 6))


@pytest.mark.parametrize("framed", [False, True])
def test_it_comes_back_from_a_file(framed: bool, tmp_path: Path) -> None:
    one = prompt(*LENGTHS)
    if framed:
        one = one.replace(frames=torch.arange(24).view(4, 6), guidance=torch.rand(4))
    flat = one.tensors()
    assert flat["caption.lengths"].tolist() == [*LENGTHS]
    save_file(flat, tmp_path / "prompt.safetensors")
    again = Prompt.from_tensors(load_file(tmp_path / "prompt.safetensors"))
    assert [*sorted(again.text)] == ["caption", "hidden"]
    assert same(again.ragged("caption"), one.ragged("caption"))
    for name in ("frames", "guidance"):
        before, after = getattr(one, name), getattr(again, name)
        assert (before is None) == (after is None) == (not framed)
        assert before is None or torch.equal(before, after)


def test_it_travels_with_a_batch() -> None:
    """Between processes, to a device, in another precision, and as fake tensors."""
    one = prompt(*LENGTHS).replace(guidance=torch.rand(4))
    sent = pickle.loads(pickle.dumps(one))
    assert same(sent.ragged("caption"), one.ragged("caption"))
    moved = move_data_to_device((one, torch.zeros(1)), torch.device("meta"))[0]
    assert {moved.device.type, moved["hidden"].device.type, moved.guidance.device.type} == {"meta"}
    assert moved.ragged("caption").lengths == LENGTHS
    assert one.map(lambda x: x.double()).ragged("caption").dtype == torch.float64
    half = HalfPrecision("bf16-true").convert_input(
        steps(2, 1)._replace(prompt=prompt(2, 1).replace(frames=torch.zeros(2, 6).long()))
    )
    assert (half.prompt["hidden"].dtype, half.prompt.frames.dtype) == (torch.bfloat16, torch.int64)
    assert half.prompt.ragged("caption").dtype == torch.bfloat16
    assert half.prompt.ragged("caption").lengths == (2, 1)
    with FakeTensorMode() as mode:
        ghost = tree_map_only(Tensor, mode.from_tensor, one)
        rows, mask = ghost.repeat(2).ragged("caption").padded()
        assert all(isinstance(x, FakeTensor) for x in (rows, mask, ghost.guidance))
        assert (rows.shape, mask.shape) == ((8, 4, 2), (8, 4))
    assert not isinstance(one["hidden"], FakeTensor)


@pytest.mark.parametrize("name", [*RESERVED, "caption.values"])
def test_names_of_other_tensors_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="A text tensor cannot be called"):
        Prompt({name: torch.zeros(1, 2)})


def test_parts_that_do_not_fit_each_other_are_named() -> None:
    plain, masked = (
        {"hidden": torch.zeros(2, 3, 4)} | more for more in ({}, {"mask": torch.ones(2, 3)})
    )
    for first, second in ((plain, masked), (masked, plain)):
        with pytest.raises(
            InputError, match="Some of the prompts have `mask` and others have none"
        ):
            Prompt(first).prepend(Prompt(second))
    for name in ("frames", "guidance"):
        with pytest.raises(InputError, match=f"have `{name}` and others have none"):
            Prompt(plain).prepend(Prompt(plain, **{name: torch.zeros(2)}))
    with pytest.raises(InputError, match=r"shape \(3, 4\) in some of the prompts and \(5, 4\)"):
        Prompt(plain).prepend(Prompt({"hidden": torch.zeros(2, 5, 4)}))
    with pytest.raises(InputError, match="`hidden` is ragged in some"):
        Prompt(plain).prepend(Prompt({"hidden": ragged(1, width=4)}))
    with pytest.raises(InputError, match=r"different numbers of rows \(hidden 2, mask 3\)"):
        Prompt(plain | {"mask": torch.ones(3, 3)})
    with pytest.raises(InputError, match="needs a text tensor at least"):
        Prompt({})


# Where prompts are used --------------------------------------------------------------------------


def steps(*lengths: int) -> Steps:
    count = len(lengths)
    numbers = torch.arange(count)
    one = torch.ones(count)
    parts = torch.randn(count, 2, 1, 4, 2, 2)
    times = torch.ones(count, 1, dtype=torch.int64)
    return Steps(parts, parts, times, times, prompt(*lengths), numbers, one, one)


def test_records_are_joined_and_cut_with_their_prompts() -> None:
    both = concatenate([steps(2, 0), steps(1, 5, 3)])
    assert both.prompt.ragged("caption").lengths == (2, 0, 1, 5, 3)
    assert len(both.parents) == 5
    some = select_rows(both, torch.tensor([3, 0]))
    assert some.prompt.ragged("caption").lengths == (5, 2)
    assert some.seeds.tolist() == [1, 0]
    first = first_row(both)
    assert (len(first.prompt), len(first.seeds)) == (1, 1)
    assert first.prompt.ragged("caption").lengths == (2,)


def test_guidance_joins_empty_rows_and_prompts_of_any_length() -> None:
    backbone = RaggedBackbone()
    texts = ["a", "the red fox jumps", ""]
    latents, t = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 999])
    own = backbone.predict(latents, t, backbone.embed(texts))
    empty = backbone.predict(latents, t, backbone.embed(["", "", ""]))
    assert backbone.empty.ragged("caption").lengths == (0,)
    mixed = guided(backbone, latents, t, backbone.embed(texts), 3.0)
    torch.testing.assert_close(mixed, empty + 3 * (own - empty))
    assert not torch.allclose(mixed[0], own[0], atol=1e-3)
    alone = torch.cat(
        [
            backbone.predict(latents[i : i + 1], t[i : i + 1], backbone.embed([texts[i]]))
            for i in range(3)
        ]
    )
    torch.testing.assert_close(own, alone)  # whatever the batch pads them to
