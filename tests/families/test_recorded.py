"""What our backbones hand to their networks against the stock pipelines, by recording both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA
from tests.families.all_cases import CASES
from tests.families.cases import TEXTS, Models, Recorded, sampled
from tests.helpers.recorder import first_difference


def transformer_difference(
    record: Recorded, *, results: bool = True, atol: float | None = None
) -> str | None:
    """Return the first difference of what the transformer gets and returns."""
    return first_difference(
        record.ours, record.theirs, ["transformer"], tensors_only=True, results=results, atol=atol
    )


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of an argument, which some transformers take as lists."""
    if isinstance(value, Tensor):
        return [value]
    return [x for inner in value for x in tensors_in(inner)] if isinstance(value, list) else []


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "several"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_the_transformer_gets_bit_for_bit_what_the_stock_pipeline_gives(
    models: Models, texts: list[str], guided: bool
) -> None:
    """Every tensor that it gets and returns at every step, the VAE's latents, and the images."""
    record = sampled(models, texts, models.case.guided if guided else models.case.unguided)
    assert transformer_difference(record) is None
    difference = first_difference(
        record.ours,
        record.theirs,
        ["vae.decode"],
        results=False,
        tensors_only=True,
        atol=None if models.case.backbone.FAMILY.scale == "shift" else 1e-5,
    )
    assert difference is None
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)


def test_an_upright_image(models: Models) -> None:
    record = sampled(models, TEXTS[:2], models.case.guided, models.case.sizes[1])
    assert transformer_difference(record) is None
    assert record.images.shape == (2, 3, *models.case.sizes[1])
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)


def test_text_encoders_get_the_same_tokens(models: Models) -> None:
    record = sampled(models, TEXTS, models.case.unguided)
    assert models.backbone.texts
    for name in models.backbone.texts:
        (ours,), (theirs,) = record.ours.of(name), record.theirs.of(name)
        for argument in ("input_ids", "attention_mask"):
            mine, other = ours.arguments[argument], theirs.arguments[argument]
            assert type(mine) is type(other)
            assert mine is None or torch.equal(mine.long(), other.long())


def test_a_prompt_given_twice_has_the_same_embedding(models: Models) -> None:
    """The caller's texts are left as they are."""
    texts = [*TEXTS]
    first, second = models.backbone.embed(texts), models.backbone.embed(texts)
    assert texts == TEXTS
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])


def test_dtypes_in_bfloat16(family: str, folder: Path) -> None:
    """The first call is equal in every bit, and the precisions of all calls are.

    Later ones are not, since stock pipelines keep their latents in bfloat16 between the steps.
    """
    case = CASES[family]
    models = case.models(folder, dtype="bfloat16", lora=LoRA(4))
    # `to` would round the frequencies of a language model's rotary embedding as well
    models = models._replace(stock=case.load(folder, torch_dtype=torch.bfloat16))
    record = sampled(models, TEXTS[:2], case.guided)
    ours, theirs = record.ours.of("transformer"), record.theirs.of("transformer")
    for mine, other in zip(ours, theirs, strict=True):
        kinds = [
            [(name, x.dtype, x.shape) for name, value in call.items() for x in tensors_in(value)]
            for call in (mine.arguments, other.arguments)
        ]
        assert kinds[0] == kinds[1]
        assert torch.equal(mine.arguments[case.time], other.arguments[case.time])
    record.ours.calls, record.theirs.calls = ours[:1], theirs[:1]
    assert transformer_difference(record, results=False) is None
