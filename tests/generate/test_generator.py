"""Generation: whole groups, the same bytes after a stop, one list for any number of ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from lightning import Trainer

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.cli import main
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules import PairGroups, PromptGroups
from lit_prefopt.datamodules.generation import GenerationGroup
from lit_prefopt.errors import InputError
from lit_prefopt.generate import SelfPlay
from lit_prefopt.generate.generator import GeneratedPair, Generator
from lit_prefopt.processes.settings import Sampling
from tests.helpers.generating import content, samples
from tests.helpers.runs import TWO_RANKS, finished, launch, wait_until

HOW = Sampling(steps=2, guidance=2.0, eta=1.0, batch_size=4)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Stopped(Exception):
    """Stands for whatever ends a process."""


class Halting(SelfPlay):
    """Stops before it makes some group."""

    halt_at = -1

    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        if group.number == self.halt_at:
            raise Stopped
        return super().make(group)


def generate(folder: str, shards: str, output: Path, halt_at: int = -1, **data: int) -> Path:
    """Run self-play, maybe up to some group only."""
    model = Halting(StableDiffusion(folder, reference="none"), str(output), HOW)
    model.halt_at = halt_at
    groups = PairGroups(str(shards), **{"group_size": 2, "seed": 5} | data)
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[], **QUIET)
    if halt_at < 0:
        trainer.predict(model, groups, return_predictions=False)
    else:
        with pytest.raises(Stopped):
            trainer.predict(model, groups, return_predictions=False)
    return output


def test_pairs_of_a_real_image_and_an_own_one(
    tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    made = samples(generate(tiny_folder, shards, tmp_path / "out", count=5))
    real = samples(Path(shards))[:5]
    assert [m.text for m in made] == [r.text for r in real]
    assert [m.sides[0] for m in made] == [r.sides[0] for r in real]
    assert len({m.sides[1] for m in made}) == 5
    assert [m.meta["prompt_index"] for m in made] == list(range(5))
    assert all(m.meta["seeds"][0] is None and m.meta["seeds"][1] > 0 for m in made)
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["seed"] == 5


def test_a_stopped_generation_ends_with_the_same_bytes(
    tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    whole = content(generate(tiny_folder, shards, tmp_path / "whole"))
    output = tmp_path / "out"
    for group in (1, 3):
        generate(tiny_folder, shards, output, halt_at=group)
        assert not output.exists()
    begun = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.parts").rglob("*.tar")}
    assert len(begun) == 3
    assert content(generate(tiny_folder, shards, output)) == whole
    assert not (tmp_path / "out.parts").exists()


def test_a_limited_generation_says_what_is_left(
    tiny_folder: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = on_pairs(tiny_folder, tmp_path / "out", shards)
    with caplog.at_level("INFO"):
        main([*arguments, "--trainer.limit_predict_batches", "2"])
    assert "10 groups are left" in caplog.text
    assert not (tmp_path / "out").exists()
    main(arguments)
    assert len(samples(tmp_path / "out")) == 24


def test_what_is_complete_is_not_made_again(tiny_folder: str, shards: str, tmp_path: Path) -> None:
    output = generate(tiny_folder, shards, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again = generate(tiny_folder, shards, output)  # it would fail at any group that it made
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == before


@pytest.mark.parametrize("stop", [1, -1], ids=["begun", "complete"])
def test_another_generation_is_not_continued(
    stop: int, tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    output = generate(tiny_folder, shards, tmp_path / "out", halt_at=stop)
    with pytest.raises(InputError, match="another generation, which differs in seed: "):
        generate(tiny_folder, shards, output, seed=6)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="was not made by a generator"):
        generate(tiny_folder, shards, other)


class Nothing(Generator):
    """Leaves everything out."""

    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        self.left_out["too dull"] += len(group.texts)
        return []


def test_not_one_pair_is_told_with_the_reasons(tiny_folder: str, tmp_path: Path) -> None:
    model = Nothing(StableDiffusion(tiny_folder, reference="none"), str(tmp_path / "out"), HOW)
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[], **QUIET)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nthe sea\n")
    from lit_prefopt.prompts.files import PromptFile

    groups = PromptGroups(PromptFile(str(tmp_path / "prompts.txt")), group_size=2)
    with pytest.raises(InputError, match="No pair was generated .*3 too dull"):
        trainer.predict(model, groups, return_predictions=False)
    assert not (tmp_path / "out").exists()


def test_a_broken_sample_is_left_out(
    tiny_folder: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = samples(Path(shards))[:4]
    with ShardWriter(tmp_path / "pairs") as writer:
        for n, sample in enumerate(good):
            writer.add(" " if n == 1 else sample.text, *sample.sides)
    output = generate(tiny_folder, tmp_path / "pairs", tmp_path / "out")
    assert [m.meta["prompt_index"] for m in samples(output)] == [0, 2, 3]
    assert "left out" in caplog.text


def test_prompts_without_images_cannot_be_played_against(
    tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = [*recipe(tiny_folder, tmp_path / "out"), "--data", "PromptGroups"]
    arguments += ["--data.prompts", "PromptFile", "--data.prompts.path"]
    with pytest.raises(SystemExit, match="real image for each prompt"):
        main([*arguments, str(tmp_path / "prompts.txt")])


def recipe(folder: str, output: Path) -> list[str]:
    """Return the arguments of `predict` but for the data."""
    return [
        *("predict", "--model", "SelfPlay", "--model.output", str(output)),
        *("--model.sampling.steps", "2", "--model.sampling.batch_size", "4"),
        *("--backbone", "StableDiffusion", "--backbone.pretrained", folder),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    ]


def on_pairs(folder: str, output: Path, shards: str) -> list[str]:
    """Return the arguments of twelve groups."""
    on = ["--data", "PairGroups", "--data.shards", shards, "--data.group_size", "2"]
    return [*recipe(folder, output), *on]


@pytest.mark.slow
def test_a_killed_generation_ends_with_the_same_bytes(
    tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    """SIGKILL, then SIGTERM; afterwards on two ranks: the same list, to the last byte here."""

    def arguments(folder: Path) -> list[str]:
        """Return those of groups that take long enough for a signal to come in time."""
        return [*on_pairs(tiny_folder, folder, shards), "--model.sampling.steps", "40"]

    whole, output, both = tmp_path / "whole", tmp_path / "out", tmp_path / "both"
    main(arguments(whole))
    parts = tmp_path / "out.parts"
    for code in (-signal.SIGKILL, 128 + signal.SIGTERM):
        done = len([*parts.glob("0*")])
        running = launch(arguments(output))
        wait_until(lambda n=done: len([*parts.glob("0*")]) > n, running)
        running.send_signal(signal.SIGKILL if code < 0 else signal.SIGTERM)
        finished(running)
        assert running.returncode == code
        assert not output.exists()
    said = finished(launch(arguments(output)))
    assert "groups are left to generate" in said
    assert content(output) == content(whole)
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    said = finished(launch([*arguments(both), *two], TWO_RANKS))
    assert content(both) == content(whole), said
