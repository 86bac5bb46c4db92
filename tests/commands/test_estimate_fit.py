"""`lit-prefopt estimate --fit`: the options with which a recipe fits a card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from lit_prefopt.commands.estimate import estimate
from lit_prefopt.commands.estimate_fit import fit_card, parse_memory
from lit_prefopt.errors import InputError
from lit_prefopt.estimate.memory import FITS, GIB


def test_a_card_that_is_large_enough_needs_no_option(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["estimate", *recipe, "--fit", "24GiB"])
    said = capsys.readouterr().out
    assert "The recipe fits as it is." in said
    assert "of the 21.60 GiB that it may use" in said  # 0.9 of the card
    assert not (tmp_path / "run").exists()


def test_needs_are_those_of_a_run(recipe: list[str]) -> None:
    """Without weights, the sizes are those of the recipe whose weights are loaded and trained."""
    found, measured = fit_card(recipe, GIB), estimate([*recipe, "--steps", "1"])
    [trial] = found.trials
    assert trial.parts.named() == measured.parts
    assert trial.pair_flops == round(measured.pair_teraflops * 1e12)
    assert found.kept == measured.kept > 0


def test_a_smaller_card_needs_options(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    needed = fit_card(recipe, GIB).needed
    found = fit_card(recipe, int(0.9 * needed / FITS))
    assert found.options == "--data.batch_size 1 --trainer.accumulate_grad_batches 4"
    assert found.needed <= found.limit < needed
    assert len(found.trials) > 1
    assert found.options in capsys.readouterr().out
    again = fit_card([*recipe, *found.options.split()], GIB)
    assert again.needed == found.needed


def test_a_card_too_small_for_every_set_is_refused(recipe: list[str]) -> None:
    with pytest.raises(InputError) as error:
        fit_card([*recipe, "--backbone.lora.rank", "2"], 1_000_000)
    said = str(error.value)
    assert said.startswith("No set of options fits the recipe to a card of 0.00 GiB: with the")
    assert "checkpointing, one pair per batch, cached encodings, base in nf4" in said
    assert "--data CachedPairs --data.shards FOLDER --backbone.encoders false" in said
    assert re.search(r"needs \d\.\d\d GiB, \d\.\d\d GiB more than the 90% of the card", said)


def test_roll_outs_are_refused(recipe: list[str]) -> None:
    with pytest.raises(InputError, match=r"computes a step on stored pairs.*without it"):
        fit_card(["--config", "toy-spo"], GIB)


def test_sizes() -> None:
    sizes = {"24GiB": 24 * GIB, "24": 24 * GIB, "1.5 gib": 3 * GIB // 2, "80GB": 80 * 10**9}
    assert {text: parse_memory(text) for text in sizes} == sizes
    for text in ("much", "0", "-3", "24 TB", ""):
        with pytest.raises(InputError, match="such as `--fit 24GiB`"):
            parse_memory(text)


def test_a_size_that_is_missing_is_refused(recipe: list[str]) -> None:
    with pytest.raises(SystemExit, match="--fit needs the card's memory"):
        main(["estimate", *recipe, "--fit"])
