"""SIGKILL at any moment: the run goes on to the same weights, to the last bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from tests.helpers.recipes import small_recipe
from tests.helpers.runs import assert_same_end, lines, start
from tests.helpers.tiny_toy_flow import flow_twin

STEPS = 18
EXACT = [
    *("--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", str(STEPS)),
    *("--trainer.val_check_interval", "5", "--data.workers", "2", "--data.batch_size", "3"),
    *("--data.caption_dropout", "0.2", "--data.flip", "true", "--data.crop", "random"),
    *("--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.every_n_train_steps", "1"),
    *("--trainer.callbacks.save_last", "true", "--trainer.callbacks.filename", "{step}"),
    *("--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"),
    *("--model.optimizer.schedule", "cosine", "--model.optimizer.warmup_steps", "3"),
]
LORA = ["--backbone.lora.rank", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_killed_five_times_it_ends_in_the_same_weights(
    recipe: list[str], extra: list[str], tmp_path: Path
) -> None:
    killed_to_the_end(recipe, extra, tmp_path, kills=5)


@pytest.mark.slow
def test_flow_dpo_killed_three_times_ends_in_the_same_weights(
    toy_flow_folder: str, shards: str, tmp_path: Path
) -> None:
    recipe = small_recipe(toy_flow_folder, shards, tmp_path / "run", "toy-flow-diffusion-dpo")
    killed_to_the_end(recipe, [*flow_twin(toy_flow_folder), *LORA], tmp_path, kills=3)


def killed_to_the_end(recipe: list[str], extra: list[str], tmp_path: Path, kills: int) -> None:
    """Check that a recipe ends alike, whether it is killed between and within its steps or not."""
    arguments = [*recipe, *EXACT, *extra]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(["fit", *arguments, "--trainer.default_root_dir", str(whole)])
    draws = random.Random(len(extra))
    arguments += ["--trainer.default_root_dir", str(parts)]
    beat = tmp_path / "beat"
    slow = ["--trainer.callbacks+", "tests.helpers.runs.Beat"]
    slow += ["--trainer.callbacks.path", str(beat)]
    slow += ["--trainer.callbacks.pause", "0.05"]
    codes = []
    for _ in range(kills):
        begun = any((parts / "checkpoints").glob("*.ckpt"))
        resume = ["--ckpt_path", "last"] if begun else []
        beat.unlink(missing_ok=True)
        process = start([*arguments, *slow, *resume])
        batches = draws.randrange(3, 9)  # a third one follows the first checkpoint
        while len(lines(beat)) < batches and process.poll() is None:
            time.sleep(0.005)
        # somewhere in the next batch and whatever it writes
        time.sleep(draws.uniform(0.0, 0.2))
        process.kill()
        said = process.communicate()[0]
        codes.append(process.returncode)
        assert codes[-1] in (-9, 0), said
    assert codes.count(-9) >= kills - 1  # a fast machine may reach the end before
    main(["fit", *arguments, "--ckpt_path", "last"])
    assert_same_end(whole, parts)
    left = [path.name for path in (parts / "checkpoints").glob(".*")]
    assert left == []
