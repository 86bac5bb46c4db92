"""On a CUDA device: the same step, in the precisions that people train in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._pytree import tree_leaves

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.backbones.quantization import Quantization
from lit_prefopt.cli import main
from lit_prefopt.datamodules import PairShards
from lit_prefopt.toy.pairs import PAIRS
from tests.helpers.quantized import COARSE, arguments, predicted
from tests.helpers.runs import LORA, scalars

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_step_zero_and_fit(
    recipe: list[str], tmp_path: Path, precision: str, extra: list[str]
) -> None:
    device = ["--trainer.accelerator", "gpu", "--trainer.precision", precision]
    main(["fit", *recipe, *extra, *device])
    logged = scalars(tmp_path / "run")
    assert logged["train/margin"][0] == 0
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(math.isfinite(loss) for loss in logged["train/loss"])


@pytest.mark.parametrize(
    "extra",
    [COARSE, arguments("nf4"), arguments("int8")],
    ids=["weights of bfloat16", "four bits", "eight bits"],
)
def test_small_weights(recipe: list[str], tmp_path: Path, extra: list[str]) -> None:
    main(["fit", *recipe, *extra, "--trainer.accelerator", "gpu"])
    logged = scalars(tmp_path / "run")
    assert logged["train/margin"][0] == 0
    assert all(math.isfinite(loss) for loss in logged["train/loss"])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_few_bits_say_the_same_on_both_devices(tiny_folder: str, kind: Quantization) -> None:
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4), quantization=kind)
    expected = predicted(backbone)
    torch.testing.assert_close(predicted(backbone.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


class NoWaiting(Callback):
    """Lets whatever makes the host wait for the device fail, where nothing is logged."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        quiet = trainer.global_step % 4 in (1, 2)  # of steps 2 and 3, after the first use of all
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_no_step_waits_for_the_device(recipe: list[str], precision: str, extra: list[str]) -> None:
    main(
        [
            *("fit", *recipe, *extra, "--trainer.accelerator", "gpu", "--data.workers", "1"),
            *("--trainer.precision", precision, "--trainer.log_every_n_steps", "4"),
            *("--trainer.gradient_clip_val", "1.0", "--trainer.max_steps", "8"),
            *("--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "true"),
            *("--trainer.callbacks+", "Guard", "--trainer.callbacks.every", "4"),
            *("--trainer.callbacks+", "tests.test_gpu.NoWaiting"),
        ]
    )


@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_compiled_blocks_begin_at_a_margin_of_nothing(
    recipe: list[str], tmp_path: Path, extra: list[str]
) -> None:
    fast = ["--backbone.compile", "true", "--backbone.channels_last", "true"]
    fast += ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    main(["fit", *recipe, *extra, *fast])
    logged = scalars(tmp_path / "run")
    assert abs(logged["train/margin"][0]) < 0.5  # beta 5000 times a rounding in bfloat16
    assert all(math.isfinite(loss) for loss in logged["train/loss"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["toy-spo", "toy-dense-reward"])
def test_collections(name: str, tmp_path: Path, precision: str) -> None:
    """States lie on the host, and what is drawn from them is learned from on the device."""
    main(
        [
            *("fit", "--config", name, "--trainer.accelerator", "gpu", "--data.batch_size", "4"),
            *(
                "--batch.pairs",
                "4",
                "--data.batches",
                "2",
                "--data.round_size",
                "2",
                "--trainer.max_steps",
                "4",
            ),
            *(() if name == "toy-spo" else ("--data.collection", "2", "--data.keep", "3")),
            *("--trainer.precision", precision, "--trainer.limit_val_batches", "0"),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.log_every_n_steps", "1"),
        ]
    )
    logged = scalars(tmp_path)
    assert logged["train/margin"][0] == 0
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(math.isfinite(loss) for loss in logged["train/loss"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_lie_in_pinned_memory(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(PairShards, "_pinned", lambda self: True)
    data = PairShards(str(PAIRS / "train"), 4, resolution=32, workers=workers)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) >= 5
    assert all(tensor.is_pinned() for tensor in tensors)
