"""What generators of pairs share: prompts in groups, and how their images are sampled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from lit_prefopt.backbones import Backbone
from lit_prefopt.data.shards.writer import ShardWriter, Side
from lit_prefopt.datamodules.generation import GenerationDataModule, GenerationGroup, ShardGroups
from lit_prefopt.generate.producer import Producer
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.fingerprint import fingerprint


class GeneratedPair(NamedTuple):
    """One pair that was made."""

    place: int  # of its prompt in the list of prompts
    prompt: str
    chosen: Side  # decoded, or encoded as png, jpg or webp
    rejected: Side
    meta: Mapping[str, Any] = {}  # goes to the sample's .json
    mask: Side | None = None  # white where the two sides are meant to differ

    def write_to(self, writer: ShardWriter) -> None:
        """Write it into a shard."""
        meta = {**self.meta, "prompt_index": self.place}
        writer.add(self.prompt, self.chosen, self.rejected, meta, self.mask)


class Generator(Producer):
    """Makes pairs for prompts, as shards; `lit-prefopt predict` runs it, on one device or many.

    A group of prompts is generated whole, from seeds of its own, so a run that was stopped makes
    only what is missing, in the same batches as before, and ends with the same bytes.

    Args:
        backbone: Makes the images; given as the recipe's own key `backbone`.
        output: Folder of pair shards to be made.
        sampling: How images are sampled; the backbone's own settings where not given.
    """

    REFUSES: ClassVar[tuple[type[GenerationDataModule], ...]] = (ShardGroups,)

    def __init__(self, backbone: Backbone, output: str, sampling: Sampling | None = None) -> None:
        super().__init__(backbone, output)
        backbone.freeze()
        self.sampling = sampling or backbone.sampling

    @abstractmethod
    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        """Return the pairs of a group, any number for each prompt, in the order of the prompts.

        What is left out on the way is counted by name in `left_out`.

        Args:
            group: B prompts.
        """

    def model_settings(self) -> dict[str, Any]:
        """Return how images are sampled, and by which weights."""
        return {
            "sampling": {k: v for k, v in vars(self.sampling).items() if v is not None},
            "weights": fingerprint(self.backbone),
        }

    def setup(self, stage: str | None = None) -> None:
        """Look at what is there already, before anything is made."""
        self.backbone.require_encoders(f"{type(self).__name__}, which samples images,")
        super().setup(stage)
