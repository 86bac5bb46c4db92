"""Checkpoints stand right after optimizer steps, and a file is whole or absent."""

from __future__ import annotations

import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_prefopt.callbacks import Checkpoints
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.runs.checkpoint_files import AtomicCheckpointIO, last_checkpoint
from lit_prefopt.weights.checkpoint import is_complete
from tests.helpers.runs import FailAt, assert_same_end, folder_of

WINDOW = 3


class Line(LightningModule):
    """One weight that moves by the mean of its batches; validation has a number to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("watched", -self.weight.sum() - self.trainer.fit_loop.total_batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], 1.0)


class StopAt(Callback):
    """Asks for a stop after a batch, as a timer does."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.fit_loop.total_batch_idx == 3


def fit(folder: Path, saver: Checkpoints, *more: Callback, **options: Any) -> list[int]:
    """Train on 11 batches, 3 a step; return how many batches the checkpoints have behind them."""
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=WINDOW,
        callbacks=[*more, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    ).fit(
        Line(),
        torch.utils.data.DataLoader(torch.ones(11), 1),
        torch.utils.data.DataLoader(torch.zeros(1), 1),
    )
    behind = []
    for path in folder.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        behind.append(progress["total"]["processed"])
        steps = -(-behind[-1] // WINDOW)
        assert checkpoint["global_step"] == steps
        assert checkpoint["state_dict"]["weight"].item() == pytest.approx(-behind[-1] / WINDOW)
    return sorted(behind)


def test_checkpoints_by_the_clock_wait_for_the_step(tmp_path: Path) -> None:
    saver = Checkpoints(
        tmp_path, "{step}", save_top_k=-1, train_time_interval=timedelta(0), save_last=False
    )
    assert fit(tmp_path, saver) == [3, 6, 9, 11]  # the last batch of an epoch steps


@pytest.mark.parametrize("monitor", [None, "watched"])
def test_checkpoints_after_a_validation_wait_for_the_step(
    tmp_path: Path, monitor: str | None
) -> None:
    saver = Checkpoints(tmp_path, "{step}", monitor=monitor, save_top_k=-1)
    assert fit(tmp_path, saver, val_check_interval=4) == [6, 9]  # validated after 4 and 8
    assert "weight" in torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]


def test_a_stop_waits_for_the_step(tmp_path: Path) -> None:
    assert fit(tmp_path, Checkpoints(tmp_path, save_last=True, save_top_k=0), StopAt()) == [6]


def test_after_a_failure_within_accumulation_the_run_goes_on_exactly(
    exact: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*exact, "--trainer.default_root_dir", str(tmp_path)]
    failing = ["--trainer.callbacks+", "tests.callbacks.test_checkpoints.FailAt"]
    failing += ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.save_last", "true"]
    failing += ["--trainer.callbacks.save_on_exception", "true"]
    for batch, step in ((4, 1), (6, 2)):  # in the midst of a step's batches, and at their beginning
        monkeypatch.setattr(FailAt, "batch", batch)
        resume = ["--ckpt_path", "last"] if step > 1 else []
        with pytest.raises(KeyError, match="a failure"):
            main(["fit", *arguments, *failing, *resume])
        stopped = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert stopped["global_step"] == step
    main(["fit", *arguments, "--ckpt_path", "last"])
    assert_same_end(folder_of(exact), tmp_path)


def write(path: Path, step: int, size: int = 1000) -> None:
    state = {"global_step": step, "state_dict": {"weight": torch.full((size,), float(step))}}
    state |= {
        "loops": {"fit_loop": {}},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    state |= {"pytorch-lightning_version": "2.6.0", "recipe": "model: {}"}
    AtomicCheckpointIO().save_checkpoint(state, path)


def test_the_newest_whole_checkpoint_is_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = tmp_path / "last.ckpt"
    write(tmp_path / "000002.ckpt", 2)
    write(last, 2)
    write(tmp_path / "000004.ckpt", 4)  # then the run was killed
    assert last_checkpoint(tmp_path, fitting=False) == str(tmp_path / "000004.ckpt")
    assert last_checkpoint(tmp_path, fitting=True) == str(last)
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert not caplog.records

    damage(tmp_path / "000004.ckpt")  # and its other name, last.ckpt, with it
    assert last_checkpoint(tmp_path, fitting=False) == str(tmp_path / "000002.ckpt")
    assert "000004.ckpt is damaged" in caplog.text
    (tmp_path / "000002.ckpt").write_bytes((tmp_path / "000002.ckpt").read_bytes()[:-100])
    with pytest.raises(InputError, match="No checkpoint in .* is complete"):
        last_checkpoint(tmp_path, fitting=True)


def test_a_run_goes_on_from_the_newest_whole_checkpoint_among_others(
    recipe: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    main(["fit", *recipe, "--trainer.max_steps", "1"])
    (folder / "000001.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    damage(folder / "last.ckpt")
    (folder / "link.ckpt").symlink_to("nowhere")
    (folder / "folder.ckpt").mkdir()
    (folder / "page.ckpt").write_text("<html>")
    torch.save({"state_dict": {"w": torch.ones(1)}, "epoch": 3}, folder / "other.ckpt")
    main(["fit", *recipe, "--trainer.max_steps", "2", "--ckpt_path", "last"])
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    passed = [record.getMessage() for record in caplog.records if "passed over" in record.message]
    assert len(passed) == 5
    for name in ("last", "link", "folder", "page", "other"):
        assert sum(f"{name}.ckpt" in message for message in passed) == 1


def change(path: Path, **changes: Any) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint.update(changes)
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, path)


def test_checkpoints_that_do_not_fit_are_refused_by_every_command(
    recipe: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    main(["fit", *recipe, "--trainer.max_steps", "1"])
    whole = torch.load(path, weights_only=True)
    name, weight = next(iter(whole["state_dict"].items()))
    export = ["export", "--to", "unet", "--output", str(tmp_path / "out"), "--source", str(path)]
    fit, validate = (
        [command, *recipe, "--ckpt_path", str(path)] for command in ("fit", "validate")
    )

    change(path, optimizer_states=None)  # weights can still be read from it
    with pytest.raises(SystemExit, match="no valid optimizer_states, so no run can be resumed"):
        main(fit)
    main(validate)

    change(path, **{**whole, "state_dict": {**whole["state_dict"], name: weight[:1]}})
    for command in (fit, validate):
        with pytest.raises(SystemExit, match=f"1 of its trained weights differ, such as {name}"):
            main(command)

    for broken, described in (
        ({"recipe": "model: ["}, "is not valid YAML"),
        ({"recipe": "words"}, "has no keys"),
        ({"state_dict": None}, "has no valid state_dict"),
    ):
        change(path, **{**whole, **broken})
        for command in (fit, validate, export):
            with pytest.raises(SystemExit, match=described):
                main(command)


def damage(path: Path) -> None:
    """Change bytes in the middle, which a power cut may leave unwritten."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(
    recipe: list[str], tmp_path: Path
) -> None:
    every = ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.every_n_train_steps", "1"]
    every += ["--trainer.callbacks.save_top_k", "-1", "--trainer.callbacks.filename", "{step}"]
    main(["fit", *recipe, *every, "--trainer.max_steps", "2"])
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step=2.ckpt", "last.ckpt"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r"step=2.ckpt is damaged.*resume from .*step=1.ckpt"):
        main(["fit", *recipe, "--ckpt_path", str(folder / "step=2.ckpt")])
    main(["fit", *recipe, "--ckpt_path", "last"])
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 4


class FillDisk(Callback):
    """Lets no file grow beyond 100 kB from the third batch on."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))


def test_a_full_disk_is_told_and_leaves_the_earlier_checkpoints(
    recipe: list[str], tmp_path: Path
) -> None:
    every = ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.every_n_train_steps", "1"]
    every += ["--trainer.callbacks.save_last", "true", "--trainer.callbacks.filename", "{step}"]
    full = ["--trainer.callbacks+", "tests.callbacks.test_checkpoints.FillDisk"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(SystemExit, match=r"step=3.ckpt could not be written \(File too large"):
            main(["fit", *recipe, *every, *full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    left = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in left] == ["last.ckpt", "step=2.ckpt"]
    assert all(is_complete(path) for path in left)
    main(["fit", *recipe, *every, "--ckpt_path", "last"])


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed(recipe: list[str], tmp_path: Path) -> None:
    main(["fit", *recipe, "--trainer.max_steps", "1"])
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".last.ckpt.abc").write_bytes(b"half")
    main(["fit", *recipe, "--trainer.max_steps", "2", "--ckpt_path", "last"])
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
