"""A training step never waits for the device: the host reads numbers from it only to log them."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.cli import main
from lit_prefopt.estimate.step_cost import step_cost
from lit_prefopt.methods import DiffusionDPO, SPINDiffusion, SupervisedFineTuning
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import images


def dpo(backbone: StableDiffusion) -> DiffusionDPO:
    return DiffusionDPO(
        backbone, AdamW(1e-3), beta=5000.0, anchor=0.1, chosen_protection=0.9, gamma=0.9
    )


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_a_step_runs_where_nothing_can_be_read(tiny_folder: str, lora: LoRA | None) -> None:
    """On tensors that have shapes alone, whatever decides anything by a number fails."""
    assert step_cost(dpo(StableDiffusion(tiny_folder, lora=lora)), images(3)).flops > 1e6


def test_a_step_of_sdxl_runs_where_nothing_can_be_read(tiny_xl_folder: str) -> None:
    assert step_cost(dpo(StableDiffusionXL(tiny_xl_folder, lora=LoRA(4))), images(3)).flops > 1e6


def test_the_other_methods_run_there_too(tiny_folder: str) -> None:
    for kind, arguments in ((SupervisedFineTuning, {}), (SPINDiffusion, {"beta": 10.0})):
        module = kind(StableDiffusion(tiny_folder, lora=LoRA(2)), AdamW(1e-3), **arguments)
        assert step_cost(module, images(3)).flops > 1e6


def test_something_that_reads_would_fail_there(backbone: StableDiffusion) -> None:
    class Reading(DiffusionDPO):
        def losses(self, *arguments: Any) -> Tensor:
            losses = super().losses(*arguments)
            return losses if losses.sum() > 0 else -losses

    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        step_cost(Reading(backbone, AdamW(1e-3), beta=5000.0), images(3))


def test_seeds_stay_where_they_are_read(backbone: StableDiffusion) -> None:
    moved = dpo(backbone).transfer_batch_to_device(images(3), torch.device("meta"), 0)
    assert moved.images.device.type == moved.weights.device.type == "meta"
    assert moved.seeds.tolist() == [0, 1, 2]


class Reads(TorchDispatchMode):
    """Notes the files from which numbers are read; an optimizer counts its steps on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            stack = [frame.filename for frame in traceback.extract_stack()]
            if not any("/torch/optim/" in name for name in stack):
                self.files.append(next(n for n in reversed(stack[:-1]) if "/torch/" not in n))
        return func(*args, **(kwargs or {}))


class CountReads(Callback):
    """Notes the batches in which numbers are read, from one batch's begin to the next one's."""

    reads: dict[int, list[str]]
    bar: dict[str, Any]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        CountReads.reads, self.mode = {}, Reads()
        self.mode.__enter__()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.mode.files = self.reads.setdefault(trainer.global_step + 1, [])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mode.__exit__(None, None, None)
        CountReads.bar = trainer.progress_bar_callback.get_metrics(trainer, pl_module)


def test_a_run_reads_numbers_only_where_it_logs(recipe: list[str], tmp_path: Path) -> None:
    """Loop, progress bar, guard and average included; the bar shows a step's log after it."""
    main(
        [
            *("fit", *recipe, "--trainer.max_steps", "6", "--trainer.limit_val_batches", "0"),
            *("--trainer.log_every_n_steps", "3", "--trainer.gradient_clip_val", "1.0"),
            *("--trainer.enable_progress_bar", "true"),
            *("--trainer.callbacks+", "Guard", "--trainer.callbacks.every", "3"),
            *("--trainer.callbacks+", "PolicyAveraging"),
            *("--trainer.callbacks+", "tests.test_waiting.CountReads"),
        ]
    )
    from tests.test_waiting import CountReads as Used  # the class that the recipe named

    assert list(Used.reads) == [1, 2, 3, 4, 5, 6]
    assert Used.reads[3]  # so it does notice
    assert (Used.reads[2], Used.reads[5]) == ([], [])
    assert {"train/loss", "train/accuracy"} <= set(Used.bar)
