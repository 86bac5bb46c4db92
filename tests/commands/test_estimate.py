"""`lit-prefopt estimate`: the numbers hang together, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_prefopt.cli import main
from lit_prefopt.commands.estimate import checkpointing_advice, estimate
from lit_prefopt.errors import InputError
from lit_prefopt.estimate.memory import GIB
from lit_prefopt.estimate.pace import BatchTiming, Pace, Recomputation
from lit_prefopt.utils.device import is_out_of_memory, matmul_dtype


def test_an_estimate_of_a_recipe(recipe: list[str], tmp_path: Path) -> None:
    few = ["--trainer.accumulate_grad_batches", "6", "--trainer.max_steps", "500", "--steps=2"]
    found = estimate([*recipe, *few])
    assert (found.steps, found.step_pairs, found.ranks) == (500, 6 * 4, 1)
    assert found.pairs_per_second * found.step_seconds == pytest.approx(24)
    epochs = 500 * 6 / 6  # of six batches each
    seconds = 500 * found.step_seconds + epochs * found.epoch_seconds
    assert found.hours * 3600 == pytest.approx(seconds)
    reached = found.pair_teraflops * found.pairs_per_second
    assert found.utilisation * found.matmul == pytest.approx(reached)
    assert 0 < found.utilisation < 1
    assert 0 <= found.waiting < 1
    assert set(found.parts) >= {"trained weights", "gradients", "optimizer states", "activations"}
    assert found.peak > sum(found.parts.values())
    assert not (tmp_path / "run").exists()


def test_the_command_prints_it(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", *recipe, "--steps", "1", "--backbone.lora.rank", "2"])
    said = capsys.readouterr().out
    for words in ("pairs per second", "peak memory", "share of the matmul peak", "steps"):
        assert words in said, words
    assert "the denoiser's frozen weights" in said


def test_a_flow_transformer_is_estimated(recipe: list[str], tiny_sd35_folder: str) -> None:
    family = ["--backbone", "StableDiffusion3", "--backbone.pretrained", tiny_sd35_folder]
    found = estimate([*recipe, *family, "--backbone.lora.rank", "2", "--steps", "1"])
    assert {"the denoiser's frozen weights", "text encoder 3", "vae"} <= set(found.parts)
    assert 0 < found.utilisation < 1
    assert found.peak > sum(found.parts.values())


@pytest.mark.parametrize("steps", [["--steps"], ["--steps", "few"], ["--steps", "0"]])
def test_steps_that_are_none_are_refused(recipe: list[str], steps: list[str]) -> None:
    with pytest.raises(InputError, match="steps"):
        estimate([*recipe, *steps])


def test_more_steps_than_the_recipe_has_are_refused(recipe: list[str]) -> None:
    with pytest.raises(InputError, match="lower `--steps`"):
        estimate([*recipe, "--trainer.max_steps", "1", "--steps", "1"])


def test_what_a_step_takes_with_all_the_batches_that_it_accumulates() -> None:
    pace = Pace(2)
    pace.accumulated = 10
    inner, last = BatchTiming(0.1, 1.0, False, False), BatchTiming(0.1, 1.5, True, False)
    slow = BatchTiming(7.0, 30.0, False, True)  # the first of an epoch, in which much is set up
    pace.batches = [slow, last, inner, last, inner, last]
    assert pace.timed == [inner, last, inner, last]
    assert pace.step_seconds == pytest.approx(9 * 1.0 + 1.5 + 10 * 0.1)
    assert pace.epoch_seconds == 7.0
    pace.flops, pace.matmul = 10**12, 2.0
    assert pace.utilisation == pytest.approx(10 / 11.5 / 2.0)


def test_shortages_are_told_from_other_failures() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_precisions_have_a_dtype() -> None:
    named = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}
    assert {name: matmul_dtype(name) for name in named} == named


def measured(checkpointed: bool, peak: int) -> Pace:
    pace = Pace(1)
    pace.checkpointed, pace.peak_bytes, pace.flops = checkpointed, peak * GIB, 300
    pace.recomputation = Recomputation(4 * GIB, 100)
    return pace


def test_checkpointing_is_advised_both_ways() -> None:
    """10 + 4 GiB fit into 24 and not into 15; a quarter of 400 FLOPs is recomputed."""
    off = checkpointing_advice(measured(True, 10), 24 * GIB)
    assert "14.00 of 24.00 GiB, and 25%" in off
    assert "`--backbone.gradient_checkpointing false`" in off
    assert checkpointing_advice(measured(True, 10), 15 * GIB) == ""
    on = checkpointing_advice(measured(False, 23), 24 * GIB)
    assert "save about 4.00 of 24.00 GiB, for 33% more FLOPs" in on
    assert "`--backbone.gradient_checkpointing true`" in on
    assert checkpointing_advice(measured(False, 10), 24 * GIB) == ""
    assert checkpointing_advice(measured(True, 10), 0) == ""  # a device of unknown size


def test_an_estimate_advises_against_needless_checkpointing(recipe: list[str]) -> None:
    """It runs past the end of an epoch, where early stopping would miss the held-out loss."""
    more = ["--steps=6", "--backbone.gradient_checkpointing", "true", "--trainer.max_steps", "20"]
    more += ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    found = estimate([*recipe, *more, "--trainer.callbacks.check_on_train_epoch_end", "true"])
    assert "Gradient checkpointing can be disabled" in found.advice
