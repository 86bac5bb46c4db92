"""Judges that compare image and text in the space of a CLIP, such as PickScore."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lit_prefopt.judges.judge import Judge


class CLIPJudge(Judge):
    """Scores by exp(logit_scale) times the cosine of image and text, as CLIP itself does.

    Args:
        pretrained: Hub name or folder of a transformers CLIPModel.
        processor: Hub name or folder of its image processor and tokenizer; where not given, they
            lie beside the model.
        batch_size: Images scored at a time.
    """

    antialias = True
    """Whether images are smoothed as they shrink, as by the stock processor."""

    def __init__(self, pretrained: str, processor: str | None = None, batch_size: int = 16) -> None:
        self.pretrained, self.processor = pretrained, processor or pretrained
        self.batch_size = batch_size

    @cached_property
    def clip(self) -> CLIPModel:
        """The model, loaded when it is asked for first."""
        return CLIPModel.from_pretrained(self.pretrained).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Its tokenizer."""
        return CLIPTokenizer.from_pretrained(self.processor)

    @cached_property
    def look(self) -> CLIPImageProcessor:
        """Its image processor, read for its numbers alone: images are tensors here."""
        return CLIPImageProcessor.from_pretrained(self.processor)

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Timesteps (B,), for a model that is step-aware.
        """
        self.clip.to(images.device)
        size = self.batch_size
        steps = [None] * len(texts) if t is None else t.split(size)
        parts = zip(range(0, len(texts), size), images.split(size), steps, strict=False)
        return torch.cat([self._score(x, texts[i : i + size], s) for i, x, s in parts])

    def pixels(self, images: Tensor) -> Tensor:
        """Return what the vision tower sees of images (B, 3, H, W) in [-1, 1]: (B, 3, S, S)."""
        crop = self.look.crop_size
        side = crop["height"]
        scale = side / min(images.shape[-2:])
        size = [max(side, round(length * scale)) for length in images.shape[-2:]]
        unit = (images.float() + 1) / 2
        unit = F.interpolate(unit, size, mode="bicubic", antialias=self.antialias).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        unit = unit[..., top : top + side, left : left + side]
        mean, deviation = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (self.look.image_mean, self.look.image_std)
        )
        return (unit - mean) / deviation

    def image_features(self, images: Tensor, t: Tensor | None) -> Tensor:
        """Return the images' places in the common space, (B, D)."""
        return self.clip.get_image_features(self.pixels(images)).pooler_output

    def _score(self, images: Tensor, texts: Sequence[str], t: Tensor | None) -> Tensor:
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(images.device)
        text = self.clip.get_text_features(tokens).pooler_output
        image = self.image_features(images, t)
        return self.clip.logit_scale.exp() * F.cosine_similarity(image.float(), text.float())


class PickScore(CLIPJudge):
    """PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained on human choices.

    Args:
        pretrained: Hub name or folder of the model.
        processor: Hub name or folder of its image processor and tokenizer.
        batch_size: Images scored at a time.
    """

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        batch_size: int = 16,
    ) -> None:
        super().__init__(pretrained, processor, batch_size)
