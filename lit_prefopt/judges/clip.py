"""Judges that compare image and text embeddings of a CLIP, such as PickScore."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lit_prefopt.judges.judge import Judge
from lit_prefopt.judges.pixels import Crop, center_crop, normalize
from lit_prefopt.judges.weights import loading_errors, version
from lit_prefopt.utils.transfer import to_device
from lit_prefopt.weights.checks import check_weights


class CLIPJudge(Judge):
    """Scores by exp(logit_scale) times the cosine of image and text, as CLIP itself does.

    Args:
        pretrained: Hub name or folder of a transformers CLIPModel.
        processor: Hub name or folder of its image processor and tokenizer; by default
            `pretrained`.
        batch_size: Images scored at a time.
    """

    crop: Crop = "transformers"
    """Preprocessing that images get: that of the published judge."""

    def __init__(self, pretrained: str, processor: str | None = None, batch_size: int = 16) -> None:
        self.pretrained, self.processor = pretrained, processor or pretrained
        self.batch_size = batch_size

    @cached_property
    def clip(self) -> CLIPModel:
        """The model, loaded on first access."""
        return load_clip(self.pretrained).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Its tokenizer."""
        with clip_loading_errors(self.processor, "tokenizer"):
            tokenizer = CLIPTokenizer.from_pretrained(self.processor, trust_remote_code=False)
            # transformers falls back to an empty one
            if len(tokenizer) <= len(tokenizer.all_special_ids):
                raise ValueError("its vocabulary is empty")
        return tokenizer

    @cached_property
    def image_processor(self) -> CLIPImageProcessor:
        """Its image processor, of which only the settings are used: images are tensors here."""
        with clip_loading_errors(self.processor, "image processor"):
            return CLIPImageProcessor.from_pretrained(self.processor, trust_remote_code=False)

    def prepare(self) -> None:
        """Load the model, its tokenizer and its image processor."""
        _ = self.clip, self.tokenizer, self.image_processor

    def versions(self) -> dict[str, str | None]:
        """Return the versions of the weights."""
        return {self.pretrained: version(self.pretrained)}

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Timesteps (B,), for a step-aware model.
        """
        self.clip.to(images.device)
        size = self.batch_size
        steps = [None] * len(texts) if t is None else t.split(size)
        parts = zip(range(0, len(texts), size), images.split(size), steps, strict=False)
        return torch.cat([self._score(x, texts[i : i + size], s) for i, x, s in parts])

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocess images (B, 3, H, W) in [-1, 1] for the vision tower: (B, 3, S, S)."""
        square = center_crop(images, self.image_processor.crop_size["height"], self.crop)
        return normalize(square, self.image_processor.image_mean, self.image_processor.image_std)

    def image_features(self, images: Tensor, t: Tensor | None) -> Tensor:
        """Return the image embeddings, (B, D)."""
        return self.clip.get_image_features(self.pixels(images)).pooler_output

    def text_features(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Return the text embeddings, (B, D)."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        )
        return self.clip.get_text_features(to_device(tokens.input_ids, device)).pooler_output

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the scores of embeddings, (B,) float32.

        Args:
            image: (B, D).
            text: (B, D).
        """
        return self.clip.logit_scale.exp() * F.cosine_similarity(image.float(), text.float())

    def _score(self, images: Tensor, texts: Sequence[str], t: Tensor | None) -> Tensor:
        text = self.text_features(texts, images.device)
        return self.logits(self.image_features(images, t), text)


class PickScore(CLIPJudge):
    """PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained on human preferences.

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


class CLIPScore(CLIPJudge):
    """CLIPScore (arXiv 2104.08718) as in torchmetrics: 100 max(cosine, 0), here per image.

    torchmetrics' own metric and function return only means, and move images through the CPU.

    Args:
        pretrained: Hub name or folder of a transformers CLIPModel; scores of different models
            are not comparable.
        processor: Hub name or folder of its image processor and tokenizer; by default
            `pretrained`.
        batch_size: Images scored at a time.
    """

    def __init__(
        self,
        pretrained: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(pretrained, processor, batch_size)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the scores of embeddings, (B,) float32 in [0, 100].

        Args:
            image: (B, D).
            text: (B, D).
        """
        return 100 * F.cosine_similarity(image.float(), text.float()).clamp(min=0)


def load_clip(pretrained: str) -> CLIPModel:
    """Load a CLIP with both towers.

    Args:
        pretrained: Hub name or folder of a transformers CLIPModel.

    Raises:
        InputError: It does not exist or is incomplete.
    """
    with clip_loading_errors(pretrained, "CLIP"):
        model, found = CLIPModel.from_pretrained(
            pretrained, output_loading_info=True, trust_remote_code=False
        )
        if found["missing_keys"]:
            raise ValueError(f"it lacks {min(found['missing_keys'])}")
    check_weights(model, pretrained)
    return model


def clip_loading_errors(source: str, name: str) -> AbstractContextManager[None]:
    """Raise InputError for transformers' errors in loading a CLIP."""
    return loading_errors(
        source,
        name,
        "name the folder or hub name of a transformers CLIPModel and its processor; train the toy "
        "world's own, runs/toy/clip, with `lit-prefopt fit --config configs/toy/clip.yaml`",
    )
