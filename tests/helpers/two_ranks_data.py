"""Trains on the ranks that torchrun started; each writes down what it saw.

torchrun --nproc-per-node 2 -m tests.helpers.two_ranks_data SHARDS OUTPUT [CHECKPOINT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prefopt.datamodules import PairShards
from tests.helpers.pair_data import Recorder, seen_keys


def main(shards: str, output: str, checkpoint: str | None = None) -> None:
    """Train for two epochs and save after every step."""
    saver = ModelCheckpoint(output, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
    )
    recorder = Recorder()
    data = PairShards(shards, 2, resolution=8, validation=shards, workers=1, seed=1)
    trainer.fit(recorder, data, ckpt_path=checkpoint, weights_only=True)
    held_out = [key for batch in recorder.held_out for key in batch.keys]
    seen = {"trained": seen_keys(recorder), "held_out": held_out}
    Path(output, f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
