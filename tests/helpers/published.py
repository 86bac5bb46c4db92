"""Made-up weights in published layouts, and the small folders that go with them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

from tests.helpers.tiny import tiny_text_config, tiny_tokenizer

WIDE = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}


def small_clip_config(folder: Path, act: str = "gelu") -> Path:
    """Write all of a CLIP of open_clip's proportions but its weights, for 32 x 32 pixels."""
    tokenizer = tiny_tokenizer(folder)
    look = {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "hidden_act": act}
    vision = CLIPVisionConfig(**WIDE, **look)
    text = tiny_text_config(tokenizer, intermediate_size=128, hidden_act=act)
    CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def open_clip_model(act: str = "gelu") -> Any:
    """Return open_clip's own CLIP with random weights, of the size of `small_clip_config`.

    open_clip wants torchvision for what a CLIP does not do: it is imported without its transforms,
    and where there is no torchvision, without the frozen batch norms of its ResNets.
    """
    found = find_spec("open_clip")
    if found is None:
        pytest.skip("open_clip_torch is not installed")
    package = ModuleType("open_clip")
    package.__path__ = list(found.submodule_search_locations or [])
    borrowed = {"open_clip": package}
    if find_spec("torchvision") is None:
        misc: Any = ModuleType("torchvision.ops.misc")
        misc.FrozenBatchNorm2d = torch.nn.BatchNorm2d
        borrowed |= {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
        borrowed["torchvision.ops.misc"] = misc
    with pytest.MonkeyPatch.context() as patch:
        for name, module in borrowed.items():
            patch.setitem(sys.modules, name, module)
        from open_clip.model import CLIP
    for name in [name for name in sys.modules if name.startswith("open_clip")]:
        del sys.modules[name]  # a half of it is nobody else's
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 514, "width": 32, "heads": 2, "layers": 2}
    model = CLIP(24, vision, text, quick_gelu=act == "quick_gelu").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they begin at 0, which would hide a mistake
                parameter.normal_(std=0.1)
    return model


def open_clip_weights() -> dict[str, Tensor]:
    """Return random weights of the published names and shapes, of that size."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (16, 32),
        "token_embedding.weight": (514, 32),
        "text_projection": (32, 24),
        "ln_final.weight": (32,),
        "ln_final.bias": (32,),
        "visual.class_embedding": (32,),
        "visual.conv1.weight": (32, 3, 8, 8),
        "visual.positional_embedding": (17, 32),
        "visual.proj": (32, 24),
    }
    shapes |= {f"visual.ln_{n}.{k}": (32,) for n in ("pre", "post") for k in ("weight", "bias")}
    layer = {
        "attn.in_proj_weight": (96, 32),
        "attn.in_proj_bias": (96,),
        "attn.out_proj.weight": (32, 32),
        "attn.out_proj.bias": (32,),
        "mlp.c_fc.weight": (128, 32),
        "mlp.c_fc.bias": (128,),
        "mlp.c_proj.weight": (32, 128),
        "mlp.c_proj.bias": (32,),
    } | {f"ln_{n}.{kind}": (32,) for n in (1, 2) for kind in ("weight", "bias")}
    for tower in ("", "visual."):
        for n in range(2):
            place = f"{tower}transformer.resblocks.{n}."
            shapes |= {place + name: shape for name, shape in layer.items()}
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def head_weights(width: int, prefix: str = "") -> dict[str, Tensor]:
    """Return random weights of the head that the aesthetic predictor and ImageReward share."""
    state = {}
    widths = (width, 1024, 128, 64, 16, 1)
    for number, before, after in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"{prefix}layers.{number}.weight"] = torch.randn(after, before) / before**0.5
        state[f"{prefix}layers.{number}.bias"] = torch.randn(after) * 0.1
    return state


VISION, TEXT, HIDDEN, PATCH, WORDS = 128, 128, 192, 16, 40


def image_reward_weights() -> dict[str, Tensor]:
    """Return random weights of ImageReward's published names, two layers, 32 x 32 pixels."""
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape) * (0.3 if name.endswith("bias") else shape[-1] ** -0.5)

    def linear(name: str, before: int, after: int) -> None:
        put(f"{name}.weight", after, before)
        put(f"{name}.bias", after)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width) * 0.1
        state[f"{name}.bias"] = torch.randn(width) * 0.1

    image, text = "blip.visual_encoder", "blip.text_encoder"
    put(f"{image}.cls_token", 1, 1, VISION)
    put(f"{image}.pos_embed", 1, 5, VISION)
    put(f"{image}.patch_embed.proj.weight", VISION, 3, PATCH, PATCH)
    put(f"{image}.patch_embed.proj.bias", VISION)
    norm(f"{image}.norm", VISION)
    put(f"{text}.embeddings.word_embeddings.weight", WORDS, TEXT)
    put(f"{text}.embeddings.position_embeddings.weight", 24, TEXT)
    state[f"{text}.embeddings.position_ids"] = torch.arange(24)[None]
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for n in range(2):
        block = f"{image}.blocks.{n}"
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.attn.qkv", VISION, 3 * VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        linear(f"{block}.mlp.fc1", VISION, 2 * VISION)
        linear(f"{block}.mlp.fc2", 2 * VISION, VISION)
        layer = f"{text}.encoder.layer.{n}"
        for kind, seen in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}.{kind}.self.key", seen, TEXT)
            linear(f"{layer}.{kind}.self.value", seen, TEXT)
            linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", VISION, 256)
    linear("blip.text_proj", TEXT, 256)
    return state | head_weights(TEXT, "mlp.")


LAYER = {
    "layer_norm1.bias": (32,),
    "layer_norm1.weight": (32,),
    "layer_norm2.bias": (32,),
    "layer_norm2.weight": (32,),
    "mlp.fc1.bias": (64,),
    "mlp.fc1.weight": (64, 32),
    "mlp.fc2.bias": (32,),
    "mlp.fc2.weight": (32, 64),
} | {
    f"self_attn.{name}_proj.{kind}": shape
    for name in ("k", "out", "q", "v")
    for kind, shape in (("bias", (32,)), ("weight", (32, 32)))
}

OTHERS = {
    "logit_scale": (),
    "t_embedder.mlp.0.bias": (32,),
    "t_embedder.mlp.0.weight": (32, 256),
    "t_embedder.mlp.2.bias": (32,),
    "t_embedder.mlp.2.weight": (32, 32),
    "text_model.embeddings.position_embedding.weight": (16, 32),
    "text_model.embeddings.token_embedding.weight": (514, 32),
    "text_model.final_layer_norm.bias": (32,),
    "text_model.final_layer_norm.weight": (32,),
    "text_projection.weight": (24, 32),
    "vision_model.adaLN_modulation.1.bias": (64,),
    "vision_model.adaLN_modulation.1.weight": (64, 32),
    "vision_model.embeddings.class_embedding": (32,),
    "vision_model.embeddings.patch_embedding.weight": (32, 3, 8, 8),
    "vision_model.embeddings.position_embedding.weight": (17, 32),
    "vision_model.post_layernorm.bias": (32,),
    "vision_model.post_layernorm.weight": (32,),
    "vision_model.pre_layrnorm.bias": (32,),
    "vision_model.pre_layrnorm.weight": (32,),
    "visual_projection.weight": (24, 32),
}


def _published() -> dict[str, torch.Tensor]:
    shapes = dict(OTHERS)
    for n in range(2):
        for name, shape in LAYER.items():
            shapes[f"text_model.encoder.layers.{n}.{name}"] = shape
            shapes[f"vision_model.encoder.layers.{n}.{name}"] = shape
        shapes[f"vision_model.encoder.layers.{n}.adaLN_modulation.1.bias"] = (192,)
        shapes[f"vision_model.encoder.layers.{n}.adaLN_modulation.1.weight"] = (192, 32)
    return {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}
