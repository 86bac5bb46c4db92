"""SIGKILL in a collection and between two: the run ends in the same weights, to the last bit."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from lit_prefopt.cli import main
from tests.helpers.collecting import TWO, spo, write_prompts
from tests.helpers.runs import TWO_RANKS, assert_same_end, finished, kill, lines, start, wait_until

pytestmark = pytest.mark.slow
BATCHES = 4  # of a collection; two of them make a step, and every step a checkpoint
PAUSE = 0.3  # seconds after each call of the judge and at the beginning of each batch
EXACT = [
    *("--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "6"),
    *("--trainer.val_check_interval", "3", "--data.validation_pairs", "4"),
    *("--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.every_n_train_steps", "1"),
    *("--trainer.callbacks.save_last", "true", "--trainer.callbacks.filename", "{step}"),
    *("--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"),
    *("--model.optimizer.schedule", "cosine", "--model.optimizer.warmup_steps", "3"),
]


class Run:
    """A run of three collections in a folder of its own, which can be watched and killed."""

    def __init__(
        self, pipeline: str, folder: Path, *more: str, ranks: int = 1, flow: bool = False
    ) -> None:
        folder.mkdir()
        prompts = write_prompts(folder / "prompts.txt", opens=9, shut=9)
        self.root, self.seen = folder / "run", folder / "judged-0.jsonl"
        self.arguments = [*spo(pipeline, prompts, self.root, flow=flow), *EXACT, *more]
        self.options = {"command": TWO_RANKS} if ranks == 2 else {}
        self.arguments += TWO if ranks == 2 else []

    def begin(self, *more: str) -> subprocess.Popen[str]:
        """Start it, or go on from its last checkpoint."""
        self.seen.unlink(missing_ok=True)
        return start([*self.arguments, *more, *self.resume()], **self.options)

    def resume(self) -> list[str]:
        """Return the arguments that resume from the last checkpoint, if there is one."""
        begun = (self.root / "checkpoints" / "last.ckpt").exists()
        return ["--ckpt_path", "last"] if begun else []

    def to_the_end(self) -> None:
        """Run it to its end: on one rank in this process, which saves the imports of another."""
        if not self.options:
            main(["fit", *self.arguments, *self.resume()])
            return
        process = self.begin()
        said = finished(process)
        assert process.returncode == 0, said

    def kill(self, batch: int, calls: int, draws: random.Random) -> list[str]:
        """Kill it a little after a batch began and the judge was called so often after that.

        Returns:
            What it did since it was started, one line for each batch and each call of the judge.
        """
        slowly = ["--trainer.callbacks+", "tests.helpers.runs.Beat"]
        slowly += ["--model.judge.pause", str(PAUSE)]
        slowly += ["--trainer.callbacks.path", str(self.seen)]  # beside the calls, in their order
        slowly += ["--trainer.callbacks.pause", str(PAUSE)]
        process = self.begin(*slowly)
        wait_until(lambda: _calls_after(batch, lines(self.seen)) >= calls, process)
        time.sleep(draws.uniform(0, PAUSE))
        kill(process)
        said = process.communicate()[0]
        assert process.returncode == -9, said
        return lines(self.seen)


def _calls_after(batch: int, seen: list[str]) -> int:
    """Return how often the judge was called after a batch (-1: the start), -1 before that."""
    if batch < 0:
        return len(seen)
    beat = f"batch {batch}"
    return len(seen) - 1 - seen.index(beat) if beat in seen else -1


FULL = ["--backbone.lora", "null"]


def test_spo_on_a_flow_killed_in_a_collection_and_in_the_training(
    toy_flow_folder: str, shards: str, tmp_path: Path
) -> None:
    whole, parts = (
        Run(toy_flow_folder, tmp_path / name, "--data.validation", shards, flow=True)
        for name in ("whole", "parts")
    )
    whole.to_the_end()
    draws = random.Random(0)
    assert parts.kill(2, 0, draws)[-1].startswith("batch")
    assert parts.kill(BATCHES - 1, draws.randint(1, 6), draws)[-1].startswith("[")
    parts.to_the_end()
    assert_same_end(whole.root, parts.root)


@pytest.mark.parametrize("extra", [[], FULL], ids=["lora", "full"])
def test_killed_in_every_collection(
    extra: list[str], tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    extra = ["--data.validation", shards, *extra]
    whole, parts = (Run(tiny_folder, tmp_path / name, *extra) for name in ("whole", "parts"))
    whole.to_the_end()
    draws = random.Random(len(extra))
    for number in range(3):
        last = number * BATCHES - 1
        seen = parts.kill(last, draws.randint(1, 6), draws)
        assert seen[-1].startswith("[")  # the judge's; no batch of this collection has begun
        assert f"batch {last + 1}" not in seen
    parts.to_the_end()
    assert_same_end(whole.root, parts.root)


@pytest.mark.parametrize("extra", [[], FULL], ids=["lora", "full"])
def test_killed_in_the_training_after_every_collection(
    extra: list[str], tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    extra = ["--data.validation", shards, *extra]
    whole, parts = (Run(tiny_folder, tmp_path / name, *extra) for name in ("whole", "parts"))
    whole.to_the_end()
    draws = random.Random(len(extra))
    amid = []
    for number in range(3):
        batch = number * BATCHES + draws.choice([1, 2])
        seen = parts.kill(batch, 0, draws)
        assert seen[-1].startswith("batch")
        if amid and amid[-1]:
            # what was collected before the kill is learned from, not collected again
            # (a validation that was due at the checkpoint's step is repeated first)
            first = next(line for line in seen if line != "validation")
            assert first == f"batch {(number - 1) * BATCHES + 2}"
        amid.append(batch % BATCHES == 2)  # after the collection's first step
    assert any(amid[:-1])
    parts.to_the_end()
    assert_same_end(whole.root, parts.root)


def test_two_ranks_killed_in_a_collection_and_in_the_training(
    tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    extra = ["--data.validation", shards]
    whole, parts = (
        Run(tiny_folder, tmp_path / name, *extra, ranks=2) for name in ("whole", "parts")
    )
    whole.to_the_end()
    draws = random.Random(0)
    assert parts.kill(2, 0, draws)[-1].startswith("batch")
    assert parts.kill(BATCHES - 1, draws.randint(2, 6), draws)[-1].startswith("[")
    assert parts.kill(2 * BATCHES + 2, 0, draws)[-1].startswith("batch")
    parts.to_the_end()
    assert_same_end(whole.root, parts.root)
