"""LAION aesthetic predictor: score the beauty of an image without its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from lit_prefopt.judges.clip import CLIPJudge
from lit_prefopt.judges.linear_head import LinearHead
from lit_prefopt.judges.weights import fill, read_weights, version, weights_file

REPOSITORY, NAME = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


class Aesthetic(CLIPJudge):
    """LAION's aesthetic predictor V2: linear layers over the direction of CLIP's image features.

    Scores are between about 1 and 10. Prompts are ignored.

    Args:
        weights: The published sac+logos+ava1-l14-linearMSE.pth, or a .safetensors file of its
            layout; by default downloaded from the hub.
        pretrained: Hub name or folder of its CLIP, OpenAI's ViT-L/14.
        processor: Hub name or folder of the CLIP's image processor; by default `pretrained`.
        batch_size: Images scored at a time.
    """

    crop = "torchvision"

    def __init__(
        self,
        weights: str | None = None,
        pretrained: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(pretrained, processor, batch_size)
        self.weights = weights

    @cached_property
    def head(self) -> LinearHead:
        """The linear layers, loaded on first access."""
        file = weights_file(self.weights, REPOSITORY, NAME)
        head = LinearHead(self.clip.config.projection_dim)
        cure = "name the CLIP that it was trained with as `pretrained`"
        fill(head, read_weights(file), file, "an aesthetic predictor of this CLIP", cure)
        return head.eval().requires_grad_(False)

    def prepare(self) -> None:
        """Load the CLIP, its image processor and the linear layers."""
        _ = self.clip, self.image_processor, self.head

    def versions(self) -> dict[str, str | None]:
        """Return the versions of the weights."""
        if self.weights is not None:
            return super().versions() | {self.weights: version(self.weights)}
        return super().versions() | {f"{REPOSITORY}/{NAME}": version(REPOSITORY, NAME)}

    def _score(self, images: Tensor, texts: Sequence[str], t: Tensor | None) -> Tensor:
        features = F.normalize(self.image_features(images, t).float(), dim=-1)
        return self.head.to(images.device)(features)
