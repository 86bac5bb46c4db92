"""Concatenate, select and name the tensors of records with one row per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lit_prefopt.batches import Pairs, Steps, Trajectories
from lit_prefopt.conditioning import Prompt

Rows = TypeVar("Rows", Steps, Trajectories, Pairs)
"""A record with one row per sample in each tensor."""


PROMPT = "prompt."  # start of the flat names of a prompt's tensors


def tensors_by_name(record: Steps | Trajectories | Pairs) -> dict[str, Tensor]:
    """Return a record's tensors by name, those of its prompt as `prompt.NAME`."""
    prompt = {PROMPT + name: value for name, value in record.prompt.tensors().items()}
    return {**_fields(record), **prompt}


def record_from_tensors(kind: type[Rows], tensors: Mapping[str, Tensor]) -> Rows:
    """Return the record of these tensors: the inverse of `tensors_by_name`."""
    prompt = {k.removeprefix(PROMPT): v for k, v in tensors.items() if k.startswith(PROMPT)}
    others = {k: v for k, v in tensors.items() if not k.startswith(PROMPT)}
    return kind(prompt=Prompt.from_tensors(prompt), **others)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Concatenate records along their rows."""
    named = [_fields(part) for part in parts]
    others = {name: torch.cat([one[name] for one in named]) for name in named[0]}
    return type(parts[0])(prompt=Prompt.cat([part.prompt for part in parts]), **others)


def select_rows(record: Rows, which: Tensor | slice) -> Rows:
    """Return some rows; a slice shares the record's memory."""
    others = {name: value[which] for name, value in _fields(record).items()}
    return type(record)(prompt=record.prompt.rows(which), **others)


def _fields(record: Steps | Trajectories | Pairs) -> dict[str, Tensor]:
    named = record._asdict().items()
    return {name: value for name, value in named if name != "prompt" and value is not None}
