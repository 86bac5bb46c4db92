"""Data modules on small shards, and runs that record what they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prefopt.batches import ImagePairs
from lit_prefopt.data.order.plan import Plan, RankSplit
from lit_prefopt.datamodules import PairShards
from lit_prefopt.errors import InputError


def sentence(module: PairShards) -> str:
    """Return what ends the reading of all batches."""
    # not pytest.raises: what it keeps alive makes workers end seconds later
    try:
        list(module.train_dataloader())
    except InputError as error:
        return str(error)
    raise AssertionError("all could be read")


def data(folder: str, **more) -> PairShards:
    """Return a data module that is set up."""
    defaults = {"batch_size": 4, "resolution": 8, "workers": 0, "seed": 1}
    module = PairShards(folder, **{**defaults, **more})
    module.setup("fit")
    return module


def equal(left: ImagePairs, right: ImagePairs) -> bool:
    """Return whether two batches agree in every bit."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def keys(batches: list[ImagePairs]) -> list[str]:
    """Return the keys of all batches."""
    return [key for batch in batches for key in batch.keys]


class Recorder(LightningModule):
    """Notes every batch and takes steps that depend on it."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.fail_at = fail_at
        self.seen: list[tuple[int, ImagePairs]] = []
        self.held_out: list[ImagePairs] = []

    def training_step(self, batch: ImagePairs, batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise KeyError("interrupted")
        self.seen.append((self.current_epoch, batch))
        return self.layer(batch.images.mean((1, 3, 4))).square().mean()

    def validation_step(self, batch: ImagePairs, batch_idx: int) -> None:
        self.held_out.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def seen_keys(recorder: Recorder) -> list[tuple[int, str]]:
    """Return (epoch, key) of all samples in the order in which they were trained on."""
    return [(epoch, key) for epoch, batch in recorder.seen for key in batch.keys]


def train(module: PairShards, path: Path, ckpt: Path | None = None, **more: Any) -> Recorder:
    """Train with a checkpoint after every step; return what was seen."""
    torch.manual_seed(0)
    recorder = Recorder(more.pop("fail_at", None))
    saver = ModelCheckpoint(
        path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_exception=True
    )
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "log_every_n_steps": 1, **more}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", callbacks=[saver], **silent, **options)
    try:
        trainer.fit(recorder, module, ckpt_path=ckpt, weights_only=True)
    except KeyError:
        assert recorder.fail_at is not None
    return recorder


def epoch_on(plan: Plan, epoch: int, world: int, batch_size: int, first: int = 0) -> list:
    """Return the samples of an epoch, batch by batch and rank by rank, as the ranks read them."""
    ranks = [RankSplit(rank, world, batch_size) for rank in range(world)]
    batches = (plan.samples - first) // ranks[0].global_batch
    stretches = (r.stretch(first, batch) for batch in range(batches) for r in ranks)
    return [place for stretch in stretches for place in plan.slice(epoch, *stretch)]
