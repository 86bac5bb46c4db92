"""ImageReward (arXiv 2304.05977): a BLIP reward model with cross-attention to the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from lit_prefopt.errors import InputError
from lit_prefopt.judges.judge import Judge
from lit_prefopt.judges.linear_head import LinearHead
from lit_prefopt.judges.pixels import center_crop, normalize
from lit_prefopt.judges.weights import fill, loading_errors, read_weights, version, weights_file
from lit_prefopt.utils.transfer import to_device

REPOSITORY, NAME = "THUDM/ImageReward", "ImageReward.pt"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the scores, as released
TOKENS = 35  # of a prompt, as released
HEAD = 64  # width of an attention head, in ViT-L/16 as in BERT-base
TEXT, IMAGE, LAST = "blip.text_encoder.", "blip.visual_encoder.", "mlp."
IN_TOWER = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


class RewardBLIP(nn.Module):
    """BLIP's vision tower, its text encoder with cross-attention, and the reward head.

    Args:
        vision: Configuration of the vision tower.
        text: Configuration of the text encoder.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearHead(text.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the scores, (B,).

        Args:
            pixels: (B, 3, S, S), normalised.
            tokens: (B, N) int64.
            mask: (B, N), 1 for tokens and 0 for padding.
        """
        seen = self.vision(pixels).last_hidden_state
        # no mask for the image, and bidirectional attention in the text
        encoded = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        )
        return (self.head(encoded.last_hidden_state[:, 0].float()) - MEAN) / DEVIATION


class ImageReward(Judge):
    """ImageReward v1.0 (arXiv 2304.05977): about zero mean and unit deviation on its own images.

    The published file is converted to transformers' BLIP; prompts are truncated to 35 tokens, as
    in the released code.

    Args:
        weights: The published ImageReward.pt, or a .safetensors file of its layout; by default
            downloaded from the hub.
        tokenizer: Hub name or folder of BERT's tokenizer.
        batch_size: Images scored at a time.
    """

    def __init__(
        self,
        weights: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        batch_size: int = 16,
    ) -> None:
        self.weights, self.tokenizer, self.batch_size = weights, tokenizer, batch_size

    @cached_property
    def network(self) -> RewardBLIP:
        """The model, loaded on first access."""
        file = weights_file(self.weights, REPOSITORY, NAME)
        state = read_weights(file)
        cure = f"name {NAME} of huggingface.co/{REPOSITORY}"
        try:
            network = RewardBLIP(*sizes(state))
        except (KeyError, ZeroDivisionError, ValueError) as error:
            raise InputError(f"{file} is not ImageReward (without {error}): {cure}.") from error
        fill(network, from_blip(state), file, "an ImageReward", cure)
        return network.eval().requires_grad_(False)

    @cached_property
    def bert_tokenizer(self) -> BertTokenizer:
        """Its tokenizer."""
        with loading_errors(
            self.tokenizer, "tokenizer", "name the folder or hub name of BERT's own"
        ):
            words = BertTokenizer.from_pretrained(self.tokenizer, trust_remote_code=False)
            known, most = len(words), self.network.text.config.vocab_size
            if not len(words.all_special_ids) < known <= most:
                raise ValueError(f"it has {known} tokens, and the model {most}")
        return words

    def prepare(self) -> None:
        """Load the model and its tokenizer."""
        _ = self.network, self.bert_tokenizer

    def versions(self) -> dict[str, str | None]:
        """Return the versions of the weights."""
        if self.weights is not None:
            return {self.weights: version(self.weights)}
        return {f"{REPOSITORY}/{NAME}": version(REPOSITORY, NAME)}

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return one score per image, (B,) float32.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Ignored.
        """
        network, size = self.network.to(images.device), self.batch_size
        side, longest = (
            network.vision.config.image_size,
            network.text.config.max_position_embeddings,
        )
        tokens = self.bert_tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=min(TOKENS, longest),
            return_tensors="pt",
        )
        ids, mask = (to_device(x, images.device) for x in (tokens.input_ids, tokens.attention_mask))
        parts = zip(images.split(size), ids.split(size), mask.split(size), strict=True)
        return torch.cat(
            [network(normalize(center_crop(x, side, "torchvision")), *some) for x, *some in parts]
        )


def sizes(state: Mapping[str, Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Return the configurations of both towers, derived from the shapes of published weights.

    Args:
        state: The weights by their published names.

    Raises:
        KeyError: They have another layout.
    """
    width, _, patch, _ = state[f"{IMAGE}patch_embed.proj.weight"].shape
    squares = state[f"{IMAGE}pos_embed"].shape[1] - 1
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state[f"{IMAGE}blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=_layers(state, f"{IMAGE}blocks."),
        num_attention_heads=width // HEAD,
        image_size=patch * math.isqrt(squares),
        patch_size=patch,
        layer_norm_eps=1e-6,  # of BLIP's own tower; transformers' default differs
    )
    vocabulary, hidden = state[f"{TEXT}embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=len(state[f"{TEXT}encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=_layers(state, f"{TEXT}encoder.layer."),
        num_attention_heads=hidden // HEAD,
        max_position_embeddings=len(state[f"{TEXT}embeddings.position_embeddings.weight"]),
    )
    return vision, text


def from_blip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert published weights to the keys of `RewardBLIP`.

    Args:
        state: The weights by their published names; those of BLIP's own training heads, which do
            not affect scores, are dropped.
    """
    mapped: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(IMAGE):
            name = name.removeprefix(IMAGE)
            if name.startswith("norm."):
                name = f"post_layernorm.{name.removeprefix('norm.')}"
            for old, new in IN_TOWER:
                name = name.replace(old, new)
            mapped[f"vision.{name}"] = value
        elif name.startswith(TEXT) and not name.endswith("position_ids"):
            mapped[f"text.{name.removeprefix(TEXT)}"] = value
        elif name.startswith(LAST):
            mapped[f"head.{name.removeprefix(LAST)}"] = value
    return mapped


def _layers(state: Mapping[str, Tensor], place: str) -> int:
    """Return the number of numbered layers with a prefix."""
    numbers = {name.removeprefix(place).split(".")[0] for name in state if name.startswith(place)}
    return len(numbers)
