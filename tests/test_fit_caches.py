"""Caches that a training fills itself: the same run to the last bit, without encoding twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.cli import main
from tests.helpers.caching import assert_same_end, logged, recipe
from tests.helpers.runs import TWO_RANKS, finished, launch, wait_until

VISITS, BATCHES = 3, 6  # of 4 pairs


class Calls:
    """Counts what VAE, text encoder and denoiser are called with."""

    def __init__(self) -> None:
        self.images = self.texts = self.predicted = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Return the counts of this process."""
    counted = Calls()
    posterior, embed, predict = (
        getattr(StableDiffusion, name) for name in ("posterior", "embed", "predict")
    )

    def count_posterior(self: StableDiffusion, images: torch.Tensor) -> object:
        counted.images += len(images)
        return posterior(self, images)

    def count_embed(self: StableDiffusion, texts: list[str]) -> object:
        counted.texts += len(texts)
        return embed(self, texts)

    def count_predict(self: StableDiffusion, latents: torch.Tensor, *rest: object) -> object:
        counted.predicted += len(latents)
        return predict(self, latents, *rest)

    monkeypatch.setattr(StableDiffusion, "posterior", count_posterior)
    monkeypatch.setattr(StableDiffusion, "embed", count_embed)
    monkeypatch.setattr(StableDiffusion, "predict", count_predict)
    return counted


Arguments = Callable[..., list[str]]


@pytest.fixture
def arguments(tiny_folder: str, shards: str, tmp_path: Path) -> Arguments:
    """Return a function of a run's name and further arguments, which returns all of them."""

    def made(name: str, *more: str) -> list[str]:
        data = ["--data", "PairShards", "--data.shards", shards, "--data.validation", shards]
        data += ["--data.resolution", "32", "--data.workers", "0"]
        data += ["--data.cache", str(tmp_path / "cache")]
        steps = ["--trainer.max_steps", str(VISITS * BATCHES)]
        steps += ["--trainer.val_check_interval", str(BATCHES)]
        steps += ["--trainer.callbacks", "Checkpoints", "--trainer.callbacks.save_last", "true"]
        steps += ["--trainer.callbacks.every_n_train_steps", "1"]
        return [*recipe(tiny_folder, tmp_path / name, *data), *steps, *more]

    return made


OFF = ["--data.keep_encodings", "false"]


def assert_same(one: Path, other: Path) -> None:
    """Assert that two runs logged the same numbers and ended in the same weights."""
    a, b = logged(one), logged(other)
    for name in ("train/loss", "train/error", "val/loss", "val/accuracy", "val/error"):
        assert a[name] == b[name], name
    assert len(set(a["train/loss"])) > VISITS
    assert_same_end(one, other)


def records(folder: Path, kind: str) -> list[Path]:
    """Return the paths of the records of a kind."""
    return [*folder.glob(f"cache/encodings/*/{kind}/*/*")]


def test_a_run_with_a_store_is_the_run_without(
    arguments: Arguments, calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first visit it encodes, and from then on it reads; so do workers and another run."""
    main(["fit", *arguments("without", *OFF)])
    visited = 2 * 4 * BATCHES  # images of an epoch
    assert calls.images == 2 * VISITS * visited
    assert not (tmp_path / "cache").exists()
    calls.images = calls.texts = 0
    with caplog.at_level("INFO"):
        main(["fit", *arguments("with")])
    assert "Latents and prompts are kept in" in caplog.text
    assert calls.images == visited  # the held-out pairs are the same ones here
    assert len(records(tmp_path, "latents")) == 24
    assert len(records(tmp_path, "prompts")) == 25
    assert_same(tmp_path / "without", tmp_path / "with")
    calls.images = calls.texts = 0
    main(["fit", *arguments("workers", "--data.workers", "2")])
    assert calls.images == 0
    assert calls.texts <= 1  # the empty prompt
    assert_same(tmp_path / "without", tmp_path / "workers")


@pytest.mark.slow
def test_flips_are_stored_both_ways(arguments: Arguments, calls: Calls, tmp_path: Path) -> None:
    flips = ["--data.flip", "true", "--data.validation", "null"]
    main(["fit", *arguments("without", *flips, *OFF)])
    calls.images = 0
    main(["fit", *arguments("with", *flips)])
    assert calls.images == 2 * 2 * 4 * BATCHES
    assert len(records(tmp_path, "latents")) == 48
    assert logged(tmp_path / "without")["train/loss"] == logged(tmp_path / "with")["train/loss"]
    assert_same_end(tmp_path / "without", tmp_path / "with")


def test_the_errors_of_held_out_pairs_are_computed_once(
    arguments: Arguments, calls: Calls, tmp_path: Path
) -> None:
    main(["fit", *arguments("without", *OFF)])
    without, calls.predicted = calls.predicted, 0
    main(["fit", *arguments("with")])
    held_out, draws = 2 * 24, 4
    assert without - calls.predicted == (VISITS - 1) * held_out * draws


def test_a_resumed_run_goes_on_with_or_without_its_store(
    arguments: Arguments, calls: Calls, tmp_path: Path
) -> None:
    main(["fit", *arguments("whole", *OFF)])
    middle = ["--trainer.max_steps", str(BATCHES + 2)]
    for name in ("kept", "deleted"):
        main(["fit", *arguments(name), *middle])
        if name == "deleted":
            for path in [*records(tmp_path, "latents"), *records(tmp_path, "prompts")]:
                path.unlink()
        calls.images = 0
        main(["fit", *arguments(name), "--ckpt_path", "last"])
        assert (calls.images > 0) == (name == "deleted")
        assert_same_end(tmp_path / "whole", tmp_path / name)


def test_a_damaged_record_is_made_again(
    arguments: Arguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", *arguments("first")])
    damaged = [records(tmp_path, "latents")[3], records(tmp_path, "prompts")[5]]
    whole = [path.read_bytes() for path in damaged]
    damaged[0].write_bytes(whole[0][:-200] + bytes(200))
    damaged[1].write_bytes(whole[1][:100])
    main(["fit", *arguments("second")])
    assert caplog.text.count("was damaged and is made again.") >= 2
    assert [path.read_bytes() for path in damaged] == whole
    assert_same(tmp_path / "first", tmp_path / "second")


def test_fixed_draws_come_back(arguments: Arguments, calls: Calls, tmp_path: Path) -> None:
    """As many draws as visits are the run without; fewer need no reference at later visits."""
    main(["fit", *arguments("without", *OFF)])
    main(["fit", *arguments("three", "--data.draws", str(VISITS))])
    assert_same(tmp_path / "without", tmp_path / "three")
    calls.predicted = 0
    main(["fit", *arguments("evaluated", "--data.draws", "1", *OFF)])
    evaluated, calls.predicted = calls.predicted, 0
    main(["fit", *arguments("one", "--data.draws", "1")])
    saved = 2 * 4 * BATCHES * (VISITS - 1)
    held_out = 2 * 24 * 4 * (VISITS - 1)
    # the errors of the first draw were kept by the run of three draws
    assert evaluated - calls.predicted == saved + held_out + 2 * 4 * BATCHES
    assert_same(tmp_path / "evaluated", tmp_path / "one")
    losses = logged(tmp_path / "one")["train/loss"]
    assert losses[:BATCHES] == logged(tmp_path / "without")["train/loss"][:BATCHES]
    assert losses[BATCHES:] != logged(tmp_path / "without")["train/loss"][BATCHES:]


@pytest.mark.slow
def test_another_model_or_precision_has_a_store_of_its_own(
    arguments: Arguments, calls: Calls, tmp_path: Path
) -> None:
    main(["fit", *arguments("first", "--trainer.max_steps", "8")])
    calls.images = 0
    main(["fit", *arguments("other", "--trainer.max_steps", "8", "--backbone.dtype", "bfloat16")])
    assert calls.images == 2 * 4 * BATCHES
    calls.images = 0
    main(["fit", *arguments("third", "--trainer.max_steps", "8", "--data.batch_size", "3")])
    assert calls.images > 0
    assert len([*(tmp_path / "cache" / "encodings").iterdir()]) == 3


@pytest.mark.slow
def test_random_crops_keep_prompts_alone(
    arguments: Arguments, calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crops = ["--data.crop", "random", "--data.validation", "null"]
    with caplog.at_level("INFO"):
        main(["fit", *arguments("with", *crops)])
    assert "Latents are not kept, because `crop: random` takes another part" in caplog.text
    assert not records(tmp_path, "latents")
    assert calls.texts < 3 * 4 * BATCHES  # captions that were dropped are embedded as well
    main(["fit", *arguments("without", *crops, *OFF)])
    assert_same_end(tmp_path / "without", tmp_path / "with")


def test_the_bound_is_kept(arguments: Arguments, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="of this run would take .* MB at most, more than the 0.0 MB"
    ) as seen:
        main(["fit", *arguments("small", "--data.cache_size", "20000")])
    assert sum("no further encodings are kept" in str(one.message) for one in seen) == 1
    assert not records(tmp_path, "latents")
    main(["fit", *arguments("without", *OFF)])
    assert_same(tmp_path / "without", tmp_path / "small")


@pytest.mark.slow
def test_the_oldest_store_is_removed_for_a_new_one(arguments: Arguments, tmp_path: Path) -> None:
    short = ["--trainer.max_steps", "8"]
    main(["fit", *arguments("first", *short)])
    [first] = (tmp_path / "cache" / "encodings").iterdir()
    size = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    bound = ["--data.cache_size", str(int(size * 1.8))]
    main(["fit", *arguments("second", *short, *bound, "--backbone.dtype", "bfloat16")])
    assert not first.exists()
    [second] = (tmp_path / "cache" / "encodings").iterdir()
    assert [*second.glob("latents/*/*")]


@pytest.mark.slow
def test_a_run_of_one_visit_writes_no_latents(arguments: Arguments, tmp_path: Path) -> None:
    main(["fit", *arguments("once", "--trainer.max_steps", "4", "--data.validation", "null")])
    assert not records(tmp_path, "latents")


def test_fine_tuning_stores_the_chosen_side(
    arguments: Arguments, calls: Calls, tmp_path: Path
) -> None:
    tuned = ["--model", "SupervisedFineTuning", "--data.validation", "null"]
    main(["fit", *arguments("without", *tuned, *OFF)])
    calls.images = 0
    main(["fit", *arguments("with", *tuned)])
    assert calls.images == 4 * BATCHES
    assert_same_end(tmp_path / "without", tmp_path / "with")


@pytest.mark.slow
def test_killed_and_on_two_ranks(arguments: Arguments, tmp_path: Path) -> None:
    """A killed run leaves whole records; two ranks share them, with the losses of no store."""
    running = launch(["fit", *arguments("killed")])
    wait_until(lambda: len(records(tmp_path, "latents")) >= 8, running)
    running.kill()
    finished(running)
    assert "damaged" not in finished(launch(["fit", *arguments("killed"), "--ckpt_path", "last"]))
    main(["fit", *arguments("whole", *OFF)])
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    both = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
    for name, more in (("ranks", []), ("ranks-without", OFF)):
        arguments_of = arguments(name, *both, "--data.draws", "1", *more)
        finished(launch(["fit", *arguments_of], TWO_RANKS))
    assert_same(tmp_path / "ranks", tmp_path / "ranks-without")
    assert records(tmp_path, "errors-*")
