"""Runs of SPO on the tiny pipeline, and what recipes of tests name to watch their collections."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_prefopt.judges import Judge
from tests.helpers.recipes import OWN_COUNTS
from tests.helpers.tiny_toy_flow import flow_twin

CANDIDATES = 2
DECISIONS = 3  # of a roll-out, each of which is a pair if the prompt is an open one
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def rank() -> int:
    """Return the number of this process under torchrun."""
    return int(os.environ.get("RANK", "0"))


class Picky(Judge):
    """The brighter the better, but all candidates of a prompt that begins with `shut` are alike.

    Every call is written down as a line of `judged-RANK.jsonl`.

    Args:
        folder: Where.
        pause: Seconds to wait after each call, so that a signal can hit it.
        moods: For each rank one sign for each call, the last one for all that follow: `0` shuts
            every prompt.
    """

    def __init__(self, folder: str, pause: float = 0.0, moods: list[str] | None = None) -> None:
        self.path, self.pause = Path(folder) / f"judged-{rank()}.jsonl", pause
        self.moods = moods[rank()] if moods else "1"
        self.calls = 0

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return the brightness, or 0."""
        mood = self.moods[min(self.calls, len(self.moods) - 1)]
        opens = [text.startswith("open") and mood == "1" for text in texts]
        self.calls += 1
        with self.path.open("a") as stream:
            stream.write(json.dumps([text for text, o in zip(texts, opens, strict=True) if o]))
            stream.write("\n")
        time.sleep(self.pause)
        return images.mean((1, 2, 3)) * torch.tensor(opens)


class Learned(Callback):
    """Writes down what a rank learned from and the weights that it ended in: `learned-RANK.pt`.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f"learned-{rank()}.pt"
        self.pairs: list[tuple[int, int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note every pair's roll-out and timestep."""
        self.pairs += zip(batch.seeds.tolist(), batch.t[:, 0].tolist(), strict=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        weights = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
        seen = {"pairs": self.pairs, "weights": weights, "steps": trainer.global_step}
        torch.save(seen, self.path)


class Late(Callback):
    """Keeps rank 1 waiting whenever a checkpoint is taken, before the data module is asked.

    Args:
        pause: Seconds.
    """

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def state_dict(self) -> dict[str, Any]:
        """Wait and return nothing."""
        time.sleep(self.pause * rank())
        return {}


def write_prompts(path: Path, opens: int, shut: int) -> Path:
    """Write so many prompts of each kind."""
    texts = [f"open {i}" for i in range(opens)] + [f"shut {i}" for i in range(shut)]
    path.write_text("\n".join(texts))
    return path


def spo(pipeline: str, prompts: Path, folder: Path, *, flow: bool = False) -> list[str]:
    """Return the arguments of an SPO run whose every open prompt is worth three pairs.

    A collection is 4 batches of 3 pairs, made of rounds of 2 prompts; there are 3 collections.

    Args:
        pipeline: Folder of a Stable Diffusion, or of a flow twin of the toy world.
        prompts: File of prompts.
        folder: Folder of the run.
        flow: Whether the pipeline is a flow, whose recipe is toy-flow-spo.
    """
    family = ["--backbone", "StableDiffusion", "--backbone.pretrained", pipeline]
    return [
        *("--config", "toy-flow-spo" if flow else "toy-spo"),
        *(flow_twin(pipeline) if flow else family),
        *("--backbone.lora.rank", "4"),
        *("--model.candidates", str(CANDIDATES), "--model.first", "0", "--model.threshold", "0"),
        *("--model.sampling.steps", str(DECISIONS), "--model.optimizer.lr", "1e-3"),
        *(
            "--model.judge",
            "tests.helpers.collecting.Picky",
            "--model.judge.folder",
            str(folder.parent),
        ),
        *("--data", "PromptCollections", "--data.prompts", "PromptFile"),
        *("--data.prompts.path", str(prompts), "--data.resolution", "32"),
        *("--data.batch_size", "3", "--data.batches", "4", "--data.round_size", "2"),
        *("--trainer.max_steps", "12", "--trainer.log_every_n_steps", "1", *OWN_COUNTS),
        *("--trainer.enable_progress_bar", "false"),
        *("--trainer.default_root_dir", str(folder)),
    ]


def pairs_of_rounds(path: Path) -> list[int]:
    """Return how many pairs every round of a rank was worth, out of its `judged-RANK.jsonl`."""
    calls = [len(json.loads(line)) // CANDIDATES for line in path.read_text().splitlines()]
    return [sum(calls[i : i + DECISIONS]) for i in range(0, len(calls), DECISIONS)]
