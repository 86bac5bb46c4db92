"""Adapters that cannot learn: one warning each, and an error where nothing would be trained."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.errors import InputError


def warned(folder: str, **options: Any) -> list[str]:
    """Return the warnings about a LoRA with these options."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        StableDiffusion(folder, lora=LoRA(4, **options))
    return [str(one.message) for one in seen if "LoRA" in str(one.message)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha 0.0: .* set `--backbone.lora.alpha 4`"),
        ({"dropout": 1.0}, "dropout 1.0: .* set `--backbone.lora.dropout 0.0`"),
        ({"targets": ["to_q", "q_proj"]}, r"1 of the LoRA's 2 targets .*'q_proj'.*to_v.*to_out.0"),
    ],
)
def test_what_cannot_learn_gets_one_warning(
    options: dict[str, Any], message: str, tiny_folder: str
) -> None:
    [text] = warned(tiny_folder, **options)
    assert re.search(message, text), text


def test_what_learns_gets_none(tiny_folder: str) -> None:
    assert warned(tiny_folder) == []
    assert warned(tiny_folder, alpha=1.0, dropout=0.5, targets=["attn2.to_k", "conv1"]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_proj" * 50]}, r"1 of the LoRA's 1 targets.*'\w{40}'.*`--backbone.lora.t"),
        ({"alpha": float("nan")}, "lora.alpha is nan"),
        ({"dropout": 1.5}, "lora.dropout is 1.5; give a number from 0 up to 1"),
    ],
)
def test_what_is_no_lora_is_refused(
    options: dict[str, Any], message: str, tiny_folder: str
) -> None:
    with pytest.raises(InputError, match=message):
        StableDiffusion(tiny_folder, lora=LoRA(4, **options))


def test_a_rank_of_zero_is_refused(tiny_folder: str) -> None:
    with pytest.raises(InputError, match="lora.rank is 0; give a number from 1"):
        StableDiffusion(tiny_folder, lora=LoRA(0))
