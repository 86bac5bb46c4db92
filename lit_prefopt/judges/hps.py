"""HPSv2 and HPSv2.1 (arXiv 2306.09341): a CLIP ViT-H/14 trained on human preferences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from lit_prefopt.judges.clip import CLIPJudge, clip_loading_errors
from lit_prefopt.judges.pixels import normalize, pad_to_square
from lit_prefopt.judges.weights import fill, read_weights, version, weights_file

REPOSITORY = "xswu/HPSv2"
FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
IN_LAYER = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
)
AROUND = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}


class HPSv2(CLIPJudge):
    """HPSv2 (arXiv 2306.09341): 100 times the cosine of image and text in its own CLIP ViT-H/14.

    The published file has open_clip's layout and is converted to transformers' CLIPModel. As in the
    released code, images are resized by their longer side and padded with black, and the logit
    scale is not applied; the factor of 100 is that of the paper's tables (the code returns the
    cosine).

    Args:
        weights: The published .pt file, or a .safetensors file of its layout; by default
            downloaded from the hub.
        version: Version of the published weights; ignored with `weights`.
        pretrained: Hub name or folder of the CLIP that it was trained from, for its architecture,
            tokenizer and image processor; none of its weights are read.
        antialias: Antialias when downscaling, as the released code does with torchvision 0.17 and
            newer; with the version of its publication it did not.
        batch_size: Images scored at a time.
    """

    def __init__(
        self,
        weights: str | None = None,
        version: Literal["v2", "v2.1"] = "v2.1",
        pretrained: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        batch_size: int = 16,
    ) -> None:
        super().__init__(pretrained, None, batch_size)
        self.weights, self.version, self.antialias = weights, version, antialias

    @cached_property
    def clip(self) -> CLIPModel:
        """The model, loaded on first access."""
        file = weights_file(self.weights, REPOSITORY, FILES[self.version])
        with clip_loading_errors(self.pretrained, "CLIP"):
            config = CLIPConfig.from_pretrained(self.pretrained, trust_remote_code=False)
            model = CLIPModel(config)
        cure = "name the CLIP that it was trained from as `pretrained`"
        fill(model, from_open_clip(read_weights(file)), file, "a CLIP of this size", cure)
        return model.eval().requires_grad_(False)

    def versions(self) -> dict[str, str | None]:
        """Return the versions of the weights."""
        if self.weights is not None:
            return {self.weights: version(self.weights)}
        name = FILES[self.version]
        return {f"{REPOSITORY}/{name}": version(REPOSITORY, name)}

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocess images (B, 3, H, W) in [-1, 1] for the vision tower: (B, 3, S, S)."""
        square = pad_to_square(images, self.image_processor.crop_size["height"], self.antialias)
        return normalize(square, self.image_processor.image_mean, self.image_processor.image_std)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the scores of embeddings, (B,) float32.

        Args:
            image: (B, D).
            text: (B, D).
        """
        return 100 * F.cosine_similarity(image.float(), text.float())


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an open_clip CLIP's state dict to the keys of transformers' CLIPModel.

    Args:
        state: As open_clip stores them: fused queries, keys and values, and projections that are
            multiplied from the right. Unknown names are kept unchanged.
    """
    mapped: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = LAYER.fullmatch(name)
        if layer is not None:
            tower = "vision_model" if layer[1] else "text_model"
            mapped |= _layer(f"{tower}.encoder.layers.{layer[2]}.", layer[3], value)
        elif name in TRANSPOSED:
            mapped[TRANSPOSED[name]] = value.T
        elif not name.endswith("attn_mask"):  # a constant that old versions stored
            mapped[AROUND.get(name, name)] = value
    return mapped


def _layer(place: str, name: str, value: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"{place}self_attn.{part}_proj.{kind}": some
            for part, some in zip("qkv", value.chunk(3), strict=True)
        }
    for old, new in IN_LAYER:
        name = name.replace(old, new)
    return {place + name: value}
