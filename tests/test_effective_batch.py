"""Pairs per optimizer step: the same gradient on any number of ranks, and at an epoch's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.cli import main
from lit_prefopt.datamodules import PairShards
from lit_prefopt.effective_batch import batches_per_step, planned_steps
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.recipes import small_recipe
from tests.helpers.runs import FailAt, assert_same_end, scalars
from tests.helpers.strategy_runs import CPU, STRATEGIES, run_cases
from tests.helpers.two_ranks_module import Witness

BY_STEPS = ["--trainer.val_check_interval", "null"]  # small_recipe counts batches


def test_accumulation_follows_from_the_devices_and_the_batch() -> None:
    assert batches_per_step(2048, 8, 1) == 256
    assert batches_per_step(2048, 8, 8) == 32
    assert batches_per_step(2048, 4, 8) == 64


@pytest.mark.parametrize(
    ("numbers", "cures"),
    [
        ((2048, 3, 8), ("--data.batch_size 2", "--data.batch_size 4", "2040", "2064")),
        ((8, 3, 8), ("--data.batch_size 1", "24")),
        ((10, 2, 4), ("8", "16")),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(
    numbers: tuple[int, int, int], cures: tuple[str, ...]
) -> None:
    full = [c if c.startswith("--") else f"--batch.pairs {c}" for c in cures]
    wanted = " or ".join(f"`{cure}`" for cure in full)
    with pytest.raises(InputError, match=f": set {wanted}\\."):
        batches_per_step(*numbers)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--batch.pairs", "10"], "no multiple of data.batch_size 4.*`--data.batch_size 2`"),
        (["--batch.pairs", "0"], "batch.pairs is 0; give a number from 1"),
        (
            ["--batch.pairs", "8", "--trainer.accumulate_grad_batches", "1"],
            "leave the first out, or set `--batch.pairs null`",
        ),
        (
            ["--batch.validate_every", "2"],
            r"val_check_interval \(2\) and .* set `--batch.validate_every",
        ),
        (
            ["--batch.validate_every", "2", *BY_STEPS, "--trainer.check_val_every_n_epoch", "2"],
            r"check_val_every_n_epoch \(2\) and .* set `--batch.validate_every null`",
        ),
    ],
)
def test_keys_that_contradict_are_refused(
    recipe: list[str], change: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main(["fit", *recipe, *change])


def test_a_key_of_the_trainer_replaces_the_recipes_batch(
    recipe: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = recipe.index("--batch.pairs")
    plain = recipe[:start] + recipe[start + 4 :]  # with the numbers of toy-diffusion-dpo
    given = ["--trainer.accumulate_grad_batches", "3", "--trainer.max_steps", "1"]
    main(["fit", *plain, *given])
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["batch"] == {"pairs": None, "validate_every": None}
    assert written["trainer"]["accumulate_grad_batches"] == 3
    for key in ("trainer.accumulate_grad_batches", "trainer.val_check_interval"):
        assert f"{key} of the command line replaces the recipe's batch." in caplog.text


def gradients(pipeline: str, shards: str, batch_size: int, accumulated: int) -> list[torch.Tensor]:
    """Return the gradients of every step of an epoch of 24 pairs, whose weights stay."""
    torch.manual_seed(0)
    witness = Witness()
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulated,
        callbacks=[witness],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(
        DiffusionDPO(StableDiffusion(pipeline), AdamW(0.0), beta=100.0),
        PairShards(shards, batch_size=batch_size, resolution=32, workers=0),
    )
    return [g.clone() for g in witness.gradients]


def test_the_last_step_of_an_epoch_is_the_mean_of_its_pairs(tiny_folder: str, shards: str) -> None:
    *_, last = gradients(tiny_folder, shards, batch_size=3, accumulated=3)  # of 3, 3 and 2 batches
    *_, whole = gradients(tiny_folder, shards, batch_size=6, accumulated=1)
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())
    [short] = gradients(tiny_folder, shards, batch_size=12, accumulated=50)
    [whole] = gradients(tiny_folder, shards, batch_size=24, accumulated=1)
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


def moments(run: Path) -> torch.Tensor:
    """Return AdamW's mean gradients at the end of a run."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    states = checkpoint["optimizer_states"][0]["state"].values()
    return torch.cat([state["exp_avg"].flatten() for state in states])


@pytest.mark.slow
def test_two_ranks_and_one_see_the_same_gradients(
    tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    """An epoch of 24 pairs in a step of 16 and one of 8, whose weights stay as they are."""

    def case(name: str, ranks: int, *more: str) -> list[str]:
        return [
            *("fit", *small_recipe(tiny_folder, shards, tmp_path / name)),
            *("--trainer.limit_val_batches", "0", "--model.beta", "100"),
            *("--trainer.max_steps", "2", "--batch.pairs", "16", "--data.batch_size", "2"),
            *("--model.optimizer.lr", "0", *more, "--trainer.devices", str(ranks)),
        ]

    seen = ["--trainer.callbacks+", f"{CPU}.WholeGradients"]
    seen += ["--trainer.callbacks.folder"]
    kinds = ("zero2", "zero3")
    cases = [case("ddp", 2, *STRATEGIES["ddp"], *seen, str(tmp_path / "ddp-seen"))]
    cases += [case(kind, 2, *STRATEGIES[kind]) for kind in kinds]
    run_cases(cases, tmp_path / "cases.json")
    main(case("one", 1, *seen, str(tmp_path / "one-seen")))

    one = torch.load(tmp_path / "one-seen" / "gradients-0.pt", weights_only=True)
    assert len(one) == 2
    assert all(gradient.abs().max() > 0 for gradient in one)
    for rank in (0, 1):
        both = torch.load(tmp_path / "ddp-seen" / f"gradients-{rank}.pt", weights_only=True)
        for mine, theirs in zip(one, both, strict=True):
            print("gradient", mine.abs().max().item(), (mine - theirs).abs().max().item())
            assert (mine - theirs).abs().max() < 1e-6 * mine.abs().max()
    alone = moments(tmp_path / "one")
    for kind in kinds:
        assert (moments(tmp_path / kind) - alone).abs().max() < 1e-5 * alone.abs().max()


def test_steps_count_over_epochs_and_a_run_in_parts_ends_in_the_same_bits(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 4 and 2 batches: validation at each, and a stop within an epoch."""
    steps = [*BY_STEPS, "--batch.pairs", "16", "--batch.validate_every", "2"]
    steps += ["--model.optimizer.schedule", "linear", "--model.optimizer.warmup_steps", "0"]
    epochs = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "3"]
    main(["fit", *recipe, *steps, *epochs])
    whole = tmp_path / "run"
    assert len(scalars(whole)["val/accuracy"]) == 3
    last = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert last["lr_schedulers"][0]["_last_lr"] == [0]  # it decays to the last of them

    parts = ["--trainer.default_root_dir", str(tmp_path / "parts")]
    failing = ["--trainer.callbacks+", "tests.callbacks.test_checkpoints.FailAt"]
    failing += ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.save_last", "true"]
    failing += ["--trainer.callbacks.save_on_exception", "true"]
    resume: list[str] = []
    for batch, step in ((5, 1), (9, 2)):  # among the two last batches of an epoch, and in another
        monkeypatch.setattr(FailAt, "batch", batch)
        with pytest.raises(KeyError, match="a failure"):
            main(["fit", *recipe, *steps, *epochs, *parts, *failing, *resume])
        resume = ["--ckpt_path", "last"]
        stopped = torch.load(tmp_path / "parts/checkpoints/last.ckpt", weights_only=True)
        assert stopped["global_step"] == step
    main(["fit", *recipe, *steps, *epochs, *parts, *resume])
    assert_same_end(whole, tmp_path / "parts")


def test_epochs_that_never_reach_the_effective_batch_are_named(
    recipe: list[str], tmp_path: Path
) -> None:
    steps = [*BY_STEPS, "--batch.pairs", "48", "--batch.validate_every", "2"]
    with pytest.warns(UserWarning, match="epoch of 24 pairs never reaches .* batch of 48"):
        main(["fit", *recipe, *steps])
    logged = scalars(tmp_path / "run")
    assert len(logged["train/loss"]) == 4  # a step is an epoch
    assert len(logged["val/accuracy"]) == 2


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 3}, 9),
        ({"max_epochs": 3, "limit_train_batches": 4}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 3, "max_steps": 70}, 9),
        ({"max_epochs": -1}, -1),
    ],
)
def test_schedules_know_the_last_step(limits: dict[str, Any], steps: int) -> None:
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=3, logger=False, **limits)
    trainer.fit_loop._data_source.instance = torch.utils.data.DataLoader(torch.zeros(8), 1)
    assert planned_steps(trainer) == steps
