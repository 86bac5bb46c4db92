"""What every generator shares: groups made whole or not at all, joined into shards at the end."""

from __future__ import annotations

import hashlib
import signal
import threading
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_prefopt.backbones import Backbone, check_backbone
from lit_prefopt.data.groups import Group, Groups
from lit_prefopt.data.writer import Side
from lit_prefopt.diffusion.settings import Sampling
from lit_prefopt.errors import InputError
from lit_prefopt.generate.parts import Parts


class Made(NamedTuple):
    """One pair that was made."""

    place: int  # of its prompt in the list of prompts
    prompt: str
    chosen: Side  # decoded, or encoded as png, jpg or webp
    rejected: Side
    meta: Mapping[str, Any] = {}  # goes to the sample's .json
    mask: Side | None = None  # white where the two sides are meant to differ


class Generator(LightningModule):
    """Makes pairs for prompts; `lit-prefopt predict` runs it, on one device or many.

    A group of prompts is generated whole and kept as a folder of shards of its own in OUTPUT.parts,
    so a run that was stopped makes only what is missing, in the same batches as before, and ends
    with the same bytes. At the end all parts are joined, in the order of the prompts.

    Args:
        backbone: Makes the images; given as the recipe's own key `backbone`.
        output: Folder of pair shards to be made.
        sampling: How images are sampled; the backbone's own settings where not given.
    """

    def __init__(self, backbone: Backbone, output: str, sampling: Sampling | None = None) -> None:
        super().__init__()
        check_backbone(backbone)
        backbone.freeze()
        self.backbone = backbone
        self.sampling = sampling or backbone.sampling
        self.output = Path(output)
        self.left_out: Counter[str] = Counter()  # of the group that is being made

    @abstractmethod
    def make(self, group: Group) -> list[Made]:
        """Return the pairs of a group, any number for each prompt, in the order of the prompts.

        What is left out on the way is counted by name in `left_out`.

        Args:
            group: B prompts.
        """

    def facts(self) -> dict[str, Any]:
        """Return what decides, beside weights, prompts and sampling, what is made."""
        return {}

    def setup(self, stage: str | None = None) -> None:
        """Look at what is there already, before anything is made."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Groups):
            raise InputError(
                f"{type(self).__name__} wants prompts in groups: give `--data PromptGroups` or "
                "`--data PairGroups`."
            )
        facts = {
            "generator": type(self).__name__,
            **data.facts(),
            "sampling": {k: v for k, v in vars(self.sampling).items() if v is not None},
            "weights": fingerprint(self.backbone),
            **self.facts(),
        }
        self.parts = Parts(self.output, facts, data.groups)
        self.parts.check()

    def on_predict_start(self) -> None:
        """Say what is left to do; all ranks have looked before one of them writes."""
        # what is made lies in shards; there is nothing to return
        warnings.filterwarnings("ignore", "predict returned None")
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler is for trainings; here all that is done is on the disk
            signal.signal(signal.SIGTERM, _leave)
        self.trainer.strategy.barrier()
        self.parts.begin()
        missing = self.parts.missing()
        if self.parts.complete:
            rank_zero_info(f"{self.output} is complete: nothing is left to generate.")
        elif missing < self.parts.count:
            rank_zero_info(f"{missing} of {self.parts.count} groups are left to generate.")

    def predict_step(self, group: Group, batch_idx: int) -> None:
        """Make a group, unless it has been made."""
        if self.parts.complete or self.parts.has(group.number):
            return
        self.left_out.clear()
        made = self.make(group) if group.texts else []
        self.parts.write(group.number, made, self.left_out)

    def on_predict_end(self) -> None:
        """Join what was made (rank zero), and say what was left out."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero and not self.parts.complete:
            self._join()
        self.trainer.strategy.barrier()

    def _join(self) -> None:
        missing = self.parts.missing()
        if missing:  # the Trainer was given a limit
            rank_zero_info(f"{missing} groups are left: the same command goes on with them.")
            return
        counts = self.parts.join()
        told = "".join(f", {count} {name}" for name, count in sorted(counts.items()))
        rank_zero_info(f"Pairs: {self.output}{told}")


def _leave(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def fingerprint(net: nn.Module) -> str:
    """Return a short text that two networks share only if they have the same weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
