"""Base class of pair generators: prompts in groups, sampler settings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from lit_prefopt.backbones import Backbone
from lit_prefopt.data.shards.writer import ShardWriter, Side
from lit_prefopt.datamodules.generation import GenerationDataModule, GenerationGroup, ShardGroups
from lit_prefopt.diffusion.sampling import check_sampling
from lit_prefopt.export.negative import attach_negative
from lit_prefopt.generate.producer import Producer
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.fingerprint import fingerprint


class GeneratedPair(NamedTuple):
    """One generated pair."""

    place: int  # of its prompt in the list of prompts
    prompt: str
    chosen: Side  # decoded, or encoded as png, jpg or webp
    rejected: Side
    meta: Mapping[str, Any] = {}  # goes to the sample's .json
    mask: Side | None = None  # white where the two sides should differ

    def write_to(self, writer: ShardWriter) -> None:
        """Write the pair into a shard."""
        meta = {**self.meta, "prompt_index": self.place}
        writer.add(self.prompt, self.chosen, self.rejected, meta, self.mask)


class Generator(Producer):
    """Generates pairs for prompts, as shards; run by `lit-prefopt predict` on one device or many.

    A group of prompts is generated atomically, with seeds of its own: a resumed run generates only
    the missing groups, in the same batches, and the output is identical byte for byte.

    Args:
        backbone: The model that is sampled; given as the recipe's own key `backbone`.
        output: Output folder of pair shards.
        sampling: Sampler settings; the backbone's own by default.
        negative: LoRA file, denoiser's folder, checkpoint or run of a negative model
            (`--model.swapped true`), whose prediction takes the place of the one without prompt in
            guidance.
        negative_merge: 0 adds the negative model to the weights that are sampled, 1 to the base.
    """

    REFUSES: ClassVar[tuple[type[GenerationDataModule], ...]] = (ShardGroups,)

    def __init__(
        self,
        backbone: Backbone,
        output: str,
        sampling: Sampling | None = None,
        negative: str | None = None,
        negative_merge: float = 0.0,
    ) -> None:
        super().__init__(backbone, output)
        backbone.require_denoiser(type(self).__name__)
        backbone.freeze()
        if negative is not None:
            attach_negative(backbone, negative, negative_merge)
        self.sampling = sampling or backbone.sampling

    @abstractmethod
    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        """Return the pairs of a group, any number for each prompt, in the order of the prompts.

        Skipped pairs are counted by reason in `left_out`.

        Args:
            group: B prompts.
        """

    def model_settings(self) -> dict[str, Any]:
        """Return the sampler settings and the weights' identity."""
        return {
            "sampling": {k: v for k, v in vars(self.sampling).items() if v is not None},
            "weights": fingerprint(self.backbone),
        }

    def setup(self, stage: str | None = None) -> None:
        """Check an existing output before generating."""
        self.backbone.require_encoders(f"{type(self).__name__}, which samples images,")
        check_sampling(self.backbone, self.sampling)
        super().setup(stage)
